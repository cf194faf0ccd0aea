"""Decoded images in a file on the disk, which loader workers, ranks and later runs read where it lies.

A set of files, decoded to one size in one way, has one file here: an array uint8 (N, 3, H, W) as numpy writes it, and
behind it a byte for each image that tells whether it could be read. It is written under another name and renamed when
all of it is on the disk, so what bears the name is whole. It is never written to again: whoever needs other images, or
the same ones of another size, needs another file.

The name has a hash of what the pixels depend on: of each file its path below the folder that they share, its size and
the time of its last change (as ``make`` does; a hash of the contents would take as long as reading the dataset, which
is what is to be saved), the size in pixels, the crop, and the versions of the decoders.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
from PIL import features
from torch import Tensor

from datamodules.loading import progress

log = logging.getLogger(__name__)
#: Raised when what :func:`datamodules.images.decode` makes of a file changes.
VERSION = 1
#: Files that are looked at, or decoded, before the next ones are asked for.
CHUNK = 1024
#: Files whose reading, and whose looking at, takes so long that it is shown.
MANY, MANY_NAMES = 2000, 200_000
#: Seconds for which another process that builds the same file may write nothing before it isn't waited for.
PATIENCE = 600.0
#: Days after which a file that nobody opened is named as one that could go.
OLD = 30
#: Gives the image uint8 (3, H, W) at a position; None for one that can't be read and may be left out.
Read = Callable[[int], "Tensor | None"]


class Unkept(Exception):
    """Why there is no cache."""


# ---------------------------------------------------------------------- reading


class Mapped:
    """Images of a cache, read where they lie: all processes of a machine share the memory that holds them.

    Args:
        file: the cache.
        rows: positions (n,) of the images that are meant; all if omitted.
    """

    def __init__(self, file: Path, rows: Tensor | None = None) -> None:
        self.file, self.rows = file, rows
        self._array = np.asarray(np.load(file, mmap_mode="r"))  # read only: never counted as memory of this process
        self.shape = torch.Size((len(self._array) if rows is None else len(rows), *self._array.shape[1:]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) of positions (B,)."""
        rows = index if self.rows is None else self.rows[index]
        return torch.from_numpy(self._array[rows.numpy()])

    def __reduce__(self) -> Any:
        return Mapped, (self.file, self.rows)  # a worker that isn't forked opens the file, too


def _opened(file: Path, count: int, size: tuple[int, int]) -> np.ndarray | None:
    """The byte of each image (N,), 1 for one that can't be read, if the cache is there and whole."""
    try:
        array = np.load(file, mmap_mode="r")
        end = array.offset + array.nbytes
        if array.shape == (count, 3, *size) and array.dtype == np.uint8 and file.stat().st_size == end + count:
            return np.fromfile(file, np.uint8, count, offset=end)
    except (OSError, ValueError, EOFError):
        pass
    return None


# ---------------------------------------------------------------------- the key


