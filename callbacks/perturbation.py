"""The contract of every technique: *perturb, step, restore*.

One training step, with everything a technique may rely on::

    on_train_batch_start   every active Perturbation: perturb(module, batch)    in the order of SITES, then list order
    training_step          the recipe's forward and loss see the perturbed batch, features, weights, ...
    backward
    on_after_backward      every active Perturbation: restore(module)           last in, first out; then the
                           batch gets its entries back
    optimizer.step         a plain update from the perturbed gradient

What a technique gets from here and need not write again: the schedule (``every_n_steps``, ``start_epoch``,
``probability``), random draws that resume exactly, restoring in the right order and also when the step fails, and a
place for its own tensors (``module.perturbations[name]``) that checkpoints, optimizers and DDP know.

Draws are *counter-based*: a generator is seeded from (seed, name, epoch, batch, purpose[, rank]), so nothing has to be
stored for a run to resume exactly, and a run resumes exactly on every rank. Draw in :meth:`Perturbation.perturb`, not
in the forward pass: then every forward of that step (crafting, recomputation by activation checkpointing) sees the
same perturbation.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

log = logging.getLogger(__name__)

Batch = MutableMapping[str, Any]
PREFIX = "perturbations"
#: The order in which sites are perturbed in one step: an adversarial input is crafted on the features and weights of
#: the untouched network, a weight perturbation sees the batch that the step will see. Restored in reverse.
SITES = ("data", "input", "features", "attention", "skips", "weights")


def fold_seed(*keys: object) -> int:
    """A seed in [0, 2**63) from any keys with a stable ``str``: the same keys give the same seed on every machine."""
    digest = hashlib.blake2b("/".join(map(str, keys)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def run_seed() -> int:
    """The seed of ``seed_everything`` (0 if it was never called)."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def fill_rows(rows: Tensor, seeds: Iterable[int], kind: Literal["uniform", "normal"] = "normal") -> Tensor:
    """Fill each of the rows (B, ...) by a generator of its own, uniform in [0, 1) or standard normal.

    So what a row gets depends on its seed (and the kind of device) and not on the rows beside it.
    """
    generator = torch.Generator(device=rows.device)
    for row, seed in zip(rows, seeds, strict=True):
        generator.manual_seed(seed)
        row.uniform_(generator=generator) if kind == "uniform" else row.normal_(generator=generator)
    return rows


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are. Lightning's ``module.device`` names the GPU before they have been moved there."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def trained_weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of the network that are trained, techniques' own left out."""
    own = f"{PREFIX}."
    return [(n, p) for n, p in module.named_parameters() if p.requires_grad and not n.startswith(own)]


def batch_size(batch: Mapping[str, Any]) -> int:
    """Examples in a batch: the length of its first tensor."""
    for value in batch.values():
        if isinstance(value, Tensor):
            return value.shape[0]
    raise ValueError(f"the batch holds no tensor (entries: {', '.join(batch)})")


class Perturbation(Callback):
    """Something that is perturbed for exactly one training step.

    A technique subclasses this, says at which ``site`` it works and with which settings it does nothing (``zero``),
    and overrides :meth:`perturb`, :meth:`restore`, and :meth:`attach` where it hangs modules on the network.

    Args:
        every_n_steps: perturb only optimizer steps whose number is a multiple of this; all micro-batches of an
            accumulated step are treated alike.
        start_epoch: first epoch (from 0) in which it is active.
        probability: chance that it is active at a batch, in [0, 1]; decided alike on all ranks.
        seed: of its own draws; ``None``: the seed of the run.
        name: its place under ``module.perturbations`` and in checkpoints; the class name in snake case if omitted.
            Needed only where the same technique is used twice.

    Raises:
        ValueError: for a setting out of range.
    """

    #: One of SITES.
    site: ClassVar[str] = "input"
    #: Constructor arguments at which the technique is the identity (law 2).
    zero: ClassVar[Mapping[str, Any]] = {}
    #: Constructor arguments at which an example is perturbed without looking at the others of its batch; then two ranks
    #: give the update of one process exactly (law 4). None: there are none.
    per_example: ClassVar[Mapping[str, Any] | None] = None
    #: Whether it adds gradients of its own to the step's, on purpose, where they are accumulated (see FreeLB).
    adds_gradients: ClassVar[bool] = False
    #: Not weights' own: those refuse sharded ones, see callbacks/sharded.py.
    works_sharded: ClassVar[bool] = True
    #: Whether it is a part of the network, in training and evaluation alike, and no perturbation of single steps.
    part_of_network: ClassVar[bool] = False

    def __init__(
        self,
        *,
        every_n_steps: int = 1,
        start_epoch: int = 0,
        probability: float = 1.0,
        seed: int | None = None,
        name: str | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {every_n_steps}")
        if start_epoch < 0:
            raise ValueError(f"start_epoch must not be negative, but is {start_epoch}")
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must lie in [0, 1], not {probability}")
        if self.site not in SITES:
            raise ValueError(f"{type(self).__name__}.site must be one of {', '.join(SITES)}, not '{self.site}'")
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()
        self.name = name or snake
        if not self.name.isidentifier():
            raise ValueError(f"name must be letters, digits and '_', not '{self.name}'")
        self.every_n_steps = every_n_steps
        self.start_epoch = start_epoch
        self.probability = probability
        self.seed = seed
        self._step: tuple[int, int] = (0, 0)  # epoch and batch of the step in hand
        self._rank, self._world = 0, 1
        self._perturbed: list[Perturbation] = []  # used by the first technique of the trainer, which drives them all
        self._given: tuple[Batch, dict[str, Any]] | None = None  # the batch, and its entries before the step

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}.{self.name}"

    # ------------------------------------------------------------------ what a technique overrides

    def attach(self, module: LightningModule) -> None:
        """Hang modules on the network, before the optimizer is made; put them in ``own(module)``.

        Called at the start of each fit, validate, test and predict, before the module's own ``setup`` and
        ``configure_model``: a recipe builds its network in ``__init__``.
        """

    def detach(self, module: LightningModule) -> None:
        """Take the hooks off again; also called after an error, and then perhaps without :meth:`attach`."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        """Perturb the step that follows; entries of ``batch`` are replaced, never changed in place."""
        raise NotImplementedError(f"{type(self).__name__} must define perturb(module, batch)")

    def restore(self, module: LightningModule) -> None:
        """Undo :meth:`perturb`; called after the (first) backward pass, and when the step or :meth:`perturb` fails.

        So a technique keeps what it needs here before it changes anything.
        """

    def as_trained(self, module: LightningModule, batch: Batch) -> None:
        """Of a technique that stands for other *data* (labels, pixels of certain examples): what training sees of them.

        Entries of ``batch`` are replaced, as in :meth:`perturb`, by what depends on the examples alone (their
        ``index``). Diagnostics call it on the training examples that they look at.
        """

    # ------------------------------------------------------------------ what a technique calls

    def own(self, module: LightningModule) -> nn.ModuleDict:
        """``module.perturbations``: modules put there are in checkpoints, optimizers and DDP."""
        if not hasattr(module, PREFIX):
            module.add_module(PREFIX, nn.ModuleDict())
        return getattr(module, PREFIX)

    def generator(self, purpose: str, *, shared: bool = False, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator for this step's draws of one purpose: alike on all ranks if ``shared``, else one per rank."""
        seed = run_seed() if self.seed is None else self.seed
        keys = (seed, self.name, purpose, *self._step, *(() if shared else (self._rank,)))
        return torch.Generator(device=device).manual_seed(fold_seed(*keys))

    def normal(self, purpose: str, size: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers for the examples of this rank's batch, (size, *shape).

        They are what one process would draw for the same examples: row i of rank r is row ``i * ranks + r`` of the
        whole batch (which is how ``datamodules`` deals examples out). Every rank draws for all, so keep it to small
        shapes, and use :meth:`generator` for whole images.
        """
        generator = self.generator(purpose, shared=True, device=device)
        return torch.randn(size * self._world, *shape, generator=generator, device=device)[self._rank :: self._world]

    def uniform(self, purpose: str, size: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """The same as :meth:`normal`, uniform in [0, 1)."""
        generator = self.generator(purpose, shared=True, device=device)
        return torch.rand(size * self._world, *shape, generator=generator, device=device)[self._rank :: self._world]

    def rows(self, purpose: str, like: Tensor, kind: Literal["uniform", "normal"] = "uniform") -> Tensor:
        """Numbers of the shape (B, ...) of ``like``, float32, uniform in [0, 1) or standard normal.

        As :meth:`uniform` and :meth:`normal`, what one process would draw for the same examples; each is drawn from a
        generator of its own, so ranks don't draw for each other and whole images are no waste.
        """
        seeds = self.row_seeds(purpose, len(like))
        return fill_rows(torch.empty(like.shape, dtype=torch.float32, device=like.device), seeds, kind)

    def row_seeds(self, purpose: str, size: int) -> list[int]:
        """A seed for each example of this rank's batch, the one that it has in one process, too."""
        seed = run_seed() if self.seed is None else self.seed
        places = (i * self._world + self._rank for i in range(size))
        return [fold_seed(seed, self.name, purpose, *self._step, place) for place in places]

    # ------------------------------------------------------------------ the loop

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        techniques = techniques_of(trainer)
        if [c.name for c in techniques].count(self.name) > 1:
            raise ValueError(f"two techniques are named '{self.name}': give one of them another name=...")
        self._rank, self._world = trainer.global_rank, trainer.world_size
        accept_other_techniques(pl_module)
        self.attach(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.detach(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        match_optimizer_groups(pl_module, checkpoint)

    def active(self, trainer: Trainer) -> bool:
        """Whether the step in hand is perturbed; the same answer on all ranks."""
        if trainer.current_epoch < self.start_epoch or trainer.global_step % self.every_n_steps:
            return False
        if self.probability < 1.0:
            return torch.rand((), generator=self.generator("active", shared=True)).item() < self.probability
        return True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        techniques = techniques_of(trainer)
        if techniques[0] is not self:
            return
        if not isinstance(batch, MutableMapping):
            raise ValueError(f"{type(self).__name__} needs batches that are dicts, not {type(batch).__name__}")
        self._given = (batch, dict(batch))
        for technique in techniques:  # of all before any perturbs: an attack's loss may draw for another technique
            technique._step = (trainer.current_epoch, batch_idx)
        for technique in sorted(techniques, key=lambda c: SITES.index(c.site)):
            if technique.active(trainer):
                self._perturbed.append(technique)  # before: what fails halfway is restored too
                technique.perturb(pl_module, batch)

    def _restore_all(self, module: LightningModule) -> None:
        with ExitStack() as last_in_first_out:  # goes on with the others where one raises
            if self._given is not None:
                batch, entries = self._given
                last_in_first_out.callback(batch.update, entries)
                last_in_first_out.callback(batch.clear)
                self._given = None
            for technique in self._perturbed:
                last_in_first_out.callback(technique.restore, module)
            self._perturbed = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_all(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._restore_all(pl_module)  # a training_step that returned None had no backward pass

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_all(pl_module)  # a module whose on_train_batch_start returned -1 had no step at all

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_all(pl_module)
        self.detach(pl_module)  # Lightning calls no teardown after an error


def techniques_of(trainer: Trainer) -> list[Perturbation]:
    """The techniques of a trainer, in the order of its list."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it dynamically
    return [callback for callback in callbacks if isinstance(callback, Perturbation)]


# ---------------------------------------------------------------------- crafting

Mode = Literal["eval", "train", "train_frozen_bn"]


@contextmanager
def crafting(module: nn.Module, mode: Mode = "train_frozen_bn", *, parameters: bool = False) -> Iterator[None]:
    """Where a perturbation is crafted: forward passes that leave no trace on the network.

    Inside, take gradients with ``torch.autograd.grad`` on the tensor that is perturbed, never with ``backward()``
    (it leaks into the gradients of the parameters and, under DDP, is not synchronised).

    * ``eval``: every submodule in evaluation mode.
    * ``train``: modes as they are; batch norm normalises by the batch but its running statistics don't move.
    * ``train_frozen_bn``: modes as they are, except that batch norm normalises by its running statistics.

    Gradients are on, also within validation's inference mode (clone the tensors that come from there, labels too,
    before they enter the graph). Parameters take no gradient unless ``parameters``. The passes run in the trainer's
    mixed precision (a callback's hooks are outside of it), but not in fp16: small gradients would underflow. Train
    flags, gradient flags, buffers, ``.grad`` and torch's random state are afterwards as they were before; so the step
    that follows draws the dropout that it would have drawn, which is that of the first pass in here.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in ("eval", "train", "train_frozen_bn"):
        raise ValueError(f"crafting mode must be eval, train or train_frozen_bn, not '{mode}'")
    training = [(m, m.training) for m in module.modules()]
    tracking = [(m, m.track_running_stats) for m in module.modules() if isinstance(m, _BatchNorm)]
    needing = [p for p in module.parameters() if p.requires_grad]
    where = device_of(module)
    device = where.type
    moving = [] if mode == "eval" else [(b, b._version, b.clone()) for b in _unguarded_buffers(module)]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[where] if device == "cuda" else []))
        trainer = getattr(module, "_trainer", None)  # module.trainer raises where there is none
        precision = getattr(trainer, "precision_plugin", None)
        if isinstance(precision, MixedPrecision) and not torch.is_autocast_enabled(device):
            stack.enter_context(precision.forward_context())
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            stack.enter_context(torch.autocast(device, enabled=False))
        if mode == "eval" and any(isinstance(m, nn.RNNBase) for m, _ in training):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # its backward pass wants training mode
        try:
            if mode == "eval":
                for submodule, _ in training:
                    submodule.training = False
            else:
                for norm, _ in tracking:
                    if mode == "train":
                        norm.track_running_stats = False if norm.training else norm.track_running_stats
                    elif norm.running_mean is not None:
                        norm.training = False
            if not parameters:
                for parameter in needing:
                    parameter.requires_grad_(False)
            yield
        finally:
            for parameter in needing:
                parameter.requires_grad_(True)
            for norm, flag in tracking:
                norm.track_running_stats = flag
            for submodule, flag in training:
                submodule.training = flag
            with torch.no_grad():
                for buffer, version, kept in moving:
                    if buffer._version != version:  # only then: writing would spoil graphs that hold the buffer
                        buffer.copy_(kept)


def _unguarded_buffers(module: nn.Module) -> Iterator[Tensor]:
    """Buffers that a pass in training mode may move (spectral norm, instance norm, ...), except batch norm's."""
    for submodule in module.modules():
        if submodule.training and not isinstance(submodule, _BatchNorm):
            yield from (b for b in submodule.buffers(recurse=False) if not b.is_inference())


# ---------------------------------------------------------------------- optimizer and checkpoint


def parameter_groups(module: LightningModule, **options: Any) -> list[dict[str, Any]]:
    """Groups for the optimizer: the network with ``options``, then a group without weight decay per technique.

    What is frozen when the groups are made is in none of them.

    Groups carry a ``name`` (``model``, ``perturbations.<name>``) and the names of their ``parameters``, by which
    checkpoints with other techniques are read. A recipe may split the first group, if it keeps one named ``model``.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {"model": []}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        place = name.split(".")
        members.setdefault(f"{PREFIX}.{place[1]}" if place[0] == PREFIX else "model", []).append((name, parameter))
    return [
        {
            "params": [p for _, p in members[group]],
            "name": group,
            "parameters": [n for n, _ in members[group]],
            **options,
            **({} if group == "model" else {"weight_decay": 0.0}),
        }
        for group in ["model", *sorted(members.keys() - {"model"})]
    ]


def clip_groups(optimizer: Optimizer, value: float | None, algorithm: str | None = "norm") -> None:
    """Clip each group of the optimizer by itself, so that a reversed, scaled gradient can't starve the network's."""
    if not value:
        return
    for group in optimizer.param_groups:
        if algorithm == "value":
            nn.utils.clip_grad_value_(group["params"], value)
        else:
            nn.utils.clip_grad_norm_(group["params"], value)


def _fit_techniques(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: put aside the tensors of techniques that aren't here, keep the fresh ones of those that are."""
    here = {f"{prefix}{k}": v for k, v in module.state_dict().items() if k.startswith(f"{PREFIX}.")}
    saved = {k for k in state if k.startswith(f"{prefix}{PREFIX}.")}
    aside, fresh = sorted(saved - here.keys()), sorted(here.keys() - saved)
    for key in aside:
        del state[key]
    for key in fresh:
        state[key] = here[key]
    for keys, what in ((aside, "put aside: not part of this run"), (fresh, "starts fresh: not in the checkpoint")):
        names = sorted({k.removeprefix(f"{prefix}{PREFIX}.").split(".")[0] for k in keys})
        if names:
            log.info("%s of the checkpoint %s", ", ".join(f"{PREFIX}.{n}" for n in names), what)


def accept_other_techniques(module: nn.Module) -> None:
    """Let ``module`` load checkpoints that were trained with other techniques than it has now."""
    if _fit_techniques not in [getattr(h, "hook", h) for h in module._load_state_dict_pre_hooks.values()]:
        module.register_load_state_dict_pre_hook(_fit_techniques)


def match_optimizer_groups(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Rewrite the optimizer states of a checkpoint for the techniques of ``module`` (see :func:`parameter_groups`).

    Groups of the network stay as they are. Those of techniques are replaced by what ``module`` has; the state of each
    parameter goes with its name, and one that wasn't there starts fresh, with the settings of the group ``model``.
    States of optimizers that weren't made from :func:`parameter_groups` are left alone.
    """
    wanted = [g for g in parameter_groups(module) if g["name"] != "model"]
    for i, saved in enumerate(checkpoint.get("optimizer_states", ())):
        old = saved["param_groups"]
        place = {g.get("name"): j for j, g in enumerate(old)}
        if "model" not in place:
            continue
        number = {n: k for g in old for n, k in zip(g.get("parameters", ()), g["params"], strict=False)}
        source = [j for j, g in enumerate(old) if not str(g.get("name")).startswith(f"{PREFIX}.")]
        groups, numbers = [old[j] for j in source], [k for j in source for k in old[j]["params"]]
        for group in wanted:
            source.append(place.get(group["name"], place["model"]))
            fresh = {} if group["name"] in place else {"weight_decay": 0.0}
            groups.append({**old[source[-1]], **fresh, **{k: group[k] for k in ("name", "parameters", "params")}})
            numbers += [number.get(n, -1) for n in group["parameters"]]
        states, first = {k: saved["state"][n] for k, n in enumerate(numbers) if n in saved["state"]}, 0
        for j, group in enumerate(groups):
            groups[j] = {**group, "params": list(range(first, first := first + len(group["params"])))}
        checkpoint["optimizer_states"][i] = {**saved, "state": states, "param_groups": groups}
        for scheduler in checkpoint.get("lr_schedulers", ()):
            _match_scheduler(scheduler, len(old), source)


def _match_scheduler(state: dict[str, Any], groups: int, source: list[int]) -> None:
    """Reorder what a scheduler keeps per group of the optimizer, also within one that is made of several."""
    for key, value in state.items():
        if key == "_schedulers":
            for inner in value:
                _match_scheduler(inner, groups, source)
        elif key.endswith("lrs") or key in ("_last_lr", "lr_lambdas"):
            if isinstance(value, list) and len(value) == groups:
                state[key] = [value[j] for j in source]
