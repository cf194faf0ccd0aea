"""How good generated images are: FID, KID, improved precision and recall, on features of Inception or of digits.

FID and KID are torchmetrics' own. Precision and recall: Kynkaanniemi et al., Improved Precision and Recall Metric for
Assessing Generative Models (arXiv 1904.06991), with k = 3 as published. Features are taken once per image, gathered
from all ranks and put in an order of their own, so that batches, ranks and global random states change nothing.

``python -m recipes.scalelong.quality CHECKPOINT OUT.safetensors`` writes the digit features of a trained classifier.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities.data import dim_zero_cat

from recipes.classifier.networks import CNN4

#: The digit features that come with the project.
DIGITS = Path(__file__).parents[2] / "datamodules" / "embedded" / "mnist" / "features.safetensors"
#: Inception's weights of 2015, as torch-fidelity converted them: what published FIDs are computed with.
INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
#: Of red, green and blue (ITU-R BT.601).
LUMINANCE = (0.299, 0.587, 0.114)
#: Distances held at a time.
CHUNK = 2**24


# ---------------------------------------------------------------------- precision and recall


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (arXiv 1904.06991, eq. 1-2).

    Precision: the part of the fakes that lie within the radius of some real one, which is the distance to its k-th
    nearest *other* real one. Recall: the same with the roles exchanged. On the radius is within.

    Args:
        real: (N, D) features, float32 or float64.
        fake: (M, D) features.
        k: which neighbour sets the radius.

    Returns:
        ``precision`` and ``recall``, float32 scalars in [0, 1].

    Raises:
        ValueError: for shapes that don't fit, or no more than ``k`` features of either kind.
    """
    if real.dim() != 2 or fake.dim() != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), not {tuple(real.shape)} and {tuple(fake.shape)}")
    if k < 1 or min(len(real), len(fake)) <= k:
        raise ValueError(f"k = {k} must be at least 1 and below the {len(real)} real and {len(fake)} fake features")
    return _covered(fake, real, k), _covered(real, fake, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """The part of the points (M, D) within the k-NN radius of some centre (N, D)."""
    rows = max(1, CHUNK // len(centres))
    # the nearest is the centre itself, at 0
    radii = torch.cat([_distances(chunk, centres).kthvalue(k + 1).values for chunk in centres.split(rows)])
    return torch.cat([(_distances(chunk, centres) <= radii).any(1) for chunk in points.split(rows)]).float().mean()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(A, D) and (B, D) to (A, B), from differences: by matrix products, as is the default, equal ones aren't equal."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


# ---------------------------------------------------------------------- features


class Features(nn.Module):
    """uint8 images (B, C, H, W), C 1 or 3, to float32 features (B, ``num_features``), by a frozen network.

    The network is no submodule: a recipe that holds these features has it neither in its checkpoints nor among what is
    trained, averaged or cast. It follows the images to their device.
    """

    #: Stands behind the names of the metrics.
    suffix = ""
    num_features: int

    def __init__(self) -> None:
        super().__init__()
        self._hidden: list[nn.Module] = []

    def build(self) -> nn.Module:
        """The network, asked for when it is first needed."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def extract(self, network: nn.Module, images: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define extract(network, images)")

    def network(self) -> nn.Module:
        if not self._hidden:
            with torch.inference_mode(False):  # or its weights could never be used outside
                self._hidden.append(self.build().eval().requires_grad_(False))
        return self._hidden[0]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images must be uint8 (B, C, H, W) with one channel or three, not {images.dtype} {tuple(images.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.extract(self.network().to(images.device), images).float()


class DigitFeatures(Features):
    """What a small classifier of MNIST's digits sees before its last layer; its distances mean nothing elsewhere.

    Images are made grey by their luminance and scaled to 28x28.

    Args:
        weights: a file that ``python -m recipes.scalelong.quality`` wrote; None: the one that comes with the project.

    Raises:
        FileNotFoundError, ValueError: if it isn't there, or is something else.
    """

    suffix = " (digit features)"
    size = 28

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.file = DIGITS if weights is None else Path(weights).expanduser()
        self.num_features = self.network().num_features  # type: ignore[assignment]

    def build(self) -> nn.Module:
        if not self.file.is_file():
            raise FileNotFoundError(
                f"there is no file {self.file}: train it with python -m recipes.classifier fit --config digit_features "
                "and write it with python -m recipes.scalelong.quality CHECKPOINT OUT.safetensors"
            )
        try:
            with safe_open(self.file, "pt") as opened:
                config = json.loads((opened.metadata() or {})["config"])
                weights = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118  # no mapping
            network = CNN4(config["num_classes"], 1, config["width"])
            network.load_state_dict(weights)
        except Exception as error:  # of safetensors' own kind, which it doesn't export
            raise ValueError(
                f"{self.file} has no digit features of recipes.scalelong.quality: {' '.join(str(error).split())}"
            ) from error
        return network

    def extract(self, network: nn.Module, images: Tensor) -> Tensor:
        assert isinstance(network, CNN4)
        return network.forward_head(network.forward_features(self.prepare(images)), pre_logits=True)

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images as the classifier saw them: (B, 1, 28, 28), normalised."""
        x = images.float() / 255
        if x.shape[1] == 3:
            x = (x * x.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return (x - 0.5) / 0.25


class InceptionFeatures(Features):
    """The 2048 features of Inception that published FIDs are computed with, as torch-fidelity and torchmetrics do.

    The weights (91 MB) are looked for when the first images come: nothing is fetched for a run that never asks.

    Args:
        weights: their file; None: the one in torch.hub's folder, which is fetched if it isn't there.
    """

    num_features = 2048

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.weights = weights

    def build(self) -> nn.Module:
        """
        Raises:
            ModuleNotFoundError: without torch-fidelity.
            FileNotFoundError: if the weights aren't there and can't be fetched.
            ValueError: if the file holds something else.
        """
        try:
            import torch_fidelity  # noqa: F401  # torchmetrics asks for it
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Inception's features need torch-fidelity: pip install torch-fidelity", name=error.name
            ) from error
        file = self.find()
        try:
            torch.load(file, weights_only=True, map_location="cpu", mmap=True)  # torch-fidelity would run what is in it
            return NoTrainInceptionV3("inception-v3-compat", [str(self.num_features)], str(file))
        except (RuntimeError, ValueError, EOFError, AttributeError, TypeError, pickle.UnpicklingError) as error:
            said = " ".join(str(error).split())[:150]
            raise ValueError(f"{file} doesn't hold Inception's weights of {INCEPTION}: {said}") from error

    def find(self) -> Path:
        if self.weights is not None:
            file = Path(self.weights).expanduser()
            if not file.is_file():
                raise FileNotFoundError(f"there is no file {file}: fetch Inception's weights with wget {INCEPTION}")
            return file
        file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rpartition("/")[2]
        if not file.is_file():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                digest = file.stem.rpartition("-")[2]
                torch.hub.download_url_to_file(INCEPTION, str(file), digest, progress=sys.stderr.isatty())
            except (OSError, RuntimeError) as error:  # RuntimeError: another file than expected
                raise FileNotFoundError(
                    f"Inception's weights can't be fetched ({' '.join(str(error).split())}): "
                    f"wget -P {file.parent} {INCEPTION}, or give a file of them as weights"
                ) from error
        return file

    def extract(self, network: nn.Module, images: Tensor) -> Tensor:
        return network(images.expand(-1, 3, -1, -1))


# ---------------------------------------------------------------------- the metrics


class Gathered(Metric):
    """Features of real and of fake images, of all ranks: what all metrics are computed from, kept once.

    torchmetrics' KID keeps its features so that ranks with different numbers of batches wait for each other for ever.
    """

    full_state_update = False
    real: list[Tensor] | Tensor
    fake: list[Tensor] | Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__(compute_with_cache=False)
        self.num_features = num_features
        for name in ("real", "fake"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, features: Tensor, real: bool) -> None:
        kept = self.real if real else self.fake
        assert isinstance(kept, list)
        kept.append(features)

    def sync(self, *arguments: Any, **options: Any) -> None:
        for name in ("real", "fake"):
            if len(getattr(self, name)) == 0:  # or ranks with no image would send another number of dimensions
                setattr(self, name, [torch.zeros(0, self.num_features, device=self.device)])
        super().sync(*arguments, **options)

    def compute(self) -> dict[str, Tensor]:
        empty = torch.zeros(0, self.num_features, device=self.device)
        return {name: dim_zero_cat([empty, *self._list(name)]) for name in ("real", "fake")}

    def _list(self, name: str) -> list[Tensor]:
        kept = getattr(self, name)
        return kept if isinstance(kept, list) else [kept]

    def reset(self, real: bool = True) -> None:
        """Forget the features; with ``real`` false only those of the fakes."""
        kept = list(self._list("real"))  # the list itself is emptied
        super().reset()
        if not real:
            self.real = kept


class Given(nn.Module):
    """Hands torchmetrics the features that there are already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class SampleQuality(nn.Module):
    """FID, KID, improved precision and recall of fake against real images.

    Under DDP each rank gives its own images to :meth:`update`, and :meth:`compute`, to be called by all, returns the
    same numbers on each. Work and memory of all but the FID grow with the product of the numbers of images; the FID of
    fewer images than features is larger than that of many, so compare at the same number.

    Args:
        features: :class:`InceptionFeatures`, :class:`DigitFeatures`, or what else takes uint8 images (B, C, H, W) to
            (B, ``num_features``).
        suffix: of the names of the metrics; None: what the features bring (``" (digit features)"``; Inception: none).
        k: the neighbour of precision and recall.
        subset_size: of KID's draws; at most as many as there are images of either kind.
        subsets: how many draws KID is the mean of.
        seed: of these draws.
    """

    def __init__(
        self,
        features: nn.Module,
        suffix: str | None = None,
        k: int = 3,
        subset_size: int = 1000,
        subsets: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {"k": k, "subset_size": subset_size - 1, "subsets": subsets}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least {2 if name == 'subset_size' else 1}")
        self.features = features
        self.num_features = int(features.num_features)  # type: ignore[arg-type]
        self.suffix: str = getattr(features, "suffix", "") if suffix is None else suffix
        self.k, self.subset_size, self.subsets, self.seed = k, subset_size, subsets, seed
        self.gathered = Gathered(self.num_features)

    @property
    def names(self) -> list[str]:
        """The names of the metrics, in the order of :meth:`compute`."""
        return [f"{name}{self.suffix}" for name in ("FID", "KID", "precision", "recall")]

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Take in images.

        Args:
            images: uint8 (B, C, H, W) in 0..255.
            real: whether they are what the others are compared with.
        """
        self.gathered.update(self.features(images).detach(), real)

    @torch.no_grad()
    def compute(self) -> dict[str, Tensor]:
        """The metrics of all images since :meth:`reset`, float32 scalars.

        Raises:
            ValueError: for fewer than k + 2 images of either kind.
        """
        real, fake = (each.view(-1, self.num_features) for each in self.gathered.compute().values())
        if min(len(real), len(fake)) < self.k + 2:
            raise ValueError(
                f"{len(real)} real and {len(fake)} generated images are too few: FID, KID, precision and recall need "
                f"{self.k + 2} of each"
            )
        precision, recall = precision_recall(real, fake, self.k)
        real, fake = (_ordered(each) for each in (real, fake))
        values = (self._fid(real, fake), self._kid(real, fake), precision, recall)
        return {name: value.to(precision) for name, value in zip(self.names, values, strict=True)}

    def reset(self, real: bool = True) -> None:
        """Forget the images; with ``real`` false the real ones are kept."""
        self.gathered.reset(real)

    def _fid(self, real: Tensor, fake: Tensor) -> Tensor:
        fid = FrechetInceptionDistance(Given(self.num_features), sync_on_compute=False).to(real.device)
        fid.update(real, real=True)
        fid.update(fake, real=False)
        return fid.compute()

    def _kid(self, real: Tensor, fake: Tensor) -> Tensor:
        size = min(self.subset_size, len(real), len(fake))
        subsets = self.subsets if max(len(real), len(fake)) > size else 1  # they would all be the same
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Kernel Inception Distance.*buffer")
            kid = KernelInceptionDistance(Given(self.num_features), subsets, size, sync_on_compute=False)
        kid.update(real, real=True)
        kid.update(fake, real=False)
        before = torch.get_rng_state()  # it draws from torch's generator of the CPU
        try:
            torch.default_generator.manual_seed(self.seed)
            return kid.compute()[0]
        finally:
            torch.set_rng_state(before)


def _ordered(features: Tensor) -> Tensor:
    """float64 features (N, D) in an order that depends on nothing but themselves, for draws that are to be the same."""
    wide = features.to("cpu" if features.device.type == "mps" else features.device).double()
    weights = torch.arange(
        1, wide.shape[1] + 1, dtype=wide.dtype, device=wide.device
    ).sin()  # plain sums would be equal
    return wide[(wide * weights).sum(1).argsort(stable=True)]


# ---------------------------------------------------------------------- writing digit features


def export(checkpoint: Path, out: Path) -> None:
    """Write the backbone of a classifier of digits, in half precision, as one safetensors file.

    Args:
        checkpoint: of ``recipes.classifier`` with the backbone ``cnn4`` on one channel.
        out: the file to write.

    Raises:
        FileNotFoundError, ValueError: if the checkpoint isn't there, or is of something else.
    """
    if not checkpoint.is_file():
        raise FileNotFoundError(f"there is no file {checkpoint}")
    try:
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
        weights = {
            name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")
        }
        width, num_classes = len(weights["layer1.0.weight"]), len(weights["fc.weight"])
        CNN4(num_classes, 1, width).load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        said = " ".join(str(error).split())[:150]
        raise ValueError(
            f"{checkpoint} is not a classifier with --model.backbone cnn4 on grey images: {said}"
        ) from error
    halves = {n: (v.half() if v.is_floating_point() else v).contiguous() for n, v in weights.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(halves, out, {"config": json.dumps({"width": width, "num_classes": num_classes})})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m recipes.scalelong.quality", description="Write digit features.")
    parser.add_argument("checkpoint", type=Path, help="of python -m recipes.classifier fit --config digit_features")
    parser.add_argument("out", type=Path, help="the safetensors file to write")
    given = parser.parse_args(arguments)
    try:
        export(given.checkpoint, given.out)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
