"""ExactResume: what is drawn at a batch depends on seed, rank, stage, epoch and batch, and on nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from callbacks.exact_resume import ExactResume
from tests.callbacks.small import Learned, Net, images, trainer


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


class Drawing(Callback):
    """Draws from all three streams at every batch of every loop; and in between, where it should be no matter."""

    def __init__(self, between: bool = False) -> None:
        self.between = between
        self.seen: dict[tuple[Any, ...], tuple[float, float, float]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen["train", trainer.current_epoch, batch_idx] = draws()

    def on_validation_batch_start(
        self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen["evaluate", trainer.current_epoch, batch_idx] = draws()

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def on_train_batch_end(self, *_: Any) -> None:
        if self.between:
            draws()

    on_train_epoch_start = on_validation_epoch_end = on_train_batch_end


def fitted(*callbacks: Any, stream: int = 0, **options: Any) -> dict[Any, Any]:
    torch.manual_seed(stream)
    drawing = next(c for c in callbacks if isinstance(c, Drawing))
    runner = trainer(*callbacks, **{"max_epochs": 2, **options})
    runner.fit(Net(), images(), images(2) if options.get("limit_val_batches") != 0 else None)
    return drawing.seen


def test_every_training_batch_has_draws_of_its_own() -> None:
    seen = fitted(ExactResume(), Drawing())
    train = [v for k, v in seen.items() if k[0] == "train"]
    assert len(train) == 8
    for stream in zip(*train, strict=True):
        assert len(set(stream)) == 8


def test_evaluation_draws_the_same_in_every_epoch_and_other_than_training() -> None:
    seen = fitted(ExactResume(), Drawing())
    assert [seen["evaluate", 0, b] for b in range(2)] == [seen["evaluate", 1, b] for b in range(2)]
    assert seen["evaluate", 0, 0] != seen["evaluate", 0, 1]
    assert not {v for k, v in seen.items() if k[0] == "train"} & {v for k, v in seen.items() if k[0] == "evaluate"}


def test_what_was_drawn_before_and_between_has_no_influence() -> None:
    plain = fitted(ExactResume(), Drawing())
    assert fitted(ExactResume(), Drawing(between=True), stream=99) == plain
    without = fitted(ExactResume(), Drawing(), limit_val_batches=0)
    assert without == {k: v for k, v in plain.items() if k[0] == "train"}
    assert fitted(Drawing(), stream=1) != fitted(Drawing(), stream=2), "the test must be able to fail"


def test_seeds_differ_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for seed in ("1", "2", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        found.append(fitted(ExactResume(), Drawing()))
    assert found[0] == found[2]
    assert not set(found[0].values()) & set(found[1].values())


def test_ranks_draw_different_numbers() -> None:
    class Rank:
        def __init__(self, rank: int) -> None:
            self.global_rank, self.current_epoch = rank, 0

    found = []
    for rank in range(2):
        ExactResume().on_train_batch_start(Rank(rank), Net(), {}, 0)  # type: ignore[arg-type]
        found.append(draws())
    assert all(a != b for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_verbs_draw_as_validation_does(verb: str) -> None:
    net, drawing = Net(), Drawing()
    net.test_step = net.validation_step  # type: ignore[method-assign,assignment]
    net.predict_step = lambda batch, batch_idx: None  # type: ignore[method-assign,assignment]
    options: dict[str, Any] = {} if verb == "predict" else {"verbose": False}
    getattr(trainer(ExactResume(), drawing), verb)(net, images(2), **options)
    within = fitted(ExactResume(), Drawing())
    assert drawing.seen == {k: v for k, v in within.items() if k[:2] == ("evaluate", 0)}


class Stop(Callback):
    """Saves after some steps, and fails."""

    def __init__(self, file: Path, steps: int) -> None:
        self.file, self.steps = file, steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.file)
            raise KeyError("stopped")


class Skipping:
    """The batches of :func:`images` from the n-th on, once: what the DataModule does at a resume."""

    def __init__(self, skip: int) -> None:
        self.skip = skip

    def __iter__(self) -> Any:
        skip, self.skip = self.skip, 0  # at the first batch: Lightning makes an iterator that it doesn't use
        yield from list(images())[skip:]

    def __len__(self) -> int:
        return 4


def test_dropout_of_a_resumed_run_in_mid_epoch(tmp_path: Path) -> None:
    whole = Net()
    trainer(ExactResume(), Learned(), max_epochs=2).fit(whole, images())
    file = tmp_path / "a.ckpt"
    with pytest.raises(KeyError):
        trainer(ExactResume(), Learned(), Stop(file, 6), max_epochs=2).fit(Net(), images())
    resumed = Net()
    torch.manual_seed(123)
    trainer(ExactResume(), Learned(), max_epochs=2).fit(resumed, Skipping(2), ckpt_path=file, weights_only=True)
    again = resumed.state_dict()
    assert [n for n, v in whole.state_dict().items() if not torch.equal(v, again[n])] == []


def test_alone_it_lets_a_checkpoint_open_that_had_a_technique(tmp_path: Path) -> None:
    runner = trainer(ExactResume(), Learned())
    runner.fit(Net(), images())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    net = Net()
    resumed = trainer(ExactResume(), max_epochs=2)
    resumed.fit(net, images(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert resumed.global_step == 8
    assert [g["name"] for g in resumed.optimizers[0].param_groups] == ["model"]
