"""What every image DataModule shares: decoding once, batched augmentation, an order of the data that resumes exactly.

A batch is a dict: ``image`` float32 (B, C, H, W) in [0, 1], ``label``, ``domain`` and ``index`` int64 (B,), and what
the dataset adds. What an example looks like depends on (seed, epoch, index) and on nothing else: not on the rank, the
number of loader workers or what was drawn before.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import rgb_to_grayscale

from datamodules.cache import cached
from datamodules.loading import PartsDataModule, progress, run_seed  # noqa: F401  # run_seed: used from here
from datamodules.sampling import Draw

log = logging.getLogger(__name__)
#: Random numbers per example and epoch: flip, whether to shift, how far down and to the right, the user's transform.
_DRAWS = 5
#: Four more where images are cropped: how large the window is, of what aspect, how far down and to the right.
_CROP_DRAWS = 4
#: Windows are at most this much wider than high, or higher than wide.
_ASPECT = 4 / 3
#: Files whose reading takes so long that it is shown.
MANY = 2000
#: How much larger than the middle that is cut out ImageNet's images are scaled.
IMAGENET_CROP = 8 / 7
#: Bytes of an image from which on a CPU copies it whole faster than by an index.
LARGE = 8192
#: What counts as an image in a folder of the user's.
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
OnCorrupt = Literal["error", "skip"]
#: The entry of a batch whose images are still to be drawn: the epoch, or -1 where they are wanted as they are.
BARE = "bare"
#: A part of an image, in its own pixels: left, top, right, bottom.
Window = tuple[int, int, int, int]


# ---------------------------------------------------------------------- decoding


def decode(file: Path, size: tuple[int, int], crop: float | Window = 0.0) -> Tensor:
    """An image file as uint8 (3, H, W), squashed to ``size`` = (H, W) with bicubic filtering (Dassl's ``Resize``).

    With ``crop`` it isn't squashed: it is scaled so that ``crop`` times the size just fits, and the middle is cut out.
    Where ``crop`` is a window, that is cut out first, and squashed.

    Raises:
        ValueError: naming the file, if it is no image or is cut short.
    """
    try:
        with Image.open(file) as opened:
            if opened.format == "JPEG" and not isinstance(crop, tuple):
                opened.draft("RGB", (2 * size[1], 2 * size[0]))  # decodes large photographs at a fraction of the size
            image = opened.convert("RGBA").convert("RGB") if opened.mode in ("P", "PA", "LA") else opened.convert("RGB")
            if isinstance(crop, tuple):
                image = _inside(image, crop)
            elif crop and image.size != (size[1], size[0]):
                image = _middle(image, size, crop)
            if image.size != (size[1], size[0]):
                image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no file {file}: the dataset is incomplete; fetch it again (a run that was stopped by it goes on "
            "with --ckpt_path last)"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} can't be read as an image ({' '.join(str(error).split())}): fetch it again, or leave such files "
            "out with --data.on_corrupt skip"
        ) from None


def _middle(image: Image.Image, size: tuple[int, int], crop: float) -> Image.Image:
    """The middle of the image, which is first scaled so that ``crop`` times ``size`` = (H, W) just fits."""
    scale = max(crop * size[1] / image.width, crop * size[0] / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size[1]) // 2, (image.height - size[0]) // 2
    return image.crop((left, top, left + size[1], top + size[0]))


def _inside(image: Image.Image, window: Window) -> Image.Image:
    """The window of the image; ValueError if it reaches over the edge."""
    if window[0] < 0 or window[1] < 0 or window[2] > image.width or window[3] > image.height:
        raise ValueError(f"it has {image.width}x{image.height} pixels, which don't hold the window {window}")
    return image.crop(window)


# ---------------------------------------------------------------------- sets of images


class Rows(Protocol):
    """Images that are read when they are asked for."""

    shape: torch.Size

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Tensor:
        """uint8 (B, C, H, W) of positions (B,)."""


class Files:
    """Images decoded when they are asked for, grey (by their luminance) where ``channels`` is 1."""

    def __init__(self, files: Sequence[Path], channels: int, size: tuple[int, int], crop: float | Window = 0.0) -> None:
        self.files, self.size, self.crop = list(files), size, crop
        self.shape = torch.Size((len(self.files), channels, *size))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Tensor) -> Tensor:
        """uint8 (B, C, H, W) of positions (B,)."""
        images = torch.stack([decode(self.files[i], self.size, self.crop) for i in index.tolist()])
        return rgb_to_grayscale(images) if self.shape[1] == 1 else images


class ImageSet(Dataset[dict[str, Tensor]]):
    """Images with labels and domains, in memory or on disk; a batch is fetched as a whole.

    Args:
        images: uint8 (N, C, H, W), or what is indexed like that, or N files.
        entries: int64 or bool tensors (N,), ``label`` and ``domain`` among them; they become entries of the batch.
        size: (H, W) to which files are decoded.
        memory_gb: files are decoded once, here, if the images take no more than this; else at every fetch.
        on_corrupt: ``error``, or ``skip``: count files that can't be decoded and leave them out.
        crop: see :func:`decode`.
        cache: files are decoded once into a file in this folder, which later sets of the same files read; whatever
            ``memory_gb`` is. See :mod:`datamodules.cache`.
    """

    def __init__(
        self,
        images: Tensor | Rows | Sequence[Path],
        entries: Mapping[str, Tensor],
        size: tuple[int, int] | None = None,
        memory_gb: float = 0.0,
        on_corrupt: OnCorrupt = "error",
        crop: float | Window = 0.0,
        cache: Path | None = None,
    ) -> None:
        self.entries = dict(entries)
        self.files: list[Path] | None = None
        self.images: Tensor | Rows | None = None
        self.crop = crop
        self.transform: Augmentation | None = None
        #: 2: batches also have ``view``, the same images under a second, independent draw of the transform.
        self.views = 1
        #: Batches have the images as uint8 and as they are, for :meth:`drawn` to work on where the network is.
        self.bare = False
        if not isinstance(images, Sequence):
            self.images, self.size = images, (images.shape[-2], images.shape[-1])
        else:
            if size is None:
                raise ValueError("files need a size to be decoded to")
            self.files, self.size = list(images), size
            keep = 3 * size[0] * size[1] * len(self.files) <= memory_gb * 2**30
            kept = cache is not None and len(self.files) > 0 and self._read_cache(cache, on_corrupt)
            if not kept and (keep or on_corrupt == "skip"):
                self._read_all(keep, on_corrupt)
        for name, values in self.entries.items():
            if len(values) != len(self):
                raise ValueError(f"{len(self)} images, but {len(values)} values of '{name}'")

    def _read_cache(self, folder: Path, on_corrupt: OnCorrupt) -> bool:
        """Takes the images from the folder, where they are put first if need be; False where that can't be done."""
        files, size, crop = list(self.files or ()), self.size, self.crop

        def read(i: int) -> Tensor | None:
            try:
                return decode(files[i], size, crop)
            except ValueError:
                if on_corrupt == "error":
                    raise
                return None

        found = cached(files, size, crop, folder, read)
        if found is None:
            return False
        self.images, good = found
        self._leave_out(~good)
        return True

    def _leave_out(self, bad: Tensor) -> None:
        """Says which files, bool (N,), can't be read, and forgets them and their entries."""
        if not bool(bad.any()) or self.files is None:
            return
        named = [str(self.files[i]) for i in bad.nonzero()[:5].flatten().tolist()]
        log.warning("left out %d files that can't be read as images: %s", int(bad.sum()), ", ".join(named))
        self.entries = {name: values[~bad] for name, values in self.entries.items()}
        self.files = [file for file, out in zip(self.files, bad.tolist(), strict=True) if not out]

    def _read_all(self, keep: bool, on_corrupt: OnCorrupt) -> None:
        assert self.files is not None
        bad = torch.zeros(len(self.files), dtype=torch.bool)
        images = torch.empty(len(self.files), 3, *self.size, dtype=torch.uint8) if keep else None

        def read(i: int) -> None:
            try:
                image = decode(files[i], self.size, self.crop)
            except ValueError:
                if on_corrupt == "error":
                    raise
                bad[i] = True
                return
            if images is not None:
                images[i] = image

        files = self.files
        with (
            ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
            progress("reading images", len(files), MANY, "files") as bar,
        ):
            for _ in pool.map(read, range(len(files))):
                bar.advance(bar.task_ids[0])
        self._leave_out(bad)
        self.images = images[~bad] if images is not None and bool(bad.any()) else images

    def __len__(self) -> int:
        return len(self.images) if self.images is not None else len(self.files or ())

    def __getitem__(self, draw: Draw | int) -> dict[str, Tensor]:
        draw = draw if isinstance(draw, tuple) else Draw(0, draw)
        bare, self.bare = self.bare, False  # a single example goes through no transfer
        try:
            return {name: values[0] for name, values in self.__getitems__([draw]).items()}
        finally:
            self.bare = bare

    def __getitems__(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """The batch of these draws; torch's loader calls this once a batch."""
        index = torch.tensor([draw.position for draw in draws])
        if self.images is not None:
            images = self.images[index]
        else:
            assert self.files is not None
            images = torch.stack([decode(self.files[i], self.size, self.crop) for i in index.tolist()])
        epoch = draws[0].epoch
        if self.bare and images.dtype == torch.uint8 and (self.transform is None or self.transform.anywhere):
            batch = {"image": images, BARE: torch.tensor(-1 if self.transform is None else epoch)}
        else:
            batch = self.drawn(images, epoch, index)
        batch |= {name: values[index] for name, values in self.entries.items()}
        return {**batch, "index": index}

    def drawn(self, images: Tensor, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """The views of these images, float32 (B, C, H, W) in [0, 1], on the device where the images are.

        Args:
            images: as they are kept; uint8, or what the transform takes.
            epoch: that of the draws.
            index: positions (B,) of the images, on the CPU.
        """
        views = {}
        for number, name in enumerate(("image", "view")[: self.views]):
            drawn = images if self.transform is None else self.transform(images, epoch, index, number)
            views[name] = drawn.float().div_(255) if drawn.dtype == torch.uint8 else drawn
        return views

    def plain(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these examples as they are: not augmented, and in one view."""
        kept = self.transform, self.views, self.bare
        self.transform, self.views, self.bare = None, 1, False
        try:
            return self.__getitems__([Draw(0, i) for i in positions])
        finally:
            self.transform, self.views, self.bare = kept


def scaled(images: Tensor, windows: Tensor) -> Tensor:
    """Windows of images, each scaled to the size of the image, with a triangle as wide as a pixel of the result.

    That is ``interpolate(mode="bilinear", antialias=True)`` on each window, as two products of matrices for all.

    Args:
        images: uint8 (B, C, H, W).
        windows: int64 (B, 4): left, top, right, bottom.

    Returns:
        uint8 (B, C, H, W), within one level of what it gives on the CPU.
    """
    height, width = images.shape[-2:]
    left, top, right, bottom = windows.to(torch.float32).unbind(1)
    across, down = _weights(left, right, width), _weights(top, bottom, height)
    with torch.autocast(images.device.type, enabled=False):
        rows = torch.einsum("byh,bchw->bcyw", down, images.float())
        return torch.einsum("bxw,bcyw->bcyx", across, rows).round_().clamp_(0, 255).to(torch.uint8)


def _weights(first: Tensor, last: Tensor, size: int) -> Tensor:
    """What each of ``size`` pixels gives to each of ``size`` new ones, of windows from ``first`` to ``last`` (B,).

    Returns:
        float32 (B, new, old); the weights of a new pixel sum to 1.
    """
    scale = ((last - first) / size)[:, None, None]
    pixel = torch.arange(size, device=first.device) + 0.5
    distance = pixel - first[:, None, None] - scale * pixel[:, None]
    weights = (1 - distance.abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel > first[:, None]) & (pixel < last[:, None]))[:, None]
    return weights / weights.sum(-1, keepdim=True)


def _padded(images: Tensor, high: int, wide: int) -> Tensor:
    """Images (B, C, H, W) with their border's pixels repeated, ``high`` rows and ``wide`` columns on each side.

    By copies: torch's own padding needs floats, and takes seven times as long.
    """
    height, width = images.shape[-2:]
    padded = images.new_empty(*images.shape[:2], height + 2 * high, width + 2 * wide)
    middle = padded[..., high : high + height, :]
    middle[..., wide : wide + width] = images
    middle[..., :wide], middle[..., wide + width :] = images[..., :1], images[..., -1:]
    padded[..., :high, :], padded[..., high + height :, :] = middle[..., :1, :], middle[..., -1:, :]
    return padded


def _one_by_one(images: Tensor) -> bool:
    """Whether copying one image after the other is faster than an index for all: large ones on a CPU."""
    return images.device.type == "cpu" and images[:1].numel() >= LARGE


class Augmentation:
    """Random crop, flip and translation of a whole batch, each image by its own draws, then a transform of the user's.

    Args:
        seed: draws of an example are a function of (seed, epoch, index).
        size: number of examples.
        flip: mirror left to right with probability 1/2.
        translate: with probability 1/2 shift by up to this part of the side (padded by the border's pixels).
        transform: any module or function on one uint8 (C, H, W) image (torchvision v2), called per image with torch's
            random state set to its own draw.
        crop_scale: cut out a window whose share of the area lies between these two (uniform) and whose aspect between
            3/4 and 4/3 (uniform in the logarithm), anywhere in the image, and scale it to the image's size. That is
            torchvision's ``RandomResizedCrop``, but for windows that don't fit: here the aspect is drawn among those
            with which the window fits; torchvision draws another window, which makes large ones rarer.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        flip: bool,
        translate: float,
        transform: Any = None,
        crop_scale: tuple[float, float] | None = None,
    ) -> None:
        if not 0 <= translate < 1:
            raise ValueError(f"translate must lie in [0, 1), not {translate}")
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two shares of the area, 0 < least <= most <= 1, not {crop_scale}")
        self.seed, self.size, self.flip, self.translate, self.transform = seed, size, flip, translate, transform
        self.crop_scale = crop_scale
        #: Whether it may run on a GPU: a transform of the user's draws from the CPU's random state.
        self.anywhere = transform is None
        self._tables: dict[tuple[int, int], Tensor] = {}

    def _draws(self, epoch: int, index: Tensor, view: int = 0) -> Tensor:
        """Uniform numbers of these examples in this epoch, (B, 5): a row of a table that is made once an epoch.

        (B, 9) where images are cropped; the first five are then the same.
        """
        if (epoch, view) not in self._tables:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + 500_009 * (1 + view))
            self._tables = {key: table for key, table in self._tables.items() if key[0] == epoch}
            table = torch.rand(self.size, _DRAWS, generator=generator)
            if self.crop_scale is not None:
                table = torch.cat([table, torch.rand(self.size, _CROP_DRAWS, generator=generator)], 1)
            self._tables[epoch, view] = table
        return self._tables[epoch, view][index]

    def __call__(self, images: Tensor, epoch: int, index: Tensor, view: int = 0) -> Tensor:
        """uint8 (B, C, H, W) in, the same out; ``view``: which of the independent draws of an example and epoch.

        Positions ``index`` are on the CPU, where the numbers are drawn, the images anywhere. Flips and shifts are the
        same everywhere; a window is scaled on a GPU to what it is on the CPU within one level of 255.
        """
        u = self._draws(epoch, index, view)
        if self.crop_scale is not None:
            images = self._cropped(images, u[:, _DRAWS:])
        if self.flip:
            images = self._mirrored(images, u)
        if self.translate:
            images = self._shifted(images, u)
        if self.transform is not None:
            images = torch.stack([self._own(image, u[i, 4]) for i, image in enumerate(images)])
        return images

    def _windows(self, u: Tensor, height: int, width: int) -> Tensor:
        """Windows of these draws (B, 4), in whole pixels: left, top, right, bottom, (B, 4)."""
        assert self.crop_scale is not None
        u = u.double()
        share = self.crop_scale[0] + (self.crop_scale[1] - self.crop_scale[0]) * u[:, 0]
        most, fits = math.log(_ASPECT), math.log(width / height)
        narrow, wide = (fits + share.log()).clamp(-most, most), (fits - share.log()).clamp(-most, most)
        aspect = (narrow + (wide - narrow) * u[:, 1]).exp()
        w, h = (share * height * width * aspect).sqrt(), (share * height * width / aspect).sqrt()
        fit = torch.minimum(width / w, height / h).clamp(max=1)  # a long image has no window of that aspect and share
        w, h = (w * fit).round().clamp(1, width), (h * fit).round().clamp(1, height)
        left, top = (u[:, 3] * (width - w + 1)).floor(), (u[:, 2] * (height - h + 1)).floor()
        return torch.stack([left, top, left + w, top + h], 1).long()

    def _cropped(self, images: Tensor, u: Tensor) -> Tensor:
        """Each image's window, scaled to the size of the image."""
        size = images.shape[-2:]
        windows = self._windows(u, *size)
        if images.device.type != "cpu":  # one by one, 64 images are 64 times the start of a kernel
            return scaled(images, windows.to(images.device, non_blocking=True))
        found = []  # one by one: from 64 pixels on that is faster than a grid for all, and it is what torchvision does
        for image, (left, top, right, bottom) in zip(images, windows.tolist(), strict=True):
            part = image[None, :, top:bottom, left:right]
            found.append(F.interpolate(part, size, mode="bilinear", antialias=True))
        return torch.cat(found)

    def _mirrored(self, images: Tensor, u: Tensor) -> Tensor:
        mirrored = u[:, 0] < 0.5
        if _one_by_one(images):
            return torch.stack([x.flip(-1) if flip else x for x, flip in zip(images, mirrored.tolist(), strict=True)])
        return torch.where(mirrored.to(images.device, non_blocking=True).view(-1, 1, 1, 1), images.flip(-1), images)

    def _shifted(self, images: Tensor, u: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        reach = max(1, round(self.translate * height)), max(1, round(self.translate * width))
        moved = u[:, 1] < 0.5
        down = torch.where(moved, (u[:, 2] * (2 * reach[0] + 1)).long(), reach[0])
        right = torch.where(moved, (u[:, 3] * (2 * reach[1] + 1)).long(), reach[1])
        padded = _padded(images, *reach)
        if _one_by_one(images):
            places = zip(padded, down.tolist(), right.tolist(), strict=True)
            return torch.stack([x[:, y : y + height, left : left + width] for x, y, left in places])
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (B, C, 2r+1, 2r+1, H, W)
        where = torch.stack([torch.arange(len(images)), down, right]).to(images.device, non_blocking=True)
        return windows[where[0], :, where[1], where[2]]

    def _own(self, image: Tensor, draw: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(draw.item() * 2**31))
            return self.transform(image)


# ---------------------------------------------------------------------- the DataModule


def choose(what: str, wanted: Sequence[str], known: Sequence[str]) -> list[int]:
    """Positions of the wanted names among the known ones.

    Raises:
        ValueError: for a name that doesn't exist (lists those that do), twice the same, or none.
    """
    for name in wanted:
        if name not in known:
            raise ValueError(f"there is no {what} '{name}'; there are: {', '.join(known)}")
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"name each {what} once, and at least one of: {', '.join(known)}")
    return [list(known).index(name) for name in wanted]


def check_image_size(size: int | None) -> None:
    """ValueError for a side of fewer than 8 pixels; None: as the images are."""
    if size is not None and size < 8:
        raise ValueError(f"image_size must be at least 8, not {size}")


def cache_at(folder: str | None) -> Path | None:
    """The folder of decoded images that was asked for."""
    return None if folder is None else Path(folder).expanduser()


class ImageDataModule(PartsDataModule[ImageSet]):
    """Loaders over three :class:`ImageSet`; a dataset's class fills them in :meth:`load`.

    Args:
        batch_size: of training, per rank.
        num_workers: of each loader; 0 is best for what is in memory.
        seed: of the order of the data, of augmentation and of splits made here; None: the run's seed.
        flip: mirror training images at random.
        translate: shift training images at random by up to this part of the side.
        transform: a torchvision v2 transform of one uint8 training image, after crop, flip and shift.
        eval_batch_size: of evaluation, per rank; twice ``batch_size`` if omitted.
        crop_scale: cut a window out of each training image at random and scale it to the image's size; its share of
            the area lies between these two numbers (``[0.08, 1]`` is usual), its aspect between 3/4 and 4/3.
    """

    image_size: int
    in_chans: int = 3
    #: Folder of the autoencoder whose latents the images are; None: pixels.
    vae: str | None = None
    #: Folder of the decoded images of what reads files; None: they aren't kept.
    cache: Path | None = None
    unit = "images"

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int | None = None,
        flip: bool = True,
        translate: float = 0.0,
        transform: nn.Module | None = None,
        eval_batch_size: int | None = None,
        crop_scale: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, eval_batch_size)
        self.flip, self.translate, self.transform, self.crop_scale = flip, translate, transform, crop_scale
        #: A folder whose images are predicted in place of the test data's.
        self.predict_folder: Path | None = None
        #: How many independently drawn views of each training image a batch has, 1 or 2 (``image``, ``view``); set by
        #: recipes that compare views, before the loaders are made.
        self.views = 1

    def prepare_data(self) -> None:
        """Called on one rank of each machine, for whom the others wait as long as it takes: there it is decoded."""
        if self.cache is not None and self.trainer is not None and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn.value)

    def ready_for_training(self, examples: ImageSet) -> None:
        examples.transform = Augmentation(
            self.seed, len(examples), self.flip, self.translate, self.transform, self.crop_scale
        )
        examples.views = self.views

    # ------------------------------------------------------------------ where images are augmented

    def draws_on_device(self) -> bool:
        """Whether images travel to the network's device as uint8, a quarter of the bytes, and are augmented there.

        On a CPU the loader does it: there its workers can.
        """
        return self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"

    def _loader(self, part: Literal["train", "val", "test", "predict"], batches: Any) -> DataLoader[Any]:
        self.part(part).bare = self.draws_on_device()
        return super()._loader(part, batches)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Moves a batch, then draws its images if they are still as they were.

        Not in ``on_after_batch_transfer``: there a recipe may draw, and Lightning calls the DataModule's hook or the
        recipe's, never both.
        """
        if not isinstance(batch, dict) or BARE not in batch:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        epoch = int(batch[BARE])  # stays here: reading it from the device would wait for that
        rest = {name: values for name, values in batch.items() if name != BARE}
        moved = super().transfer_batch_to_device(rest, device, dataloader_idx)
        image = moved.pop("image")
        if epoch < 0:
            views = {"image": image.float().div_(255)}
        else:
            views = self.part("train").drawn(image, epoch, batch["index"])
        if self.trainer is not None:  # what Lightning did to the batch on the CPU, for modules of another precision
            views = self.trainer.precision_plugin.convert_input(views)
        return {**views, **moved}

    # ------------------------------------------------------------------ a folder of the user's

    @property
    def given(self) -> Path | None:
        return self.predict_folder

    def load_given(self) -> ImageSet:
        files = self.files_to_predict()
        size = (self.image_size, self.image_size)
        unknown = torch.full((len(files),), -1)
        images = Files(files, self.in_chans, size, getattr(self, "crop", 0.0))
        return ImageSet(images, {"label": unknown, "domain": torch.zeros_like(unknown)})

    def files_to_predict(self) -> list[Path]:
        """The images in ``predict_folder`` and its subfolders, sorted.

        Raises:
            FileNotFoundError: if there is no such folder, or no image in it.
        """
        folder = self.predict_folder
        if folder is None or not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        found = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGES and f.is_file())
        if not found:
            raise FileNotFoundError(f"there is no image in {folder} (looked for {', '.join(IMAGES)})")
        return found
