"""Exact resume: the random stream of a batch depends on (seed, rank, epoch, batch) and on nothing else."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.perturbation import accept_other_techniques, fold_seed, match_optimizer_groups, run_seed


class ExactResume(Callback):
    """Seeds Python, NumPy and torch at the start of every batch, from the run's seed and the batch's place.

    So a run that is resumed, at an epoch's end or in its middle, draws what the run that was never stopped drew, on
    every rank, with nothing stored; what was drawn in between (a validation, another number of loader workers) has no
    influence; and ranks draw different noise, which ``seed_everything`` alone doesn't give. Costs some 20 microseconds
    a step. The order of the data is the DataModule's part (``datamodules``).
    """

    def _seed(self, trainer: Trainer, *place: Any) -> None:
        seed = fold_seed(run_seed(), trainer.global_rank, *place)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        accept_other_techniques(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        match_optimizer_groups(pl_module, checkpoint)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._seed(trainer, "train", trainer.current_epoch, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(trainer, "evaluate", dataloader_idx, batch_idx)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(trainer, "evaluate", dataloader_idx, batch_idx)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(trainer, "evaluate", dataloader_idx, batch_idx)
