"""What the laws are applied to: every technique found in callbacks/ and every recipe found in recipes/, made small.

A technique is taken with its default settings, and a recipe with a small network on a few images. Where that can't
work, say so here, in one line. It can't be forgotten: a recipe or technique that can't be built fails the tests, so
does a recipe whose network is large, and a pair that doesn't go together has to be named and to say so itself.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import callbacks
from callbacks.exact_resume import ExactResume
from callbacks.perturbation import Perturbation
from datamodules.images import ImageDataModule, ImageSet
from datamodules.text import Examples, TextDataModule
from recipes.__main__ import read_cards
from recipes.clip import towers
from tests.processes import model_of

CLASSES, SIDE, BATCH, STEPS = 3, 32, 4, 3

#: Arguments of recipes beside what all recipes with a backbone get (below), by name of the recipe.
RECIPES: dict[str, dict[str, Any]] = {
    "adversarial_training": {"norm": "l2", "eps": 0.5, "steps": 2},
    "clip": {
        "vocabulary": ("red", "green", "blue"),
        "class_texts": ("red", "green", "blue"),
        **dict.fromkeys(("embed_dim", "width", "text_width"), 32),
        **{"layers": 3, "text_layers": 1, "context_length": 8, "lr": 1e-3},
    },
}
#: For recipes on a frozen CLIP: made once for each process, deleted when it ends.
_FOLDER = tempfile.TemporaryDirectory(prefix="clip-")


def small_clip() -> str:
    """A file with a small random CLIP that knows three words."""
    file = Path(_FOLDER.name) / "small.safetensors"
    if not file.is_file():
        vision = {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": SIDE}
        text = {"context_length": 8, "vocab_size": 7, "width": 16, "heads": 2, "layers": 2}
        config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
        torch.manual_seed(0)
        towers.save_small(file, towers.small(config), config, ["red", "green", "blue"])
    return str(file)


#: In which precision two ranks are compared with one process, if not in float32. The bias of attention's keys has no
#: gradient but for rounding, and Adam divides that by itself; so it is with additive attention's.
PRECISION: dict[str, Any] = {"clip": "64-true", "scalelong": "64-true", "attention_at": "64-true"}
#: Arguments of techniques that can't do without, by class name.
TECHNIQUES: dict[str, dict[str, Any]] = {
    "AdversarialInput": {"steps": 2},
    "FreeAdversary": {"replays": 1},  # what replays do to the loop is tested beside the technique
    "FreeLB": {"layer": "layer1"},
    "LatentAdversarial": {"steps": 2},
}
#: The same for one recipe.
ON: dict[tuple[str, str], dict[str, Any]] = {("clip", "FreeLB"): {"layer": "transformer.resblocks.0"}}
#: (recipe, technique) that don't go together, and a part of what the technique then says (a ValueError).
APART: dict[tuple[str, str], str] = {("classifier", "NeedsAttention"): "no attention"}

RECIPES["coprompt"] = {
    "clip": small_clip(),
    **{"n_ctx": 2, "depth": 3, "ctx_init": "red green", "lr": 0.05, "warmup_epochs": 0},
    **{"class_names": ("red", "green", "blue"), "class_texts": ("red", "green", "blue")},
    "class_sentences": {c: (f"{c} {c}", f"{c} red") for c in ("red", "green", "blue")},
    **{"domain_names": ("base", "novel"), "domain_classes": ((0, 1), (2,))},
}
RECIPES["noise_mask"] = {"stage": "pretrain"}
#: What texts are made of.
VOCABULARY = ["<pad>", "<unk>", *(f"w{i}" for i in range(28))]
RECIPES["attention_at"] = {"vocabulary": VOCABULARY, "embedding_dim": 16, "hidden": 16, "lr": 0.01}
RECIPES["scalelong"] = {
    "network_args": {"patch_size": 8, "dim": 32, "depth": 4, "heads": 2},
    **{"lr": 1e-3, "warmup_steps": 0, "sample_steps": 2, "test_samples": 0, "num_samples": 4},
}
for _technique in ("FreeLB",):
    ON["coprompt", _technique] = ON["clip", _technique]
    ON["scalelong", _technique] = {"layer": "in_blocks.0"}

ON["attention_at", "FreeLB"], ON["attention_at", "LatentAdversarial"] = {"layer": "embed"}, {"layer": "encoder"}
ON["attention_at", "AttentionPerturbation"] = {"layers": ["attention.scores"]}
for _name in ("classifier", "advstyle", "adversarial_training", "noise_mask"):  # whose small network is a ResNet
    APART[_name, "AttentionPerturbation"] = "no attention"

for _name in ("AdversarialInput", "FreeAdversary", "NoiseMask"):  # words are numbers of a list
    APART["attention_at", _name] = "image"
for _name in ("MixStyle", "EFDMix", "DSU", "AdvStyle"):  # a style is one of images
    APART["attention_at", _name] = "no stages found in AttentionNetwork"

TECHNIQUES["PlantOpposingOutliers"] = {"k": 3}
TECHNIQUES["DropGroups"] = {"examples": [4]}
APART["attention_at", "PlantOpposingOutliers"] = "'image'"
APART["clip", "DropGroups"] = "captioned data compares"

_SMALL: dict[str, Any] = {
    "backbone": "resnet10t",
    "backbone_args": {"channels": (8, 8, 16, 16), "stem_width": 8, "drop_rate": 0.2},
    "num_classes": CLASSES,
    "image_size": SIDE,
    "lr": 0.05,
    "momentum": 0.9,
}


def _below(cls: type) -> Iterator[type]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _below(sub)


def techniques() -> dict[str, type[Perturbation]]:
    """Every public technique of callbacks/, by name."""
    for module in pkgutil.iter_modules(callbacks.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"callbacks.{module.name}")
    public = [c for c in _below(Perturbation) if not c.__name__.startswith("_")]
    found = [c for c in public if c.__module__.startswith("callbacks.")]
    return {c.__name__: c for c in sorted(found, key=lambda c: c.__name__)}


def recipes() -> dict[str, type[LightningModule]]:
    """Every recipe's LightningModule, by name of the recipe."""
    found = {}
    for name in read_cards():
        module, _, cls = model_of(name).rpartition(".")
        found[name] = getattr(importlib.import_module(module), cls)
    return found


