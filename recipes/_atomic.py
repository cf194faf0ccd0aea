"""Checkpoints that are whole or not there: whatever ends the run, the file of that name opens."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch import Trainer

#: What is being written has another name than any checkpoint, until it is whole.
PARTIAL = ".partial"
#: A folder can't be replaced in one step: the one before stands aside under this name until the new one is in place.
BEFORE = ".before"


class NotWritten(OSError):
    """A checkpoint could not be written; the one before it, if any, is untouched. ``hint`` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def _partial(file: Path) -> Path:
    """A new name in the same folder: a rename is one step only within a file system."""
    return file.with_name(f"{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    try:
        opened = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
    except OSError:
        if path.is_file():
            raise  # that of a folder isn't possible on every file system, nor on Windows


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def put_in_place(new: Path, place: Path) -> None:
    """Rename a whole checkpoint to its name, in place of what is there; at no moment is there neither."""
    before = place.with_name(place.name + BEFORE)
    if place.is_dir() and not place.is_symlink():
        _remove(before)
        os.replace(place, before)
    os.replace(new, place)
    _to_disk(place.parent)
    _remove(before)


def remove_partial(folder: Path) -> None:
    """Remove what a run that was killed in the middle of writing a checkpoint left in this folder."""
    for left in folder.glob(f"*{PARTIAL}"):
        _remove(left)
    for before in folder.glob(f"*{BEFORE}"):
        place = before.with_name(before.name.removesuffix(BEFORE))
        if place.exists():
            _remove(before)
        else:
            os.replace(before, place)


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, (list, tuple)) else 0


def _size(count: int) -> str:
    for unit, step in (("GB", 10**9), ("MB", 10**6)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count / 1000:.0f} kB"


def _reason(error: BaseException) -> OSError | None:
    """The operating system's complaint below an error: torch's writer says only that it failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        for failure, _ in getattr(seen, "failures", {}).values():  # of each rank, where torch wrote shards
            if (reason := _reason(failure)) is not None:
                return reason
        seen = seen.__cause__ or seen.__context__
    return None


def _complaint(error: BaseException, place: Path, needed: int = 0) -> NotWritten | None:
    """What is said of a checkpoint that the operating system didn't let be written; None for any other error."""
    # torch's of shards is none of Exception; a signal's isn't one of writing, whatever it came upon
    reason = _reason(error) if isinstance(error, Exception) or hasattr(error, "failures") else None
    if reason is None:
        return None
    takes = f"it takes {_size(needed)}, " if needed else ""
    free = shutil.disk_usage(place.parent).free
    return NotWritten(
        f"{place} can't be written: {(reason.strerror or str(reason)).lower()} ({takes}"
        f"{_size(free)} are free there{'; the one before is kept' if place.exists() else ''})",
        "make room or set a quota right, then go on with: fit --ckpt_path last?",
    )


def not_written(error: BaseException | None) -> NotWritten | None:
    """The checkpoint that wasn't written, below an error that came of it: on a full disk, say, nothing else is."""
    while error is not None and not isinstance(error, NotWritten):
        error = error.__context__
    return error


@contextmanager
def writing(place: Path, needed: int) -> Iterator[Path]:
    """A name to write a checkpoint to, which is ``place`` when it is whole, and nothing if it doesn't become so.

    Raises:
        NotWritten: where the disk is full, or can't be written for another reason.
    """
    partial = _partial(place)
    try:
        yield partial
        put_in_place(partial, place)
    except BaseException as error:
        _remove(partial)
        said = _complaint(error, place, needed)
        if said is None:
            raise
        raise said from error


def write_whole(file: Path, write: Callable[[BinaryIO], None], needed: int = 0) -> None:
    """Write a file that is whole, and on the disk, from the moment on when it has its name.

    Args:
        file: where it goes; a file of that name is replaced at the end.
        write: writes into what it is given.
        needed: how large it becomes, in bytes, for the error.

    Raises:
        NotWritten: where it can't be written; ``file`` is then as it was.
    """
    with writing(file, needed) as partial, partial.open("xb") as opened:
        write(opened)
        opened.flush()
        os.fsync(opened.fileno())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint under another name in the same folder, waits until it is on the disk, and renames it.

    Lightning's own writes to the system's temporary folder and moves it, which across file systems (a cluster's) is
    a copy that can stop half-way; and it keeps the file's bytes in memory twice.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):  # an object store writes whole objects
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda opened: torch.save(checkpoint, opened), _bytes_of(checkpoint))

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """A file, or the folder that ``ModelParallelStrategy`` wrote with a shard of each rank, put together."""
        if not Path(path).is_dir():
            return super().load_checkpoint(path, *args, **options)
        found = _load_distributed_checkpoint(Path(path))
        count = sum(re.fullmatch(r"optimizer_\d+", key) is not None for key in found)
        found["optimizer_states"] = [_numbered(found.pop(f"optimizer_{i}")) for i in range(count)]
        return found


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by the numbers of its parameters, as optimizers have it, in place of their names."""
    groups, number = [], {name: i for i, name in enumerate(n for g in state["param_groups"] for n in g["params"])}
    for group in state["param_groups"]:
        groups.append({**group, "params": [number[name] for name in group["params"]]})
    return {"state": {number[name]: value for name, value in state["state"].items()}, "param_groups": groups}


class AtomicTrainer(Trainer):
    """A Trainer all of whose checkpoints are whole or not there: files through :class:`AtomicCheckpointIO` unless it
    was given another CheckpointIO, and the folders that a strategy writes with a shard of each rank."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.strategy._checkpoint_io is None:
            self.strategy.checkpoint_io = AtomicCheckpointIO()

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        shards = getattr(self.strategy, "_save_distributed_checkpoint", False)  # of ModelParallelStrategy
        if not shards and getattr(self.strategy, "_state_dict_type", "") != "sharded":  # of FSDPStrategy
            super().save_checkpoint(filepath, weights_only, storage_options)
            return
        place = Path(self.strategy.broadcast(str(filepath)))
        partial = Path(self.strategy.broadcast(str(_partial(place))))
        try:
            super().save_checkpoint(partial, weights_only, storage_options)
            self.strategy.barrier("checkpoint")
            if self.is_global_zero:
                for file in partial.rglob("*"):
                    _to_disk(file)
                put_in_place(partial, place)
        except BaseException as error:
            if self.is_global_zero:  # another rank may still write: what is left of it goes at the next start
                _remove(partial)
            said = _complaint(error, place)
            if said is None:
                raise
            raise said from error
        self.strategy.barrier("checkpoint")
