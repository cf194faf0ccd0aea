"""Diagnostics leave no trace, to the last bit; resume exactly; find on two ranks what one process finds."""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.diagnostic import Diagnostic, label_of, logits_of, losses_of, summed
from tests.laws import cells, diagnostics
from tests.laws.laws import _flags, _plainly

NAMES = sorted(diagnostics.diagnostics())
LOOKS = diagnostics.looks_on()
every = pytest.mark.parametrize(
    ("recipe", "names"), LOOKS, ids=[f"{r}-{n[0]}" if len(n) == 1 else f"{r}-all" for r, n in LOOKS]
)


class Watch(Callback):
    """Stands last and notes all that a diagnostic could have touched, after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def _note(self, trainer: Trainer, module: LightningModule, when: str) -> None:
        streams = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
        numbers = {"random stream": hashlib.sha256(repr(streams).encode()).hexdigest()}
        numbers["weights"] = repr({n: _digest(v) for n, v in module.state_dict().items()})
        grads = {n: None if p.grad is None else _digest(p.grad) for n, p in module.named_parameters()}
        numbers["gradients"] = repr(grads)
        flags = _flags(module)
        flags["hooks"] = {n: [len(kind) for kind in kinds] for n, kinds in flags["hooks"].items()}  # ids count on
        numbers["flags and hooks"] = repr(flags)
        numbers["optimizer"] = repr([_digests(o.state_dict()) for o in trainer.optimizers])
        self.seen.append({"when": when, **numbers})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module, "before the first step")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._note(trainer, pl_module, "before a step")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._note(trainer, pl_module, "after a step")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module, "at the end")


def _digest(value: torch.Tensor) -> str:
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return hashlib.sha256(data).hexdigest()


def _digests(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: _digests(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return [_digests(v) for v in state]
    return _digest(state) if isinstance(state, torch.Tensor) else repr(state)


def compare(plain: Watch, watched: Watch) -> None:
    assert len(plain.seen) == len(watched.seen) > 2
    for without, with_it in zip(plain.seen, watched.seen, strict=True):
        for what in without:
            assert without[what] == with_it[what], f"{what}: not as without it, {without['when']}"


_plain: dict[str, Watch] = {}


def plain(recipe: str) -> Watch:
    if recipe not in _plain:
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        _plain[recipe] = Watch()
        module = cells.recipe(recipe)
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        data = cells.data(recipe)
        diagnostics.quiet_trainer(_plain[recipe], exact=False).fit(module, datamodule=data)
    return _plain[recipe]


def no_trace(recipe: str, *looks: Diagnostic) -> None:
    watch, before = Watch(), plain(recipe)
    module = cells.recipe(recipe)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    diagnostics.quiet_trainer(*looks, watch, exact=False).fit(module, datamodule=cells.data(recipe))
    assert all(look.steps for look in looks), "nothing was measured"
    compare(before, watch)


# ---------------------------------------------------------------------- no trace


def test_diagnostics_are_found() -> None:
    assert "Accuracy" not in NAMES  # those of the tests are none


@every
def test_1_no_trace(recipe: str, names: tuple[str, ...]) -> None:
    looks = [diagnostics.make(name, recipe) for name in names]
    no_trace(recipe, *looks)
    for look in looks:
        assert look.history, f"{look.name} found nothing"
        assert all(key.startswith(f"{look.name}/") for key in look.history)


def test_what_is_apart_says_so() -> None:
    for (recipe, name), words in diagnostics.APART.items():
        with pytest.raises(ValueError, match=words) as error:
            runner = cells.trainer(diagnostics.make(name, recipe))
            runner.fit(cells.recipe(recipe), datamodule=cells.data(recipe))
        assert "\n" not in str(error.value)


class Accuracy(Diagnostic):
    """A right one, of both parts of the data."""

    def plan(self, trainer: Trainer, module: LightningModule) -> list[int]:
        return [0, 2, 3]

    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        torch.rand(3), random.random(), np.random.rand()
        found = torch.zeros(3)
        for part in ("train", "val"):
            for batch in self.examples(trainer, part, self.positions(trainer, part, 9), 4):
                with torch.no_grad():
                    right = logits_of(module, batch).argmax(1) == label_of(batch)
                    found += torch.tensor([float(right.sum()), len(right), float(losses_of(module, batch).sum())])
        right, count, loss = summed(found, module.device).tolist()
        return {"acc": right / count, "loss": loss / count, "count": count}


class Other(Accuracy):
    """The same by another name."""


class DrawsFromTheStream(Accuracy):
    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        torch.rand(1)


class LeavesAGradient(Accuracy):
    by_weights = True

    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        batch = next(self.examples(trainer, "train", [0, 1]))
        losses_of(module, batch).mean().backward()
        return {"loss": 0.0}


class MovesAWeight(Accuracy):
    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        with torch.no_grad():
            weight = next(module.parameters())
            weight += 1e-3
            weight -= 1e-3
        return {}


class LeavesAHook(Accuracy):
    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        module.register_forward_hook(lambda *_: None)
        return {}


class LeavesEvaluationMode(Accuracy):
    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        trainer.callbacks[0]._later = module.eval  # type: ignore[attr-defined]
        return {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        super().on_train_batch_end(trainer, pl_module)
        pl_module.eval()


@pytest.mark.parametrize(
    ("cls", "finding"),
    [
        (DrawsFromTheStream, "random stream"),
        (LeavesAGradient, "gradients"),
        (MovesAWeight, "weights"),
        (LeavesAHook, "hooks"),
        (LeavesEvaluationMode, "flags|random stream"),
    ],
)
def test_1_bites(cls: type[Diagnostic], finding: str) -> None:
    no_trace("classifier", Accuracy())
    with pytest.raises(AssertionError, match=finding):
        no_trace("classifier", cls())


def test_1_holds_among_techniques() -> None:
    """All of them at once, beside techniques on features, input and weights."""
    stack = ("AdvStyle", "AdversarialInput", "SAM")
    watches = []
    for with_them in (False, True):
        watches.append(Watch())
        module = cells.recipe("classifier")
        own = [cells.technique(cells.techniques()[t]) for t in stack]
        more = [diagnostics.make(name) for name in NAMES] if with_them else []
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        runner = diagnostics.quiet_trainer(*own, *more, watches[-1], exact=False)
        runner.fit(module, datamodule=cells.data("classifier"))
    compare(*watches)


@pytest.mark.parametrize("name", NAMES)
def test_1_on_a_users_own_module(name: str) -> None:
    watches, found = [], []
    for with_it in (False, True):
        torch.manual_seed(3)
        watches.append(Watch())
        module = diagnostics.Own()
        more = [diagnostics.make(name, **diagnostics.OWN_ARGUMENTS.get(name, {}))] if with_it else []
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        runner = diagnostics.quiet_trainer(*more, watches[-1], exact=False)
        runner.fit(module, diagnostics.own_data(1), diagnostics.own_data(2))
        found = [*found, *more]
    compare(*watches)
    assert found[0].history


# ---------------------------------------------------------------------- resume, ranks, precision


@every
@pytest.mark.parametrize("stop", [3, 5], ids=["at an epoch's end", "in mid-epoch"])
def test_5_resume_is_exact(recipe: str, names: tuple[str, ...], stop: int, tmp_path: Path) -> None:
    def fit(steps: int, resume: Path | None = None) -> tuple[list[Diagnostic], LightningModule]:
        looks, module = [diagnostics.make(name, recipe) for name in names], cells.recipe(recipe)
        save = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1, filename="{step}")
        runner = cells.trainer(*looks, save, max_epochs=2, enable_checkpointing=True)
        if steps:
            runner.callbacks.insert(0, _StopAt(steps))  # type: ignore[attr-defined]
        try:
            runner.fit(module, datamodule=cells.data(recipe), ckpt_path=resume, weights_only=False)
        except KeyError:
            pass
        return looks, module

    whole, whole_module = fit(0)
    for file in tmp_path.glob("*.ckpt"):
        file.unlink()
    fit(stop)
    (file,) = tmp_path.glob("*.ckpt")
    resumed, module = fit(0, file)
    assert not cells.differing(cells.weights(whole_module), cells.weights(module))
    for one, other in zip(whole, resumed, strict=True):
        assert other.steps == one.steps
        assert repr(_plainly(other.history)) == repr(_plainly(one.history))


class _StopAt(Callback):
    """Kills the run at the start of the batch after so many."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            raise KeyError("killed")


