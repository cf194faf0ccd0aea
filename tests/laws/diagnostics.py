"""What the laws of diagnostics are applied to: every public Diagnostic of callbacks/, on every recipe."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import callbacks
from callbacks.diagnostic import Diagnostic
from callbacks.exact_resume import ExactResume
from tests.laws import cells

#: Arguments that a diagnostic can't do without, or with which it does something in a few steps, by class name.
ARGUMENTS: dict[str, dict[str, Any]] = {}
#: The same for one recipe.
ON: dict[tuple[str, str], dict[str, Any]] = {}
#: (recipe, diagnostic) that don't go together, and a part of what the diagnostic then says (a ValueError).
APART: dict[tuple[str, str], str] = {}
for _name in ("clip", "coprompt"):  # whose logits are cosines with features of texts
    APART[_name, "NeuralCollapse"] = "needs a linear layer that gives the logits"
APART["lazy_to_rich", "NeuralCollapse"] = "needs a linear head"
APART["scalelong", "NeuralCollapse"] = "needs logits"
for _name in ("clip", "coprompt", "scalelong"):  # whose towers have GELU
    APART[_name, "LocalComplexity"] = "isn't piecewise linear"
APART["attention_at", "LocalComplexity"] = "an entry 'image' of floats"
APART["scalelong", "Grokking"] = "needs logits"
ON["attention_at", "Grokking"] = {"eps": 0.0}
APART["scalelong", "GeneralizationMeasures"] = "needs logits"
APART["scalelong", "SGDTemperature"] = "needs logits"
ARGUMENTS["OpposingSignals"] = {"warmup": 0, "q": 2, "probe": 12}
ARGUMENTS["Sharpness"] = {"iterations": 4}
ARGUMENTS["LocalComplexity"] = {"points": 5, "measurements": 5}
for _name in ("OpposingSignals", "Sharpness"):
    APART["scalelong", _name] = "needs logits"


def diagnostics() -> dict[str, type[Diagnostic]]:
    """Every public diagnostic of callbacks/, by name."""
    for module in pkgutil.iter_modules(callbacks.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"callbacks.{module.name}")
    found = [c for c in cells._below(Diagnostic) if c.__module__.startswith("callbacks.")]
    return {c.__name__: c for c in sorted(found, key=lambda c: c.__name__) if not c.__name__.startswith("_")}


def make(name: str, on: str = "classifier", **more: Any) -> Diagnostic:
    cls = diagnostics()[name]
    return cls(**{"share": None, **ARGUMENTS.get(name, {}), **ON.get((on, name), {}), **more})


class Own(LightningModule):
    """A user's own module: another loss, batches that are pairs, a plain loop, dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()
        )
        self.top = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * 64, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, image: Tensor) -> Tensor:
        return self.top(self.body(image))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


#: Layers of it, for diagnostics that ask for some.
OWN_ARGUMENTS: dict[str, dict[str, Any]] = {}


def own_data(part: int) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(part)
    images, label = torch.rand(12, 3, 32, 32, generator=g), torch.arange(12) % 3
    return DataLoader(TensorDataset(images, label), 4, shuffle=part == 1)


def quiet_trainer(*parts: Callback, exact: bool = True, **options: Any) -> Trainer:
    """As the command line makes it; without ``exact`` the random stream runs on from step to step."""
    options = {"max_epochs": 2, **options}
    if exact:
        return cells.trainer(*parts, **options)
    runner = cells.trainer(*parts, **options)
    runner.callbacks = [c for c in runner.callbacks if not isinstance(c, ExactResume)]  # type: ignore[attr-defined]
    return runner


def two_ranks_cell(recipe: str, names: Sequence[str], batch: int, **options: Any) -> dict[str, Any]:
    """Histories of a short double precision run, without batch norm's means and dropout."""
    torch.manual_seed(0)
    looks = [make(name, recipe) for name in names]
    runner = cells.trainer(*looks, max_epochs=2, precision="64-true", **options)
    module = cells.recipe(recipe, norm=False, drop=False)
    runner.fit(module, datamodule=cells.data(recipe, batch_size=batch))
    return {key: points for look in looks for key, points in look.history.items()}


def looks_on() -> list[tuple[str, tuple[str, ...]]]:
    """What is tried: each diagnostic by itself on the classifier, all that take it together on every other recipe."""
    names = [name for name in sorted(diagnostics()) if ("classifier", name) not in APART]
    found: list[tuple[str, tuple[str, ...]]] = [("classifier", (name,)) for name in names]
    for recipe in sorted(cells.recipes()):
        together = tuple(name for name in sorted(diagnostics()) if (recipe, name) not in APART)
        if recipe != "classifier" and together:
            found.append((recipe, together))
    return found
