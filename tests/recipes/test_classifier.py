"""The plain classifier, from outside: what it logs, what it optimises, how its learning rate moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from callbacks.style import AdvStyle
from datamodules import FashionMNIST
from recipes.adversarial_training import AdversarialTrainer
from recipes.classifier import Classifier
from recipes.classifier.module import DomainConfusion
from tests.laws import cells

SMALL = {"backbone": "resnet10t", "backbone_args": {"channels": (8, 8, 16, 16), "stem_width": 8}, "image_size": 32}


def trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**quiet, "max_epochs": 1, "accelerator": "cpu", **options})


class Batches(LightningDataModule):
    """A few random batches, the last one smaller."""

    def __init__(self, domains: tuple[int, ...] = (0, 2)) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.batches = [
            {
                "image": torch.rand(n, 3, 32, 32, generator=g),
                "label": torch.randint(0, 5, (n,), generator=g),
                "domain": torch.tensor(domains)[torch.randint(0, len(domains), (n,), generator=g)],
                "index": torch.arange(n),
            }
            for n in (8, 8, 3)
        ]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def test_accuracy_per_domain_counts_images_and_the_mean_counts_domains() -> None:
    data = Batches()
    model = Classifier(num_classes=5, domain_names=["a", "b", "c"], **SMALL)
    runner = trainer()
    runner.test(model, datamodule=data, verbose=False)
    found = {name: float(v) for name, v in runner.callback_metrics.items()}
    label, domain = (torch.cat([b[k] for b in data.batches]) for k in ("label", "domain"))
    with torch.no_grad():
        model.eval()
        right = torch.cat([model(b["image"]).argmax(1) for b in data.batches]) == label
    a, c = (right[domain == d].float().mean().item() for d in (0, 2))
    assert found == pytest.approx({"test/acc_a": a, "test/acc_c": c, "test/acc": (a + c) / 2}, abs=1e-6)
    assert model.confusion.shape == (3, 5, 5) and model.confusion[1].sum() == 0 and model.confusion.sum() == 19
    assert torch.equal(model.confusion[2].sum(1), torch.bincount(label[domain == 2], minlength=5))


def test_confusion_has_true_classes_in_its_rows() -> None:
    counts = DomainConfusion(2, 3)
    counts.update(torch.tensor([2, 0, 0]), torch.tensor([1, 0, 0]), torch.tensor([1, 0, 1]))
    wanted = torch.zeros(2, 3, 3, dtype=torch.long)
    wanted[1, 1, 2] = wanted[0, 0, 0] = wanted[1, 0, 0] = 1
    assert torch.equal(counts.compute(), wanted)


def test_normalisation_sits_inside_the_model() -> None:
    model = Classifier(num_classes=5, **SMALL).eval()
    image = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    by_hand = (image - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(model(image), model.backbone(by_hand))


@pytest.mark.parametrize("warmup", [0, 2])
def test_learning_rate_warms_up_and_follows_a_cosine(warmup: int) -> None:
    model = Classifier(num_classes=5, lr=0.3, warmup_epochs=warmup, **SMALL)
    model.trainer = trainer(max_epochs=6)  # type: ignore[assignment]
    [optimizer], [scheduler] = model.configure_optimizers()
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    left = 6 - warmup
    wanted = [0.3 * (e + 1) / (warmup + 1) for e in range(warmup)]
    wanted += [0.15 * (1 + math.cos(math.pi * e / left)) for e in range(left)]
    assert rates == pytest.approx(wanted)


def test_intensities_have_a_group_without_weight_decay_and_are_trained() -> None:
    model = Classifier(num_classes=5, weight_decay=0.1, **SMALL)
    runner = trainer(max_epochs=2, callbacks=[AdvStyle(adv_weight=1.0, p_identity=0.0, p_dsu=0.0)])
    runner.fit(model, datamodule=Batches())
    groups = {g["name"]: g for g in runner.optimizers[0].param_groups}
    assert groups.keys() == {"model", "perturbations.adv_style"}
    assert (groups["model"]["weight_decay"], groups["perturbations.adv_style"]["weight_decay"]) == (0.1, 0.0)
    everything = {id(p) for p in model.parameters()}
    assert sorted(id(p) for g in groups.values() for p in g["params"]) == sorted(everything)
    assert all(float(layer.theta.detach().std()) > 0 for layer in model.perturbations["adv_style"].values())


def test_an_unknown_backbone_names_near_ones() -> None:
    with pytest.raises(ValueError, match="no model 'resnet19'"):
        Classifier(backbone="resnet19")


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(ValueError, match="weights of 'resnet18' can't be fetched: .* --model.pretrained false"):
        Classifier(pretrained=True)


def test_a_bare_trainer_goes_on_without_the_technique(tmp_path) -> None:  # type: ignore[no-untyped-def]
    first = trainer(callbacks=[AdvStyle()])
    first.fit(Classifier(num_classes=5, **SMALL), datamodule=Batches())
    first.save_checkpoint(tmp_path / "c.ckpt")
    model = Classifier(num_classes=5, **SMALL)
    second = trainer(max_epochs=2)
    second.fit(model, datamodule=Batches(), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
    assert [g["name"] for g in second.optimizers[0].param_groups] == ["model"]
    assert second.global_step == 6


def test_checkpoints_open_with_weights_only(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = Classifier(num_classes=5, class_names=["v", "w", "x", "y", "z"], **SMALL)
    runner = trainer(callbacks=[AdvStyle()])
    runner.fit(model, datamodule=Batches())
    runner.save_checkpoint(tmp_path / "c.ckpt")
    torch.load(tmp_path / "c.ckpt", weights_only=True)
    again = Classifier.load_from_checkpoint(tmp_path / "c.ckpt", weights_only=True)  # without the technique
    assert not [name for name in again.state_dict() if name.startswith("perturbations")]
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("objective", ["standard", "vat"])
def test_images_without_labels_need_an_objective_that_takes_them(objective: Any) -> None:
    settings: dict[str, Any] = {"num_classes": 10, "in_chans": 1, "image_size": 28}
    data = FashionMNIST(train_size=100, val_size=20, labelled=20, batch_size=50)
    module = AdversarialTrainer("cnn4", objective=objective, eps=0.5, steps=1, **settings)
    options = {"limit_val_batches": 0}
    if objective == "vat":
        cells.trainer(**options).fit(module, datamodule=data)
        assert all(p.isfinite().all() for p in module.parameters())
        module = Classifier("cnn4", **settings)
    with pytest.raises(ValueError, match="only 20 have one: leave --data.labelled out"):
        cells.trainer(**options).fit(module, datamodule=data)