@every
def test_4_two_ranks_find_what_one_process_finds(recipe: str, names: tuple[str, ...], two_ranks: Any) -> None:
    one = diagnostics.two_ranks_cell(recipe, names, 2 * cells.BATCH)
    for history in two_ranks(recipe, f"diagnostics {' '.join(names)}"):
        assert not isinstance(history, str), history
        assert history.keys() == one.keys()
        for key, points in one.items():
            for (step, value), (other_step, other) in zip(points, history[key], strict=True):
                assert step == other_step
                close = math.isclose(value, other, rel_tol=1e-5, abs_tol=1e-7) or (value != value and other != other)
                assert close, f"{key} at step {step}: {value} and {other}"


@every
def test_7_mixed_precision_and_accumulation(recipe: str, names: tuple[str, ...]) -> None:
    looks = [diagnostics.make(name, recipe) for name in names]
    runner = cells.trainer(*looks, max_epochs=2, precision="bf16-mixed", accumulate_grad_batches=2)
    runner.fit(cells.recipe(recipe), datamodule=cells.data(recipe, size=4 * cells.BATCH))
    for look in looks:
        assert look.steps[-1] == 4 and len(set(look.steps)) == len(look.steps)


# ---------------------------------------------------------------------- of the base


def test_the_share_bounds_the_examples() -> None:
    """12 examples, 2 epochs: 72 passes; a quarter of them over 4 measurements of 3 passes."""

    class Counts(Accuracy):
        def plan(self, trainer: Trainer, module: LightningModule) -> list[int]:
            return [0, 1, 2, 6]

        def prepare(self, trainer: Trainer, module: LightningModule) -> None:
            self.count = self.affordable(trainer, 500, 3)

    class Data(cells.Images):
        def __init__(self) -> None:
            super().__init__(size=1200, batch_size=4)

    counts = Counts(share=0.25)
    cells.trainer(counts, max_epochs=2, limit_val_batches=0, max_steps=600).fit(cells.recipe("classifier"), Data())
    assert counts.count == int(0.25 * 3 * 1200 * 2 / (3 * 4))
    with pytest.raises(ValueError, match="share must be positive"):
        Counts(share=0.0)


def test_two_of_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two diagnostics are named 'accuracy'"):
        cells.trainer(Accuracy(), Other(name="accuracy")).fit(cells.recipe("classifier"), cells.data("classifier"))
    cells.trainer(Accuracy(), Accuracy(name="second")).fit(cells.recipe("classifier"), cells.data("classifier"))


def test_rows_come_back_in_the_order_of_one_process() -> None:
    from callbacks.diagnostic import log_steps

    assert log_steps(5, 1000) == [0, 1, 10, 100, 1000]
    assert log_steps(50, 3) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="at least 3"):
        log_steps(2, 10)
