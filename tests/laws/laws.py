"""The seven laws as functions that raise AssertionError; see DESIGN and callbacks/perturbation.py.

Each takes techniques as factories, since a technique object belongs to one trainer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.layers import backbone_of
from callbacks.perturbation import SITES, Perturbation, techniques_of
from tests.laws import cells
from tests.laws.cells import BATCH, differing, trainer, weights

Make = Callable[..., Perturbation]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _flags(module: nn.Module) -> dict[str, Any]:
    """All that a step must leave as it found it, beside the values."""
    found: dict[str, Any] = {"gradient flags": {n: p.requires_grad for n, p in module.named_parameters()}}
    found["train flags"] = {n: m.training for n, m in module.named_modules()}
    found["hooks"] = {n: [list(getattr(m, kind)) for kind in _HOOKS] for n, m in module.named_modules()}
    found["batch norm's flags"] = {n: getattr(m, "track_running_stats", None) for n, m in module.named_modules()}
    return found


def _hooks(module: nn.Module) -> list[str]:
    return [n for n, m in module.named_modules() if any(getattr(m, kind) for kind in _HOOKS)]


def _grads(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    names = {n for n, _ in module.named_buffers()}
    return {n: v for n, v in weights(module).items() if n in names}


def _partly_frozen(recipe: str) -> LightningModule:
    """A recipe of which the user froze one parameter and put one layer in evaluation mode."""
    module = cells.recipe(recipe)
    next(module.parameters()).requires_grad_(False)
    leaves = [m for m in module.modules() if not list(m.children())]
    next((m for m in leaves if isinstance(m, (nn.modules.batchnorm._NormBase, nn.Dropout))), leaves[0]).eval()
    return module


class _Before(Callback):
    """Stands before the techniques and remembers what the step begins with."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.flags: dict[str, Any] = {}
        self.batch: dict[str, Any] = {}
        self.given: dict[str, Any] = {}
        self.held: Any = None
        self.grads: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.weights, self.flags = weights(pl_module), _flags(pl_module)
        self.held = batch
        self.given = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        self.batch = {name: value.clone() for name, value in self.given.items()}
        self.grads = _grads(pl_module)


