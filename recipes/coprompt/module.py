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

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

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
from callbacks.sharded import shard, shards
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
log = logging.getLogger(__name__)

Technique = Literal["zero_shot", "zero_shot_ensemble", "coop", "cocoop", "maple", "promptsrc", "coprompt"]
TECHNIQUES: tuple[Technique, ...] = get_args(Technique)
Distill = Literal["cosine", "mse"]
#: PromptSRC's weights of its consistency of image features, text features and logits.
_SRC = (10.0, 25.0, 1.0)
#: Parts of the module that are frozen and not in its checkpoints.
_FROZEN = ("clip", "teacher")
#: Texts that CoCoOp's evaluation encodes at a time.
_TEXTS = 512
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
        depth: J, blocks that are given prompts of their own, the first included; 0: no prompts. CoOp and CoCoOp have
            them before the first block only.
        lam: weight of the consistency terms of ``coprompt``.
        adapter_image: share of the adapted image features, of ``coprompt``.
        adapter_text: share of the adapted text features, of ``coprompt``.
        distill: the consistency term, ``cosine`` or ``mse``, whose ``lam`` must be D / 2 times as large.
        lr: of SGD after the warm-up, falling by epoch with a cosine that would reach zero after ``max_epochs`` more
            (released: Dassl counts its epochs anew after the warm-up).
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
    #: Settings without which a checkpoint's weights don't fit: a config of other data to test on doesn't change them.
    shaping = ("clip", "pretrained", "technique", "n_ctx", "ctx_init", "depth", "adapter_image", "adapter_text")
    clip: Any
    teacher: Any
    mean: Tensor
    std: Tensor
    #: Of all K classes: which belong to a domain (domains, K); tokens (K, L) of the template's texts and of the texts
    #: whose first words are learned; the position of each among the classes trained on, or -1.
    allowed: Tensor
    tokens: Tensor
    prompted: Tensor
    place: Tensor
    #: The teacher's features of the template's texts (K, D) and of all sentences (S, K, D), as soon as they are needed.
    taught_classes: Tensor | None
    bank: Tensor | None
    val_confusion: DomainConfusion
    test_confusion: DomainConfusion

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
        # DDP would send in each step what never changes, above all the sentences' features.
        self._ddp_params_and_buffers_to_ignore = [*(n for n, _ in self.named_buffers()), "bank", "taught_classes"]
        self.clip.eval()
        self.teacher.eval()

    def _learned(self, text: Any, technique: Technique, n_ctx: int, ctx_init: str, depth: int) -> None:
        """Make what is trained."""
        h, width = self.hparams, text.token_embedding.weight.shape[1]
        image_width = self.clip.visual.class_embedding.shape[0]
        layers = len(text.transformer.resblocks), len(self.clip.visual.transformer.resblocks)
        if depth > max(layers):
            has = f"the text tower has {layers[0]} blocks, the image tower {layers[1]}"
            raise ValueError(f"depth is {depth}, but {has}")
        words = self._words(ctx_init)
        self._prefix = ctx_init if n_ctx <= len(words) else " ".join(["X"] * n_ctx)
        ctx = torch.empty(n_ctx, width).normal_(std=0.02)
        if n_ctx <= len(words):
            ctx = text.token_embedding.weight[words[:n_ctx]].detach().float()
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

    def _words(self, text: str) -> list[int]:
        """Numbers of a text's tokens between start and end."""
        length = (self.tokenize([text, ""]) != 0).sum(1).tolist()  # 0 is the padding, or a token that isn't used
        return self.tokenize([text])[0, 1 : 1 + length[0] - length[1]].tolist()

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
        known = template or getattr(self, "template", None) or "a photo of a {}."
        if "{}" not in known:
            raise ValueError(f"the template must have a place {{}} for the class, but is '{known}'")
        called = list(texts) or [name.replace("_", " ") for name in names]
        plain = [known.format(text) for text in called]
        about = [list((sentences or {}).get(n) or [p]) for n, p in zip(names, plain, strict=True)]
        if len({len(lines) for lines in about}) > 1:
            raise ValueError("each class needs the same number of sentences")
        self.class_names, self.class_texts, self.template, self.class_sentences = names, called, known, about
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
        self.val_cosine = nn.ModuleDict({f"of_{name}": MeanMetric().to(device) for name in self.domain_names})

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        """(N, L) numbers; says so where a text is cut."""
        tokens = self.tokenize(texts)
        longer = [text for text, row in zip(texts, tokens, strict=True) if row[-1] != 0]
        if longer:  # perhaps it fits just so, which can't be told
            log.warning("%d texts fill all %d tokens or are cut, such as '%s'", len(longer), tokens.shape[1], longer[0])
        return tokens

    # ------------------------------------------------------------------ set up

    @property
    def backbone(self) -> nn.Module:
        """The image tower, on whose layers techniques hang; the teacher's is untouched."""
        return self.clip.visual

    def train(self, mode: bool = True) -> CoPrompt:
        """As everywhere, but for the frozen towers, which stay in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        self.teacher.eval()
        return self

    def _needs(self) -> tuple[bool, bool]:
        """Whether training compares with the teacher, and whether on another view of the image."""
        other_view = self.technique == "coprompt" and self.hparams["lam"] > 0
        return other_view or self.technique == "promptsrc", other_view

    def setup(self, stage: str) -> None:
        if len(self.class_texts) < 2:
            raise ValueError("the model needs at least two classes: use a DataModule that has class_names")
        data: Any = getattr(self.trainer, "datamodule", None)
        given = getattr(data, "image_size", self._image_size)
        if given != self._image_size:
            raise ValueError(
                f"images are {given} pixels high, but this CLIP takes {self._image_size}: --data.image_size "
                f"{self._image_size}"
            )
        if stage == "fit" and self.trainer.max_epochs != 0 and not any(p.requires_grad for p in self.parameters()):
            raise ValueError(
                f"{self.technique} has nothing to train: use the verb test, or fit with --trainer.max_epochs 0"
            )
        compared, other_view = self._needs()
        if stage == "fit" and other_view and hasattr(data, "views"):
            data.views = 2
        ensemble = self.technique == "zero_shot_ensemble"
        if self.bank is None and (ensemble or (stage == "fit" and compared)):
            if self.trainer.is_global_zero:
                self._encode_bank()
            self.trainer.strategy.barrier()  # the others read what the first has written
            self._sentences()

    def configure_model(self) -> None:
        """Under ``ModelParallelStrategy`` the blocks of both towers, and the teacher's, are sharded.

        What is trained is small and stays whole, as does what the towers have outside of their blocks.
        """
        if shards(self):
            self._fingerprint()  # while the weights are here
            self.strict_loading = False  # the frozen weights aren't in checkpoints
            towers_ = (towers.text_tower(self.clip), self.clip.visual, self.teacher)
            shard(self, [block for tower in towers_ for block in tower.transformer.resblocks])

    def _sentences(self) -> Tensor:
        """:attr:`bank`."""
        if self.bank is None:
            self._encode_bank()
        assert self.bank is not None
        return self.bank

    def _encode_bank(self) -> None:
        lines = [line for lines in self.class_sentences for line in lines]
        features = encode_once(self.clip, self.tokenize(lines), self._fingerprint())
        self.bank = features.view(len(self.class_names), -1, features.shape[-1]).transpose(0, 1).contiguous()

    def _taught_texts(self) -> Tensor:
        """:attr:`taught_classes`."""
        if self.taught_classes is None:
            self.taught_classes = encode(self.clip, self.tokens)
        return self.taught_classes

    def _fingerprint(self) -> str:
        """Of the frozen CLIP."""
        if self._weights is None:
            self._weights = towers.fingerprint(self.clip)
        return self._weights

    # ------------------------------------------------------------------ the student

    def _prompted(self) -> Prompted:
        return self.prompts() if self.prompts is not None else Prompted()

    def image_features(self, image: Tensor, prompts: Prompted | None = None) -> Tensor:
        """(B, D) of length 1, float32, of images (B, 3, H, W) in [0, 1]."""
        prompts = self._prompted() if prompts is None else prompts
        z = towers.encode_image(self.clip, (image - self.mean) / self.std, prompts.image, prompts.deep_image)
        return F.normalize(self.adapter_image(z).float(), dim=-1)

    def class_features(self, prompts: Prompted | None = None, classes: Sequence[int] | None = None) -> Tensor:
        """(K, D) of length 1, float32, of these classes or all, in one batch."""
        if self.technique == "zero_shot_ensemble":
            features = F.normalize(self._sentences().mean(0), dim=-1)
            return features if classes is None else features[classes]
        prompts = self._prompted() if prompts is None else prompts
        tokens = self.tokens if prompts.text is None else self.prompted
        tokens = tokens if classes is None else tokens[classes]
        z = towers.encode_text(self.clip, tokens, prompts.text, prompts.deep_text)
        return F.normalize(self.adapter_text(z).float(), dim=-1)

    def _logits(self, image: Tensor, classes: Tensor) -> Tensor:
        """(B, K) of features (B, D) and (K, D), or (B, K, D), as open_clip computes them."""
        with torch.autocast(image.device.type, enabled=False):
            scaled = self.clip.logit_scale.exp().float() * image
            logits = scaled @ classes.T if classes.dim() == 2 else (scaled[:, None] * classes).sum(-1)
            return logits if self.clip.logit_bias is None else logits + self.clip.logit_bias

    def _conditional(self, image: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """CoCoOp's logits (B, K): a text of each class for each image (B, D)."""
        assert isinstance(self.prompts, ConditionalPrompts)
        tokens = self.prompted if classes is None else self.prompted[classes]
        rows = len(image) if torch.is_grad_enabled() else max(1, _TEXTS // len(tokens))  # memory without a graph
        found = []
        for part in image.split(rows):
            ctx = self.prompts.of(part).repeat_interleave(len(tokens), 0)
            z = towers.encode_text(self.clip, tokens.repeat(len(part), 1), ctx)
            found.append(self._logits(part, F.normalize(z.float(), dim=-1).view(len(part), len(tokens), -1)))
        return torch.cat(found)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        features = self.image_features(image)
        if isinstance(self.prompts, ConditionalPrompts):
            return self._conditional(features)
        return self._logits(features, self._eval_classes if self._eval_classes is not None else self.class_features())

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def teacher_features(self, image: Tensor) -> Tensor:
        """(B, D) of length 1, float32, by the untouched CLIP."""
        if self._taught is None or self._taught[0] is not image:  # while a technique crafts, the view stays the same
            z = self.teacher((image - self.mean) / self.std)
            self._taught = image, F.normalize(z.float(), dim=-1)
        return self._taught[1]

    def _sentence(self) -> int:
        """Which sentence of each class this step's consistency is with: alike on all ranks and when resumed."""
        step = self.trainer.global_step if self._trainer is not None else 0
        return fold_seed(run_seed(), "coprompt", "sentence", step) % len(self._sentences())

    def terms(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of the loss, weighted: ``ce`` and, where there are, ``image``, ``text`` and ``logits``."""
        base, prompts = self.domain_classes[0], self._prompted()
        label = self.place[batch["label"]]
        image = self.image_features(batch["image"], prompts)
        if isinstance(self.prompts, ConditionalPrompts):
            return {"ce": F.cross_entropy(self._conditional(image, base), label)}
        classes = self.class_features(prompts, base)
        logits = self._logits(image, classes)
        found = {"ce": F.cross_entropy(logits, label)}
        compared, other_view = self._needs()
        if not compared:
            return found
        bank = self._sentences()
        if other_view:
            if "view" not in batch:
                raise ValueError("coprompt compares with another view: the batch needs 'view', as our DataModules draw")
            lam, kind = self.hparams["lam"], self.hparams["distill"]
            found["image"] = lam * consistency_loss(image, self.teacher_features(batch["view"]), kind)
            found["text"] = lam * consistency_loss(classes, bank[self._sentence()][base], kind)
            return found
        taught = self.teacher_features(batch["image"])
        ensemble = F.normalize(bank[:, base].mean(0), dim=-1)
        found["image"] = _SRC[0] * F.l1_loss(image, taught)
        found["text"] = _SRC[1] * F.l1_loss(classes, ensemble)
        wanted = self._logits(taught, ensemble).log_softmax(-1)
        apart = F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
        found["logits"] = _SRC[2] * apart / logits.numel()
        return found

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy among the classes trained on, and the consistency terms; no logging, no side effects."""
        return torch.stack(list(self.terms(batch).values())).sum()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        terms, size = self.terms(batch), len(batch["label"])
        loss = torch.stack(list(terms.values())).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        if len(terms) > 1:
            self.log_dict({f"train/loss_{name}": term for name, term in terms.items()}, batch_size=size)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self._taught = None

    # ------------------------------------------------------------------ evaluation

    def _once(self) -> None:
        if not isinstance(self.prompts, ConditionalPrompts):
            with torch.inference_mode(False), torch.no_grad():  # an attack may take gradients through what uses it
                self._eval_classes = self.class_features()

    on_validation_epoch_start = on_predict_epoch_start = _once

    def _among(self, logits: Tensor, domain: Tensor) -> Tensor:
        """Logits of other classes than those of each image's domain are put out."""
        return logits.masked_fill(~self.allowed[domain], -torch.inf)

    def _evaluated(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Features, logits among the domain's classes, and domain."""
        domain = batch.get("domain", torch.zeros_like(batch["label"]))
        features = self.image_features(batch["image"])
        if isinstance(self.prompts, ConditionalPrompts):
            logits = self._conditional(features)
        else:
            logits = self._logits(features, self.class_features() if self._eval_classes is None else self._eval_classes)
        return features, self._among(logits, domain), domain

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        features, logits, domain = self._evaluated(batch)
        self.val_confusion.update(logits.argmax(-1), batch["label"], domain)
        cosine = (features * self.teacher_features(batch["image"])).sum(-1)
        for number, name in enumerate(self.domain_names):
            if bool((domain == number).any()):
                self.val_cosine[f"of_{name}"].update(cosine[domain == number])  # type: ignore[operator]
        self._taught = None

    def on_validation_epoch_end(self) -> None:
        """``val/acc`` of the classes trained on, that of the other domains, and cosines to the teacher."""
        accuracy = self._accuracies(self.val_confusion)
        first = self.domain_names[0]
        self.log("val/acc", accuracy[first], prog_bar=True, sync_dist=True)
        others = {f"val/acc_{name}": value for name, value in accuracy.items() if name != first}
        self.log_dict(others, sync_dist=True)
        if self._eval_classes is not None:
            cosine = (self._eval_classes * self._taught_texts()).sum(-1)
            for name, members in zip(self.domain_names, self.domain_classes, strict=True):
                self.log(f"val/cos_text_{name}", cosine[members].mean(), sync_dist=True)
        for name in accuracy:
            mean = self.val_cosine[f"of_{name}"]
            self.log(f"val/cos_image_{name}", mean.compute(), sync_dist=True)  # type: ignore[operator]
            mean.reset()  # type: ignore[operator]
        self._eval_classes = None

    def _accuracies(self, confusion: DomainConfusion) -> dict[str, Tensor]:
        """Of each domain that has images."""
        counts = confusion.compute()
        confusion.reset()
        self.confusion = counts.cpu()
        shares = [c.diagonal().sum() / c.sum() for c in counts]
        found = zip(self.domain_names, shares, counts, strict=True)
        return {name: share for name, share, c in found if c.sum() > 0}

    def on_test_epoch_start(self) -> None:
        self._once()
        #: The most confident mistake of each class: true class to (confidence, predicted class, image), for the report.
        self.mistakes: dict[int, tuple[float, int, Tensor]] = {}

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _, logits, domain = self._evaluated(batch)
        confidence, predicted = logits.softmax(-1).max(-1)
        self.test_confusion.update(predicted, batch["label"], domain)
        for i in (predicted != batch["label"]).nonzero().flatten().tolist():
            label, sure = int(batch["label"][i]), float(confidence[i])
            if label not in self.mistakes or self.mistakes[label][0] < sure:
                self.mistakes[label] = (sure, int(predicted[i]), batch["image"][i].cpu())

    def on_test_epoch_end(self) -> None:
        """Accuracy of each domain, and of base and novel classes their harmonic mean."""
        accuracy = self._accuracies(self.test_confusion)
        for name, value in accuracy.items():
            self.log(f"test/acc_{name}", value, sync_dist=True)
        if accuracy.keys() == {"base", "novel"}:
            self.log("test/hm", harmonic_mean(accuracy["base"], accuracy["novel"]), sync_dist=True)
        self._eval_classes = None

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        probability = self(batch["image"]).softmax(-1)
        return {"index": batch["index"], "probability": probability, "prediction": probability.argmax(-1)}

    def on_predict_end(self) -> None:
        self._eval_classes = None

    # ------------------------------------------------------------------ optimisation, checkpoints

    def configure_optimizers(self) -> Any:
        h = self.hparams
        groups = parameter_groups(self, weight_decay=h["weight_decay"])
        if not any(group["params"] for group in groups):
            return None
        optimizer = torch.optim.SGD(groups, lr=h["lr"], momentum=h["momentum"])
        epochs, warmup = max(self.trainer.max_epochs or 1, 1), h["warmup_epochs"]

        def factor(epoch: int) -> float:
            if epoch < warmup:
                return min(_WARMUP_LR / h["lr"], 1.0) if h["lr"] else 1.0
            return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / epochs))

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["clip"] = self._fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("clip", self._fingerprint()) != self._fingerprint():
            raise ValueError(
                "the checkpoint was trained on another CLIP than this one: give the same --model.clip and "
                "--model.pretrained"
            )
        match_optimizer_groups(self, checkpoint)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        clip_groups(optimizer, gradient_clip_val, gradient_clip_algorithm)


def _without_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Only what is trained is kept in checkpoints."""
    for key in [k for k in state if k.removeprefix(prefix).split(".")[0] in _FROZEN]:
        del state[key]


def _with_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: the frozen weights are those that are here."""
    for name in _FROZEN:
        state.update(module.get_submodule(name).state_dict(prefix=f"{prefix}{name}."))
