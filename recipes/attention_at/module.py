"""Adversarial training of text classifiers on attention.

Paper: Kitada and Iyatomi, Attention Meets Perturbations, arXiv 2009.12064 (Attention AT, Attention iAT), and its
follow-up for unlabelled texts, arXiv 2104.08763 (Attention VAT, Attention iVAT). The claim: trained on attention scores
that are moved by a small step up the loss, a BiRNN with attention classifies better, and its attention agrees better
with the gradient of its words.

* ``vanilla``: L, the plain loss.
* ``word_at``: the same step on word vectors (Miyato et al., arXiv 1605.07725).
* ``word_iat``: on word vectors along the directions to other words (Sato et al., arXiv 1805.02917).
* ``attention_rp``: scores moved as far at random; the control.
* ``attention_at``: r = xi g / |g|, g the gradient of L by the scores.
* ``attention_iat``: the same along the differences between an example's own scores.
* ``attention_vat``, ``attention_ivat``: where the output changes most, which needs no label: examples with label -1
  take part in it.
* ``released_iat``: minus Attention AT's step, which is what the released code's "iAT" computes.

The loss is L + lam L_adv; of ``attention_vat`` and ``attention_ivat`` L + lam KL(p || p_adv).

What is sound here and not in the released code (shunk031/attention-meets-perturbation, commit d40a5ca):

* The step is crafted on constants behind the encoder, by ``torch.autograd.grad``, so the states are computed once and
  the gradients are exactly those of the loss above. There the crafting's ``backward()`` stays in ``.grad``, so that L
  counts twice (its lam 1 is lam 0.5 here), accumulation is lost and DDP misses it.
* Its iAT subtracts the scores of *other sentences of the batch*, never reads them, and goes down the loss. With
  differences within a sentence, each of unit length (``row``), iAT equals AT: dL/dalpha_tk = g_t d_tk, so r_t = g_t.
  One norm for all differences of a sentence (``matrix``, the default) is what makes it another technique.
* Accuracy and F1 take the class with the larger probability; there the logit is compared with 0.5.

Word AT and Attention RP aren't in the released code, nor any xi; vectors of words aren't normalised here by how often
the word occurs, as Miyato et al. do, so that ``vanilla`` is the same network in all of them.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torchmetrics.classification import BinaryAUROC

from callbacks.attention import attention_at, attention_iat, random_direction
from callbacks.perturbation import (
    Batch,
    Perturbation,
    accept_other_techniques,
    clip_groups,
    crafting,
    match_optimizer_groups,
    parameter_groups,
)
from datamodules.vocabulary import read_vectors
from recipes.attention_at.network import AttentionNetwork
from recipes.classifier.module import DomainConfusion

Technique = Literal[
    "vanilla",
    "word_at",
    "word_iat",
    "attention_rp",
    "attention_at",
    "attention_iat",
    "attention_vat",
    "attention_ivat",
    "released_iat",
]
#: Without labels.
VIRTUAL = ("attention_vat", "attention_ivat")
#: Length of the random start of those, in scores (a divergence has no gradient where it is zero).
START = 0.1
#: Words to which ``word_iat`` looks from each word.
NEIGHBOURS = 15

# ---------------------------------------------------------------------- losses and metrics


def divergence(target: Tensor, other: Tensor) -> Tensor:
    """KL(p || p') of each example, (B,), of two rows of logits; classes at -inf count nothing."""
    log_p, log_q = target.float().log_softmax(-1), other.float().log_softmax(-1)
    apart = torch.where(log_p.isneginf(), 0.0, log_p - log_q.masked_fill(log_p.isneginf(), 0.0))
    return (log_p.exp() * apart).sum(-1)


def accuracy(confusion: Tensor) -> Tensor:
    """The share on the diagonal of counts (classes, classes)."""
    return confusion.diagonal().sum() / confusion.sum().clamp_min(1)


def f1(confusion: Tensor) -> Tensor:
    """F1 of the second of two classes; of more classes the mean of all that occur. Rows are true classes."""
    hits = confusion.diagonal().float()
    both = confusion.sum(0) + confusion.sum(1)
    scores = 2 * hits / both.clamp_min(1)
    return scores[1] if len(scores) == 2 else scores[both > 0].mean()


# ---------------------------------------------------------------------- on words


def neighbours(tokens: Tensor, table: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """Unit vectors from each word to the ``count`` words nearest by cosine, (B, T, count, D).

    Args:
        tokens: (B, T).
        table: (V, D), a vector for each word; of the first two, padding and the unknown word, none is a neighbour.
        count: at most V - 3.
    """
    words, place = tokens.unique(return_inverse=True)
    unit = F.normalize(table.float(), dim=-1)
    near = unit[words] @ unit.T
    near[:, :2] = -torch.inf
    near[torch.arange(len(words), device=near.device), words] = -torch.inf
    chosen = near.topk(min(count, len(table) - 3), dim=-1).indices
    return F.normalize(table.float()[chosen] - table.float()[words][:, None], dim=-1)[place]


def word_iat(gradient: Tensor, directions: Tensor, mask: Tensor, xi: float = 1.0) -> Tensor:
    """iAdv-Text (arXiv 1805.02917, eq. 10 to 13): r_t = sum_k alpha_tk d_tk, alpha a step of length xi up the loss.

    Args:
        gradient: (B, T, D) by the vectors of words.
        directions: (B, T, K, D) of unit length.
        mask: (B, T), True for real tokens.
        xi: length of an example's alpha (not of r: directions aren't orthogonal).
    """
    alpha = (directions @ gradient.float()[..., None]).squeeze(-1)
    return (attention_at(alpha, mask[..., None], xi)[..., None, :] @ directions).squeeze(-2)


# ---------------------------------------------------------------------- what the step draws


class Draws(Perturbation):
    """Puts ``uniform`` into the batch, (B, T) numbers in [0, 1): what the recipe's random directions are made of."""

    site = "data"

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        batch["uniform"] = self.rows("direction", batch["tokens"])


# ---------------------------------------------------------------------- the recipe


class AttentionClassifier(LightningModule):
    """A BiRNN with attention that classifies texts, or texts in the light of a question.

    Args:
        technique: see the head of this file.
        xi: length of an example's perturbation: l2, of its scores (of ``word_at`` its words' vectors) together. None is
            published for attention; 5 is what Miyato et al. take for words.
        lam: weight of the second term; 0 is vanilla training to the last bit.
        iat_norm: ``matrix`` or ``row``, of ``attention_iat`` and ``attention_ivat``.
        rnn: ``lstm`` or ``gru``.
        attention: ``additive`` or ``dot`` (scaled).
        embedding_dim: of word vectors.
        hidden: of each direction, and of additive attention.
        vectors: a file of fastText or GloVe vectors (text) from which words start; null: at random.
        lr: of Adam (AMSGrad).
        weight_decay: added to the gradient, as Adam's; none on the attention layer, as published.
        balanced: weigh the classes of a binary task by the training split, N / N_pos - 1 for the second, as published.
        vocabulary: words by their number, from the data.
        num_classes: from the data.
        class_names: from the data.
        domain_names: from the data.
        class_counts: labelled training examples of each class, from the data.
        pairs: whether there is a question; from the data.

    A batch is a dict, see :mod:`datamodules.text`.

    Raises:
        ValueError: for a setting out of range.
    """

    monitor = ("val/f1", "max")

    def __init__(
        self,
        technique: Technique = "attention_at",
        xi: float = 5.0,
        lam: float = 1.0,
        iat_norm: Literal["matrix", "row"] = "matrix",
        rnn: Literal["lstm", "gru"] = "lstm",
        attention: Literal["additive", "dot"] = "additive",
        embedding_dim: int = 300,
        hidden: int = 128,
        vectors: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        balanced: bool = True,
        vocabulary: Sequence[str] = ("<pad>", "<unk>"),
        num_classes: int = 2,
        class_names: Sequence[str] = (),
        domain_names: Sequence[str] = (),
        class_counts: Sequence[int] = (),
        pairs: bool = False,
    ) -> None:
        super().__init__()
        if not xi >= 0 or not lam >= 0:
            raise ValueError(f"xi and lam must not be negative, not {xi} and {lam}")
        if embedding_dim < 1 or hidden < 1:
            raise ValueError(f"embedding_dim and hidden must be at least 1, not {embedding_dim} and {hidden}")
        if num_classes < 2:
            raise ValueError(f"a classifier needs two classes, not {num_classes}")
        vocabulary = list(vocabulary)
        self.save_hyperparameters(logger=False)  # the words would fill the tracker's settings
        accept_other_techniques(self)
        self.technique, self.xi, self.lam, self.iat_norm = technique, xi, lam, iat_norm
        self.vocabulary = vocabulary
        self.class_names = list(class_names) or [str(i) for i in range(num_classes)]
        self.domain_names = list(domain_names) or ["all"]
        self.unlabelled = technique in VIRTUAL
        self.backbone = AttentionNetwork(len(vocabulary), num_classes, pairs, rnn, attention, embedding_dim, hidden)
        counts = list(class_counts)
        weigh = balanced and num_classes == 2 and len(counts) == 2 and min(counts) > 0
        self.class_weight = (1.0, counts[0] / counts[1]) if weigh else None
        self._draws = Draws(name="draws")
        self._restored = False
        self.val_confusion = DomainConfusion(1, num_classes)
        self.test_confusion = DomainConfusion(len(self.domain_names), num_classes)
        self.val_auc, self.test_auc = (BinaryAUROC() if num_classes == 2 else None for _ in range(2))

    def configure_callbacks(self) -> list[Callback]:
        there: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it dynamically
        draws = self.technique in ("attention_rp", *VIRTUAL) and self._draws not in there
        return [self._draws] if draws else []

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        labelled = getattr(getattr(self.trainer, "datamodule", None), "labelled", None)
        if labelled is not None and not self.unlabelled:
            raise ValueError(
                f"{self.technique} needs a label for each text, but only {labelled} have one: leave --data.labelled "
                f"out, or train with --model.technique {' or '.join(VIRTUAL)}"
            )
        if self.backbone.num_classes != 2 and any(
            isinstance(c, ModelCheckpoint) and c.monitor == "val/auc"
            for c in self.trainer.callbacks  # type: ignore[attr-defined]  # as above
        ):
            raise ValueError("val/auc is of two classes: choose the best by --checkpoint.monitor val/acc")

    def on_fit_start(self) -> None:
        if self.hparams["vectors"] and not self._restored:
            table = self.backbone.embed.weight
            found, known = read_vectors(Path(self.hparams["vectors"]), self.vocabulary, table.shape[1])
            with torch.no_grad():
                table[known] = found[known].to(table)

    # ------------------------------------------------------------------ the loss

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, num_classes) of a batch; the first of two classes has logit 0."""
        return self.backbone(batch)

    def criterion(self, logits: Tensor, label: Tensor) -> Tensor:
        """Weighted cross-entropy, the mean over the labelled examples (the weights aren't divided out, as published).

        Of two classes this is the binary cross-entropy of the second one's logit.
        """
        weight = None if self.class_weight is None else logits.new_tensor(self.class_weight)
        total = F.cross_entropy(logits, label, weight, ignore_index=-1, reduction="sum")
        return total / (label >= 0).sum().clamp_min(1)

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """L, or L + lam L_adv; no logging, no side effects: techniques call it while they craft.

        It takes gradients, so not in inference mode.
        """
        network, label, mask = self.backbone, batch["label"], batch["attention_mask"]
        embedded = network.embed(batch["tokens"])
        h, q, scores = network.states(embedded, batch)

        def read(scores: Tensor, h: Tensor = h, q: Tensor | None = q) -> Tensor:
            return network.read(h, scores, mask, q, batch.get("candidates"))

        logits = read(scores)
        clean = self.criterion(logits, label)
        if self.technique == "vanilla" or self.lam == 0:
            return clean
        if self.technique in ("word_at", "word_iat"):
            h, q, scores = network.states(embedded + self._words(embedded, batch), batch)
            return clean + self.lam * self.criterion(read(scores, h, q), label)
        constant = None if q is None else q.detach()
        r = self.craft(scores.detach(), lambda s: read(s, h.detach(), constant), batch)
        moved = read(scores + r)
        if self.technique in VIRTUAL:
            return clean + self.lam * divergence(logits.detach(), moved).mean()
        return clean + self.lam * self.criterion(moved, label)

    def craft(self, scores: Tensor, read: Callable[[Tensor], Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """The perturbation r of scores (B, T), a constant.

        Args:
            scores: (B, T), constant.
            read: from scores to logits, over constant states; parameters take no gradient from it.
            batch: the batch.
        """
        mask, label = batch["attention_mask"], batch["label"]

        def random(length: float) -> Tensor:
            uniform = batch.get("uniform")
            uniform = self._draws.rows("direction", batch["tokens"]) if uniform is None else uniform
            return random_direction(uniform, mask, length).to(scores)

        if self.technique == "attention_rp":
            return random(self.xi)
        with torch.enable_grad():
            if self.technique in VIRTUAL:
                s = (scores + random(START)).requires_grad_()
                loss = divergence(read(scores).detach(), read(s)).sum()
            else:
                s = scores.clone().requires_grad_()
                loss = self.criterion(read(s), label)
            (gradient,) = torch.autograd.grad(loss, s)
        if self.technique in ("attention_iat", "attention_ivat"):
            return attention_iat(gradient, scores, mask, self.xi, self.iat_norm).to(scores)
        return attention_at(-gradient if self.technique == "released_iat" else gradient, mask, self.xi).to(scores)

    def _words(self, embedded: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The perturbation (B, T, D) of word vectors, by a pass of its own through the encoder; a constant."""
        network, mask = self.backbone, batch["attention_mask"]
        with crafting(self, "train"):
            moved = embedded.detach().clone().requires_grad_()
            h, q, scores = network.states(moved, batch)
            logits = network.read(h, scores, mask, q, batch.get("candidates"))
            (gradient,) = torch.autograd.grad(self.criterion(logits, batch["label"]), moved)
        with torch.no_grad():
            if self.technique == "word_at":
                return attention_at(gradient, mask[..., None], self.xi).to(embedded)
            return word_iat(gradient, neighbours(batch["tokens"], network.embed.weight), mask, self.xi).to(embedded)

    # ------------------------------------------------------------------ the steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def _count(self, part: Literal["val", "test"], batch: dict[str, Tensor]) -> None:
        logits, label = self(batch), batch["label"]
        counts, auc = (self.val_confusion, self.val_auc) if part == "val" else (self.test_confusion, self.test_auc)
        domain = torch.zeros_like(label) if part == "val" else batch["domain"]
        counts.update(logits.argmax(-1), label, domain)
        if auc is not None:
            auc.update((logits[:, 1] - logits[:, 0]).sigmoid(), label)
        if part == "val":
            self.log("val/loss", self.criterion(logits, label), on_epoch=True, batch_size=len(label), sync_dist=True)

    def _report(self, part: Literal["val", "test"]) -> None:
        """Accuracy and F1 over all examples, the area under the ROC curve of two classes, accuracy of each domain."""
        metric, auc = (self.val_confusion, self.val_auc) if part == "val" else (self.test_confusion, self.test_auc)
        counts = metric.compute()
        self.log(f"{part}/acc", accuracy(counts.sum(0)), prog_bar=part == "val", sync_dist=True)
        self.log(f"{part}/f1", f1(counts.sum(0)), prog_bar=part == "val", sync_dist=True)
        if auc is not None:
            self.log(f"{part}/auc", auc)
        if part == "test":
            #: (domains, classes, classes), rows are true classes; kept for the report.
            self.confusion = counts.cpu()
            for name, confusion in zip(self.domain_names, counts, strict=True):
                if len(self.domain_names) > 1 and confusion.sum() > 0:
                    self.log(f"test/acc_{name}", accuracy(confusion), sync_dist=True)
        metric.reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._count("val", batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._count("test", batch)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        probability = self(batch).softmax(-1)
        return {"index": batch["index"], "probability": probability, "prediction": probability.argmax(-1)}

    def save_predictions(self, found: dict[str, Tensor], folder: Path, part: str) -> list[Path]:
        """Writes ``predictions.csv``: index, class, confidence, text and, of pairs, query."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it dynamically
        index, given = found["index"].tolist(), "predict" if data.predict_texts is not None else "test"
        texts = [[text] for text in data.texts(given, index)]
        if data.pairs:
            texts = [[*text, query] for text, query in zip(texts, data.queries(given, index), strict=True)]
        file = folder / f"predictions{part}.csv"
        with file.open("w", newline="", encoding="utf-8") as opened:
            rows = csv.writer(opened)
            rows.writerow(["index", "class", "confidence", "text", *(["query"] if data.pairs else [])])
            for i in sorted(range(len(index)), key=index.__getitem__):
                answer = int(found["prediction"][i])
                sure = f"{float(found['probability'][i, answer]):.4f}"
                rows.writerow([index[i], self.class_names[answer], sure, *texts[i]])
        return [file]

    # ------------------------------------------------------------------ optimizer and checkpoint

    def configure_optimizers(self) -> Any:
        h = self.hparams
        model, *techniques = parameter_groups(self, lr=h["lr"], weight_decay=h["weight_decay"])
        members = ("params", "parameters")
        inside = [name.startswith("backbone.attention.") for name in model["parameters"]]

        def part(attention: bool) -> dict[str, Any]:
            kept = {k: [v for v, i in zip(model[k], inside, strict=True) if i is attention] for k in members}
            return {**model, **kept, **({"name": "attention", "weight_decay": 0.0} if attention else {})}

        return torch.optim.Adam([part(False), part(True), *techniques], lr=h["lr"], amsgrad=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = True
        match_optimizer_groups(self, checkpoint)
        saved = checkpoint.get("hyper_parameters", {}).get("vocabulary")
        if saved and list(saved) != self.vocabulary:
            self.use_vocabulary(list(saved))

    def use_vocabulary(self, words: list[str]) -> None:
        """Take over a checkpoint's words, in the data, too; the table of vectors is made anew, to be loaded."""
        old = self.backbone.embed.weight
        self.vocabulary = self.hparams["vocabulary"] = words
        self.backbone.embed = self.backbone.table(len(words), old.shape[1]).to(old)
        data = getattr(self._trainer, "datamodule", None)
        if data is not None:
            data.use_vocabulary(words)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        clip_groups(optimizer, gradient_clip_val, gradient_clip_algorithm)