def technique(cls: type[Perturbation], on: str = "classifier", **more: Any) -> Perturbation:
    return cls(**{**TECHNIQUES.get(cls.__name__, {}), **ON.get((on, cls.__name__), {}), **more})


def recipe(name: str, *, norm: bool = True, drop: bool = True, **more: Any) -> LightningModule:
    """A small network of a recipe, the same each time.

    Without ``norm`` batch norm is fixed, so rows are independent; without ``drop`` there is no dropout, so a step draws
    nothing beside what techniques draw.
    """
    cls = recipes()[name]
    torch.manual_seed(1)
    given = {**_SMALL, **RECIPES.get(name, {}), **more}
    taken = {k for c in cls.__mro__ for k in inspect.signature(c.__init__).parameters}
    module = cls(**{k: v for k, v in given.items() if k in taken})
    for layer in module.modules():
        if isinstance(layer, _NormBase) and not norm:
            layer.eval()
        for rate in ("p", "drop_rate", "drop_prob"):  # torch's and timm's names
            if not drop and isinstance(getattr(layer, rate, None), float):
                setattr(layer, rate, 0.0)
    return module


for _name in recipes():
    if _name != "scalelong":  # whose network has long skip connections
        APART[_name, "LongSkipScaling"] = "no long skip connections found"


def data(name: str, **more: Any) -> LightningDataModule:
    """A few batches for a recipe."""
    return DATA.get(name, Images)(**more)


class Images(ImageDataModule):
    """A few random images through the project's own loaders."""

    def __init__(self, size: int = BATCH * STEPS, batch_size: int = BATCH) -> None:
        super().__init__(batch_size, seed=7, translate=0.1)
        self.size = size
        self.num_classes, self.class_names, self.domain_names = CLASSES, ["a", "b", "c"], ["all"]
        self.image_size = SIDE

    def load(self, part: str) -> ImageSet:  # type: ignore[override]
        g = torch.Generator().manual_seed({"train": 1, "val": 2, "test": 3}[part])
        label = torch.arange(self.size) % CLASSES
        images = torch.randint(0, 256, (self.size, 3, SIDE, SIDE), generator=g, dtype=torch.uint8)
        return ImageSet(images, {"label": label, "domain": torch.zeros_like(label)})

    def probe_sets(self) -> tuple[ImageSet, ImageSet]:
        """For LinearProbe."""
        return self.load("train"), self.load("test")


