"""The seven laws as functions that raise AssertionError; see DESIGN and callbacks/perturbation.py.

Each takes techniques as factories, since a technique object belongs to one trainer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.perturbation import SITES, Perturbation
from tests.laws import cells
from tests.laws.cells import BATCH, Images, differing, trainer, weights

Make = Callable[..., Perturbation]


def _flags(module: nn.Module) -> dict[str, Any]:
    """All that a step must leave as it found it, beside the values."""
    found: dict[str, Any] = {"grad": {n: p.requires_grad for n, p in module.named_parameters()}}
    found["train"] = {n: m.training for n, m in module.named_modules()}
    found["hooks"] = {
        n: [list(getattr(m, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        for n, m in module.named_modules()
    }
    found["norm"] = {n: m.track_running_stats for n, m in module.named_modules() if hasattr(m, "track_running_stats")}
    return found


def _grads(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


class _Before(Callback):
    """Stands before the techniques and remembers what the step begins with."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.flags: dict[str, Any] = {}
        self.batch: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.weights, self.flags = weights(pl_module), _flags(pl_module)
        self.given = dict(batch)
        self.batch = {name: value.clone() for name, value in batch.items()}
        self.grads = _grads(pl_module)


class _After(Callback):
    """Stands after the techniques and compares."""

    def __init__(self, before: _Before) -> None:
        self.before = before
        self.gradient: dict[str, Tensor | None] = {}
        self.updated: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Lightning clears gradients after the forward pass, so what crafting leaves would only show when accumulating
        assert not differing(self.before.grads, _grads(pl_module)), "crafting left a gradient in .grad"

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        named = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        self.gradient = {n: g for (n, _), g in zip(named, found, strict=True)}
        self.losses.append(loss.item())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        buffers = {n for n, _ in pl_module.named_buffers()}
        changed = [n for n in differing(self.before.weights, weights(pl_module)) if n not in buffers]
        assert not changed, f"the step's perturbation is still in {changed[:3]}"
        after = _flags(pl_module)
        for kind, values in self.before.flags.items():
            assert after[kind] == values, f"{kind} flags or hooks differ from before the step"
        for name, value in self.before.given.items():
            assert torch.equal(value, self.before.batch[name]), f"'{name}' of the batch was changed in place"
        for name, parameter in pl_module.named_parameters():
            wanted = self.gradient.get(name)
            if parameter.grad is None:
                assert wanted is None, f"{name} has no gradient"
            else:
                wanted = torch.zeros_like(parameter) if wanted is None else wanted
                assert torch.equal(parameter.grad, wanted), f"{name}.grad holds more than the step's gradient"
        # SGD with momentum, by hand
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step = parameter.grad + group["weight_decay"] * parameter
                    momentum = optimizer.state[parameter].get("momentum_buffer")
                    step = step if momentum is None else group["momentum"] * momentum + step
                    self.updated[str(id(parameter))] = parameter.detach() - group["lr"] * step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            wanted = self.updated.get(str(id(parameter)))
            if wanted is not None:
                torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-7, msg=f"{name}: no plain update")
        self.updated.clear()


def _norm_steps(module: nn.Module) -> dict[str, int]:
    return {n: int(b) for n, b in module.named_buffers() if n.endswith("num_batches_tracked")}


def no_trace(recipe: str, *makes: Make) -> None:
    """Law 1, with any number of techniques."""
    plain = cells.recipe(recipe)
    trainer(max_epochs=2).fit(plain, datamodule=Images())
    module, before = cells.recipe(recipe), _Before()
    after = _After(before)
    trainer(before, *(make() for make in makes), after, max_epochs=2).fit(module, datamodule=Images())
    assert len(after.losses) == 2 * cells.STEPS
    assert _norm_steps(module) == _norm_steps(plain), "batch norm moved in more than the step's own forward pass"
    leftover = {n: len(m._forward_hooks) for n, m in module.named_modules()}
    assert leftover == {n: 0 for n in leftover}, "hooks are left on the network"


