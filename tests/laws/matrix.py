"""``python -m tests.laws.matrix``: a worker of ``python -m recipes matrix``; tries callbacks on recipes made small.

It reads cells from its input, one JSON object a line (``recipe``, ``callbacks``), and answers each with its finding.
A cell is one callback on one recipe, or two: three steps, validation and test, with the laws that one process can
check. What comes out is one of

* ``plugs in``: it runs and keeps the laws;
* ``refuses``: our code says in one line (a ValueError) why it doesn't go with this recipe;
* ``breaks``: it runs and breaks a law;
* ``crashes``: anything else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import logging
import os
import pkgutil
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import callbacks
from callbacks.diagnostic import Diagnostic
from callbacks.layers import backbone_of
from callbacks.perturbation import Perturbation
from recipes._cli import HOME
from tests.laws import cells, diagnostics, laws
from tests.laws.test_diagnostics import Watch, compare

#: Callbacks that no cell is made of, and why.
EXCLUDED: dict[str, str] = {
    "ExactResume": "stands in every run and in every cell",
    "StopOnNonFinite": "stands in every run of the command line; ends the training, by design",
    "Perturbation": "what techniques are made from",
    "Diagnostic": "what diagnostics are made from",
    "Craft": "a part of the recipe adversarial_training",
    "Draws": "a part of the recipe attention_at",
}
#: Arguments of callbacks that are neither technique nor diagnostic, by class name; few steps and examples.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "CatastrophicOverfitting": {"eps": 0.03, "steps": 1},
    "Explanations": {"examples": 6, "steps": 2, "draws": 1},
    "LinearProbe": {"l2": (1.0,)},
    "RobustAccuracy": {"eps": 0.03, "steps": 2, "restarts": 1, "val_steps": 1, "budget": 6, "val_budget": 6},
    "SkipMonitor": {"every_n_steps": 1},
    "WordSubstitution": {"examples": 6},
}
#: Of diagnostics, beside what the tests give them: fewer examples and steps, as a pair costs milliseconds.
FEWER: dict[str, dict[str, Any]] = {
    "GeneralizationMeasures": {"examples": 6, "draws": 1, "redraws": 1},
    "Grokking": {"steps": 1, "points": 6, "measurements": 3},
    "LocalComplexity": {"points": 2, "measurements": 3, "directions": 4},
    "SGDTemperature": {"measurements": 3},
    "Sharpness": {"iterations": 2, "measurements": 3},
}
#: (recipe, callback) of these that don't go together, and a part of what the callback then says.
APART: dict[tuple[str, str], str] = {}
for _name in cells.recipes():
    if _name != "attention_at":  # which alone is on texts
        APART[_name, "Explanations"] = "no layer 'embed' in the backbone"
        APART[_name, "WordSubstitution"] = "needs data with synonyms(word)"
    if _name != "scalelong":  # whose network has long skip connections
        APART[_name, "SkipMonitor"] = "no long skip connections found"
for _name in ("clip", "coprompt", "lazy_to_rich", "scalelong"):
    APART[_name, "LinearProbe"] = "needs a module with a timm backbone"
APART["attention_at", "LinearProbe"] = "needs data with probe_sets()"
for _name in ("CatastrophicOverfitting", "RobustAccuracy"):
    APART["attention_at", _name] = "needs batches with 'image'"
    APART["scalelong", _name] = "needs a module whose forward gives logits (B, classes)"

KINDS = ("technique", "diagnostic", "other")
Finding = dict[str, Any]


# ---------------------------------------------------------------------- what there is


def found() -> dict[str, type[Callback]]:
    """Every callback of callbacks/ that a user may put into ``--trainer.callbacks``, by name; techniques first."""
    for module in pkgutil.iter_modules(callbacks.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"callbacks.{module.name}")
    classes = {c.__name__: c for c in cells._below(Callback) if c.__module__.startswith("callbacks.")}
    public = {name: c for name, c in classes.items() if not name.startswith("_") and name not in EXCLUDED}
    return dict(sorted(public.items(), key=lambda item: (KINDS.index(kind(item[1])), item[0])))


def find(name: str) -> type[Callback]:
    """A callback by its name in callbacks/, or by its dotted path.

    Raises:
        ValueError: if there is none.
    """
    if name in found():
        return found()[name]
    module, dot, own = name.rpartition(".")
    if not dot:
        raise ValueError(f"no callback '{name}' in callbacks/; one of yours is named with its module: my_module.{name}")
    try:
        cls = getattr(importlib.import_module(module), own)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"'{name}' can't be imported: {' '.join(str(error).split())}") from error
    if not (inspect.isclass(cls) and issubclass(cls, Callback)):
        raise ValueError(f"'{name}' is no class below lightning.pytorch.Callback")
    return cls


def kind(cls: type[Callback]) -> str:
    """``technique``, ``diagnostic`` or ``other``."""
    return "technique" if issubclass(cls, Perturbation) else "diagnostic" if issubclass(cls, Diagnostic) else "other"


def make(name: str, recipe: str, /, **more: Any) -> Callback:
    """The callback with what it can't do without on this recipe."""
    cls = find(name)
    if issubclass(cls, Perturbation):
        return cells.technique(cls, recipe, **more)
    if issubclass(cls, Diagnostic):
        given = (diagnostics.ARGUMENTS.get(cls.__name__, {}), FEWER.get(cls.__name__, {}))
        on = diagnostics.ON.get((recipe, cls.__name__), {})
        return cls(**{"share": None, **given[0], **given[1], **on, **more})
    return cls(**{**ARGUMENTS.get(cls.__name__, {}), **more})


