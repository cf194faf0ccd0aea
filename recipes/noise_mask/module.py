"""Policy Gradient-Driven Noise Mask (Yavuz & Yang, arXiv 2406.14568): heat a network under masks, then fine-tune it.

The claim: a classifier that is pre-trained on images multiplied by noise masks, which a second network learns to draw,
and then fine-tuned on clean images is better than one that is trained plainly.

The masks and the network that draws them are the callback :class:`callbacks.noise_mask.NoiseMask`, which plugs into any
image recipe and says where the released code is unsound. What is here are the two stages.

Where paper and released code differ, or something isn't said:

* The release validates under a random mask while it pre-trains. Here validation and test see clean images.
* Fine-tuning starts with a fresh momentum and its own learning rate, as a second run of the release does.
* A comparison needs the same number of steps: ``plain`` trains as long as both stages together.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from callbacks.noise_mask import policy_loss as policy_loss
from callbacks.noise_mask import sample_mask as sample_mask
from recipes.classifier.module import Classifier

Stage = Literal["both", "pretrain", "finetune", "plain"]
Schedule = Literal["cosine", "step"]


def shape(epoch: int, epochs: int, warmup: float, schedule: Schedule, every: int) -> float:
    """The learning rate of an epoch over the stage's: linear warm-up from a hundredth, then a cosine to zero, or steps.

    Args:
        epoch: of the stage, from 0.
        epochs: of the stage.
        warmup: epochs of the warm-up.
        schedule: ``cosine``, or ``step``: a tenth after each ``every`` epochs.
        every: of ``step``.
    """
    if epoch < warmup:
        return 0.01 + 0.99 * epoch / warmup
    if schedule == "step":
        return 0.1 ** (epoch // every)
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))


class NoiseMaskPolicy(Classifier):
    """A classifier that is pre-trained under masks and fine-tuned without.

    Args:
        stage: ``both`` in one run, or ``pretrain`` or ``finetune`` alone; ``plain``: one stage without masks.
        pretrain_epochs: of ``both``, how many of the trainer's epochs are masked; the rest fine-tunes.
        heated: of ``finetune``: the checkpoint whose backbone is fine-tuned. Its head too, if it has as many classes.
        finetune_lr: learning rate of fine-tuning, after its warm-up.
        finetune_warmup_epochs: linear, from a hundredth.
        schedule: ``cosine`` of each stage to zero, or ``step``: a tenth after each ``step_epochs``.
        step_epochs: of ``step``.
        compare: after ``both``, train plainly as long and print both results.
        classifier: see :class:`recipes.classifier.module.Classifier`; ``lr`` is that of pre-training.

    Raises:
        ValueError: for settings that don't go together, or a checkpoint without a backbone that fits.
    """

    fine_tuning: Tensor

    def __init__(
        self,
        stage: Stage = "both",
        pretrain_epochs: int = 90,
        heated: str | None = None,
        finetune_lr: float = 1e-3,
        finetune_warmup_epochs: float = 0.0,
        schedule: Schedule = "cosine",
        step_epochs: int = 30,
        compare: bool = True,
        **classifier: Any,
    ) -> None:
        super().__init__(**classifier)
        self.save_hyperparameters()
        if stage not in ("both", "pretrain", "finetune", "plain"):
            raise ValueError(f"stage must be both, pretrain, finetune or plain, not '{stage}'")
        if schedule not in ("cosine", "step"):
            raise ValueError(f"schedule must be cosine or step, not '{schedule}'")
        if min(pretrain_epochs, step_epochs) < 1 or finetune_lr <= 0 or finetune_warmup_epochs < 0:
            raise ValueError(
                "pretrain_epochs and step_epochs must be at least 1, finetune_lr positive, warm-ups not negative"
            )
        if heated is not None and stage != "finetune":
            raise ValueError("heated weights are for --model.stage finetune; the other stages start without")
        #: 1 once fine-tuning has begun. (A number: averaging weights takes differences of buffers.)
        self.register_buffer("fine_tuning", torch.tensor(int(stage == "finetune")))

    @property
    def masked(self) -> bool:
        """Whether :class:`callbacks.noise_mask.NoiseMask` is to mask at the moment."""
        stage = self.hparams["stage"]
        return stage == "pretrain" or (stage == "both" and self.trainer.current_epoch < self.hparams["pretrain_epochs"])

    def setup(self, stage: str) -> None:
        super().setup(stage)
        h, trainer = self.hparams, self.trainer
        if stage != "fit":
            return
        dry = bool(getattr(trainer, "fast_dev_run", False))
        if h["stage"] == "both" and not dry and 0 <= (trainer.max_epochs or 0) <= h["pretrain_epochs"]:
            raise ValueError(
                f"of {trainer.max_epochs} epochs {h['pretrain_epochs']} pre-train and none is left to fine-tune: give "
                "fewer --model.pretrain_epochs or more --trainer.max_epochs"
            )
        if h["stage"] == "finetune" and trainer.ckpt_path is None:
            if h["heated"] is None:
                raise ValueError("--model.stage finetune needs --model.heated PATH, a checkpoint of the first stage")
            self.load_heated(Path(h["heated"]).expanduser())

    def load_heated(self, file: Path) -> None:
        """Take the backbone of a checkpoint; its head only where it has the same classes.

        Raises:
            ValueError: if there is none, or it doesn't fit.
        """
        if not file.is_file():
            raise ValueError(f"there is no checkpoint {file}: --model.heated takes one of the first stage")
        try:
            checkpoint = torch.load(file, weights_only=True, map_location="cpu")
            saved = checkpoint["state_dict"]
        except Exception as error:  # torch raises anything from KeyError to its own
            raise ValueError(f"{file} is not a checkpoint that can be read ({type(error).__name__})") from error
        found = {k.removeprefix("backbone."): v for k, v in saved.items() if k.startswith("backbone.")}
        here = self.backbone.state_dict()
        last = self.backbone.get_classifier() if hasattr(self.backbone, "get_classifier") else None
        head = tuple(f"{name}." for name, layer in self.backbone.named_modules() if layer is last and name)
        differing = {k for k in here.keys() & found.keys() if found[k].shape != here[k].shape}
        apart = sorted(here.keys() ^ found.keys()) + sorted(k for k in differing if not k.startswith(head))
        if apart:
            raise ValueError(
                f"the backbone of {file} isn't {self.hparams['backbone']} as set here: '{apart[0]}' differs or is "
                "missing; give both stages the same --model.backbone and --model.backbone_args"
            )
        self.backbone.load_state_dict({k: here[k] if k in differing else v for k, v in found.items()})
        self.normalise_as(checkpoint)

    def on_train_epoch_start(self) -> None:
        if self.hparams["stage"] == "both" and not self.masked and not self.fine_tuning:
            self.fine_tuning.fill_(1)
            optimizer: Any = self.optimizers()
            optimizer.optimizer.state.clear()  # a second run would begin without momentum, too

    def lr_factor(self, epoch: int) -> float:
        h, total = self.hparams, max(self.trainer.max_epochs or 1, 1)
        first = {"both": h["pretrain_epochs"], "finetune": 0}.get(h["stage"], total)
        if epoch < first:
            return shape(epoch, first, h["warmup_epochs"], h["schedule"], h["step_epochs"])
        warmup = h["finetune_warmup_epochs"]
        over = shape(epoch - first, total - first, warmup, h["schedule"], h["step_epochs"])
        return h["finetune_lr"] / h["lr"] * over
