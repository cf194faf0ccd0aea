"""Does attention explain the answer? Its agreement with word importance, adversarial attention, and erasure.

* **Importance** (Jain and Wallace, arXiv 1902.10186, algorithm 1): g_t = abs(sum_d e_td dp/de_td) with the attention
  held fixed, p being the probability of the predicted class and e_t the word's embedding. How well attention agrees
  with it, by Kendall's tau-b and Pearson's r over the words of each text, is what Kitada and Iyatomi (arXiv 2009.12064)
  report. In p's place stand its log odds: their gradient is the same but for a factor of the text, which changes
  neither of the two numbers, and it doesn't vanish where p is 1 to the last bit. Jain and Wallace leave out the marks
  at a text's ends; there are none here.
* **Adversarial attention**: what is added to the scores, before the softmax, so that the true class's log odds fall
  (which the cross-entropy's rise is), within an l2 ball. One step along the gradient as long as the radius is what the
  paper trains on; here it is the first guess, Auto-PGD's the second.
* **Erasure**: the words that are attended to most are deleted, beside as many by importance and at random.
"""

from __future__ import annotations

import csv
import heapq
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from callbacks.adversary import apgd, fgsm
from callbacks.heatmap import (
    Batch,
    Heat,
    Shown,
    attended,
    class_name,
    draw_explanations,
    expect,
    heats,
    hooked,
    opened,
    page,
    words_of,
)
from callbacks.layers import Behind, find_layers
from callbacks.perturbation import crafting, device_of, fold_seed
from callbacks.report import Report, save_figure, save_page, wanted
from callbacks.texts import chunks, gathered

log = logging.getLogger(__name__)
#: A share of texts without tau above which it is said in words, and seconds above which the time is.
MANY, LONG = 0.1, 10.0

#: A measure of one text, and at which size of the adversary or share of its words; None: at none.
Key = tuple[str, "float | None"]

# ---------------------------------------------------------------------- functions


def log_odds(logits: Tensor, label: Tensor) -> Tensor:
    """log p / (1 - p) of the class ``label`` (B,) by logits (B, K), (B,), float32 or better.

    It rises and falls with p and never saturates. Classes that are ruled out (logits of minus infinity) don't count.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, label[:, None], True)
    others = logits.masked_fill(own, torch.finfo(logits.dtype).min).logsumexp(1)  # finite also where there is no other
    return logits.gather(1, label[:, None]).squeeze(1) - others


def kendall_tau(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Kendall's tau-b of each row over its real tokens, ties counted, (B,) float64.

    NaN where there is none: of fewer than two tokens, and where all values of x or of y are the same.

    Args:
        x: (B, T).
        y: (B, T).
        mask: (B, T), True for real tokens.
    """
    found = []
    for a, b, real in zip(x.detach().cpu(), y.detach().cpu(), mask.cpu(), strict=True):  # of each row only its own T^2
        a, b = a[real], b[real]
        one, other = ((v[:, None] > v).to(torch.int8) - (v[:, None] < v).to(torch.int8) for v in (a, b))
        ranked = int(one.abs().sum(dtype=torch.int64)), int(other.abs().sum(dtype=torch.int64))
        agreed = int((one * other).sum(dtype=torch.int64))
        found.append(agreed / math.sqrt(ranked[0]) / math.sqrt(ranked[1]) if min(ranked) else math.nan)
    return torch.tensor(found, dtype=torch.float64)


