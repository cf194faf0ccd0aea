"""Accuracy when words are replaced by synonyms, greedily by importance; an evaluator for any classifier of words.

The attack is the plain form of PWWS (Ren et al. 2019) and TextFooler (Jin et al. 2019): words in the order of how much
the true class's probability falls without them, each replaced by the synonym that lowers it most. Neither PWWS' weights
of the order nor TextFooler's filters (part of speech, similarity of sentences) are here: the synonyms are the data's.
"""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from callbacks.perturbation import crafting, fold_seed, run_seed
from callbacks.report import Report, new_figure, save_figure, wanted
from callbacks.robustness import wilson
from callbacks.texts import TOKENS, chunks, gathered

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
#: Ids of padding and of an unknown word; the vocabulary's words come behind.
PADDING, UNKNOWN = 0, 1
#: Log odds are rounded to this: then equal words are equal, too, in batches that add up in another order.
STEP = 2.0**-14
#: Shares of the curve, evenly from none to the largest.
POINTS = 21

#: Logits (R, C) of texts: their rows (R,) in the set, which may have a query there, and their words (R, T).
Classify = Callable[[Tensor, Tensor], Tensor]
#: Ids of the words that may stand for a word, none of them itself.
Candidates = Callable[[int], Sequence[int]]

# ---------------------------------------------------------------------- which texts, words and synonyms


def evenly(size: int, count: int) -> Tensor:
    """``count`` places, or all, at even distances in a set of ``size``: (min(count, size),), ascending."""
    count = min(count, size)
    return (2 * torch.arange(count) + 1) * size // (2 * max(count, 1))


def allowed(words: int, max_share: float) -> int:
    """How many of a text's words may be replaced: the share rounded down, so it's never exceeded."""
    return math.floor(max_share * words + 1e-9)  # .29 * 100 is a little less than 29


def substitutes(
    word: int, vocabulary: Sequence[str], places: dict[str, int], synonyms: Callable[[str], list[str]], most: int
) -> list[int]:
    """Ids of the synonyms of a word that the vocabulary has, the first ``most`` in the order of ``synonyms``.

    The first, since data that know which synonyms are the nearest name these first, and since every network must be
    tried with the same ones. (Of WordNet's words, 95 % have no more than ten.)

    Args:
        word: its id; padding and unknown words have none.
        vocabulary: words by id.
        places: ids by word.
        synonyms: those of a word.
        most: at least 1.
    """
    if word in (PADDING, UNKNOWN):
        return []
    ids = dict.fromkeys(places.get(synonym, UNKNOWN) for synonym in synonyms(vocabulary[word]))  # each once
    return [i for i in ids if i not in (PADDING, UNKNOWN, word)][:most]


def replaceable(words: Sequence[int], candidates: Candidates) -> list[int]:
    """Places in a text (without its padding) of the words that have candidates."""
    return [place for place, word in enumerate(words) if candidates(word)]


# ---------------------------------------------------------------------- what the network says


class Answers(NamedTuple):
    """Of R texts, each (R,), on the CPU."""

    #: log p / (1 - p) of the true class, rounded to STEP: ordered as its probability p, but never stuck at 1.
    odds: Tensor
    #: The class; -1 where the logits aren't numbers, which is wrong.
    predicted: Tensor
    #: The predicted class's probability.
    confidence: Tensor


def answers(logits: Tensor, label: Tensor) -> Answers:
    """What logits (R, C) say of texts whose true classes are (R,); classes with -inf can't be answered."""
    logits, label = logits.detach().float().cpu(), label.cpu()[:, None]
    others = logits.scatter(1, label, -math.inf).logsumexp(1)
    odds = logits.gather(1, label).squeeze(1) - others
    predicted = logits.argmax(1).where(~logits.isnan().any(1), -1)
    return Answers((odds / STEP).round() * STEP, predicted, logits.softmax(1).amax(1))


class Texts(NamedTuple):
    """N texts; ``tokens`` (N, T) with padding behind, ``lengths`` (N,) in words, ``label`` (N,). On the CPU."""

    tokens: Tensor
    lengths: Tensor
    label: Tensor

    def words(self, row: int) -> list[int]:
        """A text without its padding."""
        return self.tokens[row, : int(self.lengths[row])].tolist()


