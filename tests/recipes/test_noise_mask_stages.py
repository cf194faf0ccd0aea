"""The two stages of the noise-mask recipe, and what they are compared with."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.noise_mask import NoiseMask
from recipes._claim import last_values
from recipes._cli import HOME, run
from recipes.noise_mask import NoiseMaskPolicy, policy_loss, sample_mask
from recipes.noise_mask.module import shape
from tests.laws import cells
from tests.laws.laws import Kill

MODEL = "recipes.noise_mask.module.NoiseMaskPolicy"


def make(**more: Any) -> NoiseMaskPolicy:
    module = cells.recipe("noise_mask", **{"stage": "both", "pretrain_epochs": 2, "finetune_lr": 0.01, **more})
    assert isinstance(module, NoiseMaskPolicy)
    return module


class Watch(Callback):
    """Which epochs were masked, with what learning rate and momentum each began."""

    def __init__(self) -> None:
        self.masked: dict[int, bool] = {}
        self.lr: dict[int, float] = {}
        self.momentum: dict[int, int] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        (technique,) = [c for c in trainer.callbacks if isinstance(c, NoiseMask)]  # type: ignore[attr-defined]
        assert technique._given is not None
        epoch, optimizer = trainer.current_epoch, trainer.optimizers[0]
        changed = not torch.equal(batch["image"], technique._given[1]["image"])
        assert self.masked.setdefault(epoch, changed) == changed
        if batch_idx == 0:
            self.lr[epoch], self.momentum[epoch] = optimizer.param_groups[0]["lr"], len(optimizer.state)


def test_names() -> None:
    assert callable(policy_loss) and callable(sample_mask)


def test_the_stages_of_one_run() -> None:
    module, watch = make(), Watch()
    cells.trainer(NoiseMask(), watch, max_epochs=5).fit(module, datamodule=cells.data("noise_mask"))
    assert watch.masked == {0: True, 1: True, 2: False, 3: False, 4: False}
    wanted = [0.05 * (1 + math.cos(math.pi * e / 2)) / 2 for e in (0, 1)]
    wanted += [0.01 * (1 + math.cos(math.pi * e / 3)) / 2 for e in (0, 1, 2)]
    assert list(watch.lr.values()) == pytest.approx(wanted)
    assert watch.momentum[1] > 0 and watch.momentum[2] == 0 and watch.momentum[3] > 0
    assert bool(module.fine_tuning)


@pytest.mark.parametrize(("stage", "masked"), [("pretrain", True), ("plain", False)])
def test_one_stage_alone(stage: str, masked: bool) -> None:
    module, watch = make(stage=stage), Watch()
    cells.trainer(NoiseMask(), watch, max_epochs=4).fit(module, datamodule=cells.data("noise_mask"))
    assert set(watch.masked.values()) == {masked}
    assert list(watch.lr.values()) == pytest.approx([0.05 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)])


def test_plain_is_the_classifier_bit_by_bit() -> None:
    module, plain = make(stage="plain"), cells.recipe("classifier")
    cells.trainer(NoiseMask(), max_epochs=2).fit(module, datamodule=cells.data("noise_mask"))
    cells.trainer(max_epochs=2).fit(plain, datamodule=cells.data("classifier"))
    found = cells.weights(module)
    assert not bool(found.pop("fine_tuning"))
    assert not cells.differing(found, cells.weights(plain))


@pytest.mark.parametrize(
    ("epoch", "wanted"), [(0, 0.01), (1, 0.01 + 0.99 / 2), (2, 1.0), (5, 1.0), (6, 0.1), (13, 0.01)]
)
def test_steps_after_a_warm_up(epoch: int, wanted: float) -> None:
    assert shape(epoch, 14, 2, "step", 6) == pytest.approx(wanted)


@pytest.mark.parametrize("stop", [4, 6, 7, 8], ids=["masked", "between", "clean, first step", "clean"])
def test_resuming_is_exact_in_both_stages(stop: int, tmp_path: Path) -> None:
    whole = make()
    cells.trainer(NoiseMask(), max_epochs=4).fit(whole, datamodule=cells.data("noise_mask"))
    file = tmp_path / "stopped.ckpt"
    with contextlib.suppress(KeyError):
        cells.trainer(NoiseMask(), Kill(file, stop), max_epochs=4).fit(make(), datamodule=cells.data("noise_mask"))
    again = make()
    again_with = cells.trainer(NoiseMask(), max_epochs=4)
    again_with.fit(again, datamodule=cells.data("noise_mask"), ckpt_path=str(file), weights_only=True)
    assert not cells.differing(whole.state_dict(), again.state_dict())


# ---------------------------------------------------------------------- heated weights


@pytest.fixture(scope="module")
def heated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    file = tmp_path_factory.mktemp("heated") / "last.ckpt"
    runner = cells.trainer(NoiseMask(), max_epochs=1)
    module = make(stage="pretrain")
    runner.fit(module, datamodule=cells.data("noise_mask"))
    runner.save_checkpoint(file)
    return file, module.state_dict()


def fine_tuned(file: Path | None, **more: Any) -> NoiseMaskPolicy:
    module = make(stage="finetune", heated=None if file is None else str(file), **more)
    cells.trainer(NoiseMask(), max_epochs=1, limit_train_batches=0).fit(module, datamodule=cells.data("noise_mask"))
    return module


def test_fine_tuning_begins_with_heated_weights(heated: tuple[Path, dict[str, Tensor]]) -> None:
    found = fine_tuned(heated[0]).state_dict()
    own = [k for k in found if k.startswith("backbone.")]
    assert own and all(torch.equal(found[k], heated[1][k]) for k in own)
    watch = Watch()
    module = make(stage="finetune", heated=str(heated[0]), finetune_warmup_epochs=2)
    cells.trainer(NoiseMask(), watch, max_epochs=3).fit(module, datamodule=cells.data("noise_mask"))
    assert set(watch.masked.values()) == {False}
    assert list(watch.lr.values()) == pytest.approx([0.0001, 0.01 * (0.01 + 0.99 / 2), 0.01])


def test_other_classes_get_a_new_head(heated: tuple[Path, dict[str, Tensor]]) -> None:
    found = fine_tuned(heated[0], num_classes=5).state_dict()
    apart = [k for k in found if k.startswith("backbone.") and not torch.equal(found[k], heated[1].get(k, found[k]))]
    assert set(apart) <= {"backbone.fc.weight", "backbone.fc.bias"} and found["backbone.fc.weight"].shape[0] == 5


def test_heated_weights_that_are_none(heated: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs --model.heated PATH"):
        fine_tuned(None)
    with pytest.raises(ValueError, match="there is no checkpoint .*no.ckpt"):
        fine_tuned(tmp_path / "no.ckpt")
    (tmp_path / "bad.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a checkpoint that can be read"):
        fine_tuned(tmp_path / "bad.ckpt")
    args = {"channels": (8, 8, 16, 32), "stem_width": 8}
    with pytest.raises(ValueError, match="give both stages the same --model.backbone") as error:
        fine_tuned(heated[0], backbone_args=args)
    assert "\n" not in str(error.value)


def test_heated_weights_of_a_network_that_is_not_timms(tmp_path: Path) -> None:
    first = NoiseMaskPolicy(stage="pretrain", backbone="cnn4", num_classes=3, image_size=32)
    torch.save({"state_dict": first.state_dict(), "normalisation": ((0.5,) * 3, (0.5,) * 3)}, tmp_path / "a.ckpt")
    second = NoiseMaskPolicy(stage="finetune", heated="a", backbone="cnn4", num_classes=3, image_size=32)
    assert not torch.equal(second.mean, torch.full_like(second.mean, 0.5))
    second.load_heated(tmp_path / "a.ckpt")
    assert not cells.differing(first.backbone.state_dict(), second.backbone.state_dict())
    assert (second.mean == 0.5).all() and (second.std == 0.5).all()  # as the heated weights were trained


def test_a_deeper_network_is_not_taken_in_part(tmp_path: Path) -> None:
    first = NoiseMaskPolicy(stage="pretrain", backbone="resnet34", num_classes=3)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "a.ckpt")
    second = NoiseMaskPolicy(stage="finetune", heated="a", backbone="resnet18", num_classes=3)
    with pytest.raises(ValueError, match="differs or is missing") as error:
        second.load_heated(tmp_path / "a.ckpt")
    assert "\n" not in str(error.value)


def test_weights_can_be_averaged(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import WeightAveraging

    average = WeightAveraging()
    cells.trainer(NoiseMask(), average, max_epochs=3).fit(make(), datamodule=cells.data("noise_mask"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stage": "third"}, "stage must be both, pretrain, finetune or plain"),
        ({"schedule": "linear"}, "schedule must be cosine or step"),
        ({"pretrain_epochs": 0}, "at least 1"),
        ({"finetune_lr": 0.0}, "finetune_lr positive"),
        ({"heated": "x.ckpt"}, "heated weights are for --model.stage finetune"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**settings)


def test_no_epoch_is_left_to_fine_tune() -> None:
    with pytest.raises(ValueError, match="of 2 epochs 2 pre-train and none is left"):
        cells.trainer(NoiseMask(), max_epochs=2).fit(make(), datamodule=cells.data("noise_mask"))


# ---------------------------------------------------------------------- the command

TINY = ["--model.backbone_args", "{channels: [8, 8, 8, 8], stem_width: 8}", "--data.train_size", "40"]
TINY += ["--data.val_size", "20", "--data.test_size", "20", "--wandb", "off", "--trainer.max_epochs", "2"]
TINY += ["--model.pretrain_epochs", "1", "--trainer.accelerator", "cpu"]


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "recipes.noise_mask", *words, "--trainer.default_root_dir", str(folder)]
    return subprocess.run(line, capture_output=True, text=True, cwd=HOME)


def test_a_run_of_both_stages_is_compared_with_plain_training(tmp_path: Path) -> None:
    done = command("fit", *TINY, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("noise_mask/*")
    assert len(list(folder.glob("plain/noise_mask/*"))) == 1
    with (folder / "comparison.csv").open() as opened:
        rows = {row["metric"]: row for row in csv.DictReader(opened)}
    ours, theirs = last_values(tmp_path, []), last_values(folder / "plain", [])
    assert {"test/acc", "test/acc_fashion", "test/acc_mnist", "test/acc_emoji", "test/acc_brain"} <= rows.keys()
    for name, row in rows.items():
        assert float(row["heated and fine-tuned"]) == pytest.approx(ours[name], abs=1e-6)
        assert float(row["plain"]) == pytest.approx(theirs[name], abs=1e-6)
        assert float(row["difference"]) == pytest.approx(ours[name] - theirs[name], abs=1e-6)
    assert ours["step"] == theirs["step"]  # as long
    assert "mask/reward" in ours and "mask/reward" not in theirs
    assert f"{rows['test/acc']['metric']}" in done.stdout and "difference" in done.stdout
    files = {file.name for file in (folder / "plots").iterdir()}
    assert files >= {"mask-examples.png", "mask-domains.png", "mask-classes.png", "mask-curves.png", "inputs.png"}


def test_sigterm_ends_plain_training_too(tmp_path: Path) -> None:
    script = tmp_path / "wait.py"
    script.write_text(
        "import subprocess, sys, signal, os\n"
        "from recipes.noise_mask.comparison import wait\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, sys, time\\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\\nprint(1, flush=True)\\ntime.sleep(60)'],"
        " stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))\n"
        "signal.alarm(1)\n"
        "sys.exit(wait(child))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=HOME, timeout=50, env={**os.environ, "PYTHONPATH": str(HOME)}
    )
    assert done.returncode == 143


def test_where_nothing_is_compared(tmp_path: Path) -> None:
    done = command("fit", *TINY, "--model.compare", "false", folder=tmp_path / "a")
    assert done.returncode == 0 and "difference" not in done.stdout
    assert not list((tmp_path / "a").glob("noise_mask/*/plain"))
    done = command("fit", *TINY, "--trainer.fast_dev_run", "true", folder=tmp_path / "b")
    assert done.returncode == 0 and "difference" not in done.stdout, done.stderr
    done = command("fit", *TINY, "--model.stage", "third", folder=tmp_path / "c")
    assert done.returncode == 2 and done.stderr.count("\n") <= 2


def test_each_stage_alone_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--trainer.default_root_dir", str(tmp_path)]
    assert run(MODEL, "noise_mask", ["fit", *TINY, *where, "--model.stage", "pretrain"]) == 0
    (first,) = tmp_path.glob("noise_mask/*")
    words = ["--model.stage", "finetune", "--model.heated", str(first / "checkpoints" / "last.ckpt")]
    assert run(MODEL, "noise_mask", ["fit", *TINY, *where, *words]) == 0
    results = []
    for _ in range(2):  # validation sees no mask: the same number each time
        capsys.readouterr()
        assert run(MODEL, "noise_mask", ["validate", *where, "--ckpt_path", str(first / "checkpoints/last.ckpt")]) == 0
        results.append([line for line in capsys.readouterr().out.splitlines() if "val/" in line])
    assert results[0] and results[0] == results[1]


@pytest.mark.parametrize("objective", ["textbook", "released"])
def test_two_ranks_through_the_command(objective: str, tmp_path: Path) -> None:
    words = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.callbacks.objective", objective]
    done = command("fit", *TINY, *words, "--model.compare", "true", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("noise_mask/*/comparison.csv"))) == 1
