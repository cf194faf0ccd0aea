"""A watch for catastrophic overfitting: robustness that one-step training loses within an epoch.

Wong et al., arXiv 2001.03994, section 5: accuracy under PGD on training images falls to nothing while accuracy under
FGSM rises; their code stops when PGD-5 accuracy on one batch falls by more than 0.2 from one epoch to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.adversary import classification, pgd
from callbacks.balls import Norm, random_in_ball
from callbacks.perturbation import crafting, fold_seed, run_seed

log = logging.getLogger(__name__)


class CatastrophicOverfitting(Callback):
    """Logs ``train/pgd_acc`` of each epoch's last training batch, and says when it falls.

    Args:
        eps: radius; the module's own (``module.eps``) if omitted.
        norm: likewise.
        steps: of PGD, from a random start, with step size ``eps / 4``.
        drop: how far the accuracy must fall within an epoch.
        stop: end the training then, as the released code does; best.ckpt has the weights from before.

    Raises:
        ValueError: for a setting out of range; before the first step, for no radius, batches without images and labels,
            or a module that gives no logits of images.
    """

    def __init__(
        self,
        eps: float | None = None,
        norm: Norm | None = None,
        steps: int = 5,
        drop: float = 0.2,
        stop: bool = False,
    ) -> None:
        if steps < 1 or not 0 < drop < 1:
            raise ValueError(f"steps must be at least 1 and drop lie between 0 and 1: {steps} and {drop}")
        self.eps, self.norm, self.steps, self.drop, self.stop = eps, norm, steps, drop, stop
        self.before: float | None = None
        self._checked = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._checked:
            return
        self._radius(pl_module)
        image, label = (batch.get(n) if isinstance(batch, Mapping) else None for n in ("image", "label"))
        if not (isinstance(image, Tensor) and image.is_floating_point() and isinstance(label, Tensor)):
            raise ValueError("CatastrophicOverfitting needs batches with 'image', floats, and 'label'")
        with crafting(pl_module, "eval"), torch.no_grad():
            logits = pl_module(image)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(label):
            raise ValueError("CatastrophicOverfitting needs a module whose forward gives logits (B, classes) of images")
        self._checked = True

    def _radius(self, module: LightningModule) -> tuple[float, Norm]:
        eps = self.eps if self.eps is not None else getattr(module, "eps", None)
        if not isinstance(eps, (int, float)):
            raise ValueError("CatastrophicOverfitting needs eps: the module has none of its own")
        norm: Norm = self.norm or getattr(module, "norm", "linf")  # type: ignore[assignment]  # any module's
        return float(eps), norm

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 != trainer.num_training_batches:
            return
        eps, norm = self._radius(pl_module)
        x, y = batch["image"].detach(), batch["label"]
        x, y = x[y >= 0], y[y >= 0]
        seed = fold_seed(run_seed(), "overfitting", trainer.current_epoch, trainer.global_rank)
        generator = torch.Generator(device=x.device).manual_seed(seed)
        start = random_in_ball(x, eps, norm, generator)
        with crafting(pl_module, "eval"):
            loss_fn = classification(pl_module)
            moved = pgd(loss_fn, x, y, eps=eps, alpha=eps / 4, steps=self.steps, norm=norm, start=start)
            with torch.no_grad():
                right = (pl_module(moved).argmax(1) == y).sum()
        counts = torch.stack([right, torch.tensor(len(y), device=right.device)])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        accuracy = float(counts[0]) / max(int(counts[1]), 1)
        pl_module.log("train/pgd_acc", accuracy, on_step=False, on_epoch=True, sync_dist=False)
        if self.before is not None and self.before - accuracy > self.drop:
            log.warning(
                "catastrophic overfitting suspected: accuracy under PGD-%d on a training batch fell from %.2f to %.2f "
                "in epoch %d%s",
                self.steps,
                self.before,
                accuracy,
                trainer.current_epoch,
                "; training ends here, best.ckpt is from before" if self.stop else "",
            )
            trainer.should_stop = trainer.should_stop or self.stop
        self.before = accuracy

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]
