"""The benchmark of the data runs and prints its tables; what it measures takes minutes and is not judged here."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests import benchmarks
from tests.benchmark_data import Waiting, batches
from tests.laws.cells import Images


def test_the_quick_benchmark_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["data", "--quick"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if re.match(r"\|.*\d \|$", line)]
    names = ["tree, 0", "Digits", "Mails", "Mails", "JPEGs, 0", "JPEGs, cached, 0", "adversarial_training, Digits, 0"]
    assert [row[0].strip() for row in rows] == names
    assert all(float(cell) >= 0 for row in rows for cell in row[1:])
    assert all(0 <= float(row[1]) < 1 for row in rows[4:]) and float(rows[3][1]) < float(rows[3][2])


def test_waiting_is_the_time_in_the_loader() -> None:
    """Batches that take 20 ms, steps that take 60 ms: a quarter, whatever the first batch of the run took."""
    data = Images()
    data.setup("fit")
    examples, watch = data.part("train"), Waiting()
    plain, slept = type(examples).__getitems__, [0.5]

    def slow(self: Any, draws: Any) -> Any:
        time.sleep(slept.pop() if slept else 0.02)
        return plain(self, draws)

    with pytest.MonkeyPatch.context() as patch, watch.watching():
        patch.setattr(type(examples), "__getitems__", slow)
        loader = data.train_dataloader()
        for _ in range(2):
            for _ in loader:
                time.sleep(0.06)
    share, step = watch.share()
    assert 0.15 < share < 0.4 and step > 70
    assert len(watch.epochs) == 2 and type(iter(loader)) is not type(watch) and isinstance(loader, DataLoader)


def test_epochs_follow_each_other() -> None:
    data = Images()
    data.setup("fit")
    loader = data.train_dataloader()
    endless = batches(loader)
    first, second = ([next(endless)["index"] for _ in range(len(loader))] for _ in range(2))
    assert not torch.equal(torch.cat(first), torch.cat(second))