def no_trace_of_a_failed_step(recipe: str, make: Make) -> None:
    """Law 1 where the step fails."""
    module, before = cells.recipe(recipe), _Before()
    original = module.training_step

    def failing(batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            raise RuntimeError("on purpose")
        return original(batch, batch_idx)

    module.training_step = failing  # type: ignore[method-assign]
    with contextlib.suppress(RuntimeError):
        trainer(before, make()).fit(module, datamodule=Images())
    buffers = {n for n, _ in module.named_buffers()}
    assert not [n for n in differing(before.weights, weights(module)) if n not in buffers], "a failed step left its mark"
    assert {n: p.requires_grad for n, p in module.named_parameters()} == before.flags["grad"]
    assert {n: m.training for n, m in module.named_modules()} == before.flags["train"]


class _Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def zero_is_nothing(recipe: str, make: Make) -> None:
    """Law 2: at zero strength the run is bit-identical to the run without the technique."""
    runs = []
    for techniques in ([], [make()]):
        module, losses = cells.recipe(recipe), _Losses()
        trainer(*techniques, losses, max_epochs=2).fit(module, datamodule=Images())
        runs.append((weights(module), losses.losses))
    assert runs[0][1] == runs[1][1], "the losses differ"
    assert not differing(runs[0][0], runs[1][0]), "the weights differ"


def off_at_evaluation(recipe: str, make: Make) -> None:
    """Law 3: validation within a fit, and validate, test and predict, see the untouched network."""
    module, runner = cells.recipe(recipe), trainer(make(), max_epochs=1)
    runner.fit(module, datamodule=Images())
    within = {n: float(v) for n, v in runner.callback_metrics.items() if n.startswith("val/")}
    assert within
    clean = cells.recipe(recipe)
    clean.load_state_dict(weights(module))
    plain = trainer()
    plain.validate(clean, datamodule=Images(), verbose=False)
    assert {n: float(v) for n, v in plain.callback_metrics.items()} == within, "validation saw the technique"
    for verb in ("validate", "test", "predict"):
        results = []
        for network, techniques in ((module, [make()]), (clean, [])):
            run = trainer(*techniques)
            if verb == "predict":
                results.append([{k: v.tolist() for k, v in b.items()} for b in run.predict(network, datamodule=Images())])
            else:
                results.append(getattr(run, verb)(network, datamodule=Images(), verbose=False))
        assert results[0] == results[1], f"{verb} saw the technique"


class EveryStep(Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        inner = getattr(pl_module, "module", pl_module)
        self.steps.append({n: v.clone() for n, v in inner.state_dict().items() if "metric" not in n})


def one_process(recipe: str, make: Make, batch: int, devices: Any = 1, **options: Any) -> list[dict[str, Tensor]]:
    """The weights after each step of a run without batch norm; in two ranks if called by each of them."""
    module, steps = cells.recipe(recipe, norm=False), EveryStep()
    data = Images(size=4 * BATCH * cells.STEPS, batch_size=batch)
    runner = trainer(make(), steps, devices=devices, limit_train_batches=cells.STEPS, limit_val_batches=0, **options)
    runner.fit(module, datamodule=data)
    return steps.steps


def two_ranks_agree(ranks: Sequence[list[dict[str, Tensor]]]) -> None:
    """Law 4, what always holds: all ranks hold the same weights at every step."""
    first, second = ranks
    assert len(first) == len(second) == cells.STEPS
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        moving = {n for n in a if "running_" not in n and "num_batches" not in n}
        apart = [n for n in differing(a, b) if n in moving]
        assert not apart, f"ranks hold different weights after step {step}: {apart[:3]}"


def two_ranks_are_one(ranks: Sequence[list[dict[str, Tensor]]], recipe: str, make: Make) -> None:
    """Law 4, where no example looks at the others: the update of one process with the batches of both."""
    whole = one_process(recipe, make, 2 * BATCH)
    for step, (a, b) in enumerate(zip(ranks[0], whole, strict=True)):
        for name in b:
            torch.testing.assert_close(
                a[name], b[name], rtol=1e-4, atol=1e-6, msg=f"{name} differs from one process's after step {step}"
            )


class _Kill(Callback):
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
    runner.fit(whole, datamodule=Images())
    file = folder / "killed.ckpt"
    with contextlib.suppress(KeyError):
        trainer(make(), _Kill(file, stop), max_epochs=3).fit(cells.recipe(recipe), datamodule=Images())
    again, rest = cells.recipe(recipe), _Losses()
    torch.manual_seed(99)  # whatever the process drew before must not matter
    resumed = trainer(make(), rest, max_epochs=3)
    resumed.fit(again, datamodule=Images(), ckpt_path=file, weights_only=True)
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

    no_trace(recipe, *(watched(make) for make in makes))
    n = len(makes)
    assert len(calls) == 2 * n * 2 * cells.STEPS, "each perturbs and restores once a step"
    for start in range(0, len(calls), 2 * n):
        step = calls[start : start + 2 * n]
        perturbed = [technique for what, technique in step if what == "perturb"]
        restored = [technique for what, technique in step if what == "restore"]
        sites = [SITES.index(technique.site) for technique in perturbed]
        assert sites == sorted(sites) and len(perturbed) == n, "not in the order of SITES"
        assert restored == perturbed[::-1], "not restored last in, first out"


class _Micro(Callback):
    """The gradient of each micro-batch, summed by hand, against what the optimizer is given."""

    def __init__(self, every: int) -> None:
        self.every, self.sums, self.steps = every, {}, 0  # type: ignore[var-annotated]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        named = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
        for (name, _), gradient in zip(named, found, strict=True):
            if gradient is not None:
                self.sums[name] = self.sums.get(name, 0) + gradient

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.steps += 1
        for name, parameter in pl_module.named_parameters():
            if name in self.sums:
                torch.testing.assert_close(
                    parameter.grad, self.sums[name], rtol=1e-4, atol=1e-7, msg=f"{name}: a micro-batch's gradient is lost"
                )
        self.sums = {}


def accumulates(recipe: str, make: Make) -> None:
    """Law 7: the gradients of accumulated batches add up (Lightning divides the loss already)."""
    micro = _Micro(2)
    trainer(make(), micro, accumulate_grad_batches=2, max_epochs=2).fit(cells.recipe(recipe), datamodule=Images(size=16))
    assert micro.steps == 4


class _Norms(Callback):
    def __init__(self) -> None:
        self.largest = 0.0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Called before clipping; what is clipped is looked at when the step is over."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            if grads:
                self.largest = max(self.largest, float(torch.stack([g.norm() for g in grads]).norm()))


def runs_in(recipe: str, make: Make, **options: Any) -> list[float]:
    """Law 7: losses under other options of the trainer or the model; finite, and the weights stay finite."""
    model = {k: options.pop(k) for k in ("compile", "channels_last") if k in options}
    module, losses, norms = cells.recipe(recipe, **model), _Losses(), _Norms()
    trainer(make(), losses, norms, **options).fit(module, datamodule=Images())
    assert losses.losses and all(math.isfinite(loss) for loss in losses.losses), "a loss is not finite"
    assert all(bool(torch.isfinite(v).all()) for v in module.state_dict().values() if v.is_floating_point())
    if "gradient_clip_val" in options:
        assert norms.largest <= options["gradient_clip_val"] * (1 + 1e-4), "a group of the optimizer isn't clipped"
    return losses.losses