def has_twin(name: str) -> bool:
    """Whether two of it can stand in one run, told apart by ``name=``."""
    return kind(find(name)) != "other"


def apart(recipe: str, name: str) -> bool:
    """Whether it is known that these don't go together."""
    return any((recipe, name) in known for known in (cells.APART, diagnostics.APART, APART))


# ---------------------------------------------------------------------- one cell


class Refused(Exception):
    """A line of our code that says why the callbacks don't go with the recipe."""


def _in_words(error: BaseException, names: Sequence[str]) -> bool:
    """Whether an error is a refusal: one line, raised by our code (or the user's callback) on purpose."""
    if type(error) not in (ValueError, MisconfigurationException):
        return False
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    own = [Path(inspect.getfile(find(name))).resolve() for name in names]
    ours = raised in own or any(raised.is_relative_to(HOME / p) for p in ("callbacks", "recipes", "datamodules"))
    text = str(error)
    return ours and "\n" not in text and len(text.split()) > 3


def _seeded() -> None:
    torch.manual_seed(5), random.seed(5), np.random.seed(5)


def _watched(recipe: str, *looks: Callback, **options: Any) -> tuple[Watch, LightningModule, Any]:
    """A short fit in which the random stream runs on, so that a draw too many shows, and what could be touched."""
    watch, module = Watch(), cells.recipe(recipe)
    size = options.pop("size", cells.BATCH * cells.STEPS)
    _seeded()
    runner = diagnostics.quiet_trainer(*looks, watch, exact=False, **options)
    runner.fit(module, datamodule=cells.data(recipe, size=size))
    for seen in watch.seen:
        if seen["when"] == "before a step":  # a hook may hang for the step; after it, it may not
            seen["flags and hooks"] = ""
    assert runner.global_step == cells.STEPS * runner.max_epochs // runner.accumulate_grad_batches or size > 12
    assert not laws._hooks(module), "hooks are left on the network"
    finite = all(bool(torch.isfinite(v).all()) for v in module.state_dict().values() if v.is_floating_point())
    assert finite, "a weight is not finite"
    return watch, module, runner


@functools.cache
def _alone(recipe: str, names: tuple[str, ...], options: tuple[tuple[str, Any], ...]) -> Watch:
    """What techniques (or none) do without anybody looking."""
    return _watched(recipe, *(make(name, recipe) for name in names), **dict(options))[0]


def _tested(recipe: str, module: LightningModule, parts: Sequence[Callback]) -> dict[str, float]:
    """The metrics of a test, which leaves the network as it was."""
    before, flags = cells.weights(module), laws._flags(module)
    data = cells.data(recipe)
    (values,) = cells.trainer(*parts).test(module, datamodule=data, verbose=False) or [{}]
    assert not cells.differing(before, cells.weights(module)), "test changed the weights"
    assert laws._flags(module) == flags, "test changed the network's flags or hooks"
    return values


