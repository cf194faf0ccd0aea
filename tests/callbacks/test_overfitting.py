"""The watch for catastrophic overfitting: its number, its words, and that it ends a run when told to."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger

from callbacks.overfitting import CatastrophicOverfitting
from tests.callbacks.small import trainer


class Brittle(LightningModule):
    """Two classes told apart by one number, robust in the first epochs, brittle from epoch ``breaks`` on."""

    def __init__(self, breaks: int) -> None:
        super().__init__()
        self.breaks, self.eps = breaks, 0.1
        self.weight = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Decides by the first number, 0.3 away from the border, or by the second, 0.05 away."""
        broken = self.current_epoch >= self.breaks
        value = (x[:, 1] if broken else x[:, 0]) - 0.5
        return torch.stack([-value, value], 1) * 10

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight**2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> list[dict[str, torch.Tensor]]:
    label = torch.arange(8) % 2
    sign = 2.0 * label - 1
    image = torch.stack([0.5 + 0.3 * sign, 0.5 + 0.05 * sign], 1)
    last = torch.where(torch.arange(8) < 2, -1, label)  # two without a label don't count
    return [{"image": image, "label": label}, {"image": image, "label": last}]


class Loader:
    def __iter__(self) -> Any:
        return iter(batches())

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("stop", [False, True])
def test_a_fall_is_said_once_and_may_end_the_run(stop: bool, caplog: pytest.LogCaptureFixture) -> None:
    watch, values = CatastrophicOverfitting(stop=stop), []

    class Note(CatastrophicOverfitting):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            values.append(float(trainer.callback_metrics["train/pgd_acc"]))

        def on_train_batch_end(self, *_: Any) -> None:
            """Only notes what the other logged."""

    fitted = trainer(watch, Note(eps=1.0, drop=0.9), max_epochs=5)
    with caplog.at_level(logging.WARNING):
        fitted.fit(Brittle(2), Loader())
    said = [r.getMessage() for r in caplog.records if "catastrophic" in r.getMessage()]
    assert len(said) == 1 and "PGD-5 on a training batch fell from 1.00 to 0.00 in epoch 2" in said[0]
    assert fitted.current_epoch == (3 if stop else 5)
    assert values == [1.0, 1.0, 0.0, 0.0, 0.0][: len(values)] and len(values) == fitted.current_epoch


class Kept(Logger):
    """What a logger is given."""

    name, version = "kept", "0"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Not kept."""


def test_each_epochs_number_is_logged_wherever_steps_are() -> None:
    kept = Kept()
    trainer(CatastrophicOverfitting(), max_epochs=3, logger=kept, log_every_n_steps=50).fit(Brittle(2), Loader())
    assert [m["train/pgd_acc"] for m in kept.metrics if "train/pgd_acc" in m] == [1.0, 1.0, 0.0]


def test_a_robust_run_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer(CatastrophicOverfitting(stop=True), max_epochs=3).fit(Brittle(9), Loader())
    assert not [r for r in caplog.records if "catastrophic" in r.getMessage()]


def test_what_it_remembers_is_in_the_checkpoint() -> None:
    watch = CatastrophicOverfitting()
    trainer(watch, max_epochs=2).fit(Brittle(9), Loader())
    other = CatastrophicOverfitting()
    other.load_state_dict(watch.state_dict())
    assert other.before == 1.0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="drop lie between 0 and 1"):
        CatastrophicOverfitting(drop=1.5)
    module = Brittle(9)
    del module.eps
    with pytest.raises(ValueError, match="needs eps"):
        trainer(CatastrophicOverfitting()).fit(module, Loader())


class Maps(Brittle):
    """Gives a map of each image, as a denoiser does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, None, None]


class Radiusless(Brittle):
    def __init__(self) -> None:
        super().__init__(9)
        del self.eps


@pytest.mark.parametrize(
    ("module", "entries", "words"),
    [
        (Maps(9), {}, "needs a module whose forward gives logits"),
        (Radiusless(), {}, "needs eps"),
        (Brittle(9), {"image": torch.arange(8)}, "needs batches with 'image', floats, and 'label'"),
        (Brittle(9), {"image": None}, "needs batches with 'image', floats, and 'label'"),
        (Brittle(9), {"label": None}, "needs batches with 'image', floats, and 'label'"),
    ],
)
def test_what_it_cannot_watch_is_said_before_the_first_step(
    module: LightningModule, entries: dict[str, Any], words: str
) -> None:
    class Changed(Loader):
        def __iter__(self) -> Any:
            return ({k: v for k, v in {**batch, **entries}.items() if v is not None} for batch in batches())

    runner = trainer(CatastrophicOverfitting())
    with pytest.raises(ValueError, match=words) as error:
        runner.fit(module, Changed())
    assert "\n" not in str(error.value) and runner.global_step == 0