class Captioned(Images):
    """The same with captions."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for part, images in self._sets.items():
            images.entries["concept"] = torch.arange(len(images)) % 5
            if part == "train" and not isinstance(images, CaptionedSet):
                self._sets[part] = CaptionedSet(images.images, images.entries)


class CaptionedSet(ImageSet):
    """Adds ``text``."""

    def __getitems__(self, draws: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super().__getitems__(draws)
        return {**batch, "text": [("red", "green", "blue", "red green", "blue red")[c] for c in batch["concept"]]}


class Divided(Images):
    """The same, two classes base and one novel; training has the base classes alone."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for part, images in self._sets.items():
            label = images.entries["label"]
            images.entries["label"] = label = label % 2 if part == "train" else label
            images.entries["domain"] = (label == 2).long()


class Words(TextDataModule):
    """A few random texts of one to nine words."""

    def __init__(self, size: int = BATCH * STEPS, batch_size: int = BATCH) -> None:
        super().__init__(batch_size=batch_size, seed=7)
        self.size = size
        self.num_classes, self.class_names, self.domain_names = CLASSES, ["a", "b", "c"], ["all"]
        self.use_vocabulary(VOCABULARY)

    def read(self, part: str) -> Examples:  # type: ignore[override]
        g = torch.Generator().manual_seed({"train": 1, "val": 2, "test": 3}[part])
        texts = []
        for length in torch.randint(1, 10, (self.size,), generator=g).tolist():
            texts.append(" ".join(VOCABULARY[i] for i in torch.randint(2, 30, (length,), generator=g).tolist()))
        return Examples(texts, [i % CLASSES for i in range(self.size)])

    def synonyms(self, word: str) -> list[str]:
        """For WordSubstitution."""
        return VOCABULARY[2:5] if word in VOCABULARY[:16] else []


#: The DataModule's class of recipes that aren't trained on labelled images, by name of the recipe.
DATA: dict[str, type[LightningDataModule]] = {"clip": Captioned, "coprompt": Divided, "attention_at": Words}


def trainer(*callbacks: Any, **options: Any) -> Trainer:
    """A trainer as the command line makes it, without what is written to disk."""
    parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet: dict[str, Any] = dict.fromkeys((*parts, "use_distributed_sampler"), False)
    usual = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return Trainer(**{**quiet, **usual, **options}, callbacks=[ExactResume(), *callbacks])


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers of the network, the techniques' own left out."""
    state = module.state_dict()
    return {name: value.clone() for name, value in state.items() if not name.startswith("perturbations.")}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal to the last bit."""
    return sorted(a.keys() ^ b.keys()) + [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]


ON["coprompt", "LabelNoise"] = {"num_classes": 2}  # the base classes, which alone train


class Parity(Images):
    """The same in two classes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes, self.class_names = 2, ["a", "b"]

    def load(self, part: str) -> ImageSet:  # type: ignore[override]
        images = super().load(part)
        images.entries["label"] = images.entries["label"] % 2
        return images


DATA["lazy_to_rich"] = Parity
RECIPES["lazy_to_rich"] = {"num_classes": 2, "width": 8}
TECHNIQUES["SGDNoiseInjection"] = {"batch_size": 2}
ON["lazy_to_rich", "LatentAdversarial"] = {"layer": "layer1"}
APART["lazy_to_rich", "AttentionPerturbation"] = "no attention"
for _name in ("MixStyle", "EFDMix", "DSU", "AdvStyle"):
    APART["lazy_to_rich", _name] = "no stages found in MeanFieldMLP"
for _name in ("adversarial_training", "attention_at", "clip", "coprompt", "scalelong"):  # no cross-entropy of their own
    APART[_name, "SGDNoiseInjection"] = "each example's own loss"
APART["grok", "AttentionPerturbation"] = "no attention"  # its small network is a ResNet
APART["near_features", "AttentionPerturbation"] = "no attention"  # the same
# AdamW's and SGD's usual rates here: at .05 what bf16 rounds grows beyond law 7's tenth within three steps.
RECIPES["grok"], RECIPES["near_features"] = {"lr": 1e-3}, {"lr": 0.02}
