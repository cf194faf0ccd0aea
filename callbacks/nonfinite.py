"""Stops at a loss that is not finite, names the step and the examples, and keeps the batch to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class NonFiniteLoss(ValueError):
    """The training loss is nan or infinite; the message says where, and which file holds the batch."""


class _Suspect(NamedTuple):
    """A step whose loss is being looked at while the next one runs."""

    bad: Tensor  # one element, > 0 if the loss of any rank was not finite; on the host once `arrived`
    arrived: torch.cuda.Event | None
    reduction: Any  # the pending all-reduce, or None
    loss: Tensor
    batch: Any
    place: tuple[int, int, int]  # optimizer step, epoch, batch


def _to_cpu(value: Any) -> Any:
    """The tensors of a batch on the CPU, in the same nesting of dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_cpu(entry) for entry in value]
    return value


class StopOnNonFinite(Callback):
    """Looks at the loss of every training step before its backward pass.

    On one CPU process the step is stopped before it does harm. On a GPU and with several ranks the answer is read one
    step late, so that looking costs no synchronisation, and all ranks stop at the same step; an epoch's end, a
    validation and a checkpoint wait for it, so weights that are already lost are never saved.

    Args:
        save_batch: write the batch, as the step saw it, to ``nonfinite-step<N>-rank<R>.pt`` in the run's folder
            (``trainer.default_root_dir``): a dict with ``batch``, ``loss``, ``step``, ``epoch`` and ``batch_idx``,
            to be read with ``torch.load(file, weights_only=True)``.

    Raises:
        NonFiniteLoss: from the training loop.
    """

    works_sharded = True

    def __init__(self, save_batch: bool = True) -> None:
        self.save_batch = save_batch
        self._batch: Any = None
        self._batch_idx = 0
        self._suspect: _Suspect | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch, self._batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._check(trainer)
        place = (trainer.global_step, trainer.current_epoch, self._batch_idx)
        loss = loss.detach()
        if not loss.is_cuda and trainer.world_size == 1:
            if not bool(torch.isfinite(loss).all()):
                self._stop(trainer, loss, self._batch, place)
            return
        bad = (~torch.isfinite(loss)).any().float().reshape(1)
        reduction = dist.all_reduce(bad, op=dist.ReduceOp.MAX, async_op=True) if trainer.world_size > 1 else None
        arrived = None
        if bad.is_cuda:
            if reduction is not None:
                reduction.wait()  # orders the copy after the reduction on the stream; the host doesn't wait
                reduction = None
            bad = torch.empty(1, pin_memory=True).copy_(bad, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        batch = dict(self._batch) if isinstance(self._batch, dict) else self._batch  # its entries are put back soon
        self._suspect = _Suspect(bad, arrived, reduction, loss, batch, place)

    def _check(self, trainer: Trainer) -> None:
        """Read what became of the step before."""
        suspect, self._suspect = self._suspect, None
        if suspect is None:
            return
        if suspect.reduction is not None:
            suspect.reduction.wait()
        if suspect.arrived is not None:
            suspect.arrived.synchronize()  # of the previous step: as a rule long there
        if suspect.bad.item() > 0:
            self._stop(trainer, suspect.loss, suspect.batch, suspect.place)

    def _stop(self, trainer: Trainer, loss: Tensor, batch: Any, place: tuple[int, int, int]) -> None:
        if trainer.world_size > 1:
            said: list[str | None] = [None] * trainer.world_size
            own = None if bool(torch.isfinite(loss).all()) else self._describe(trainer, loss, batch, place)
            dist.all_gather_object(said, own)  # all ranks are here: they decided together
            raise NonFiniteLoss("; ".join(f"rank {rank}: {what}" for rank, what in enumerate(said) if what))
        raise NonFiniteLoss(self._describe(trainer, loss, batch, place))

    def _describe(self, trainer: Trainer, loss: Tensor, batch: Any, place: tuple[int, int, int]) -> str:
        step, epoch, batch_idx = place
        value = loss.float().mean().item()
        what = f"the loss is {value} at step {step} (epoch {epoch}, batch {batch_idx}"
        index = batch.get("index") if isinstance(batch, dict) else None
        if isinstance(index, Tensor) and index.numel() > 0:
            chosen = index.flatten().tolist()
            more = ", ..." if len(chosen) > 8 else ""
            what += f", examples {', '.join(map(str, chosen[:8]))}{more}"
        what += ")"
        if self.save_batch and not getattr(trainer, "fast_dev_run", False):
            file = Path(trainer.default_root_dir) / f"nonfinite-step{step}-rank{trainer.global_rank}.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            place_of = {"step": step, "epoch": epoch, "batch_idx": batch_idx}
            torch.save({"batch": _to_cpu(batch), "loss": loss.cpu(), **place_of}, file)
            what += f"; the batch is in {file}"
        return what

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._batch = self._suspect = None