def _looks_leave_no_trace(recipe: str, names: Sequence[str], **options: Any) -> None:
    """Weights, gradients, optimizer and random streams are to the last bit those without what only looks."""
    parts = _parts(recipe, names)
    acting = tuple(name for name in names if kind(find(name)) == "technique")
    watch, module, _ = _watched(recipe, *parts, **options)
    compare(_alone(recipe, acting, tuple(options.items())), watch)
    for part in parts:
        assert not isinstance(part, Diagnostic) or part.steps, f"{part.name} measured nothing"
    if any(_tests(name) for name in names):
        _tested(recipe, module, parts)


def _tests(name: str) -> bool:
    hooks = ("on_test_start", "on_test_batch_end", "on_test_epoch_end", "on_test_end")
    return any(getattr(find(name), hook) is not getattr(Callback, hook) for hook in hooks)


def _parts(recipe: str, names: Sequence[str]) -> list[Callback]:
    twins = [{"name": "second"} if name in names[:place] else {} for place, name in enumerate(names)]
    return [make(name, recipe, **more) for name, more in zip(names, twins, strict=True)]


def _off_at_evaluation(recipe: str, name: str) -> None:
    """What only looks leaves the metrics of a test, beside its own, as they are."""
    module = cells.recipe(recipe)
    plain = _tested(recipe, module, [])
    looked = _tested(recipe, module, [make(name, recipe)])
    assert {n: repr(v) for n, v in looked.items() if n in plain} == {n: repr(v) for n, v in plain.items()}, (
        "the test's own metrics differ"
    )


def _looks_resume(recipe: str, name: str, folder: Path) -> None:
    """Killed in mid-epoch and resumed, it holds what it would have held."""
    file = folder / "killed.ckpt"

    def fit(*more: Callback, resume: Path | None = None) -> tuple[LightningModule, Callback]:
        module, look = cells.recipe(recipe), make(name, recipe)
        with contextlib.suppress(KeyError):
            runner = cells.trainer(look, *more, max_epochs=2)
            runner.fit(module, datamodule=cells.data(recipe), ckpt_path=resume, weights_only=True)
        return module, look

    whole, look = fit()
    fit(laws.Kill(file, cells.STEPS + 2))
    again, resumed = fit(resume=file)
    assert not cells.differing(whole.state_dict(), again.state_dict()), "the weights differ"
    held = [repr(laws._plainly(each.state_dict())) for each in (look, resumed)]
    assert held[0] == held[1], "what it has seen differs"
    if isinstance(look, Diagnostic):
        histories = [repr(laws._plainly(each.history)) for each in (look, resumed)]  # type: ignore[attr-defined]
        assert histories[0] == histories[1], "what it has measured differs"


def _nothing_together(recipe: str, makes: Sequence[laws.Make]) -> None:
    """Law 2 of several: all at zero strength, the run is bit-identical to the run without them."""
    module, losses = cells.recipe(recipe), laws._Losses()
    cells.trainer(*(m() for m in makes), losses, max_epochs=2).fit(module, datamodule=cells.data(recipe))
    plain_weights, plain_losses = laws._plain_run(recipe)
    assert losses.losses == plain_losses, "at zero strength the losses differ"
    assert not cells.differing(cells.weights(module), plain_weights), "at zero strength the weights differ"


def _zero(name: str) -> Mapping[str, Any]:
    zero: Mapping[str, Any] = find(name).zero  # type: ignore[attr-defined]  # a technique's
    assert zero, f"{name} must say at which settings it does nothing (`zero`)"
    return zero


def _laws_of_one(recipe: str, name: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """The laws by their number; what one process can check of them in three steps."""
    if kind(find(name)) != "technique":
        looser = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "size": 4 * cells.BATCH}
        return {
            "1": lambda: _looks_leave_no_trace(recipe, [name], max_epochs=2),
            "3": lambda: _off_at_evaluation(recipe, name),
            "5": lambda: _looks_resume(recipe, name, folder),
            "7": lambda: _looks_leave_no_trace(recipe, [name], max_epochs=1, **looser),
        }
    one: laws.Make = functools.partial(make, name, recipe)  # type: ignore[assignment]  # of a technique
    return {
        "1": lambda: (laws.no_trace(recipe, one), laws.no_trace_of_a_failed_step(recipe, one)),
        "2": lambda: laws.zero_is_nothing(recipe, functools.partial(one, **_zero(name))),
        "3": lambda: laws.off_at_evaluation(recipe, one),
        "5": lambda: laws.resume_is_exact(recipe, one, folder, cells.STEPS + 2),
        "7": lambda: (laws.accumulates(recipe, one), laws.same_in(recipe, one, 0.1, precision="bf16-mixed")),
    }


