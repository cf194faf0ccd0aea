"""The scaled predictor, its temperature, and training that ends when all margins are fitted."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.exact_resume import ExactResume
from callbacks.sgd_noise import SGDTemperature
from datamodules.depleted import Depleted
from datamodules.parity import DigitsParity
from recipes._cli import run
from recipes.lazy_to_rich.module import LazyToRich, MeanFieldMLP, Perceptron, activation_scale, hinge


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"),
        False,
    )
    usual = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return Trainer(**{**quiet, **usual, **options}, callbacks=[ExactResume(), *callbacks])


def perceptron(**args: Any) -> LazyToRich:
    usual = {"network": "linear", "in_chans": 4, "image_size": 1, "alpha": 100.0, "temperature": 0.05}
    return LazyToRich(**{**usual, **args})


def points(**args: Any) -> Depleted:
    return Depleted(**{"d": 4, "size": 12, "val_size": 50, "test_size": 50, "epoch_steps": 100, "seed": 5, **args})


def mlp(**args: Any) -> LazyToRich:
    torch.manual_seed(7)
    usual = {"in_chans": 1, "image_size": 8, "width": 12, "depth": 2, "temperature": 0.01}
    return LazyToRich(**{**usual, **args})


# ---------------------------------------------------------------------- formulas


def test_hinge() -> None:
    predictor, label = torch.tensor([0.25, 0.25, 3.0, -3.0]), torch.tensor([1, 0, 1, 1])
    assert hinge(predictor, label, 4.0).tolist() == pytest.approx([0.75 / 4, 1.25 / 4, 0.0, 1.0])


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_activations_keep_the_second_moment(name: str) -> None:
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rho = (activation_scale(name) * getattr(torch.nn.functional, name)(z)).square()
    assert float(rho.mean()) == pytest.approx(1.0, abs=5 * float(rho.std()) / 1000)
    assert activation_scale("relu") == pytest.approx(math.sqrt(2), rel=1e-6)


def test_the_networks() -> None:
    torch.manual_seed(0)
    net, x = MeanFieldMLP(6, 5, 2, "relu"), torch.randn(3, 6)
    h = x
    for layer in (net.layer1, net.layer2):
        h = math.sqrt(2) * torch.relu(h @ layer.weight.T / math.sqrt(h.shape[1]))  # type: ignore[operator, union-attr]
    assert torch.allclose(net(x), (h * net.fc).sum(1) / 5, atol=1e-6)
    wide = MeanFieldMLP(400, 300, 1, "gelu")
    assert float(wide.layer1.weight.detach().std()) == pytest.approx(1.0, abs=0.01)  # type: ignore[operator, union-attr]
    assert sum(p.numel() for p in wide.parameters()) == 400 * 300 + 300, "no biases"
    line = Perceptron(4)
    with torch.no_grad():
        line.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert line(torch.ones(1, 4)).tolist() == [5.0]


def test_the_predictor_begins_at_zero_and_is_the_scaled_difference() -> None:
    module = mlp(alpha=50.0)
    image = torch.rand(4, 1, 8, 8)
    assert module.predictor(image).tolist() == [0.0] * 4
    with torch.no_grad():
        module.backbone.fc += 0.1  # type: ignore[operator, union-attr]
    x = image.flatten(1) - 0.5
    x = x / x.square().mean(1, keepdim=True).sqrt()
    wanted = 50 * (module.backbone(x) - module.initial(x))
    found = module.predictor({"image": image})
    assert torch.allclose(found, wanted) and bool((found != 0).all())
    logits = module(image)
    assert torch.allclose(logits[:, 1] - logits[:, 0], wanted)


def test_the_scale_survives_mixed_precision() -> None:
    module, batch = mlp(alpha=1e5), {"image": torch.rand(4, 1, 8, 8), "label": torch.tensor([0, 1, 0, 1])}
    with torch.no_grad():
        module.backbone.fc += 1e-4  # type: ignore[operator, union-attr]
    plain = module.predictor(batch)
    assert plain.dtype == torch.float32 and bool((plain != 0).all())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.predictor(batch), plain)


# ---------------------------------------------------------------------- training


def by_hand(data: Depleted, module: LazyToRich, steps: int) -> np.ndarray:
    """The same perceptron in NumPy, from the definition."""
    x, y = data.part("train").input.double().numpy(), 2 * data.part("train").entries["label"].numpy() - 1
    alpha, t = module.alpha, module.hparams["temperature"]
    w, seen = np.zeros(x.shape[1]), 0
    while seen < steps:
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(seen // len(loader))  # type: ignore[union-attr]
        for batch in loader.batch_sampler:  # type: ignore[union-attr]
            drawn = [draw.position for draw in batch]
            slope = np.zeros_like(w)
            for i in drawn:
                if y[i] * alpha * (w @ x[i]) / math.sqrt(len(w)) < 1:
                    slope -= y[i] * x[i] / math.sqrt(len(w)) / len(drawn)
            w = w - t * len(drawn) * slope
            seen += 1
            if seen == steps:
                break
    return w


def test_it_is_the_perceptron_of_the_paper_and_stops_when_all_margins_are_fitted() -> None:
    module, data = perceptron(check_every_n_steps=50), points()
    runner = trainer(max_epochs=50)
    runner.fit(module, datamodule=data)
    steps = runner.global_step
    assert int(module.fit_steps) == steps and steps % 50 == 0 and steps < 50 * 100
    wanted = by_hand(points(), module, steps)
    assert module.backbone.weight.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)  # type: ignore[union-attr]
    x, y = data.part("train").input, 2 * data.part("train").entries["label"] - 1
    assert float((y * 100 * (x @ module.backbone.weight.detach()) / 2).min()) >= 1  # type: ignore[operator, union-attr]
    later = by_hand(points(), module, steps + 200)
    assert later.tolist() == wanted.tolist(), "what is fitted doesn't move"
    (found,) = runner.test(module, datamodule=data, verbose=False)
    assert found["norm"] == pytest.approx(np.linalg.norm(wanted), rel=1e-4)
    assert found["log2_norm"] == pytest.approx(math.log2(np.linalg.norm(wanted)), rel=1e-4)
    assert found["norm_over_T"] == pytest.approx(np.linalg.norm(wanted) / 0.05, rel=1e-4)
    assert (found["w_par"], found["w_perp"]) == pytest.approx((wanted[0], np.linalg.norm(wanted[1:])), rel=1e-3)
    assert (found["unfitted"], found["diverged"], found["fit_steps"]) == (0, 0, steps)
    test = data.part("test")
    right = (test.input.double().numpy() @ wanted > 0) == test.entries["label"].numpy()
    assert found["test/acc"] == pytest.approx(right.mean())


def test_the_weights_at_the_end_do_not_depend_on_how_often_it_looks() -> None:
    modules = [perceptron(check_every_n_steps=n) for n in (5, 110)]
    for module in modules:
        trainer(max_epochs=50).fit(module, datamodule=points())
    assert torch.equal(modules[0].backbone.weight, modules[1].backbone.weight)  # type: ignore[arg-type, union-attr]
    assert int(modules[0].fit_steps) < int(modules[1].fit_steps)


def test_what_is_left_is_said() -> None:
    module, data = perceptron(temperature=1e-6), points(epoch_steps=20)
    runner = trainer()
    runner.fit(module, datamodule=data)
    (found,) = runner.test(module, datamodule=data, verbose=False)
    assert "fit_steps" not in found
    x, y = data.part("train").input, 2 * data.part("train").entries["label"] - 1
    margins = y * 100 * (x @ module.backbone.weight.detach()) / 2  # type: ignore[operator, union-attr]
    assert found["unfitted"] == pytest.approx(float((margins < 1).float().mean())) and found["unfitted"] > 0


def test_the_learning_rate_is_t_h_b() -> None:
    module, data = mlp(temperature=0.002), DigitsParity(size=64, batch_size=8, seed=0)
    runner = trainer(accumulate_grad_batches=2, limit_val_batches=0)
    runner.fit(module, datamodule=data)
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.002 * 12 * 8 * 2)
    diagnostic = SGDTemperature(width=12, threshold=1.0)
    trainer(diagnostic, limit_val_batches=0).fit(mlp(temperature=0.002), datamodule=data)
    assert diagnostic.history["sgd_temperature/temperature"][0][1] == pytest.approx(0.002)
    fixed = mlp(temperature=None, lr=0.3)
    runner = trainer(limit_val_batches=0)
    runner.fit(fixed, datamodule=data)
    assert runner.optimizers[0].param_groups[0]["lr"] == 0.3


def test_lazy_weights_move_less_than_rich_ones() -> None:
    moved = []
    for alpha in (100.0, 1.0):
        module = mlp(alpha=alpha, temperature=0.01)
        trainer(max_epochs=3, limit_val_batches=0).fit(module, datamodule=DigitsParity(size=200, seed=0))
        moved.append(module.weights()["weight_change"])
    assert 0 < moved[0] < moved[1] / 3


def test_a_run_that_diverges_says_so() -> None:
    module, data = (
        mlp(alpha=0.01, temperature=30.0, check_every_n_steps=5),
        DigitsParity(size=64, seed=0, epoch_steps=50),
    )
    runner = trainer(max_epochs=4)
    runner.fit(module, datamodule=data)
    assert runner.global_step < 200, "it goes on"
    (found,) = runner.test(module, datamodule=data, verbose=False)
    assert found["diverged"] == 1 and math.isnan(found["test/acc"]) and "fit_steps" not in found


# ---------------------------------------------------------------------- checkpoints


class Kill(Callback):
    """Saves and stops where a signal would."""

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.step = file, step

    def _end(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.file)
        raise KeyError("on purpose")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.is_last_batch:
            self._end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            self._end(trainer)


@pytest.mark.parametrize("stop", [30, 45], ids=["at an epoch's end", "in mid-epoch"])
def test_a_resumed_run_is_the_one_that_was_never_stopped(stop: int, tmp_path: Path) -> None:
    def data() -> DigitsParity:
        return DigitsParity(size=64, batch_size=4, epoch_steps=30, seed=0)

    whole = mlp()
    trainer(max_epochs=3).fit(whole, datamodule=data())
    file = tmp_path / "half.ckpt"
    with pytest.raises(KeyError, match="on purpose"):
        trainer(Kill(file, stop), max_epochs=3).fit(mlp(), datamodule=data())
    again = LazyToRich(in_chans=1, image_size=8, width=12, depth=2, temperature=0.01)  # of another initial function
    assert not torch.equal(again.initial.fc, whole.initial.fc)  # type: ignore[arg-type, union-attr]
    trainer(max_epochs=3).fit(again, datamodule=data(), ckpt_path=file, weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    image: Tensor = torch.rand(3, 1, 8, 8)
    assert torch.equal(whole.predictor(image), again.predictor(image))


def test_the_initial_function_is_not_trained() -> None:
    module = mlp()
    before = [p.clone() for p in module.initial.parameters()]
    trainer(limit_val_batches=0).fit(module, datamodule=DigitsParity(size=64, seed=0))
    assert all(torch.equal(a, b) for a, b in zip(before, module.initial.parameters(), strict=True))
    assert not torch.equal(module.backbone.fc, module.initial.fc)  # type: ignore[arg-type, union-attr]


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_classes": 3}, "two classes"),
        ({"lr": 0.1}, "either"),
        ({"temperature": None}, "either"),
        ({"temperature": -1.0}, "positive"),
        ({"temperature": 0.0}, "positive"),
        ({"alpha": 0.0}, "positive"),
        ({"width": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        mlp(**wrong)
    assert "\n" not in str(error.value)


def test_the_command_trains_and_writes_what_the_claim_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    small = ["--data.size", "12", "--data.epoch_steps", "400", "--data.test_size", "100", "--data.val_size", "100"]
    where = ["--trainer.default_root_dir", str(tmp_path), "--wandb", "off", "--seed_everything", "101"]
    assert run("recipes.lazy_to_rich.module.LazyToRich", "lazy_to_rich", ["fit", *small, *where]) == 0
    (file,) = tmp_path.glob("*/*/metrics.csv")
    rows = list(csv.DictReader(file.open()))
    for name in ("log2_norm", "norm_over_T", "unfitted", "fit_steps", "sgd_temperature/noise"):
        assert any(row[name] for row in rows), name
    assert (file.parent / "plots" / "sgd_temperature.png").is_file()


def test_margins_are_of_the_labels_that_are_trained_on() -> None:
    """With labels redrawn by LabelNoise, fitted means fitted to these."""
    from callbacks.label_noise import LabelNoise
    from tests.laws import cells

    noise, module = LabelNoise(p=1.0, seed=3), cells.recipe("lazy_to_rich")
    data = cells.data("lazy_to_rich")
    cells.trainer(noise).fit(module, datamodule=data)
    batch = data.part("train").plain(range(12))  # type: ignore[attr-defined]
    clean = batch["label"].clone()
    noise.as_trained(module, batch)
    assert not torch.equal(clean, batch["label"])
    y = 2.0 * batch["label"] - 1
    with torch.no_grad():
        margin = y * module.predictor(batch)  # type: ignore[operator]
    lowest, unfitted = module.margins()  # type: ignore[operator]
    assert lowest == pytest.approx(float(margin.min()), rel=1e-4)
    assert unfitted == pytest.approx(float((margin < 1).float().mean()))
