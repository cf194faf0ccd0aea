"""Free adversarial training against its algorithm in a plain loop; replays in the loader; resuming between replays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.free import FreeAdversary
from datamodules.sampling import Draw, TrainBatches
from tests.callbacks.small import Net, images, trainer
from tests.laws import cells

EPS = 0.3


def published(module: Net, batches: list[Any], replays: int, norm: str) -> Tensor:
    """The released loop, with the box of the images at hand."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    carried = torch.zeros_like(batches[0]["image"])
    for batch in batches:
        x = batch["image"]
        for _ in range(replays):
            d = carried.clamp(-EPS, EPS)
            d = (torch.maximum(torch.minimum(x + d, x.clamp(min=1.0)), x.clamp(max=0.0)) - x).requires_grad_()
            loss = module.loss({"image": x + d, "label": batch["label"]})
            optimizer.zero_grad()
            loss.backward()
            assert d.grad is not None
            with torch.no_grad():
                if norm == "linf":
                    d = (d + EPS * d.grad.sign()).clamp(-EPS, EPS)
                else:
                    d = d + EPS * torch.stack([g / g.norm() for g in d.grad])
                    d = torch.stack([row * min(1.0, EPS / float(row.norm())) for row in d])
                carried = torch.maximum(torch.minimum(x + d, x.clamp(min=1.0)), x.clamp(max=0.0)) - x
            optimizer.step()
    return carried


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_the_published_loop(norm: Any) -> None:
    ours, twin = Net(), Net()
    for module in (ours, twin):
        module.backbone[2].p = 0.0
    batches = [{**b, "image": b["image"].sigmoid()} for b in images()]
    technique = FreeAdversary(EPS, 1, norm)
    replayed = [batch for batch in batches for _ in range(3)]

    def first(module: Any) -> Any:  # one optimizer without a schedule
        return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)

    ours.configure_optimizers = lambda: first(ours)  # type: ignore[method-assign]
    trainer(technique, limit_val_batches=0).fit(ours, DataLoader(replayed, batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    twin.train()
    carried = published(twin, batches, 3, norm)
    assert technique.carried is not None
    torch.testing.assert_close(technique.carried, carried, rtol=1e-3, atol=1e-5)
    for (name, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_batches_come_in_a_row() -> None:
    once = list(TrainBatches(10, 2, 3, 0, 1))
    thrice = TrainBatches(10, 2, 3, 0, 1, replays=3)
    assert list(thrice) == [batch for batch in once for _ in range(3)] and len(thrice) == 15
    thrice.consumed, thrice.replayed = 4, 2
    assert list(thrice) == [once[2], *(b for b in once[3:] for _ in range(3))]
    assert list(thrice) == [batch for batch in once for _ in range(3)], "only the first epoch after resuming is cut"
    assert isinstance(once[0][0], Draw)


class Seen(FreeAdversary):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.indices: list[list[int]] = []
        self.inputs: list[Tensor] = []

    def perturb(self, module: Any, batch: Any) -> None:
        super().perturb(module, batch)
        self.indices.append(batch["index"].tolist())
        self.inputs.append(batch["image"].detach().clone())


def test_an_epoch_is_as_many_passes_and_schedules_count_them() -> None:
    technique, module = Seen(EPS, 4), cells.recipe("classifier")
    data = cells.data("classifier")
    fitted = trainer(technique, max_epochs=2, use_distributed_sampler=False)
    fitted.fit(module, datamodule=data)
    assert fitted.global_step == 2 * 4 * cells.STEPS == len(technique.indices)
    for i in range(0, len(technique.indices), 4):
        assert technique.indices[i : i + 4] == [technique.indices[i]] * 4
    assert fitted.estimated_stepping_batches == 2 * 4 * cells.STEPS
    assert data.replays == 1, "the data is as before"  # type: ignore[attr-defined]


@pytest.mark.parametrize("stop", [5, 8, 12, 17])
def test_resumes_between_replays(stop: int, tmp_path: Path) -> None:
    """3 batches of 4 replays: stopped within a batch's replays, between batches, and at an epoch's end."""

    def run(technique: Seen, **options: Any) -> Any:
        module = cells.recipe("classifier")
        fitted = cells.trainer(technique, max_epochs=2, **options)
        return module, fitted

    whole = Seen(EPS, 4)
    module, fitted = run(whole)
    fitted.fit(module, datamodule=cells.data("classifier"))
    first = Seen(EPS, 4)
    half, runner = run(first)
    original = half.on_train_batch_start

    def save(batch: Any, batch_idx: int) -> Any:
        if runner.global_step == stop:
            runner.save_checkpoint(tmp_path / "there.ckpt")
            raise KeyError("killed")
        return original(batch, batch_idx)

    half.on_train_batch_start = save
    with pytest.raises(KeyError, match="killed"):
        runner.fit(half, datamodule=cells.data("classifier"))
    rest = Seen(EPS, 4)
    again, runner = run(rest)
    runner.fit(again, datamodule=cells.data("classifier"), ckpt_path=tmp_path / "there.ckpt", weights_only=True)
    assert rest.indices == whole.indices[stop:]
    for a, b in zip(rest.inputs, whole.inputs[stop:], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(again.parameters(), module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_perturbations_stay_in_ball_and_box_of_the_images_at_hand() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Watch(FreeAdversary):
        def perturb(self, module: Any, batch: Any) -> None:
            before = batch["image"]
            super().perturb(module, batch)
            seen.append((before, batch["image"].detach()))

    fitted = trainer(Watch(EPS, 2), max_epochs=2, use_distributed_sampler=False)
    fitted.fit(cells.recipe("classifier"), datamodule=cells.data("classifier"))
    for x, moved in seen:
        assert (moved - x).abs().max() <= EPS + 1e-7 and moved.min() >= 0 and moved.max() <= 1
    assert any((moved - x).abs().max() > EPS / 2 for x, moved in seen)


def test_a_smaller_batch_takes_the_first_rows_and_leaves_the_rest() -> None:
    technique = FreeAdversary(EPS, 1, bounds=None)
    technique.carried = torch.full((4, 2), 0.1)
    batch: dict[str, Any] = {"image": torch.zeros(3, 2)}
    technique.perturb(torch.nn.Module(), batch)  # type: ignore[arg-type]  # it asks nothing of the module
    (batch["image"] * torch.tensor([1.0, -1.0])).sum().backward()
    technique.restore(torch.nn.Module())  # type: ignore[arg-type]  # nor here
    wanted = torch.tensor([[0.3, -0.2]] * 3 + [[0.1, 0.1]])
    torch.testing.assert_close(technique.carried, wanted)


def test_data_that_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(ValueError, match="can't replay the batches of NoneType: take a DataModule"):
        trainer(FreeAdversary(EPS, 2)).fit(Net(), images())
    with pytest.raises(ValueError, match="replays must be at least 1"):
        FreeAdversary(replays=0)
