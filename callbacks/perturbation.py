"""The contract of every technique: *perturb, step, restore*.

One training step, with everything a technique may rely on::

    on_train_batch_start   every active Perturbation: perturb(module, batch)    in the order of SITES, then list order
    training_step          the recipe's forward and loss see the perturbed batch, features, weights, ...
    backward
    on_after_backward      every active Perturbation: restore(module)           last in, first out
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
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
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
    #: Whether an example is perturbed without looking at the others of its batch (then law 4 is exact, given the draws).
    per_example: ClassVar[bool] = False

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
        self._rank = 0
        self._perturbed: list[Perturbation] = []  # used by the first technique of the trainer, which drives them all

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}.{self.name}"

    # ------------------------------------------------------------------ what a technique overrides

    def attach(self, module: LightningModule) -> None:
        """Hang modules on the network, once, before the optimizer is made; put them in ``own(module)``."""

    def detach(self, module: LightningModule) -> None:
        """Take the hooks off again."""

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        """Perturb the step that follows; entries of ``batch`` are replaced, never changed in place."""
        raise NotImplementedError(f"{type(self).__name__} must define perturb(module, batch)")

    def restore(self, module: LightningModule) -> None:
        """Undo :meth:`perturb`; called after the backward pass, also when the step fails."""

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

    # ------------------------------------------------------------------ the loop

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        techniques = [c for c in trainer.callbacks if isinstance(c, Perturbation)]
        if [c.name for c in techniques].count(self.name) > 1:
            raise ValueError(f"two techniques are named '{self.name}': give one of them another name=...")
        self._rank = trainer.global_rank
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
        techniques = [c for c in trainer.callbacks if isinstance(c, Perturbation)]
        if techniques[0] is not self:
            return
        if not isinstance(batch, MutableMapping):
            raise ValueError(f"{type(self).__name__} needs batches that are dicts, not {type(batch).__name__}")
        for technique in sorted(techniques, key=lambda c: SITES.index(c.site)):
            technique._step = (trainer.current_epoch, batch_idx)
            if technique.active(trainer):
                technique.perturb(pl_module, batch)
                self._perturbed.append(technique)

    def _restore_all(self, module: LightningModule) -> None:
        while self._perturbed:
            self._perturbed.pop().restore(module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_all(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._restore_all(pl_module)  # a training_step that returned None had no backward pass

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_all(pl_module)


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

    Gradients are on, also within validation's inference mode (clone what comes from there before you ask for its
    gradient). Parameters take no gradient unless ``parameters``. fp16 autocast is off (small gradients would
    underflow); bf16 stays. Train flags, gradient flags, buffers and ``.grad`` are afterwards as they were before.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode not in ("eval", "train", "train_frozen_bn"):
        raise ValueError(f"crafting mode must be eval, train or train_frozen_bn, not '{mode}'")
    training = [(m, m.training) for m in module.modules()]
    tracking = [(m, m.track_running_stats) for m in module.modules() if isinstance(m, _NormBase)]
    needing = [p for p in module.parameters() if p.requires_grad]
    device = next((p.device.type for p in module.parameters()), "cpu")
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            stack.enter_context(torch.autocast(device, enabled=False))
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


# ---------------------------------------------------------------------- optimizer and checkpoint


def parameter_groups(module: LightningModule, **options: Any) -> list[dict[str, Any]]:
    """Groups for the optimizer: the network with ``options``, then a group without weight decay per technique.

    Groups carry a ``name`` (``model``, ``perturbations.<name>``), by which checkpoints with other techniques are read.
    """
    techniques = getattr(module, PREFIX, {})
    own = {id(p) for technique in techniques.values() for p in technique.parameters()} if techniques else set()
    groups = [{"params": [p for p in module.parameters() if id(p) not in own], "name": "model", **options}]
    for name, technique in sorted(techniques.items()):
        parameters = list(technique.parameters())
        if parameters:
            groups.append({"params": parameters, "name": f"{PREFIX}.{name}", **options, "weight_decay": 0.0})
    return groups


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

    States without named groups, and checkpoints with the same techniques, are left as they are.
    """
    wanted = parameter_groups(module)
    names = [g["name"] for g in wanted]
    for i, state in enumerate(checkpoint.get("optimizer_states", ())):
        groups = {g.get("name"): g for g in state["param_groups"]}
        if list(groups) == names or "model" not in groups:
            continue
        order = [g.get("name") for g in state["param_groups"]]
        new_groups, new_state, number = [], {}, 0
        for group in wanted:
            saved = groups.get(group["name"])
            numbers = list(range(number, number + len(group["params"])))
            if saved is not None:
                for new, old in zip(numbers, saved["params"], strict=True):
                    if old in state["state"]:
                        new_state[new] = state["state"][old]
                new_groups.append({**saved, "params": numbers})
            else:
                fresh = {**groups["model"], "name": group["name"], "weight_decay": 0.0}
                new_groups.append({**fresh, "params": numbers})
            number += len(numbers)
        checkpoint["optimizer_states"][i] = {"state": new_state, "param_groups": new_groups}
        source = [order.index(n) if n in order else order.index("model") for n in names]
        for scheduler in checkpoint.get("lr_schedulers", ()):
            for key in ("base_lrs", "_last_lr", "lr_lambdas"):
                if isinstance(scheduler.get(key), list) and len(scheduler[key]) == len(order):
                    scheduler[key] = [scheduler[key][j] for j in source]