def _laws_of_two(recipe: str, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    if any(kind(find(name)) != "technique" for name in names):
        return {"1": lambda: _looks_leave_no_trace(recipe, names, max_epochs=1)}
    twin = {"name": "second"} if names[0] == names[1] else {}
    makes = [functools.partial(make, names[0], recipe), functools.partial(make, names[1], recipe, **twin)]

    def at_zero() -> None:
        _nothing_together(recipe, [functools.partial(m, **_zero(n)) for m, n in zip(makes, names, strict=True)])

    return {"6": lambda: laws.composes(recipe, *makes), "2": at_zero}


def run(recipe: str, names: Sequence[str], folder: Path) -> Finding:
    """What comes of these callbacks on a recipe.

    Args:
        recipe: its name.
        names: one or two callbacks, see :func:`find`; in the order of the trainer's list.
        folder: for checkpoints, which stay.

    Returns:
        ``recipe``, ``callbacks``, ``verdict`` (see above), ``reason`` (one line, empty where it plugs in), ``laws``
        (number to ``holds`` or what is wrong), ``seconds``; of a refusal ``of``, the classes of the recipe's network,
        module and data, which reasons name; and of a crash its ``traceback``.
    """
    begun, checked = time.perf_counter(), dict[str, str]()
    verdict, reason, trace = "plugs in", "", ""
    number = ""
    try:
        if len(names) == 1:
            _tested(recipe, _fitted(recipe, names), _parts(recipe, names))
            todo = _laws_of_one(recipe, names[0], folder)
        else:
            todo = _laws_of_two(recipe, names)
        for number, law in todo.items():
            try:
                law()
                checked[number] = "holds"
            except AssertionError as error:
                checked[number] = " ".join(str(error).split()) or "an assertion failed"
                verdict, reason = "breaks", reason or f"law {number}: {checked[number]}"
    except AssertionError as error:
        verdict, reason = "breaks", " ".join(str(error).split()) or "an assertion failed"
    except Exception as error:
        text = " ".join(f"{error}".split()) or type(error).__name__
        if _in_words(error, names) and not checked:
            verdict, reason = "refuses", text
        else:
            verdict, trace = "crashes", traceback.format_exc()
            reason = f"{type(error).__name__}: {text}"[:300] + (f" (law {number})" if number else "")
    finding: Finding = {
        "recipe": recipe,
        "callbacks": list(names),
        "verdict": verdict,
        "reason": reason,
        "laws": checked,
    }
    finding["seconds"] = round(time.perf_counter() - begun, 3)
    if verdict == "refuses":
        module = cells.recipe(recipe)
        finding["of"] = [type(each).__name__ for each in (backbone_of(module), module, cells.data(recipe))]
    return {**finding, **({"traceback": trace} if trace else {})}


def _fitted(recipe: str, names: Sequence[str]) -> LightningModule:
    """Three steps and a validation, as the command line trains."""
    module = cells.recipe(recipe)
    runner = cells.trainer(*_parts(recipe, names))
    runner.fit(module, datamodule=cells.data(recipe))
    assert runner.global_step == cells.STEPS, f"took {runner.global_step} steps in place of {cells.STEPS}"
    assert not laws._hooks(module), "hooks are left on the network"
    finite = all(bool(torch.isfinite(v).all()) for v in module.state_dict().values() if v.is_floating_point())
    assert finite, "a weight is not finite"
    return module


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a callback prints isn't an answer
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "callbacks", "recipes", "datamodules"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="matrix-", ignore_cleanup_errors=True) as folder:
        os.chdir(folder)  # plots of a cell
        for line in sys.stdin:
            wanted = json.loads(line)
            if "describe" in wanted:
                answer: Any = _described(wanted["describe"])
            else:
                answer = run(wanted["recipe"], wanted["callbacks"], Path(folder))
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        os.chdir("/")


def _described(names: Sequence[str]) -> dict[str, Any]:
    """Kinds of these callbacks, or of all; and the recipes."""
    try:
        of = {name: kind(find(name)) for name in (names or found())}
    except ValueError as error:
        return {"error": str(error), "known": list(found())}
    return {"callbacks": of, "recipes": sorted(cells.recipes()), "excluded": EXCLUDED}


if __name__ == "__main__":
    main()