def passes(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Texts by length, in batches of at most ``most`` words with their padding (or of one text): their places."""
    return chunks(dict(enumerate(lengths)), most)


def ask(classify: Classify, texts: Texts, rows: Sequence[int], places: Sequence[int], words: Sequence[int]) -> Answers:
    """Answers to texts with one word replaced each.

    Args:
        classify: gives logits.
        texts: as they are before.
        rows: which text, (R,); may repeat.
        places: of the word in it, (R,).
        words: what is put there, (R,).
    """
    row, place, word = (torch.tensor(values, dtype=torch.long) for values in (rows, places, words))
    odds, predicted, confidence = torch.zeros(len(row)), torch.zeros(len(row), dtype=torch.long), torch.zeros(len(row))
    lengths = texts.lengths[row].clamp_min(1).tolist()
    for batch in passes(lengths, TOKENS):
        i = torch.tensor(batch)
        tokens = texts.tokens[row[i], : max(lengths[b] for b in batch)]
        tokens[torch.arange(len(i)), place[i]] = word[i]
        logits = classify(row[i], tokens)
        if logits.dim() != 2 or len(logits) != len(i):
            raise ValueError("WordSubstitution needs a module whose forward gives logits (B, classes)")
        odds[i], predicted[i], confidence[i] = answers(logits, texts.label[row[i]])
    return Answers(odds, predicted, confidence)


def unchanged(classify: Classify, texts: Texts) -> Answers:
    """Answers to the texts as they are."""
    rows = list(range(len(texts.tokens)))
    return ask(classify, texts, rows, [0] * len(rows), texts.tokens[:, 0].tolist())


# ---------------------------------------------------------------------- substitution


class Substituted(NamedTuple):
    """What became of N texts; all on the CPU."""

    texts: Texts
    before: Answers
    after: Answers
    #: Words replaced, (N,).
    changed: Tensor
    #: Texts that the network was asked about, (N,).
    queries: Tensor


def greedy(classify: Classify, texts: Texts, candidates: Candidates, max_share: float) -> Substituted:
    """Replace words, the most important first, until the prediction is wrong or no more may be replaced.

    A word is the more important the less probable the true class is with ``<unk>`` in its place; of equal ones the
    earlier goes first. Each word that has candidates gets its turn once; the candidate that makes the true class the
    least probable (of equal ones the first) is taken, if it lowers the probability at all. With a smaller ``max_share``
    a text goes the same way and stops earlier. Texts that are wrong already are left alone.

    Args:
        classify: gives logits.
        texts: aren't changed themselves.
        candidates: of a word's id.
        max_share: of a text's words, in [0, 1]; see :func:`allowed`.
    """
    before = unchanged(classify, texts)
    now = Texts(texts.tokens.clone(), texts.lengths, texts.label)
    label, most = texts.label.tolist(), [allowed(n, max_share) for n in texts.lengths.tolist()]
    odds, predicted, confidence = (values.tolist() for values in before)
    changed, queries = [0] * len(label), [1] * len(label)
    left = [i for i in range(len(label)) if predicted[i] == label[i] and most[i]]

    spots = [(i, place) for i in left for place in replaceable(texts.words(i), candidates)]
    rows, places = [i for i, _ in spots], [place for _, place in spots]
    importance = ask(classify, texts, rows, places, [UNKNOWN] * len(spots)).odds.tolist()
    turns: dict[int, list[int]] = {i: [] for i in left}  # the next one last
    for (i, place), _ in sorted(zip(spots, importance, strict=True), key=lambda item: item[1]):
        turns[i].append(place)
        queries[i] += 1
    for order in turns.values():
        order.reverse()

    while left := [i for i in left if predicted[i] == label[i] and changed[i] < most[i] and turns[i]]:
        turn = {i: turns[i].pop() for i in left}
        tried = [(i, word) for i in left for word in candidates(int(texts.tokens[i, turn[i]]))]
        rows = [i for i, _ in tried]
        found = ask(classify, now, rows, [turn[i] for i in rows], [word for _, word in tried])
        best: dict[int, int] = {}
        tried_odds = found.odds.tolist()
        for number, i in enumerate(rows):
            queries[i] += 1
            if tried_odds[number] < (tried_odds[best[i]] if i in best else odds[i]):
                best[i] = number
        for i, number in best.items():
            now.tokens[i, turn[i]] = tried[number][1]
            odds[i], predicted[i], confidence[i] = (values[number].item() for values in found)
            changed[i] += 1
    after = Answers(torch.tensor(odds), torch.tensor(predicted, dtype=torch.long), torch.tensor(confidence))
    return Substituted(now, before, after, torch.tensor(changed), torch.tensor(queries))


def at_random(
    classify: Classify, texts: Texts, candidates: Candidates, counts: Sequence[int], seeds: Sequence[int]
) -> list[list[bool]]:
    """The control: words at random among those that have candidates, each replaced by one of them at random.

    Args:
        classify: gives logits.
        texts: aren't changed themselves.
        candidates: of a word's id.
        counts: words to replace, of each text, (N,).
        seeds: of each text's draws, (N,); those of a smaller count are the first of a larger one.

    Returns:
        of each text, whether it is right after 1, 2, ... and ``counts`` replacements.
    """
    now = Texts(texts.tokens.clone(), texts.lengths, texts.label)
    drawn: list[list[tuple[int, int]]] = []
    for i, (count, seed) in enumerate(zip(counts, seeds, strict=True)):
        generator, words = torch.Generator().manual_seed(seed), texts.words(i)
        spots = replaceable(words, candidates)
        chosen = [spots[k] for k in torch.randperm(len(spots), generator=generator).tolist()][:count]
        options = [candidates(words[place]) for place in chosen]
        picks = [o[int(torch.randint(len(o), (), generator=generator))] for o in options]
        drawn.append(list(zip(chosen, picks, strict=True)))
    right: list[list[bool]] = [[] for _ in counts]
    for turn in range(max(map(len, drawn), default=0)):
        rows = [i for i, replacements in enumerate(drawn) if turn < len(replacements)]
        places, words = (list(values) for values in zip(*(drawn[i][turn] for i in rows), strict=True))
        found = ask(classify, now, rows, places, words)
        now.tokens[rows, places] = torch.tensor(words)
        for i, predicted in zip(rows, found.predicted.tolist(), strict=True):
            right[i].append(predicted == int(texts.label[i]))
    return right


# ---------------------------------------------------------------------- what is reported


@dataclass(frozen=True)
class Outcome:
    """What became of one text."""

    index: int
    label: int
    before: int
    after: int
    confidence_before: float
    confidence_after: float
    changed: int
    #: Its length.
    words: int
    #: Those of them that have candidates.
    replaceable: int
    queries: int
    #: Right after 1, 2, ... and ``changed`` random replacements.
    random: list[bool]
    text: str
    #: With the replaced words in [[ ]].
    substituted: str
    query: str

    def right(self, share: float) -> tuple[bool, bool]:
        """Whether it is right if that share of its words may be replaced: greedily, and at random."""
        count = min(allowed(self.words, share), self.changed)
        fooled = self.after != self.label and count == self.changed
        return self.before == self.label and not fooled, self.random[count - 1] if count else self.before == self.label


def curve(outcomes: Sequence[Outcome], max_share: float) -> list[tuple[float, float, float]]:
    """(share of the words that may be replaced, accuracy, accuracy under random substitution), from 0 on."""
    found = []
    for i in range(POINTS):
        share = max_share * i / (POINTS - 1)
        greedily, randomly = zip(*(o.right(share) for o in outcomes), strict=True)
        found.append((share, sum(greedily) / len(outcomes), sum(randomly) / len(outcomes)))
    return found


def sanity(
    accuracy: dict[str, float], count: int, *, with_synonyms: float, too_short: float, max_share: float
) -> list[str]:
    """What is suspicious about accuracies of the same ``count`` texts, in words.

    Args:
        accuracy: clean, greedy and random.
        count: texts.
        with_synonyms: share of the words that have candidates.
        too_short: share of the texts of which not one word may be replaced.
        max_share: of a text's words that may be replaced.
    """
    found = []
    if accuracy["greedy"] > accuracy["random"] + 1.96 * math.sqrt(0.25 / max(count, 1)) + 1e-9:
        found.append("random substitution fools more than greedy: the order of words or the choice of synonyms is off")
    if accuracy["greedy"] == accuracy["clean"] > 0:
        found.append(
            "not one text was fooled: the network heeds no word that has synonyms, or is the same for all texts"
        )
    if with_synonyms < max_share:
        found.append(
            f"only {with_synonyms:.1%} of the words have a synonym in the vocabulary, less than the {max_share:.0%} "
            "that may be replaced: the accuracy says little"
        )
    if too_short > 0.1:
        found.append(f"{too_short:.1%} of the texts are too short for a replacement: raise max_share")
    low, high = wilson(round(accuracy["greedy"] * count), count)
    if high - low > 0.2:
        found.append(f"too few texts: with {count} the 95 % interval reaches from {low:.2f} to {high:.2f}")
    return found


def marked(words: Sequence[int], original: Sequence[int], vocabulary: Sequence[str]) -> str:
    """A text in which words that differ from the original stand in [[ ]]."""
    pairs = zip(words, original, strict=True)
    return " ".join(vocabulary[new] if new == old else f"[[{vocabulary[new]}]]" for new, old in pairs)


def draw_substitutions(points: Sequence[tuple[float, float, float]], count: int) -> Figure:
    """Accuracy against the share of words that may be replaced, with its 95 % interval, and the random control."""
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(5.0, 3.4)
    axis = figure.subplots()
    shares, greedily, randomly = zip(*points, strict=True)
    ends = [wilson(round(value * count), count) for value in greedily]
    axis.plot(shares, randomly, "o-", color="C7", markersize=3, label="random words, random synonyms")
    axis.plot(shares, greedily, "o-", color="C0", markersize=3, label="greedy by importance (band: 95 %)")
    axis.fill_between(shares, [low for low, _ in ends], [high for _, high in ends], color="C0", alpha=0.15, linewidth=0)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("words that may be replaced by synonyms")
    axis.set_ylabel("accuracy")
    axis.set_ylim(-0.02, 1.02)
    axis.legend(frameon=False, fontsize=8, loc="best")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{count} texts", fontsize=10)
    return figure


# ---------------------------------------------------------------------- the evaluator


class WordSubstitution(Callback):
    """Replaces words of test texts by synonyms and logs ``test/synonym_acc``, the accuracy that is left.

    The DataModule has ``synonyms(word) -> list[str]``, the module ``vocabulary`` (words by id, padding and unknown
    first) and ``module(batch) -> logits (B, classes)``. Batches have ``tokens`` and ``attention_mask`` (B, T), and
    ``label`` and ``index`` (the place in the test set), (B,); all else in them (``query``, ``candidates``) stays.

    Logged, of the same texts: ``synonym_clean_acc`` (before), ``synonym_acc`` (after; texts that were wrong before are
    wrong) with ``synonym_acc_low`` and ``synonym_acc_high`` (95 %), the control ``synonym_random_acc`` (as many words
    of each text, chosen at random, by random synonyms), ``synonym_changed`` (share of a text's words that was replaced,
    mean over the texts that were fooled; NaN if none was), ``synonym_queries`` (texts that the network was asked about,
    mean over all texts, without the control's). ``substitutions.csv`` in the run's folder has the texts; beside a
    :class:`~callbacks.report.Report`, ``plots/substitutions.png`` the accuracy by share.

    Which texts are taken depends on the size of the test set alone, of several test sets the first; each rank attacks
    its own and the first writes the table. Texts without a label are left out.

    Args:
        examples: texts, evenly over the test set.
        max_share: of a text's words (unknown ones too) that may be replaced, in (0, 1]; rounded down.
        max_synonyms: tried of a word: the first in the DataModule's list that the vocabulary has.

    Raises:
        ValueError: for a setting out of range, data without synonyms, or a module or batches without words.
    """

    def __init__(self, examples: int = 300, max_share: float = 0.2, max_synonyms: int = 10) -> None:
        for name, value in {"examples": examples, "max_synonyms": max_synonyms}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 < max_share <= 1:
            raise ValueError(f"max_share must lie in (0, 1], not {max_share}")
        self.examples, self.max_share, self.max_synonyms = examples, max_share, max_synonyms
        self._chosen = torch.zeros(0, dtype=torch.bool)
        self._kept: list[dict[str, Tensor]] = []  # rows, each without its padding
        #: Of the last test: accuracies, changed, queries, the curve and the broken rules; the same on all ranks.
        self.result: dict[str, Any] = {}

    # ------------------------------------------------------------------ which examples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "test"):  # before a training, too: what is wrong needn't wait for its end
            data = getattr(trainer, "datamodule", None)
            if not callable(getattr(data, "synonyms", None)):
                raise ValueError(
                    f"WordSubstitution needs data with synonyms(word), which {_named(data)} haven't: "
                    "take a DataModule of texts that has them, or leave the callback out"
                )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        vocabulary = getattr(pl_module, "vocabulary", None)
        if not isinstance(vocabulary, Sequence) or isinstance(vocabulary, str):
            raise ValueError(
                f"WordSubstitution needs a module with its vocabulary, a list of words, which "
                f"{type(pl_module).__name__} hasn't: take a classifier of texts, or leave the callback out"
            )
        loader: Any = trainer.test_dataloaders
        loader = loader[0] if isinstance(loader, (list, tuple)) else loader
        if not hasattr(getattr(loader, "dataset", None), "__len__"):
            raise ValueError("WordSubstitution needs a test set of known length: give its dataset a __len__")
        size = len(loader.dataset)
        self._kept, self._chosen = [], torch.zeros(size, dtype=torch.bool)
        self._chosen[evenly(size, self.examples)] = True

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx:
            return
        needed = ("tokens", "attention_mask", "label", "index")
        if not isinstance(batch, dict) or not all(isinstance(batch.get(name), Tensor) for name in needed):
            raise ValueError(f"WordSubstitution needs batches that are dicts with {', '.join(needed)}")
        index = batch["index"].cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self._chosen):
            raise ValueError(
                f"WordSubstitution needs index to be a text's place among the {len(self._chosen)} of the test set, "
                f"not {int(index.max())}"
            )
        entries = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dim() and len(v) == len(index)}
        for i in (self._chosen[index] & (batch["label"].cpu() >= 0)).nonzero().flatten().tolist():
            row = {name: value[i].cpu() for name, value in entries.items()}
            for words, mask in (("tokens", "attention_mask"), ("query", "query_mask")):
                if words in row and mask in row:
                    row[words] = row[words][row[mask].bool()]
                    row[mask] = torch.ones_like(row[words], dtype=torch.bool)
            self._kept.append(row)

    # ------------------------------------------------------------------ measuring

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        start = time.perf_counter()
        with crafting(pl_module, "eval"), torch.no_grad():
            outcomes = self._outcomes(trainer, pl_module)
        self._kept = []
        outcomes = [outcome for rank in gathered(outcomes) for outcome in rank]
        # in one order, so sums are equal however the ranks share them; a sampler may have dealt out an example twice
        outcomes = [outcome for _, outcome in sorted({o.index: o for o in outcomes}.items())]
        if not outcomes:
            self.result = {}
            if trainer.is_global_zero:
                log.warning("no accuracy under word substitution: no text with a label among those that were tested")
            return
        self.result = self._summary(outcomes)
        for name, value in self.result["logged"].items():
            pl_module.log(f"test/{name}", value, sync_dist=False)
        if trainer.is_global_zero:
            self._report(trainer, pl_module, outcomes, time.perf_counter() - start)

    def _outcomes(self, trainer: Trainer, module: LightningModule) -> list[Outcome]:
        """Of this rank's texts."""
        if not self._kept:
            return []
        kept = self._kept
        entries = {name: _padded([row[name] for row in kept]) for name in kept[0]}
        lengths = torch.tensor([len(row["tokens"]) for row in kept])
        if not entries["tokens"].shape[1]:  # not one word in all
            entries["tokens"] = torch.full((len(kept), 1), PADDING)
        texts = Texts(entries.pop("tokens"), lengths, entries["label"])
        entries = {name: value.to(module.device) for name, value in entries.items()}

        def classify(rows: Tensor, tokens: Tensor) -> Tensor:
            where = rows.to(module.device)
            batch = {name: value[where] for name, value in entries.items()}
            if "query" in batch and "query_mask" in batch:
                width = max(int(batch["query_mask"].sum(1).max()), 1)
                batch = {**batch, **{name: batch[name][:, :width] for name in ("query", "query_mask")}}
            mask = torch.arange(tokens.shape[1]) < lengths[rows][:, None]
            batch = {**batch, "tokens": tokens.to(module.device), "attention_mask": mask.to(module.device)}
            with trainer.precision_plugin.test_step_context():  # no gradients: as in the test's own passes, fp16 too
                return module(batch)

        vocabulary: Any = module.vocabulary
        places = {word: i for i, word in enumerate(vocabulary)}
        synonyms = trainer.datamodule.synonyms  # type: ignore[attr-defined]
        known: dict[int, list[int]] = {}

        def candidates(word: int) -> list[int]:
            if word not in known:
                known[word] = substitutes(word, vocabulary, places, synonyms, self.max_synonyms)
            return known[word]

        found = greedy(classify, texts, candidates, self.max_share)
        index = [int(row["index"]) for row in kept]
        seeds = [fold_seed(run_seed(), "word_substitution", i) for i in index]
        right = at_random(classify, texts, candidates, found.changed.tolist(), seeds)
        outcomes = []
        for i, row in enumerate(kept):
            original = texts.words(i)
            outcomes.append(
                Outcome(
                    index=index[i],
                    label=int(texts.label[i]),
                    before=int(found.before.predicted[i]),
                    after=int(found.after.predicted[i]),
                    confidence_before=float(found.before.confidence[i]),
                    confidence_after=float(found.after.confidence[i]),
                    changed=int(found.changed[i]),
                    words=len(original),
                    replaceable=len(replaceable(original, candidates)),
                    queries=int(found.queries[i]),
                    random=right[i],
                    text=marked(original, original, vocabulary),
                    substituted=marked(found.texts.words(i), original, vocabulary),
                    query=" ".join(vocabulary[word] for word in row["query"].tolist()) if "query" in row else "",
                )
            )
        return outcomes

    def _summary(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        count, words = len(outcomes), sum(o.words for o in outcomes)
        points = curve(outcomes, self.max_share)
        accuracy = {"clean": points[0][1], "greedy": points[-1][1], "random": points[-1][2]}
        low, high = wilson(round(accuracy["greedy"] * count), count)
        shares = [o.changed / o.words for o in outcomes if o.before == o.label != o.after]
        logged = {
            "synonym_acc": accuracy["greedy"],
            "synonym_acc_low": low,
            "synonym_acc_high": high,
            "synonym_clean_acc": accuracy["clean"],
            "synonym_random_acc": accuracy["random"],
            "synonym_changed": sum(shares) / len(shares) if shares else math.nan,
            "synonym_queries": sum(o.queries for o in outcomes) / count,
        }
        spread = {
            "with_synonyms": sum(o.replaceable for o in outcomes) / max(words, 1),
            "too_short": sum(not allowed(o.words, self.max_share) for o in outcomes) / count,
        }
        broken = sanity(accuracy, count, max_share=self.max_share, **spread)
        return {"examples": count, "logged": logged, **spread, "curve": points, "broken": broken}

    def _report(self, trainer: Trainer, module: LightningModule, outcomes: Sequence[Outcome], seconds: float) -> None:
        result, logged = self.result, self.result["logged"]
        for words in result["broken"]:
            log.warning("word substitution: %s", words)
        log.info(
            "accuracy %.3f (95 %%: %.3f to %.3f) of %d texts with up to %.0f %% of the words replaced by synonyms; "
            "clean %.3f, at random %.3f; %d queries in %.1f s; %s",
            logged["synonym_acc"],
            logged["synonym_acc_low"],
            logged["synonym_acc_high"],
            result["examples"],
            100 * self.max_share,
            logged["synonym_clean_acc"],
            logged["synonym_random_acc"],
            sum(o.queries + len(o.random) for o in outcomes),
            seconds,
            "no sanity rule is broken" if not result["broken"] else f"{len(result['broken'])} sanity rules are broken",
        )
        if not wanted(trainer):
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _write(outcomes, list(getattr(module, "class_names", [])), folder / "substitutions.csv")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it dynamically
        if any(isinstance(callback, Report) for callback in callbacks):
            save_figure(trainer, "substitutions", draw_substitutions(result["curve"], result["examples"]))


def _named(data: object) -> str:
    return "these" if data is None else type(data).__name__


def _padded(rows: list[Tensor]) -> Tensor:
    """Rows of one shape, or of different lengths with zeros behind, as one tensor."""
    return pad_sequence(rows, batch_first=True) if rows[0].dim() else torch.stack(rows)


def _write(outcomes: Sequence[Outcome], classes: Sequence[str], file: Path) -> None:
    """The table: a line a text, classes by name where they are known."""

    def name(label: int) -> str:
        return classes[label] if 0 <= label < len(classes) else str(label)

    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        head = ["index", "label", "predicted_before", "predicted_after", "confidence_before", "confidence_after"]
        writer.writerow([*head, "changed", "words", "queries", "text", "substituted", "query"])
        for o in outcomes:
            sure = [f"{o.confidence_before:.4f}", f"{o.confidence_after:.4f}"]
            numbers = [o.changed, o.words, o.queries]
            writer.writerow(
                [o.index, name(o.label), name(o.before), name(o.after), *sure, *numbers, o.text, o.substituted, o.query]
            )
