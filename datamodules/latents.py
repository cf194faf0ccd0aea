"""Images as the latents of an autoencoder (Rombach et al., arXiv 2112.10752), which are computed once and kept on disk.

Kept are mean and standard deviation of the autoencoder's posterior, of each image and of its mirror image; each time an
image is fetched, its latent is drawn from them anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.images import Augmentation, ImageDataModule, ImageSet
from datamodules.sampling import EvalBatches

log = logging.getLogger(__name__)
#: Images that are encoded at a time.
CHUNK = 32
#: Images of a set that are looked at to tell it from others.
SAMPLE = 64
#: Tell the random numbers of noise from those that others draw for the same seed, epoch and index.
_TRAINING, _EVALUATION = 2112, 10752
#: Settings of a DataModule that change nothing about its images as they are before augmentation. Nor need its seed be
#: known: which images it chooses shows in the images.
_OTHERS = frozenset(
    "batch_size eval_batch_size num_workers memory_gb cache download flip translate transform labelled attribute "
    "num_classes class_names".split()
)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/perturbation-recipes``, below ``~/.cache`` where that isn't set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perturbation-recipes"


# ---------------------------------------------------------------------- the autoencoder


class Autoencoder(NamedTuple):
    """What an autoencoder's ``config.json`` says: channels of images and of latents, pixels per latent, the scale."""

    in_channels: int
    channels: int
    factor: int
    scale: float


def read_config(folder: Path) -> Autoencoder:
    """The shape of the autoencoder in a folder, without reading its weights.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another kind.
    """
    file = folder / "config.json"
    if not file.is_file() or not _weights(folder):
        raise FileNotFoundError(
            f"there is no autoencoder in {folder}: vae expects the folder of a diffusers AutoencoderKL (config.json "
            "and diffusion_pytorch_model.safetensors); get one from https://huggingface.co/stabilityai/sd-vae-ft-mse"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["_class_name"] != "AutoencoderKL":
            raise ValueError(config["_class_name"])
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        scale = float(config.get("scaling_factor", 0.18215))  # older files leave it to diffusers' default
        return Autoencoder(int(config["in_channels"]), int(config["latent_channels"]), factor, scale)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} doesn't describe a diffusers AutoencoderKL ({error})") from None


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("diffusion_pytorch_model*"))


def fingerprint(folder: Path) -> str:
    """Of an autoencoder: a hash of its weights and its config."""
    digest = hashlib.blake2b(digest_size=16)
    for file in (folder / "config.json", *_weights(folder)):
        with file.open("rb") as opened:
            while block := opened.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def load_autoencoder(folder: Path) -> Any:
    """The autoencoder in a folder, in float32, on the GPU if there is one.

    Raises:
        ValueError: if its weights can't be read, or some are missing.
    """
    from diffusers import AutoencoderKL

    try:
        vae, found = AutoencoderKL.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # whatever kind diffusers or safetensors choose
        raise ValueError(f"the autoencoder in {folder} can't be read: {' '.join(str(error).split())}") from None
    if found["missing_keys"]:
        raise ValueError(f"the autoencoder in {folder} lacks weights, of {found['missing_keys'][0]} for one")
    return vae.float().eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def moments(vae: Any, images: Tensor) -> Tensor:
    """Mean and standard deviation (B, 2, C, h, w) of the posterior of images (B, C, H, W) in [0, 1], in float32."""
    with torch.autocast(images.device.type, enabled=False):
        posterior = vae.encode(images.float() * 2 - 1).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1)


# ---------------------------------------------------------------------- sets of latents


