"""CoPrompt: consistency-guided prompt learning for vision-language models (Roy & Etemad, ICLR 2024, arXiv 2306.01195).

Prompts of both towers of a frozen CLIP and adapters behind them are learned from a few images a class. What they make
of an image and of a class is kept near what the untouched CLIP makes of *another view* of the image and of *another
sentence* about the class: ``cross-entropy + lam (D_image + D_text)``, D the mean cosine distance (section 3.2). The
claim: less is forgotten, so classes without training images are told apart better.

Where paper and released code differ, or the code is broken, we do this:

* The student runs on the teacher's weights, which are there once; the teacher runs without a graph.
* One sentence is drawn per optimizer step for all classes, as released, but by (seed, step), so that runs resume.
* The sentences' features are kept on disk by the hash of CLIP and texts; the release writes them and never reads them.
* Parameters stay in float32 (the release trains them in fp16 with plain SGD); norms and cosines are always float32.
* The adapters' last ReLU, which the paper doesn't have, is kept: the published numbers are of the released code.
* PromptSRC is its three consistency terms (features of image and text, logits; weights 10, 25 and 1, the same view, the
  mean of all sentences) without its averaging of prompts over epochs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import copy
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from callbacks.perturbation import (
    accept_other_techniques,
    clip_groups,
    fold_seed,
    match_optimizer_groups,
    parameter_groups,
    run_seed,
)
from recipes.classifier.module import DomainConfusion
from recipes.clip import towers
from recipes.coprompt.bank import encode, encode_once
from recipes.coprompt.prompts import (
    Adapter,
    ConditionalPrompts,
    CoupledPrompts,
    IndependentPrompts,
    Prompted,
    TextPrompts,
)

__all__ = ["CoPrompt", "consistency_loss"]

Technique = Literal["zero_shot", "zero_shot_ensemble", "coop", "cocoop", "maple", "promptsrc", "coprompt"]
TECHNIQUES: tuple[Technique, ...] = ("zero_shot", "zero_shot_ensemble", "coop", "cocoop", "maple", "promptsrc", "coprompt")
Distill = Literal["cosine", "mse"]
#: PromptSRC's weights of its consistency of image features, text features and logits.
_SRC = (10.0, 25.0, 1.0)
#: Parts of the module that are frozen and not in its checkpoints.
_FROZEN = ("clip.", "teacher.")
#: Learning rate of the first epoch (Dassl's constant warm-up).
_WARMUP_LR = 1e-5


def consistency_loss(student: Tensor, teacher: Tensor, kind: Distill = "cosine") -> Tensor:
    """How far the student's features are from the teacher's (section 3.2), in float32.

    Args:
        student: (..., D).
        teacher: the same shape, without gradient.
        kind: ``cosine``: one minus the mean cosine; ``mse``: the mean squared difference of the features' entries at
            length 1, which is 2 / D of that.

    Raises:
        ValueError: for another kind, or shapes that differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"features must have one shape, not {tuple(student.shape)} and {tuple(teacher.shape)}")
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = (F.normalize(x.float(), dim=-1) for x in (student, teacher.detach()))
        if kind == "cosine":
            return 1 - (student * teacher).sum(-1).mean()
        if kind == "mse":
            return F.mse_loss(student, teacher)
    raise ValueError(f"distill must be cosine or mse, not '{kind}'")


def harmonic_mean(base: Tensor, novel: Tensor) -> Tensor:
    """``2 b n / (b + n)``, 0 where both are 0."""
    return 2 * base * novel / (base + novel).clamp_min(torch.finfo(base.dtype).tiny)