class _After(Callback):
    """Stands after the techniques and compares."""

    def __init__(self, before: _Before) -> None:
        self.before = before
        self.gradient: dict[str, Tensor | None] = {}
        self.buffers: dict[str, Tensor] = {}
        self.twin: Any = None
        self.steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Lightning clears gradients after the forward pass, so what crafting leaves would only show when accumulating
        assert not differing(self.before.grads, _grads(pl_module)), "crafting left a gradient in .grad"
        buffers = _buffers(pl_module)
        moved = [n for n, v in buffers.items() if not torch.equal(v, self.before.weights[n])]
        assert not moved, f"crafting moved the buffers {moved[:3]}"

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        named = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        self.gradient = {n: g for (n, _), g in zip(named, found, strict=True)}
        self.buffers = _buffers(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        changed = set(differing(self.before.weights, weights(pl_module))) - self.buffers.keys()
        assert not changed, f"the step's perturbation is still in {sorted(changed)[:3]}"
        moved = differing(self.buffers, _buffers(pl_module))
        assert not moved, f"restoring moved the buffers {moved[:3]}"
        after = _flags(pl_module)
        for kind, values in self.before.flags.items():
            assert after[kind] == values, f"{kind} differ from before the step"
        for name, value in self.before.given.items():
            assert torch.equal(value, self.before.batch[name]), f"'{name}' of the batch was changed in place"
            assert self.before.held.get(name) is value, f"the batch didn't get its '{name}' back"
        for name, parameter in pl_module.named_parameters():
            wanted = self.gradient.get(name)
            if parameter.grad is None:
                assert wanted is None, f"{name} has no gradient"
            elif not any(t.adds_gradients for t in techniques_of(trainer)):
                wanted = torch.zeros_like(parameter) if wanted is None else wanted
                assert torch.equal(parameter.grad, wanted), f"{name}.grad holds more than the step's gradient"
        self.twin = copy.deepcopy(optimizer)  # with the parameters and the state, but not the gradients
        for group, twin in zip(optimizer.param_groups, self.twin.param_groups, strict=True):
            for parameter, copied in zip(group["params"], twin["params"], strict=True):
                copied.grad = None if parameter.grad is None else parameter.grad.clone()
        self.twin.step()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.steps += 1
        (optimizer,) = trainer.optimizers
        for group, twin in zip(optimizer.param_groups, self.twin.param_groups, strict=True):
            for parameter, wanted in zip(group["params"], twin["params"], strict=True):
                assert torch.equal(parameter, wanted), "the update isn't the plain one from the perturbed gradient"


def _norm_steps(module: nn.Module) -> dict[str, int]:
    return {n: int(b) for n, b in module.named_buffers() if n.endswith("num_batches_tracked")}


@functools.cache
def _plain_norm_steps(recipe: str, epochs: int) -> dict[str, int]:
    module = _partly_frozen(recipe)
    trainer(max_epochs=epochs).fit(module, datamodule=cells.data(recipe))
    return _norm_steps(module)


def no_trace(recipe: str, *makes: Make, epochs: int = 2) -> None:
    """Law 1, with any number of techniques."""
    module, before = _partly_frozen(recipe), _Before()
    after = _After(before)
    trainer(before, *(make() for make in makes), after, max_epochs=epochs).fit(module, datamodule=cells.data(recipe))
    assert after.steps == epochs * cells.STEPS
    steps = _norm_steps(module)
    assert steps == _plain_norm_steps(recipe, epochs), "batch norm moved in more than the step's own forward pass"
    assert not _hooks(module), "hooks are left on the network"


def no_trace_of_a_failed_step(recipe: str, make: Make) -> None:
    """Law 1 where the step fails."""
    module, before = _partly_frozen(recipe), _Before()
    original = module.training_step

    def failing(batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise KeyError("on purpose")
        return original(batch, batch_idx)

    module.training_step = failing  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="on purpose"):
        trainer(before, make()).fit(module, datamodule=cells.data(recipe))
    assert not differing(before.weights, weights(module)), "a failed step left its mark"
    after = _flags(module)
    for kind in before.flags.keys() - {"hooks"}:
        assert after[kind] == before.flags[kind], f"a failed step left its mark on {kind}"
    assert not _hooks(module), "hooks are left on the network after an error"


class _Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


@functools.cache
def _plain_run(recipe: str) -> tuple[dict[str, Tensor], list[float]]:
    module, losses = cells.recipe(recipe), _Losses()
    trainer(losses, max_epochs=2).fit(module, datamodule=cells.data(recipe))
    return weights(module), losses.losses


def zero_is_nothing(recipe: str, make: Make) -> None:
    """Law 2: at zero strength the run is bit-identical to the run without the technique, dropout and all."""
    module, losses = cells.recipe(recipe), _Losses()
    trainer(make(), losses, max_epochs=2).fit(module, datamodule=cells.data(recipe))
    plain_weights, plain_losses = _plain_run(recipe)
    assert losses.losses == plain_losses, "the losses differ"
    assert not differing(weights(module), plain_weights), "the weights differ"


def _plainly(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plainly(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plainly(v) for v in value]
    return value.tolist() if isinstance(value, Tensor) else value


def off_at_evaluation(recipe: str, make: Make) -> None:
    """Law 3: validation within a fit, and validate, test and predict, see the untouched network and leave it so.

    What is a part of the network is there in all of them alike, and makes a difference.
    """
    part = [make] if make().part_of_network else []
    module, runner = cells.recipe(recipe), trainer(make(), max_epochs=1)
    runner.fit(module, datamodule=cells.data(recipe))
    within = {n: float(v) for n, v in runner.callback_metrics.items() if n.startswith("val/")}
    assert within
    clean = cells.recipe(recipe)
    clean.load_state_dict(weights(module))
    plain = trainer(*(m() for m in part))
    plain.validate(clean, datamodule=cells.data(recipe), verbose=False)
    assert {n: float(v) for n, v in plain.callback_metrics.items()} == within, "validation saw the technique"
    if part:
        (without,) = trainer().validate(clean, datamodule=cells.data(recipe), verbose=False)
        assert without != within, "what is a part of the network is off at evaluation"
    for verb in ("validate", "test", "predict"):
        results = []
        before, flags = weights(module), _flags(module)
        for network, techniques in ((module, [make()]), (clean, [m() for m in part])):
            options: dict[str, Any] = {} if verb == "predict" else {"verbose": False}
            results.append(getattr(trainer(*techniques), verb)(network, datamodule=cells.data(recipe), **options))
        assert _plainly(results[0]) == _plainly(results[1]), f"{verb} saw the technique"
        assert not differing(before, weights(module)) and _flags(module) == flags, f"{verb} changed the network"


class EveryStep(Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        inner = getattr(pl_module, "module", pl_module)
        self.steps.append({n: v.clone() for n, v in inner.state_dict().items() if "metric" not in n})


def one_process(recipe: str, make: Make, batch: int, devices: Any = 1, **options: Any) -> list[dict[str, Tensor]]:
    """The weights after each step of a run without batch norm; in two ranks if called by each of them."""
    module, steps = cells.recipe(recipe, norm=False, drop=False), EveryStep()
    data = cells.data(recipe, size=4 * BATCH * cells.STEPS, batch_size=batch)
    options = {"precision": cells.PRECISION.get(recipe, "32-true"), "devices": devices, **options}
    runner = trainer(make(), steps, limit_train_batches=cells.STEPS, limit_val_batches=0, **options)
    runner.fit(module, datamodule=data)
    return steps.steps


def two_ranks_agree(ranks: Sequence[list[dict[str, Tensor]] | str]) -> None:
    """Law 4, what always holds: plain DDP runs, and all ranks hold the same weights at every step."""
    first, second = ranks
    assert not isinstance(first, str) and not isinstance(second, str), f"plain DDP stops: {first}"
    assert len(first) == len(second) == cells.STEPS
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        moving = {n for n in a if "running_" not in n and "num_batches" not in n}
        apart = [n for n in differing(a, b) if n in moving]
        assert not apart, f"ranks hold different weights after step {step}: {apart[:3]}"


def two_ranks_are_one(ranks: Sequence[list[dict[str, Tensor]]], recipe: str, make: Make) -> None:
    """Law 4, where no example looks at the others: the update of one process with the batches of both."""
    two_ranks_agree(ranks)
    whole = one_process(recipe, make, 2 * BATCH)
    assert len(whole) == len(ranks[0])
    for step, (a, b) in enumerate(zip(ranks[0], whole, strict=True)):
        for name in b:
            torch.testing.assert_close(
                a[name], b[name], rtol=1e-4, atol=1e-6, msg=f"{name} differs from one process's after step {step}"
            )


class Kill(Callback):
    """Saves and stops where a signal would."""

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.step = file, step

    def _end(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.file)
        raise KeyError("stopped on purpose")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.is_last_batch:
            self._end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            self._end(trainer)


def resume_is_exact(recipe: str, make: Make, folder: Path, stop: int) -> None:
    """Law 5: stopped after ``stop`` steps (an epoch has 3) and resumed, a run ends as if it had never been stopped."""
    whole, losses = cells.recipe(recipe), _Losses()
    runner = trainer(make(), losses, max_epochs=3)
    runner.fit(whole, datamodule=cells.data(recipe))
    file = folder / "killed.ckpt"
    with contextlib.suppress(KeyError):
        trainer(make(), Kill(file, stop), max_epochs=3).fit(cells.recipe(recipe), datamodule=cells.data(recipe))
    again, rest = cells.recipe(recipe), _Losses()
    torch.manual_seed(99)  # whatever the process drew before must not matter
    resumed = trainer(make(), rest, max_epochs=3)
    resumed.fit(again, datamodule=cells.data(recipe), ckpt_path=file, weights_only=True)
    assert len(losses.losses) == 3 * cells.STEPS
    assert rest.losses == losses.losses[stop:], "the losses after resuming differ"
    assert not differing(whole.state_dict(), again.state_dict()), "the weights differ"
    first, second = (r.optimizers[0].state_dict() for r in (runner, resumed))
    assert first["param_groups"] == second["param_groups"], "the optimizer's settings differ"
    for number, state in first["state"].items():
        assert not differing(*({k: torch.as_tensor(v) for k, v in s.items()} for s in (state, second["state"][number])))
    metrics = [{n: float(v) for n, v in r.callback_metrics.items()} for r in (runner, resumed)]
    assert metrics[0] == metrics[1], "the metrics differ"


def composes(recipe: str, *makes: Make) -> None:
    """Law 6: any techniques run together, perturb in the order of SITES, restore in reverse, and leave no trace."""
    calls: list[tuple[str, Perturbation]] = []

    def watched(make: Make) -> Make:
        def build() -> Perturbation:
            technique = make()
            perturb, restore = technique.perturb, technique.restore

            def noted_perturb(module: LightningModule, batch: Any) -> None:
                calls.append(("perturb", technique))
                perturb(module, batch)

            def noted_restore(module: LightningModule) -> None:
                calls.append(("restore", technique))
                restore(module)

            technique.perturb, technique.restore = noted_perturb, noted_restore  # type: ignore[method-assign]
            return technique

        return build

    no_trace(recipe, *(watched(make) for make in makes), epochs=1)
    n = len(makes)
    assert len(calls) == 2 * n * cells.STEPS, "each perturbs and restores once a step"
    for start in range(0, len(calls), 2 * n):
        step = calls[start : start + 2 * n]
        perturbed = [technique for what, technique in step if what == "perturb"]
        restored = [technique for what, technique in step if what == "restore"]
        sites = [SITES.index(technique.site) for technique in perturbed]
        assert sites == sorted(sites) and len(perturbed) == n, "not in the order of SITES"
        assert restored == perturbed[::-1], "not restored last in, first out"


class _Micro(Callback):
    """The gradient of each micro-batch, summed by hand, against what the optimizer is given."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        named = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        for (name, _), gradient in zip(named, found, strict=True):
            if gradient is not None:
                self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.steps += 1
        for name, parameter in pl_module.named_parameters():
            if name in self.sums and not any(t.adds_gradients for t in techniques_of(trainer)):
                lost = f"{name}: a micro-batch's gradient is lost"
                torch.testing.assert_close(parameter.grad, self.sums[name], rtol=1e-4, atol=1e-7, msg=lost)
        self.sums = {}


def accumulates(recipe: str, make: Make) -> None:
    """Law 7: the gradients of accumulated batches add up (Lightning divides the loss already)."""
    micro, data = _Micro(), cells.data(recipe, size=4 * BATCH)
    trainer(make(), micro, accumulate_grad_batches=2, max_epochs=2).fit(cells.recipe(recipe), datamodule=data)
    assert micro.steps == 4


class _Backbone(Callback):
    """Does something to the network after the techniques have hung their hooks, as a recipe's own setup does."""

    def __init__(self, change: Callable[[nn.Module], Any]) -> None:
        self.change = change

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.change(backbone_of(pl_module))


class _Norms(Callback):
    """The largest norm of the gradient of a group of the optimizer, as the step used it."""

    def __init__(self) -> None:
        self.largest = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            if grads:
                self.largest = max(self.largest, float(torch.stack([g.norm() for g in grads]).norm()))


def runs_in(recipe: str, make: Make, change: Callable[[nn.Module], Any] | None = None, **options: Any) -> list[float]:
    """Law 7: losses with other options of the trainer, or a changed network; all is finite."""
    module, losses, norms = cells.recipe(recipe, drop=False), _Losses(), _Norms()
    changes = [_Backbone(change)] if change else []
    try:
        trainer(make(), *changes, losses, norms, **options).fit(module, datamodule=cells.data(recipe))
    except (RuntimeError, TypeError) as error:
        raise AssertionError(f"stops: {error}") from error
    assert len(losses.losses) == cells.STEPS and all(map(math.isfinite, losses.losses)), "a loss is not finite"
    assert all(bool(torch.isfinite(v).all()) for v in module.state_dict().values() if v.is_floating_point())
    limit = options.get("gradient_clip_val", math.inf)
    assert 0 < norms.largest <= limit * (1 + 1e-4), "a group of the optimizer isn't clipped"
    return losses.losses


def same_in(recipe: str, make: Make, rel: float, change: Any = None, **options: Any) -> None:
    """Law 7: the losses are those without these options, but for rounding."""
    plain = runs_in(recipe, make)
    assert runs_in(recipe, make, change, **options) == pytest.approx(plain, rel=rel), "the losses differ"
