"""Exact resume: the random stream of a batch depends on (seed, rank, epoch, batch) and on nothing else.

And an epoch's averages of what is logged at each step are those of the whole epoch.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.perturbation import accept_other_techniques, fold_seed, match_optimizer_groups, run_seed


class ExactResume(Callback):
    """Seeds Python, NumPy and torch at the start of every batch, from the run's seed and the batch's place.

    So a run that is resumed, at an epoch's end or in its middle, draws what the run that was never stopped drew, on
    every rank, with nothing stored; what was drawn in between (a validation, another number of loader workers) has no
    influence; and ranks draw different noise, which ``seed_everything`` alone doesn't give. Costs some 20 microseconds
    a step. The order of the data is the DataModule's part (``datamodules``).
    """

    works_sharded = True

    #: The checkpoint's sums below the averages of the epoch it was saved in, of each rank, until they are put back.
    _sums: tuple[int, list[dict[str, Any]]] | None = None

    def _seed(self, trainer: Trainer, *place: Any) -> None:
        seed = fold_seed(run_seed(), trainer.global_rank, *place)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        accept_other_techniques(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        match_optimizer_groups(pl_module, checkpoint)
        self._sums = checkpoint.get("epoch_sums")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called on all ranks, each of which has sums of its own."""
        self._add_sums(trainer)
        own = {} if self._sums is None else dict(self._sums[1][trainer.global_rank])  # of what isn't logged again yet
        own |= {
            key: [getattr(metric, state).tolist() for state in metric._defaults]
            for key, metric in trainer.fit_loop.epoch_loop._results.items()
            if metric.meta.on_epoch and metric.is_tensor
        }
        every: list[Any] = [own]
        if trainer.world_size > 1 and dist.is_initialized():
            every = [None] * trainer.world_size
            dist.all_gather_object(every, own)
        checkpoint["epoch_sums"] = (trainer.current_epoch, every)

    def _add_sums(self, trainer: Trainer) -> None:
        """Add what was summed before the stop, of each metric when it has been logged for the first time."""
        if self._sums is None:
            return
        epoch, every = self._sums
        if epoch != trainer.current_epoch or len(every) != trainer.world_size:
            self._sums = None
            return
        sums = every[trainer.global_rank]
        for key, metric in trainer.fit_loop.epoch_loop._results.items():
            if key not in sums or not metric.is_tensor:
                continue
            for state, before in zip(metric._defaults, sums.pop(key), strict=True):
                now = getattr(metric, state)
                before = now.new_tensor(before)
                either = torch.maximum if metric.meta.is_max_reduction else torch.minimum
                extreme = metric.meta.is_max_reduction or metric.meta.is_min_reduction
                setattr(metric, state, either(now, before) if extreme else now + before)
            metric._computed = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add_sums(trainer)
        self._sums = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._add_sums(trainer)
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