class CoPrompt(LightningModule):
    """Prompts of a frozen CLIP learned from a few images a class; its family by ``technique``.

    Args:
        clip: ``emoji`` (the small one that comes with the project), a ``.safetensors`` file of ``recipes.clip``, or a
            model of open_clip with ViT towers (``ViT-B-16-quickgelu``, ``hf-hub:...``).
        pretrained: open_clip's name of its weights (``openai``), or a file of them.
        technique: ``zero_shot`` (the data's template), ``zero_shot_ensemble`` (mean of all sentences), ``coop``,
            ``cocoop``, ``maple``, ``promptsrc``, ``coprompt``.
        class_names: from the data.
        class_texts: what the classes are called in a text; from the data.
        class_sentences: sentences about each class, equally many; from the data.
        template: a sentence for a class, with ``{}``; from the data. For ``zero_shot``, and what the cosines that are
            logged compare with.
        domain_names: from the data; the first is trained on, accuracies are logged for each.
        domain_classes: the classes among which each domain's images are told apart; from the data.
        n_ctx: M, tokens of each prompt.
        ctx_init: words before the class; if they are at least ``n_ctx`` tokens, the first of them are what is learned
            and are its first values; else prompts begin at random and only the class's name follows.
        depth: J, blocks that are given prompts of their own, the first included; 0: no prompts. CoOp's and CoCoOp's is 1.
        lam: weight of the consistency terms of ``coprompt``.
        adapter_image: share of the adapted image features, of ``coprompt``.
        adapter_text: share of the adapted text features, of ``coprompt``.
        distill: the consistency term, ``cosine`` or ``mse``, whose ``lam`` must be D / 2 times as large.
        lr: of SGD after the first epoch, falling to zero with a cosine, by epoch.
        momentum: of SGD.
        weight_decay: of SGD.
        warmup_epochs: epochs with a learning rate of 1e-5.
        checkpoint_text: keep less of the text tower in memory and compute it twice.

    A batch has ``image`` (B, 3, H, W) in [0, 1], ``label`` and ``domain`` (B,); for training ``coprompt``, ``view``,
    another view of the images, which our DataModules draw.

    Raises:
        ValueError: for a CLIP that can't be prompted, or settings out of range.
    """

    monitor = ("val/acc", "max")
    clip: Any
    teacher: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: str = "emoji",
        pretrained: str | None = None,
        technique: Technique = "coprompt",
        class_names: Sequence[str] = (),
        class_texts: Sequence[str] = (),
        class_sentences: Mapping[str, Sequence[str]] | None = None,
        template: str = "a photo of a {}.",
        domain_names: Sequence[str] = (),
        domain_classes: Sequence[Sequence[int]] = (),
        n_ctx: int = 4,
        ctx_init: str = "a photo of a",
        depth: int = 9,
        lam: float = 8.0,
        adapter_image: float = 0.1,
        adapter_text: float = 0.2,
        distill: Distill = "cosine",
        lr: float = 3.5e-3,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        warmup_epochs: int = 1,
        checkpoint_text: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        accept_other_techniques(self)
        if technique not in TECHNIQUES:
            raise ValueError(f"technique must be one of {', '.join(TECHNIQUES)}, not '{technique}'")
        if distill not in ("cosine", "mse"):
            raise ValueError(f"distill must be cosine or mse, not '{distill}'")
        if n_ctx < 1 or depth < 0 or lam < 0 or not 0 <= adapter_image <= 1 or not 0 <= adapter_text <= 1:
            raise ValueError("n_ctx must be at least 1, depth and lam not negative, adapter ratios in [0, 1]")
        self.technique = technique
        loaded = towers.load(clip, pretrained)
        towers.check(loaded.clip)
        self.clip, self.tokenize = loaded.clip, loaded.tokenize
        self.clip.requires_grad_(False)
        self.clip.visual.feature_info = [
            {"module": f"transformer.resblocks.{i}"} for i in range(len(self.clip.visual.transformer.resblocks))
        ]
        self.clip.visual.num_prefix_tokens = 1
        text = towers.text_tower(self.clip)
        text.transformer.grad_checkpointing = checkpoint_text
        # The image tower again, made of the same weights, without the hooks that techniques hang on the student's.
        shared = {id(p): p for p in self.clip.visual.parameters()}
        self.teacher = copy.deepcopy(self.clip.visual, shared)
        self._image_size = loaded.image_size
        self._learned(text, technique, n_ctx, ctx_init, depth)
        self._register_state_dict_hook(_without_frozen)
        self.register_load_state_dict_pre_hook(_with_frozen)
        self.register_buffer("mean", torch.tensor(loaded.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(loaded.std).view(1, 3, 1, 1), persistent=False)
        self.example_input_array = torch.zeros(2, 3, self._image_size, self._image_size)
        self._weights: str | None = None
        self._eval_classes: Tensor | None = None
        self._taught: tuple[Tensor, Tensor] | None = None
        self.set_classes(class_names, class_texts, class_sentences, template, domain_names, domain_classes)
        self.clip.eval()
        self.teacher.eval()

    def _learned(self, text: Any, technique: Technique, n_ctx: int, ctx_init: str, depth: int) -> None:
        """Make what is trained."""
        h, width, image_width = self.hparams, text.token_embedding.weight.shape[1], self.clip.visual.conv1
        image_width = self.clip.visual.class_embedding.shape[0]
        layers = len(text.transformer.resblocks), len(self.clip.visual.transformer.resblocks)
        if depth > max(layers):
            raise ValueError(f"depth is {depth}, but the text tower has {layers[0]} blocks, the image tower {layers[1]}")
        count = len(self._plain_tokens(ctx_init))
        self._prefix = ctx_init if n_ctx <= count else " ".join(["X"] * n_ctx)
        with torch.no_grad():
            ctx = text.token_embedding(torch.tensor(self._plain_tokens(ctx_init)))[:n_ctx].float()
        ctx = ctx if n_ctx <= count else torch.empty(n_ctx, width).normal_(std=0.02)
        dim = self.clip.visual.output_dim
        self.prompts: nn.Module | None = None
        if depth and technique == "coop":
            self.prompts = TextPrompts(ctx)
        elif depth and technique == "cocoop":
            self.prompts = ConditionalPrompts(ctx, dim)
        elif depth and technique == "promptsrc":
            self.prompts = IndependentPrompts(ctx, image_width, depth, layers)
        elif depth and technique in ("maple", "coprompt"):
            self.prompts = CoupledPrompts(ctx, image_width, depth, layers)
        ratios = [h["adapter_image"], h["adapter_text"]] if technique == "coprompt" else [0.0, 0.0]
        self.adapter_image, self.adapter_text = (Adapter(dim, r) if r else nn.Identity() for r in ratios)

    def _plain_tokens(self, text: str) -> list[int]:
        """Numbers of a text's tokens without start and end."""
        row = self.tokenize([text])[0]
        empty = int((self.tokenize([""])[0] != 0).sum())  # start and end
        return row[1 : int((row != 0).sum()) - empty + 1].tolist() if text else []

    # ------------------------------------------------------------------ classes

    def set_classes(
        self,
        names: Sequence[str],
        texts: Sequence[str] = (),
        sentences: Mapping[str, Sequence[str]] | None = None,
        template: str | None = None,
        domain_names: Sequence[str] = (),
        domain_classes: Sequence[Sequence[int]] = (),
    ) -> None:
        """Tell other classes apart: nothing that is learned depends on them.

        Args:
            names: at least two.
            texts: what they are called in a text; the names if omitted, with blanks for underscores.
            sentences: sentences about each; the template's if omitted.
            template: with ``{}``; as before if omitted.
            domain_names: groups of test images; one if omitted.
            domain_classes: the classes of each; all if omitted.

        Raises:
            ValueError: for names that don't fit, or longer texts than the CLIP takes.
        """
        names = list(names) or ["0", "1"]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ValueError(f"classes must differ, but '{twice}' is there twice")
        self.class_names, self.class_texts = names, list(texts) or [name.replace("_", " ") for name in names]
        self.template = template or getattr(self, "template", "a photo of a {}.")
        if "{}" not in self.template:
            raise ValueError(f"the template must have a place {{}} for the class, but is '{self.template}'")
        plain = [self.template.format(text) for text in self.class_texts]
        self.class_sentences = [list((sentences or {}).get(n) or [p]) for n, p in zip(names, plain, strict=True)]
        if len({len(lines) for lines in self.class_sentences}) > 1:
            raise ValueError("each class needs the same number of sentences")
        self.domain_names = list(domain_names) or ["all"]
        self.domain_classes = [list(c) for c in domain_classes] or [list(range(len(names)))] * len(self.domain_names)
        allowed = torch.zeros(len(self.domain_names), len(names), dtype=torch.bool)
        for row, members in zip(allowed, self.domain_classes, strict=True):
            row[members] = True
        device = self.mean.device
        self.register_buffer("allowed", allowed.to(device), persistent=False)
        self.register_buffer("tokens", self._tokens(plain).to(device), persistent=False)
        texts = [f"{self._prefix} {text}." for text in self.class_texts]
        self.register_buffer("prompted", self._tokens(texts).to(device), persistent=False)
        place = torch.full((len(names),), -1)
        place[self.domain_classes[0]] = torch.arange(len(self.domain_classes[0]))
        self.register_buffer("place", place.to(device), persistent=False)  # of a class among those trained on
        self.register_buffer("taught_classes", None, persistent=False)
        self.register_buffer("bank", None, persistent=False)
        self._eval_classes = None
        self.val_confusion, self.test_confusion = (
            DomainConfusion(len(self.domain_names), len(names)).to(device) for _ in range(2)
        )
        means = {f"{what}_{domain}": MeanMetric() for what in ("text", "image") for domain in self.domain_names}
        self.val_cosine = nn.ModuleDict({name: mean.to(device) for name, mean in means.items()})

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        """(N, L) numbers."""
        tokens = self.tokenize(texts)
        full = [t for t, row in zip(texts, tokens, strict=True) if row[-1] != 0]
        if full and (len(full[0]) > tokens.shape[1]):  # its last token is the end, perhaps of a text that was cut
            kept = len(self.tokenize(full[:1])[0])
            logging.getLogger(__name__).warning("cut to %d tokens: '%s'", kept, full[0])
        return tokens
