"""Contrastive language-image pre-training of a small CLIP (Radford et al., arXiv 2103.00020).

The claim of the paper, that a text names what an image shows well enough to classify without training, is what recipes
on prompts build on. Here it is a toy: emoji, their names and keywords, a few hundred thousand weights in each tower.

Where it differs from the paper: several drawings of the same emoji come in one batch and all are right answers to its
caption (the target is spread over them); captions are drawn anew from name and keywords each time. Under several ranks
the features of all are compared with each other, so that two ranks give the update of one process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from callbacks.perturbation import (
    accept_other_techniques,
    clip_groups,
    match_optimizer_groups,
    parameter_groups,
)
from recipes.classifier.module import DomainConfusion
from recipes.clip.towers import Words, save_small, small, text_tower

__all__ = ["Contrastive", "contrastive_loss"]


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, concept: Tensor) -> Tensor:
    """Symmetric cross-entropy of the similarities (equation in figure 3), with several right answers.

    Args:
        image: (B, D) features of length 1.
        text: (B, D) those of their captions.
        scale: factor of the cosines.
        concept: (B,) what is shown; images and captions of one concept belong together, in equal shares.
    """
    same = (concept[:, None] == concept[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Contrastive(LightningModule):
    """Trains both towers of a small CLIP; writes ``clip.safetensors`` beside the checkpoints at the end.

    That holds the weights of ``best.ckpt``: of the epoch with the best zero-shot accuracy on validation concepts.

    Args:
        vocabulary: the words it knows; from the data.
        class_texts: what the classes are called in a text; from the data.
        template: a sentence for a class, with ``{}``; from the data.
        class_names: from the data.
        domain_names: from the data.
        image_size: from the data.
        embed_dim: of the features that are compared.
        width: of the image tower.
        layers: of the image tower.
        text_width: of the text tower.
        text_layers: of the text tower.
        heads: of attention in both.
        context_length: tokens of a text, with its start and end.
        lr: largest learning rate of AdamW, reached after ``warmup_epochs`` and falling to zero with a cosine, by step.
        weight_decay: of matrices; vectors and embeddings have none.
        warmup_epochs: linear warm-up.

    A training batch has ``image`` (B, 3, H, W) in [0, 1], ``text`` (B captions) and ``concept`` (B,); an evaluation
    batch ``label`` and ``domain`` in place of the captions.
    """

    monitor = ("val/acc", "max")
    clip: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vocabulary: Sequence[str] = (),
        class_texts: Sequence[str] = (),
        template: str = "a photo of a {}.",
        class_names: Sequence[str] = (),
        domain_names: Sequence[str] = (),
        image_size: int = 32,
        embed_dim: int = 128,
        width: int = 128,
        layers: int = 4,
        text_width: int = 96,
        text_layers: int = 3,
        heads: int = 4,
        context_length: int = 24,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_epochs: float = 2.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        accept_other_techniques(self)
        if image_size % 8:
            raise ValueError(f"image_size must be a multiple of 8, not {image_size}")
        self.class_names = list(class_names) or [str(i) for i in range(len(class_texts))]
        self.domain_names = list(domain_names) or ["all"]
        self.class_texts = list(class_texts)
        self.tokenize = Words(vocabulary, context_length)
        vision = {"layers": layers, "width": width, "head_width": width // heads, "patch_size": 8}
        text = {"context_length": context_length, "vocab_size": self.tokenize.size, "width": text_width}
        self.config: dict[str, Any] = {
            "embed_dim": embed_dim,
            "vision_cfg": {**vision, "image_size": image_size},
            "text_cfg": {**text, "heads": heads, "layers": text_layers},
        }
        self.clip = small(self.config)
        self.clip.visual.feature_info = [{"module": f"transformer.resblocks.{i}"} for i in range(layers)]
        self.clip.visual.num_prefix_tokens = 1
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5), persistent=False)
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.5), persistent=False)
        self.example_input_array = torch.zeros(2, 3, image_size, image_size)
        count = max(len(self.class_texts), 2)
        self.val_accuracy = MulticlassAccuracy(count, average="micro")
        self.test_confusion = DomainConfusion(len(self.domain_names), count)
        self._classes: Tensor | None = None

    @property
    def backbone(self) -> nn.Module:
        """The image tower, on whose layers techniques hang."""
        return self.clip.visual

    def image_features(self, image: Tensor) -> Tensor:
        """(B, D) of length 1, of images (B, 3, H, W) in [0, 1]."""
        return F.normalize(self.clip.encode_image((image - self.mean) / self.std).float(), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """(N, D) of length 1."""
        return F.normalize(self.clip.encode_text(self.tokenize(texts).to(self.clip.logit_scale.device)).float(), dim=-1)

    def forward(self, image: Tensor) -> Tensor:
        """Zero-shot logits (B, classes) of images (B, 3, H, W) in [0, 1]."""
        classes = self._classes if self._classes is not None else self._class_features()
        return self.clip.logit_scale.exp() * self.image_features(image) @ classes.T

    def _class_features(self) -> Tensor:
        return self.text_features([self.hparams["template"].format(text) for text in self.class_texts])

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The contrastive loss over the batches of all ranks; no logging, no side effects."""
        image, text, concept = self.image_features(batch["image"]), self.text_features(batch["text"]), batch["concept"]
        if self._trainer is not None and self.trainer.world_size > 1:
            image, text = (torch.as_tensor(self.all_gather(x, sync_grads=True)).flatten(0, 1) for x in (image, text))
            concept = torch.as_tensor(self.all_gather(concept)).flatten()
        return contrastive_loss(image, text, self.clip.logit_scale.clamp(max=math.log(100)).exp(), concept)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    # ------------------------------------------------------------------ zero-shot evaluation

    def _once(self) -> None:
        with torch.inference_mode(False), torch.no_grad():  # an attack may take gradients through what uses it
            self._classes = self._class_features()

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _once

    def on_validation_epoch_end(self) -> None:
        self._classes = None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_accuracy.update(self(batch["image"]), batch["label"])
        self.log("val/acc", self.val_accuracy, on_epoch=True, prog_bar=True, batch_size=len(batch["label"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.test_confusion.update(self(batch["image"]).argmax(-1), batch["label"], batch["domain"])

    def on_test_epoch_end(self) -> None:
        """Zero-shot accuracy of each style, and their plain mean."""
        counts = self.test_confusion.compute()
        self.confusion = counts.cpu()
        values = []
        for name, confusion in zip(self.domain_names, counts, strict=True):
            if confusion.sum() > 0:
                values.append(confusion.diagonal().sum() / confusion.sum())
                self.log(f"test/acc_{name}", values[-1], sync_dist=True)
        self.log("test/acc", torch.stack(values).mean(), sync_dist=True)
        self.test_confusion.reset()
        self._classes = None

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        probability = self(batch["image"]).softmax(-1)
        return {"index": batch["index"], "probability": probability, "prediction": probability.argmax(-1)}

    def on_predict_end(self) -> None:
        self._classes = None

    def on_fit_end(self) -> None:
        saver: Any = self.trainer.checkpoint_callback
        folder = getattr(saver, "dirpath", None)
        if folder is None or not self.trainer.is_global_zero:
            return
        clip, best = self.clip, getattr(saver, "best_model_path", "")
        if best and Path(best).is_file():
            state = torch.load(best, weights_only=True, map_location="cpu")["state_dict"]
            clip = small(self.config)
            clip.load_state_dict({n.removeprefix("clip."): v for n, v in state.items() if n.startswith("clip.")})
        save_small(Path(folder) / "clip.safetensors", clip, self.config, self.tokenize.vocabulary)

    # ------------------------------------------------------------------ optimisation

    def configure_optimizers(self) -> Any:
        h = self.hparams
        groups = parameter_groups(self, weight_decay=h["weight_decay"])
        matrices: list[tuple[str, nn.Parameter]] = []
        vectors: list[tuple[str, nn.Parameter]] = []
        embedding = text_tower(self.clip).token_embedding.weight
        for parameter, name in zip(groups[0]["params"], groups[0]["parameters"], strict=True):
            few = parameter.dim() < 2 or parameter is embedding or "positional_embedding" in name
            (vectors if few else matrices).append((name, parameter))
        split = [
            {**groups[0], "params": [p for _, p in members], "parameters": [n for n, _ in members], **more}
            for members, more in ((matrices, {}), (vectors, {"name": "vectors", "weight_decay": 0.0}))
        ]
        optimizer = torch.optim.AdamW([*split, *groups[1:]], lr=h["lr"], betas=(0.9, 0.98), eps=1e-6)  # table 19
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        warmup = steps * h["warmup_epochs"] / max(self.trainer.max_epochs or 1, 1)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        match_optimizer_groups(self, checkpoint)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        clip_groups(optimizer, gradient_clip_val, gradient_clip_algorithm)