def pearson(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Pearson's r of each row over its real tokens, (B,) float64; NaN where tau is, see :func:`kendall_tau`."""
    mask = mask.cpu()
    centred, constant = [], torch.zeros(len(mask), dtype=torch.bool)
    for values in (x, y):
        values = values.detach().cpu().double()
        high, low = (values.masked_fill(~mask, end).aminmax(dim=1) for end in (-math.inf, math.inf))
        constant |= ~(high.max > low.min)  # not by the variance, which rounding leaves above zero
        values = values.masked_fill(~mask, 0)
        mean = values.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        centred.append((values - mean).masked_fill(~mask, 0))
    one, other = (c / c.norm(dim=1, keepdim=True).clamp_min(1e-300) for c in centred)
    return (one * other).sum(1).clamp(-1, 1).masked_fill(constant, math.nan)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions (B, T), in nats: (B,) float64, from 0 to ln 2."""
    p, q = p.detach().cpu().double(), q.detach().cpu().double()
    m = (p + q) / 2
    found = sum((torch.xlogy(v, v) - torch.xlogy(v, m)).sum(1) for v in (p, q)) / 2
    assert isinstance(found, Tensor)
    return found.clamp(0.0, math.log(2))


def remaining(order: Tensor, mask: Tensor, share: float) -> Tensor:
    """Which words stay, bool (B, T), when a share of each text's words goes.

    As many go as the share is, rounded up, so at least one; but one word always stays. Of equals the first goes.

    Args:
        order: (B, T), the largest go first.
        mask: (B, T), True for real tokens.
        share: in [0, 1].
    """
    # .07 * 100 is a little more than 7
    gone = [max(min(math.ceil(words * share - 1e-9), words - 1), 0) for words in mask.sum(1).tolist()]
    place = order.masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    return mask & (place >= torch.tensor(gone, device=mask.device)[:, None])


def without(batch: Batch, stay: Tensor) -> dict[str, Tensor]:
    """The batch of the words that stay, bool (B, T): they move together, and the mask gets shorter."""
    left = stay.sum(1)
    order = (~stay).to(torch.int8).argsort(dim=1, stable=True)[:, : max(int(left.max()), 1)]
    mask = torch.arange(order.shape[1], device=stay.device) < left[:, None]
    return {**batch, "tokens": batch["tokens"].gather(1, order).masked_fill(~mask, 0), "attention_mask": mask}


def importance(
    module: Callable[[Any], Tensor], batch: Batch, label: Tensor, embedding: nn.Module, weights: nn.Module
) -> Tensor:
    """Jain and Wallace's word importance, (B, T), float32 or better, 0 on padding; see the head of this file.

    Args:
        module: gives logits (B, K) for a batch.
        batch: with ``tokens`` and ``attention_mask``, (B, T).
        label: (B,), the class whose log odds are explained.
        embedding: the layer that gives the words' embeddings (B, T, D).
        weights: the layer that gives the attention (B, T), which is held fixed.

    Raises:
        ValueError: if a layer isn't called, or gives another shape.
    """
    embedded: list[Tensor] = []
    fixed: list[Tensor] = []

    def leaf(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    def hold(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        fixed.append(output.detach())
        return fixed[-1]

    # cuDNN's recurrent layers have a backward pass in training mode alone
    with torch.backends.cudnn.flags(enabled=False), hooked(embedding, leaf), hooked(weights, hold):
        value = log_odds(module(batch), label).sum()
        expect(embedded, (*batch["tokens"].shape, -1), "embeddings")
        expect(fixed, batch["tokens"].shape, "attention")
        gradient = torch.autograd.grad(value, embedded[0])[0]
    wide = torch.promote_types(gradient.dtype, torch.float32)
    found = (gradient.to(wide) * embedded[0].detach().to(wide)).sum(-1).abs()
    return torch.where(batch["attention_mask"], found, 0.0)


def attention_attack(
    head: Callable[[Tensor], Tensor], scores: Tensor, mask: Tensor, label: Tensor, sizes: Sequence[float], steps: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Adversarial perturbations of attention scores, of growing size.

    Two are tried at each size: one step as long as the radius, and Auto-PGD, which here is stronger than plain PGD of
    as many steps. That of the largest loss is kept, over the smaller sizes, too.

    Args:
        head: from scores (B, T) to logits (B, K).
        scores: (B, T), before the softmax.
        mask: (B, T), True for real tokens; only their scores move.
        label: (B,), true classes.
        sizes: l2 radii.
        steps: of Auto-PGD.

    Yields:
        For each size, from the smallest: the size; the perturbation (B, T), no longer than that; and whether the answer
        is right under all that were tried up to here, bool (B,).
    """
    real = mask.to(torch.promote_types(scores.dtype, torch.float32))
    none = torch.zeros_like(real)

    def answer(delta: Tensor) -> Tensor:
        return head((scores + delta * real).to(scores.dtype))

    def loss(delta: Tensor) -> Tensor:
        return -log_odds(answer(delta), label)

    def judged(delta: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = answer(delta)
            return -log_odds(logits, label), logits.argmax(1) == label

    worst = none
    most, right = judged(none)
    for size in sorted(sizes):
        step = fgsm(loss, none, eps=size, norm="l2", bounds=None)
        far = apgd(loss, none, eps=size, steps=steps, norm="l2", start="zero", bounds=None)
        for delta in (step, far):
            value, still = judged(delta)
            worst = torch.where((value > most)[:, None], delta, worst)
            most, right = torch.maximum(most, value), right & still
        yield size, worst, right


def stacked(rows: Sequence[Batch], device: torch.device) -> dict[str, Tensor]:
    """A batch of rows whose entries are numbers or (length,); those are padded by zeros."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {n: (pad_sequence(v, True) if v[0].dim() else torch.stack(v)).to(device) for n, v in columns.items()}


def choose(answers: Mapping[int, tuple[int, int]], count: int) -> list[int]:
    """So many of the examples, in turn a wrong and a right one of each class, as far as there are.

    Args:
        answers: true and predicted class of each.
        count: how many.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, (label, predicted) in sorted(answers.items()):
        groups.setdefault((label, label == predicted), []).append(index)
    found: list[int] = []
    while len(found) < count and any(groups.values()):
        found += [groups[key].pop(0) for key in sorted(groups) if groups[key]]
    return sorted(found[:count], key=lambda index: (answers[index][0], answers[index][0] == answers[index][1], index))


# ---------------------------------------------------------------------- the callback


class Explanations(Callback):
    """Measures, on some of the test texts, whether a classifier's attention explains its answers.

    Logged: ``test/tau`` and ``test/pearson`` between attention and word importance (means over the texts that have
    them), ``test/attention_acc`` and ``test/attention_js`` under adversarial attention of :attr:`size`, and
    ``test/erasure_acc`` without the :attr:`share` of words that are attended to most. ``explanations.csv`` in the run's
    folder has the curves: columns ``what``, ``x``, ``value``; x is the size or the share, 0 where nothing is done.
    Where the run has a :class:`Report`, ``plots/explanations.png`` draws them, and ``plots/attention.html`` shows texts
    with their words as they are attended to; both go to W&B, too.

    Which texts are taken depends on their ``index`` alone: they are the same in all runs, whatever the order and the
    number of ranks. The network is looked at in evaluation mode; nothing of this reaches its weights or a random state.

    Args:
        examples: how many test texts are measured, at most.
        embedding: name of the backbone's layer that gives the words' embeddings (B, T, D).
        scores: of the layer that gives attention scores (B, T), before the softmax.
        weights: of the layer that gives the attention (B, T).
        sizes: l2 radii of the adversarial attention, in units of the scores.
        size: the one of them that is logged.
        steps: of Auto-PGD, by which it is found.
        shares: of a text's words that are deleted.
        share: the one of them that is logged.
        draws: of random words.
        shown: texts on the page.
        beside: checkpoint of another network of the same class, a plainly trained one, say, whose attention the page
            shows beside this one's.

    Raises:
        ValueError: for a setting out of range, a layer that isn't there, or a checkpoint that doesn't fit.
        FileNotFoundError: if there is no such checkpoint.
    """

    def __init__(
        self,
        examples: int = 500,
        embedding: str = "embed",
        scores: str = "attention.scores",
        weights: str = "attention.weights",
        sizes: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0),
        size: float = 2.0,
        steps: int = 10,
        shares: Sequence[float] = (0.05, 0.1, 0.2, 0.5),
        share: float = 0.2,
        draws: int = 3,
        shown: int = 12,
        beside: str | None = None,
    ) -> None:
        for name, value in {"examples": examples, "steps": steps, "draws": draws, "shown": shown}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not all(0 < value < math.inf for value in sizes):
            raise ValueError(f"sizes must be positive, not {list(sizes)}")
        if not all(0 < value <= 1 for value in shares):
            raise ValueError(f"shares must lie in (0, 1], not {list(shares)}")
        for name, chosen, grid in (("size", size, sizes), ("share", share, shares)):
            if chosen not in grid:
                raise ValueError(f"{name} must be one of {name}s, {', '.join(map(str, grid))}, not {chosen}")
        self.examples, self.embedding, self.scores, self.weights = examples, embedding, scores, weights
        self.sizes, self.size, self.steps = sorted(set(sizes)), size, steps
        self.shares, self.share, self.draws = sorted(set(shares)), share, draws
        self.shown, self.beside = shown, beside
        #: Of the last test, the same on all ranks: what was logged, the number of texts, how many had no tau, the
        #: curves, and the tau of each text that has one.
        self.result: dict[str, Any] = {}
        self._order: dict[int, int] = {}  # of the texts that are taken so far; the first ones stay
        self._kept: dict[int, dict[str, Tensor]] = {}

    # ------------------------------------------------------------------ which texts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "test"):  # before a training, too: what is wrong needn't wait for its end
            find_layers(pl_module, [self.embedding, self.scores, self.weights])
            if self.beside is not None:
                opened(Path(self.beside).expanduser(), pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._order, self._kept = {}, {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        entries = ("tokens", "attention_mask", "label", "index")
        if not isinstance(batch, Mapping) or not all(isinstance(batch.get(name), Tensor) for name in entries):
            raise ValueError(f"Explanations needs batches of texts, with {', '.join(entries)}")
        if dataloader_idx:
            return
        known = zip(batch["index"].tolist(), batch["label"].tolist(), strict=True)
        indices = [index if label >= 0 else None for index, label in known]
        order = self._order | {i: fold_seed("explanations", i) for i in indices if i is not None}
        self._order = {i: order[i] for i in heapq.nsmallest(self.examples, order, key=lambda i: order[i])}
        self._kept = {i: row for i, row in self._kept.items() if i in self._order}
        rows = [row for row, i in enumerate(indices) if i in self._order]
        if not rows:
            return
        tensors = {name: v for name, v in batch.items() if isinstance(v, Tensor) and v.dim() in (1, 2)}
        taken = {name: v[torch.tensor(rows, device=v.device)].cpu() for name, v in tensors.items()}
        for place in range(len(rows)):
            own = {name: values[place] for name, values in taken.items()}
            for name, mask in (("tokens", "attention_mask"), ("query", "query_mask")):
                if name in own and mask in own:
                    length = int(own[mask].sum())
                    own |= {name: own[name][:length], mask: own[mask][:length].bool()}
            self._kept[int(own["index"])] = own

    def _share_out(self) -> None:
        """Leaves each rank those of its texts that are taken over all ranks; what is on two counts once in the end."""
        order = {i: place for rank in gathered(self._order) for i, place in rank.items()}
        taken = heapq.nsmallest(self.examples, order, key=lambda i: order[i])
        self._kept = {i: self._kept[i] for i in taken if i in self._kept}

    def _batch(self, indices: Sequence[int], module: nn.Module) -> dict[str, Tensor]:
        return stacked([self._kept[i] for i in indices], device_of(module))

    # ------------------------------------------------------------------ measuring

    def _measure(self, module: LightningModule, batch: dict[str, Tensor]) -> dict[Key, Tensor]:
        """All measures of each text, (B,)."""
        embedding, scores, weights = find_layers(module, [self.embedding, self.scores, self.weights]).values()
        mask, label = batch["attention_mask"], batch["label"]
        logits, attention = attended(module, batch, weights)
        if logits.dim() != 2 or len(logits) != len(label):
            raise ValueError("Explanations needs a module whose forward gives logits (B, classes) for a batch")
        predicted = logits.argmax(1)
        gradient = importance(module, batch, predicted, embedding, weights)
        found: dict[Key, Tensor] = {("label", None): label, ("predicted", None): predicted}
        found["tau", None] = kendall_tau(attention, gradient, mask)
        found["pearson", None] = pearson(attention, gradient, mask)
        found["attention_acc", 0.0], found["attention_js", 0.0] = predicted == label, torch.zeros(len(label))

        behind = Behind(module, scores)
        clean = behind.reach(lambda: module(batch))
        expect([clean], batch["tokens"].shape, "scores")

        def head(moved: Tensor) -> Tensor:
            behind.again(moved)
            return module(batch)

        with behind.replaying():
            for size, delta, right in attention_attack(head, clean, mask, label, self.sizes, self.steps):
                behind.again((clean + delta).to(clean.dtype))
                found["attention_acc", size] = right
                found["attention_js", size] = js_divergence(attention, attended(module, batch, weights)[1])

        def right_without(order: Tensor, share: float) -> Tensor:
            with torch.no_grad():
                return module(without(batch, remaining(order, mask, share))).argmax(1) == label

        random = [self._drawn(batch, draw) for draw in range(self.draws)]
        for name, orders in (("attention", [attention]), ("gradient", [gradient]), ("random", random)):
            found[f"erasure_{name}", 0.0] = predicted == label
            for share in self.shares:
                found[f"erasure_{name}", share] = (
                    torch.stack([right_without(o, share) for o in orders]).cpu().double().mean(0)
                )
        return found

    @staticmethod
    def _drawn(batch: Batch, draw: int) -> Tensor:
        """Random numbers (B, T), of each text's own."""
        drawn = torch.zeros(batch["tokens"].shape)
        for row, index, length in zip(drawn, batch["index"].tolist(), batch["attention_mask"].sum(1), strict=True):
            generator = torch.Generator().manual_seed(fold_seed("erasure", index, draw))
            row[: int(length)].uniform_(generator=generator)
        return drawn.to(batch["tokens"].device)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begun = time.monotonic()
        self._share_out()
        own: dict[int, dict[Key, float]] = {}
        with crafting(pl_module, "eval"):
            for indices in chunks({i: len(row["tokens"]) for i, row in self._kept.items()}):
                measures = self._measure(pl_module, self._batch(indices, pl_module))
                columns = {key: values.tolist() for key, values in measures.items()}
                own |= {i: {key: float(v[row]) for key, v in columns.items()} for row, i in enumerate(indices)}
        all_ranks = {i: measures for rank in gathered(own) for i, measures in rank.items()}
        if all_ranks:
            self._summarise([all_ranks[i] for i in sorted(all_ranks)])
            for name in ("tau", "pearson", "attention_acc", "attention_js", "erasure_acc"):
                pl_module.log(f"test/{name}", self.result[name], sync_dist=False)
            self._write(trainer)
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it dynamically
            if any(isinstance(c, Report) for c in callbacks) and not getattr(trainer, "fast_dev_run", False):
                answers = {i: (int(m["label", None]), int(m["predicted", None])) for i, m in all_ranks.items()}
                self._draw(trainer, pl_module, choose(answers, self.shown))
            self._say(trainer, time.monotonic() - begun)
        self._order, self._kept = {}, {}

    def _summarise(self, measures: Sequence[Mapping[Key, float]]) -> None:
        """Means over the texts; the same whatever rank measured which."""

        def mean(key: Key) -> float:
            values = [m[key] for m in measures if not math.isnan(m[key])]
            return math.fsum(values) / len(values) if values else math.nan

        curves: dict[str, list[tuple[float, float]]] = {}
        for what, x in measures[0]:
            if x is not None:
                curves.setdefault(what, []).append((x, mean((what, x))))
        tau = [m["tau", None] for m in measures if not math.isnan(m["tau", None])]
        logged = {"tau": mean(("tau", None)), "pearson": mean(("pearson", None))}
        logged |= {name: mean((name, self.size)) for name in ("attention_acc", "attention_js")}
        logged["erasure_acc"] = mean(("erasure_attention", self.share))
        numbers = {"examples": len(measures), "without_tau": len(measures) - len(tau)}
        self.result = {**logged, **numbers, "curves": curves, "taus": tau}

    # ------------------------------------------------------------------ what is left behind

    def _say(self, trainer: Trainer, seconds: float) -> None:
        if not trainer.is_global_zero:
            return
        r = self.result
        if r["without_tau"] > MANY * r["examples"]:
            words = (
                "%d of %d texts have no tau: of one word, or of words that are all attended to alike or alike important"
            )
            log.warning(words, r["without_tau"], r["examples"])
        if seconds > LONG:
            log.info("explanations of %d texts took %.0f s", r["examples"], seconds)

    def _write(self, trainer: Trainer) -> None:
        if not wanted(trainer):
            return
        r = self.result
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "explanations.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["what", "x", "value"])
            rows.writerows([name, "", r[name]] for name in ("examples", "without_tau", "tau", "pearson"))
            rows.writerows([name, x, value] for name, points in r["curves"].items() for x, value in points)

    def _draw(self, trainer: Trainer, module: LightningModule, indices: Sequence[int]) -> None:
        """The figure, and the page of these texts, whichever ranks have them."""
        own = [i for i in indices if i in self._kept]
        texts = {text.place: text for rank in gathered(self._texts(trainer, module, own)) for text in rank}
        if not wanted(trainer):
            return
        r = self.result
        save_figure(trainer, "explanations", draw_explanations(r["taus"], r["curves"], r["examples"]))
        save_page(trainer, "attention", page([texts[i] for i in indices], self.beside))

    def _weights(self, module: LightningModule) -> nn.Module:
        return find_layers(module, [self.weights])[self.weights]

    def _texts(self, trainer: Trainer, module: LightningModule, indices: Sequence[int]) -> list[Shown]:
        if not indices:
            return []
        beside: Sequence[Heat | None] = [None] * len(indices)
        with crafting(module, "eval"):
            batch = self._batch(indices, module)
            own = heats(module, batch, self._weights(module))
            if self.beside is not None:
                other = opened(Path(self.beside).expanduser(), module)
                beside = heats(other, batch, self._weights(other))
        shown = []
        for index, heat, another in zip(indices, own, beside, strict=True):
            row = self._kept[index]
            query = words_of(module, row["query"]) if "query" in row else []
            label = class_name(module, int(row["label"]))
            shown.append(Shown(index, words_of(module, row["tokens"], trainer, index), query, label, heat, another))
        return shown