class Moments:
    """Moments float16 (N, V, 2, C, h, w) in a file, read where they lie; V is 2 where mirror images have theirs."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, torch.Size(array.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor) -> Tensor:
        """float16 (B, V, 2, C, h, w) of positions (B,)."""
        return torch.from_numpy(np.asarray(self.array[index.numpy()]))


class Posterior(Augmentation):
    """Draws latents from their moments: scale * (mean + std * noise), of the image or of its mirror image.

    Args:
        seed: noise and flip of an example are a function of (seed, epoch, index); None: noise of the index alone and
            no flip, for evaluation.
        size: number of examples.
        flip: take the mirror image's moments with probability 1/2.
        scale: the autoencoder's ``scaling_factor``.
    """

    def __init__(self, seed: int | None, size: int, flip: bool, scale: float) -> None:
        super().__init__(seed or 0, size, flip and seed is not None, 0.0)
        self.training, self.scale = seed is not None, scale

    def __call__(self, images: Tensor, epoch: int, index: Tensor, view: int = 0) -> Tensor:
        """Moments (B, V, 2, C, h, w) in, latents float32 (B, C, h, w) out."""
        chosen = images[:, 0]
        if self.flip:
            mirrored = self._draws(epoch, index, view)[:, 0] < 0.5
            chosen = torch.where(mirrored.view(-1, 1, 1, 1, 1), images[:, 1], chosen)
        mean, std = chosen.float().unbind(1)
        noise = torch.stack([self._noise(mean.shape[1:], epoch, i, view) for i in index.tolist()])
        return self.scale * (mean + std * noise)

    def _noise(self, shape: torch.Size, epoch: int, index: int, view: int) -> Tensor:
        key = (_TRAINING, self.seed, epoch, index, view) if self.training else (_EVALUATION, index)
        return torch.from_numpy(np.random.default_rng(key).standard_normal(tuple(shape), np.float32))


class Latents(ImageDataModule):
    """Another DataModule's images as latents of an autoencoder: ``image`` is float32 (B, C, h, w).

    The first run encodes all images, and mirror images too where the data flips, and keeps the moments in ``cache``
    (float16: 2 * C * h * w numbers an image, twice that with mirror images); later runs read them. Batches have
    whatever else the data's have. Latents are scaled by the autoencoder's ``scaling_factor``: divide by it to decode.

    Args:
        data: the images; its batch sizes, workers, seed and flip hold. It can't shift or transform them.
        vae: folder of a diffusers ``AutoencoderKL``.
        cache: folder for the moments; ``$XDG_CACHE_HOME/perturbation-recipes/latents`` if omitted.

    Raises:
        FileNotFoundError: if there is no autoencoder in ``vae``.
        ValueError: if it doesn't fit the images, or diffusers isn't installed.
    """

    vae: str
    cache: Path

    def __init__(self, data: ImageDataModule, vae: str, cache: str | None = None) -> None:
        super().__init__(data.batch_size, data.num_workers, data._seed, data.flip, eval_batch_size=data.eval_batch_size)
        if importlib.util.find_spec("diffusers") is None:
            raise ValueError('Latents needs diffusers: pip install -e ".[diffusion]"')
        name = type(data).__name__
        if data.translate or data.crop_scale is not None or data.transform is not None:
            raise ValueError(
                f"latents can't be shifted or transformed: set translate of {name} to 0, and leave its transform out"
            )
        self.data, self.vae = data, str(Path(vae).expanduser())
        self.cache = cache_folder() / "latents" if cache is None else Path(cache).expanduser()
        self._autoencoder = read_config(Path(self.vae))
        factor, channels = self._autoencoder.factor, self._autoencoder.in_channels
        if data.image_size % factor:
            raise ValueError(
                f"images of {data.image_size} pixels can't be encoded: the autoencoder in {vae} needs a multiple of "
                f"{factor}; set image_size of {name}"
            )
        if data.in_chans != channels:
            raise ValueError(f"the autoencoder in {vae} takes {channels} channels, but {name} has {data.in_chans}")
        self.in_chans, self.image_size = self._autoencoder.channels, data.image_size // factor
        self.num_classes, self.class_names = data.num_classes, data.class_names
        self.domain_names = data.domain_names
        if hasattr(data, "memory_gb"):
            data.memory_gb = 0.0  # its images are needed once, if at all
        data.cache = None
        self._fingerprint: str | None = None

    # ------------------------------------------------------------------ loaders

    def prepare_data(self) -> None:
        """Called on one rank of each machine, for whom the others wait as long as it takes: there it is encoded."""
        self.data.prepare_data()
        if self.trainer is not None and self.trainer.state.fn is not None:
            self.setup(self.trainer.state.fn.value)

    def load(self, part: Literal["train", "val", "test"]) -> ImageSet:
        examples = self.data.load(part)
        if len(examples):
            kept = Moments(self._kept(part, examples, 2 if part == "train" and self.flip else 1))
            examples.images, examples.files, examples.size = kept, None, (kept.shape[-2], kept.shape[-1])
            examples.transform = Posterior(None, len(examples), False, self._autoencoder.scale)
        return examples

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()
        examples = self.part("train")
        examples.transform = Posterior(self.seed, len(examples), self.flip, self._autoencoder.scale)
        return loader

    def predict_dataloader(self) -> DataLoader[Any]:
        if self.predict_folder is not None:
            raise ValueError("Latents can't read a folder of images: leave --images out")
        return super().predict_dataloader()

    # ------------------------------------------------------------------ the cache

    def _kept(self, part: str, examples: ImageSet, views: int) -> np.ndarray:
        """Moments of these images, from the disk; computed where they aren't there or aren't whole."""
        side = self.image_size
        shape = (len(examples), views, 2, self.in_chans, side, side)
        file = self.cache / f"{type(self.data).__name__}-{part}-{self._key(examples, views)}.npy"
        array = _opened(file, shape)
        if array is None:
            log.info("computing latents of %d images (%s), once: %s", len(examples), part, file)
            self._write(file, shape, examples)
            array = _opened(file, shape)
            if array is None:
                raise OSError(f"{file} was written, but can't be read")
        return array

    def _key(self, examples: ImageSet, views: int) -> str:
        """Of these images and this autoencoder: the data's class and settings, and what tells its images from others.

        A hash of all pixels would take as long as reading them.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint(Path(self.vae))
        cls = type(self.data)
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in sorted(vars(self.data).items())
            if not name.startswith("_") and name not in _OTHERS and _plain(value)
        }
        said = [self._fingerprint, f"{cls.__module__}.{cls.__qualname__}", settings, views, len(examples)]
        said += [self.data.image_size, examples.size, examples.crop]
        digest = hashlib.blake2b(json.dumps(said, default=str).encode(), digest_size=16)
        some = sorted({round(i) for i in np.linspace(0, len(examples) - 1, SAMPLE)})
        if examples.files is not None:
            digest.update("\n".join(map(str, examples.files)).encode())
            digest.update(str([examples.files[i].stat().st_size for i in some]).encode())
        else:
            digest.update(examples.plain(some)["image"].numpy().tobytes())
        return digest.hexdigest()

    def _encoded(self, examples: ImageSet, views: int) -> Iterator[np.ndarray]:
        """Moments float16 (B, V, 2, C, h, w) of one batch after the other."""
        vae = load_autoencoder(Path(self.vae))
        batches: Any = EvalBatches(len(examples), CHUNK, 0, 1)
        loader: Any = DataLoader(examples, batch_sampler=batches, num_workers=self.num_workers, collate_fn=dict)
        for batch in track(loader, "latents", transient=True, disable=not sys.stdout.isatty()):
            images = batch["image"].to(vae.device)
            both = [moments(vae, view) for view in (images, images.flip(-1))[:views]]
            found = torch.stack(both, 1).half()
            if not found.isfinite().all():
                raise ValueError(f"the autoencoder in {self.vae} gives latents that aren't finite in half precision")
            yield found.cpu().numpy()

    def _write(self, file: Path, shape: tuple[int, ...], examples: ImageSet) -> None:
        part: Path | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as opened:
                part = Path(opened.name)
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(opened, header)
                for found in self._encoded(examples, shape[1]):
                    opened.write(found.astype("<f2").tobytes())
            part.replace(file)  # whole or not at all, whoever else writes it
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(
                f"latents can't be kept in {file.parent} ({error.strerror}): they need {_gigabytes(shape)} GB; name "
                "another folder with --data.cache"
            ) from None
        finally:
            if part is not None:
                part.unlink(missing_ok=True)


def _gigabytes(shape: tuple[int, ...]) -> str:
    return f"{2 * np.prod(shape, dtype=np.float64) / 1e9:.2g}"


def _plain(value: Any) -> bool:
    """Whether it is written the same way in every run."""
    if isinstance(value, dict):
        return _plain([*value, *value.values()])
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, int, float, Path))


def _opened(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array in the file; None, and a warning, if it isn't whole, and None if there is no file."""
    if not file.is_file():
        return None
    try:
        array = np.load(file, mmap_mode="r")
        if array.shape == shape and array.dtype == np.float16:
            return array
        log.warning("%s holds %s of %s, not %s: computed again", file, array.shape, array.dtype, shape)
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s can't be read (%s): computed again", file, " ".join(str(error).split()))
    return None