def _looked_at(file: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change; (-1, -1) if there is no such file."""
    try:
        found = file.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _key(files: Sequence[Path], size: tuple[int, int], crop: Any) -> tuple[str, str]:
    """The name of the folder that the files share, and the hash."""
    folders = {folder: os.path.abspath(folder) for folder in {os.path.dirname(file) for file in files}}
    root = os.path.commonpath(folders.values())
    below = {folder: os.path.relpath(there, root) for folder, there in folders.items()}
    decoders = [PIL.__version__, *(features.version(name) for name in ("libjpeg_turbo", "jpg", "webp", "libtiff"))]
    crop = float(crop) if isinstance(crop, (int, float)) else tuple(crop)
    digest = hashlib.blake2b(repr((VERSION, decoders, size, crop)).encode(), digest_size=16)
    with (
        ThreadPoolExecutor(16) as pool,  # where files lie on another machine each answer takes its time
        progress("looking at files", len(files), MANY_NAMES, "files") as bar,
    ):
        for start in range(0, len(files), CHUNK):
            some = files[start : start + CHUNK]
            for file, found in zip(some, pool.map(_looked_at, some), strict=True):
                where = f"{below[os.path.dirname(file)]}/{file.name}"
                digest.update(f"{where}\0{found[0]}\0{found[1]}\n".encode(errors="surrogateescape"))
            bar.advance(bar.task_ids[0], len(some))
    return os.path.basename(root) or "images", digest.hexdigest()


# ---------------------------------------------------------------------- building


@contextmanager
def _keeping() -> Iterator[None]:
    """A disk that refuses is a reason to go on without a cache; whatever reading raises passes through."""
    try:
        yield
    except OSError as error:
        raise Unkept(error.strerror or str(error)) from None


def _lock(opened: BinaryIO) -> bool:
    """Whether the file is ours alone; the system takes the lock back from a process that dies."""
    try:
        import fcntl
    except ImportError:
        raise Unkept("this system has no locks of files") from None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _claimed(part: Path, whole: Callable[[], Any]) -> BinaryIO | None:
    """The unfinished file, empty, and ours alone to write; None if another process has finished it meanwhile.

    Raises:
        Unkept: if that process writes nothing for :data:`PATIENCE` seconds, or the disk refuses.
    """
    waited, size, since = False, -1, time.monotonic()
    while True:
        with _keeping():
            opened = part.open("ab")  # doesn't cut short what another one is writing
            try:
                if _lock(opened):
                    there = part.exists() and os.path.samestat(part.stat(), os.fstat(opened.fileno()))
                    if whole() is not None:
                        if there:
                            part.unlink(missing_ok=True)
                        opened.close()
                        return None
                    if there:  # else it was renamed or removed between the two lines
                        opened.truncate(0)  # what a process that was killed left
                        return opened
                now = os.fstat(opened.fileno()).st_size
            except BaseException:
                opened.close()
                raise
            opened.close()
        if now != size:
            size, since = now, time.monotonic()
        if not waited:
            log.info("another process decodes the same images: waiting for it")
            waited = True
        if time.monotonic() - since > PATIENCE:
            raise Unkept(f"the process that builds {part} has written nothing for {PATIENCE:.0f} seconds")
        time.sleep(0.1)


def _build(file: Path, whole: Callable[[], Any], count: int, size: tuple[int, int], read: Read) -> None:
    """Decodes the images into the file, unless another process does; nothing is left where that fails."""
    part = file.with_name(f"{file.name}.part")
    with _keeping():
        file.parent.mkdir(parents=True, exist_ok=True)
    opened = _claimed(part, whole)
    if opened is None:
        return
    try:
        with _keeping():
            free, needed = shutil.disk_usage(file.parent).free, count * (3 * size[0] * size[1] + 1)
            if free < needed:
                raise OSError(errno.ENOSPC, f"they take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
            np.lib.format.write_array_header_1_0(
                opened, {"descr": "|u1", "fortran_order": False, "shape": (count, 3, *size)}
            )
        log.info("decoding %d images, once: %s", count, file)
        bad = np.zeros(count, np.uint8)
        with (
            ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
            progress("decoding images", count, MANY, "files") as bar,
        ):
            for start in range(0, count, CHUNK):
                some = range(start, min(start + CHUNK, count))
                for i, image in zip(some, pool.map(read, some), strict=True):
                    bad[i] = image is None
                    pixels = np.zeros((3, *size), np.uint8) if image is None else image.numpy()
                    with _keeping():
                        opened.write(pixels.data)
                    bar.advance(bar.task_ids[0])
        with _keeping():
            opened.write(bad.data)
            opened.flush()
            os.fsync(opened.fileno())
            part.replace(file)  # from here on that name may be another process's
    except BaseException:
        part.unlink(missing_ok=True)  # while it is still ours
        raise
    finally:
        try:
            opened.close()
        except OSError:  # what it still held, a full disk doesn't take either
            pass
    with suppress(OSError):  # the file is whole without it, too; or another process removed its own meanwhile
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    with suppress(OSError):
        _name_old(file)


def _name_old(file: Path) -> None:
    """Says which files beside this one nobody has opened for long, and how to remove them."""
    since = time.time() - OLD * 86400
    old = sorted(f for f in (*file.parent.glob("*.npy"), *file.parent.glob("*.npy.part")) if f.stat().st_mtime < since)
    if old:
        gigabytes = sum(f.stat().st_size for f in old) / 1e9
        command = "rm " + " ".join(f"'{f}'" for f in old)
        log.info("%d caches beside it weren't used for %d days (%.1f GB): %s", len(old), OLD, gigabytes, command)


def cached(
    files: Sequence[Path], size: tuple[int, int], crop: Any, folder: Path, read: Read
) -> tuple[Mapped, Tensor] | None:
    """These files, decoded: read from the folder, where they are put first if they aren't there.

    Args:
        files: at least one.
        size: (H, W) to which they are decoded.
        crop: in what way, see :func:`datamodules.images.decode`.
        folder: of the caches.
        read: decodes the file at a position; what it raises ends the building, and no cache is left.

    Returns:
        The N images that can be read, and of each file whether it is among them, bool (files,). None, and a warning,
        where they can't be kept, such as on a full disk.
    """
    root, key = _key(files, size, crop)
    file = folder / f"{root}-{len(files)}x{size[0]}x{size[1]}-{key}.npy"

    def whole() -> np.ndarray | None:
        bad = _opened(file, len(files), size)
        if bad is not None and any(read(i) is not None for i in np.flatnonzero(bad).tolist()):
            return None  # the disk was at fault then, not the files
        return bad

    bad = whole()
    try:
        if bad is None:
            if file.exists():
                log.warning("%s isn't whole, or lacks images that can be read now: it is built again", file)
            _build(file, whole, len(files), size, read)
            bad = _opened(file, len(files), size)
        if bad is None:
            raise Unkept(f"{file} was written, but can't be read")
    except Unkept as reason:
        log.warning(
            "decoded images can't be kept in %s (%s): this run decodes them itself; name another folder with "
            "--data.cache",
            folder,
            " ".join(str(reason).split()),
        )
        return None
    try:
        os.utime(file)  # when it was last used
    except OSError:  # another user's: it can be read all the same
        pass
    good = torch.from_numpy(bad == 0)
    return Mapped(file, None if bool(good.all()) else good.nonzero().squeeze(1)), good
