"""The grokking recipe: its loss, what the network sees, its two diagnostics on one run of the command."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from callbacks.local_complexity import crossed_units, frame, gated_layers
from recipes._cli import CONFIGS, run
from recipes.grok import Grok
from recipes.grok.module import squared_error

SMALL: dict[str, Any] = {"backbone_args": {"width": 16, "depth": 2}, "in_chans": 1, "image_size": 8}


def grok(**more: Any) -> Grok:
    torch.manual_seed(0)
    return Grok(**{**SMALL, **more})


def batch(size: int = 12) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"image": torch.rand(size, 1, 8, 8, generator=g), "label": torch.arange(size) % 10}


def test_the_squared_error_is_the_mean_over_classes() -> None:
    found = squared_error(torch.tensor([[0.5, 0.0, 2.0], [1.0, 1.0, 1.0]]), torch.tensor([2, 0]))
    assert found.tolist() == pytest.approx([(0.25 + 0 + 1) / 3, 2 / 3])


@pytest.mark.parametrize("objective", ["mse", "ce"])
def test_the_loss_is_the_mean_over_examples(objective: Any) -> None:
    module, given = grok(objective=objective), batch()
    logits = module(given["image"])
    one_hot = torch.eye(10)[given["label"]]
    wanted = (
        (logits - one_hot).pow(2).mean() if objective == "mse" else -(logits.log_softmax(1) * one_hot).sum(1).mean()
    )
    torch.testing.assert_close(module.loss(given), wanted)
    torch.testing.assert_close(module.example_losses(given).mean(), wanted)
    assert module.example_losses(given).shape == (12,)


def test_smoothed_labels_are_those_of_cross_entropy_alone() -> None:
    module, given = grok(objective="ce", label_smoothing=0.2), batch()
    wanted = F.cross_entropy(module(given["image"]), given["label"], label_smoothing=0.2)
    torch.testing.assert_close(module.loss(given), wanted)
    with pytest.raises(ValueError, match="squared error has no label_smoothing"):
        grok(label_smoothing=0.2)
    with pytest.raises(ValueError, match="objective must be mse or ce, not 'mae'"):
        grok(objective="mae")


def test_the_network_sees_pixels_as_they_are_unless_asked(tmp_path: Path) -> None:
    image = batch()["image"]
    plain, normalised = grok(), grok(normalise=True)
    torch.testing.assert_close(plain(image), plain.backbone(image))
    torch.testing.assert_close(normalised(image), normalised.backbone((image - 0.5) / 0.25))
    for module in (plain, normalised):  # a checkpoint brings back what its network saw
        checkpoint: dict[str, Any] = {}
        module.on_save_checkpoint(checkpoint)
        for other in (grok(), grok(normalise=True)):
            other.backbone.load_state_dict(module.backbone.state_dict())
            other.normalise_as(checkpoint)
            torch.testing.assert_close(other(image), module(image))


def test_larger_initial_weights() -> None:
    one, four = grok(), grok(backbone_args={"width": 16, "depth": 2, "init_scale": 4.0})
    for a, b in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(4 * a, b)


def test_the_network_for_cifar_is_piecewise_linear() -> None:
    torch.manual_seed(0)
    full = Grok("preact_resnet18_plain", image_size=32)
    sizes = {"stem": 27 * 16 + 16, "first": 4 * (9 * 16 * 16 + 16), "head": 128 * 10 + 10}
    sizes |= {str(c): 9 * c * 2 * c + 3 * 9 * 4 * c * c + 2 * c * c + 5 * 2 * c for c in (16, 32, 64)}
    assert sum(p.numel() for p in full.parameters()) == sum(sizes.values())
    module = Grok("preact_resnet18_plain", image_size=32, backbone_args={"width": 4}).double().eval()
    layers = gated_layers(module)
    assert len(layers) == 17 and {"act", "layer1.0.act1", "layer4.1.act2"} <= layers.keys()
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows, r = frame(2, 3072, torch.Generator().manual_seed(3)), 1e-7
    counts = crossed_units(module, layers, x, rows, r)
    units = 4 * 4 * 32**2 + 4 * 32**2 + 3 * 8 * 16**2 + 8 * 16**2 + 3 * 16 * 8**2 + 16 * 8**2 + 4 * 32 * 4**2
    assert sum(number for _, number in counts.values()) == units
    assert not any(crossed.any() for crossed, _ in counts.values()), "the corners are in one region"
    step = r * rows[0].view_as(x)
    with torch.no_grad():  # where the network is affine
        torch.testing.assert_close(module(x + step) - module(x), module(x) - module(x - step), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="no pretrained weights"):
        Grok("preact_resnet18_plain", pretrained=True)


def test_one_run_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """default.yaml, shorter: both diagnostics are there, at the same steps, and say what a claim reads."""
    options = ["--trainer.max_epochs", "12", "--trainer.default_root_dir", str(tmp_path), "--wandb", "off"]
    assert run("recipes.grok.module.Grok", "grok", ["fit", "--seed_everything", "100", *options]) == 0
    (folder,) = (tmp_path / "grok").iterdir()
    steps: dict[str, list[int]] = {}
    last: dict[str, float] = {}
    with (folder / "metrics.csv").open(newline="") as opened:
        for row in csv.DictReader(opened):
            for name, text in row.items():
                if text and "/" in name:
                    steps.setdefault(name, []).append(int(row["step"]))
                    last[name] = float(text)
    assert steps["local_complexity/train"] == steps["grokking/robust_acc"]
    assert len(steps["local_complexity/train"]) > 15
    assert last["local_complexity/train_first_descent"] < 0.9, "the first fall takes a few dozen steps"
    assert last["local_complexity/train"] == pytest.approx(
        sum(last[f"local_complexity/train/layer{i}.1"] for i in (1, 2, 3))
    )
    assert last["grokking/train_acc"] > 0.9 and last["grokking/robust_acc"] <= last["grokking/val_acc"]
    for name in ("local_complexity", "grokking"):
        assert (folder / "plots" / f"{name}.png").stat().st_size > 5000
    assert "local_complexity: r 0.05, 40 corners in 64 dimensions, 128 points" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("grok/claim*.yaml")), ids=lambda f: f.stem)
def test_claims_read_what_is_logged(file: Path) -> None:
    from recipes._claim import read

    claim = read("/".join(["grok", *file.stem.split("_", 1)[1:]]))
    logged = {
        *(f"local_complexity/{p}{k}" for p in ("train", "val", "random") for k in ("", "_first_descent", "_ascent")),
        *(f"local_complexity/{p}_second_descent" for p in ("train", "val", "random")),
        *(f"grokking/{k}" for k in ("train_acc", "val_acc", "robust_acc", "train_step", "val_step", "val_delay")),
        *(f"grokking/robust_{k}" for k in ("peak", "peak_step", "end", "late_gain")),
        "grokking/weight_norm",
    }
    assert {claim.metric, *claim.also, *claim.curves} <= logged
    assert list(claim.arms) == ["still", "random labels", "init scale 1", "init scale 4", "init scale 1, lr 1e-3"]
