"""Word substitution: the attack against loops written apart from it, what is reported, and that it leaves no trace."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import math
import os
import random
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from callbacks import word_substitution
from callbacks.report import Report
from callbacks.word_substitution import (
    Outcome,
    Texts,
    WordSubstitution,
    allowed,
    answers,
    at_random,
    curve,
    draw_substitutions,
    evenly,
    greedy,
    marked,
    passes,
    replaceable,
    sanity,
    substitutes,
)
from tests.callbacks.small import trainer
from tests.processes import ranks

# ---------------------------------------------------------------------- texts, and networks that add up their words

WORDS = ["<pad>", "<unk>", "good", "nice", "decent", "fine", "poor", "film", "movie", "bad", "the"]
PLACE = {word: i for i, word in enumerate(WORDS)}
#: What a word adds to the logit of class 1; that of class 0 is none.
WORTH = {"good": 3.0, "nice": 1.0, "decent": 0.5, "fine": 1.0, "poor": -1.0, "movie": 0.25, "bad": -2.0}
SYNONYMS = {
    "good": ["nice", "well-nigh", "decent"],
    "fine": ["poor", "nice"],
    "film": ["movie"],
    "bad": ["poor"],
    "poor": ["bad", "<unk>", "poor", "<pad>"],
}


def ids(text: str) -> list[int]:
    return [PLACE[word] for word in text.split()]


def texts(rows: Sequence[Sequence[int]], label: Sequence[int], wider: int = 0) -> Texts:
    tokens = torch.zeros(len(rows), max([1, *map(len, rows)]) + wider, dtype=torch.long)
    for row, words in zip(tokens, rows, strict=True):
        row[: len(words)] = torch.tensor(words, dtype=torch.long)
    return Texts(tokens, torch.tensor([len(r) for r in rows]), torch.tensor(label))


def binary() -> Tensor:
    return torch.tensor([[0.0, WORTH.get(word, 0.0)] for word in WORDS])


class Sums:
    """Logits: the sum of what the words add, (V, C). Notes the texts that it is asked about, without padding."""

    def __init__(self, worth: Tensor) -> None:
        self.worth = worth
        self.seen: list[tuple[int, list[int]]] = []
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, rows: Tensor, tokens: Tensor) -> Tensor:
        self.sizes.append((tokens.shape[0], tokens.shape[1]))
        self.seen += [(r, [w for w in t if w]) for r, t in zip(rows.tolist(), tokens.tolist(), strict=True)]
        return (self.worth[tokens] * (tokens > 0)[..., None]).sum(1)


def known(word: int) -> list[int]:
    return substitutes(word, WORDS, PLACE, lambda w: SYNONYMS.get(w, []), 10)


# ---------------------------------------------------------------------- pieces


@given(st.integers(0, 400), st.integers(1, 60))
def test_examples_lie_evenly_over_the_set(size: int, count: int) -> None:
    chosen = evenly(size, count).tolist()
    assert len(chosen) == min(size, count) == len(set(chosen)) and chosen == sorted(chosen)
    assert all(0 <= c < size for c in chosen)
    if size > count:
        gaps = np.diff(chosen)
        assert len(gaps) == 0 or max(gaps) - min(gaps) <= 1
        assert abs(chosen[0] - (size - 1 - chosen[-1])) <= 1, "as far from the start as from the end"


@given(st.integers(0, 1000), st.integers(0, 100))
def test_the_share_of_words_is_rounded_down(words: int, percent: int) -> None:
    assert allowed(words, percent / 100) == math.floor(Fraction(percent, 100) * words)


def test_a_share_that_floating_point_makes_smaller_is_kept() -> None:
    assert 0.29 * 100 < 29 and allowed(100, 0.29) == 29
    assert [allowed(n, 0.2) for n in (0, 4, 5, 9, 10)] == [0, 0, 1, 1, 2]


def test_only_words_of_the_vocabulary_stand_for_a_word() -> None:
    assert known(PLACE["good"]) == ids("nice decent")
    assert known(PLACE["poor"]) == ids("bad"), "neither itself, nor what is no word"
    assert known(PLACE["the"]) == []
    said: list[str] = []

    def noted(word: str) -> list[str]:
        said.append(word)
        return ["good"]

    assert [substitutes(i, WORDS, PLACE, noted, 5) for i in (0, 1)] == [[], []]
    assert said == [], "padding and unknown words aren't looked up"


def test_the_first_synonyms_are_tried_and_each_once() -> None:
    def some(_: str) -> list[str]:
        return ["lacking", "bad", "fine", "bad", "the", "movie"]

    assert substitutes(PLACE["good"], WORDS, PLACE, some, 3) == ids("bad fine the")
    assert substitutes(PLACE["fine"], WORDS, PLACE, some, 9) == ids("bad the movie")


@given(st.lists(st.lists(st.floats(-6, 6), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(0, 2))
def test_the_odds_are_those_of_the_true_class(rows: list[list[float]], label: int) -> None:
    found = answers(torch.tensor(rows), torch.full((len(rows),), label))
    for row, odds, predicted, sure in zip(np.array(rows, np.float32).astype(float), *found, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        assert float(odds) == pytest.approx(math.log(p[label] / (1 - p[label])), abs=4e-5)
        assert int(predicted) == np.argmax(np.float32(row)) and float(sure) == pytest.approx(p.max(), abs=1e-5)


def test_the_odds_tell_apart_what_probabilities_no_longer_do() -> None:
    logits = torch.tensor([[0.0, 40.0], [0.0, 39.0]])
    assert logits.softmax(1)[:, 1].tolist() == [1.0, 1.0]
    assert answers(logits, torch.tensor([1, 1])).odds.tolist() == [40.0, 39.0]


def test_odds_that_differ_by_rounding_alone_are_equal() -> None:
    one, other = answers(torch.tensor([[0.0, 1.0], [0.0, 1.0 + 2e-6]]), torch.tensor([1, 1])).odds
    assert one == other and answers(torch.tensor([[0.0, 1.0001]]), torch.tensor([1])).odds > one


def test_classes_that_may_not_be_answered_and_numbers_that_are_none() -> None:
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[1.0, -inf, 3.0], [-inf, -inf, 0.0], [0.0, nan, 1.0]])
    found = answers(logits, torch.tensor([0, 2, 1]))
    assert found.odds[:2].tolist() == [-2.0, inf] and bool(found.odds[2].isnan())
    assert found.predicted.tolist() == [2, 2, -1]


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 40))
def test_passes_take_each_text_once_and_no_more_words_than_they_may(lengths: list[int], most: int) -> None:
    found = list(passes(lengths, most))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= most for batch in found)
    for one, two in itertools.pairwise(found):
        assert (len(one) + 1) * lengths[two[0]] > most, "no pass is smaller than need be"


def test_replaced_words_are_marked() -> None:
    assert marked(ids("the decent film"), ids("the good film"), WORDS) == "the [[decent]] film"
    assert marked([], [], WORDS) == ""


# ---------------------------------------------------------------------- greedy substitution, by hand


def test_the_most_important_word_goes_first_and_the_worst_synonym_is_taken() -> None:
    """film 0 + fine 1 + good 3. Without: 4, 3, 1: good, fine, film. good -> decent: 1.5; fine -> poor: -.5, fooled."""
    network = Sums(binary())
    found = greedy(network, texts([ids("film fine good")], [1], wider=2), known, 1.0)
    assert found.texts.words(0) == ids("film poor decent") and found.texts.tokens[0, 3:].tolist() == [0, 0]
    assert (found.before.predicted.tolist(), found.after.predicted.tolist()) == ([1], [0])
    assert found.before.odds.tolist() == [4.0] and found.after.odds.tolist() == [-0.5]
    assert found.before.confidence.item() == pytest.approx(1 / (1 + math.exp(-4)))
    assert found.after.confidence.item() == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert found.changed.tolist() == [2] and found.queries.tolist() == [1 + 3 + 2 + 2] == [len(network.seen)]
    asked = [" ".join(WORDS[w] for w in words) for _, words in network.seen]
    assert asked[0] == "film fine good"
    assert sorted(asked[1:4]) == sorted(["<unk> fine good", "film <unk> good", "film fine <unk>"])
    assert asked[4:6] == ["film fine nice", "film fine decent"]
    assert asked[6:] == ["film poor decent", "film nice decent"]


@pytest.mark.parametrize(("share", "changed"), [(0.33, 0), (0.34, 1), (0.66, 1), (0.67, 2), (1.0, 2)])
def test_no_more_words_are_replaced_than_may_be(share: float, changed: int) -> None:
    found = greedy(Sums(binary()), texts([ids("film fine good")], [1]), known, share)
    assert found.changed.tolist() == [changed]
    assert found.after.predicted.tolist() == [1 if changed < 2 else 0]
    assert found.queries.tolist() == [[1, 6, 8][changed]], "none may be replaced: nothing else is asked"


def test_a_replacement_that_helps_the_network_is_not_made_and_does_not_count() -> None:
    """film may only become movie, which is worth more; then good gets its turn with the one replacement there is."""
    worth = {**WORTH, "film": 9.0, "movie": 10.0}
    network = Sums(torch.tensor([[0.0, worth.get(word, 0.0)] for word in WORDS]))
    found = greedy(network, texts([ids("good film")], [1]), known, 0.5)
    assert found.texts.words(0) == ids("decent film") and found.changed.tolist() == [1]
    assert found.queries.tolist() == [1 + 2 + 1 + 2]


def test_an_equal_replacement_is_not_made() -> None:
    worth = torch.zeros(len(WORDS), 2)
    worth[:, 1] = 1.0
    found = greedy(Sums(worth), texts([ids("good film")], [1]), known, 1.0)
    assert found.changed.tolist() == [0] and found.texts.words(0) == ids("good film")


def test_of_equal_words_the_earlier_goes_first_and_of_equal_synonyms_the_first() -> None:
    found = greedy(Sums(binary()), texts([ids("good the good")], [1]), known, 0.34)
    assert found.texts.words(0) == ids("decent the good")
    worth = binary()
    worth[PLACE["decent"]] = worth[PLACE["nice"]]
    found = greedy(Sums(worth), texts([ids("good")], [1]), known, 1.0)
    assert found.texts.words(0) == ids("nice")


def test_what_is_wrong_already_is_left_alone() -> None:
    network = Sums(binary())
    found = greedy(network, texts([ids("film fine good"), ids("bad film")], [0, 1]), known, 1.0)
    assert found.changed.tolist() == [0, 0] and found.queries.tolist() == [1, 1] and len(network.seen) == 2
    assert found.after.predicted.tolist() == [1, 0] == found.before.predicted.tolist()


@pytest.mark.parametrize("row", [[1, 1, 1], ids("the the"), [], [1]])
def test_texts_without_a_word_that_has_synonyms_stay(row: list[int]) -> None:
    network = Sums(binary())
    found = greedy(network, texts([row, ids("good")], [0, 1]), known, 1.0)
    assert found.texts.words(0) == row and int(found.changed[0]) == 0 and int(found.queries[0]) == 1
    assert int(found.changed[1]) == 1, "those beside it are attacked"
    assert replaceable(row, known) == []


def test_unknown_words_count_in_the_share() -> None:
    assert greedy(Sums(binary()), texts([[1, PLACE["good"]]], [1]), known, 0.5).texts.words(0) == [1, PLACE["decent"]]
    assert greedy(Sums(binary()), texts([[PLACE["good"]]], [1]), known, 0.5).changed.tolist() == [0]


def test_no_texts_are_no_error() -> None:
    found = greedy(Sums(binary()), texts([], []), known, 0.5)
    assert len(found.changed) == 0 and at_random(Sums(binary()), texts([], []), known, [], []) == []


# ---------------------------------------------------------------------- greedy substitution against slow loops


def probability(words: Sequence[int], worth: np.ndarray) -> np.ndarray:
    logits = worth[list(words)].sum(0) if len(words) else np.zeros(worth.shape[1])
    e = np.exp(logits - logits.max())
    return e / e.sum()


def slow(
    words: Sequence[int], label: int, worth: np.ndarray, synonyms: dict[int, list[int]], share: Fraction
) -> tuple[list[int], int, int]:
    """The attack on one text, one word at a time: the text, how many words were replaced, how often it was asked."""

    def true(text: Sequence[int]) -> float:
        p = probability(text, worth)[label]
        return round(math.log(p / (1 - p)), 9)  # but for rounding as p

    text, changed, asked = list(words), 0, 1
    most = math.floor(share * len(words))
    if probability(text, worth).argmax() != label or most == 0:
        return text, changed, asked
    falls = []
    for place, word in enumerate(words):
        if synonyms.get(word):
            asked += 1
            falls.append((true(text) - true([*text[:place], 1, *text[place + 1 :]]), place))
    for _, place in sorted(falls, key=lambda item: (-item[0], item[1])):
        best, least = None, true(text)
        for candidate in synonyms[text[place]]:
            asked += 1
            if true([*text[:place], candidate, *text[place + 1 :]]) < least:
                best, least = candidate, true([*text[:place], candidate, *text[place + 1 :]])
        if best is not None:
            text[place], changed = best, changed + 1
        if probability(text, worth).argmax() != label or changed == most:
            break
    return text, changed, asked


def can_be_fooled(
    words: Sequence[int], label: int, worth: np.ndarray, synonyms: dict[int, list[int]], share: Fraction
) -> bool:
    """Whether any choice of words and synonyms within the share does it."""
    options = [[word, *synonyms.get(word, [])] for word in words]
    for text in itertools.product(*options):
        count = sum(a != b for a, b in zip(text, words, strict=True))
        if count <= math.floor(share * len(words)) and probability(text, worth).argmax() != label:
            return True
    return False


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[int], Tensor, dict[int, list[int]], int]:
    """Texts of up to six words, labels, what words add, synonyms by id, and the share in percent."""
    vocabulary, classes = draw(st.integers(4, 9)), draw(st.integers(2, 4))
    halves = st.integers(-4, 4).map(lambda n: n / 2)  # sums are exact, so equal is equal
    worth = draw(st.lists(st.lists(halves, min_size=classes, max_size=classes), min_size=vocabulary))[:vocabulary]
    worth += [[0.0] * classes] * (vocabulary - len(worth))
    word = st.integers(2, vocabulary - 1)
    synonyms = {w: [s for s in draw(st.lists(word, max_size=3, unique=True)) if s != w] for w in range(2, vocabulary)}
    rows = draw(st.lists(st.lists(st.integers(1, vocabulary - 1), max_size=6), min_size=1, max_size=4))
    scores = [np.array(worth)[row].sum(0) if row else np.zeros(classes) for row in rows]
    label = [int(s.argmax()) if draw(st.integers(0, 4)) else draw(st.integers(0, classes - 1)) for s in scores]
    return rows, label, torch.tensor(worth), synonyms, draw(st.integers(1, 100))


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 30), st.integers(0, 3))
def test_greedy_is_the_slow_loop_and_never_beyond_exhaustive_search(problem: Any, most: int, wider: int) -> None:
    rows, label, worth, synonyms, percent = problem
    share, weights, network = Fraction(percent, 100), worth.double().numpy(), Sums(worth)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_substitution, "TOKENS", most)  # however the passes are cut, and however wide the padding is
        found = greedy(network, texts(rows, label, wider), lambda w: synonyms.get(w, []), percent / 100)
    assert int(found.queries.sum()) == len(network.seen)
    assert all(n == 1 or n * width <= most for n, width in network.sizes)
    for i, row in enumerate(rows):
        text, changed, asked = slow(row, label[i], weights, synonyms, share)
        assert found.texts.words(i) == text
        assert (int(found.changed[i]), int(found.queries[i])) == (changed, asked)
        assert int(found.after.predicted[i]) == probability(text, weights).argmax()
        assert float(found.after.confidence[i]) == pytest.approx(probability(text, weights).max(), abs=1e-5)
        assert bool((found.texts.tokens[i, len(row) :] == 0).all())
        differ = [(a, b) for a, b in zip(row, text, strict=True) if a != b]
        assert len(differ) == changed <= share * len(row)
        assert all(a > 1 and b in synonyms[a] for a, b in differ)
        if int(found.before.predicted[i]) == label[i] != int(found.after.predicted[i]):
            assert can_be_fooled(row, label[i], weights, synonyms, share)


# ---------------------------------------------------------------------- the control


def test_random_words_are_those_that_have_synonyms_and_what_they_become_are_these() -> None:
    row = ids("the good film") + [1] + ids("fine bad")
    for seed in range(20):
        network = Sums(binary())
        [right] = at_random(network, texts([row], [1]), known, [3], [seed])
        assert len(right) == len(network.seen) == 3
        for count, (_, words) in enumerate(network.seen, start=1):
            differ = [(a, b) for a, b in zip(row, words, strict=True) if a != b]
            assert len(differ) == count and all(b in known(a) for a, b in differ)
            assert right[count - 1] == (sum(WORTH.get(WORDS[w], 0.0) for w in words) > 0)


def test_every_word_and_every_synonym_may_be_drawn() -> None:
    row = ids("good film the fine bad")
    counts: dict[tuple[int, int], int] = {}
    for seed in range(400):
        network = Sums(binary())
        at_random(network, texts([row], [1]), known, [1], [seed])
        [(place, word)] = [(i, b) for i, (a, b) in enumerate(zip(row, network.seen[0][1], strict=True)) if a != b]
        counts[place, word] = counts.get((place, word), 0) + 1
    assert counts.keys() == {(0, 3), (0, 4), (1, 8), (3, 6), (3, 3), (4, 6)}
    for place in (0, 1, 3, 4):
        assert 70 <= sum(n for (p, _), n in counts.items() if p == place) <= 130
    assert all(30 <= counts[place] <= 70 for place in ((0, 3), (0, 4), (3, 6), (3, 3)))


def test_what_is_drawn_is_the_texts_own_and_goes_on_where_fewer_words_stop() -> None:
    rows = [ids("good film fine bad"), ids("fine good"), ids("film film film poor")]

    def drawn(chosen: list[int], counts: list[int]) -> list[list[list[int]]]:
        network = Sums(binary())
        at_random(network, texts([rows[i] for i in chosen], [1] * len(chosen)), known, counts, [7 + i for i in chosen])
        return [[words for row, words in network.seen if row == k] for k in range(len(chosen))]

    state = torch.get_rng_state()
    whole = drawn([0, 1, 2], [3, 2, 3])
    assert drawn([2, 0], [2, 1]) == [whole[2][:2], whole[0][:1]]
    assert drawn([1, 0], [0, 3]) == [[], whole[0]]
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------- rules and the curve


def test_nothing_is_suspicious_of_an_attack_that_works() -> None:
    accuracy = {"clean": 0.9, "greedy": 0.4, "random": 0.85}
    assert sanity(accuracy, 1000, with_synonyms=0.5, too_short=0.0, max_share=0.2) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accuracy": {"clean": 0.9, "greedy": 0.8, "random": 0.7}}, "random substitution fools more than greedy"),
        ({"accuracy": dict.fromkeys(("clean", "greedy", "random"), 0.9)}, "not one text was fooled"),
        ({"with_synonyms": 0.15}, "only 15.0% of the words have a synonym in the vocabulary, less than the 20%"),
        ({"too_short": 0.3}, "30.0% of the texts are too short for a replacement"),
        ({"count": 50}, "too few texts: with 50 the 95 % interval reaches from 0.28 to 0.54"),
    ],
)
def test_the_rules_say_what_is_suspicious(change: dict[str, Any], words: str) -> None:
    usual = {"accuracy": {"clean": 0.9, "greedy": 0.4, "random": 0.85}, "count": 1000}
    [found] = sanity(**{**usual, "with_synonyms": 0.5, "too_short": 0.0, "max_share": 0.2, **change})
    assert found.startswith(words)


def test_a_difference_within_the_spread_is_not_suspicious() -> None:
    accuracy = {"clean": 0.9, "greedy": 0.42, "random": 0.4}
    assert sanity(accuracy, 1000, with_synonyms=0.5, too_short=0.0, max_share=0.2) == []


def test_the_curve_takes_each_texts_first_replacements() -> None:
    """Ten words each, so half a percent of the last share is no word: 0 to 4 may be replaced."""

    def outcome(before: int, after: int, random: list[bool]) -> Outcome:
        said = {"index": 0, "label": 1, "confidence_before": 0.9, "confidence_after": 0.9, "words": 10}
        more = {"replaceable": 9, "queries": 9, "text": "", "substituted": "", "query": ""}
        return Outcome(before=before, after=after, changed=len(random), random=random, **said, **more)  # type: ignore[arg-type]

    outcomes = [
        outcome(1, 0, [True, False]),  # fooled by the second word
        outcome(1, 0, [True, False, True]),  # by the third; at random by the second, and no longer by the third
        outcome(1, 1, [True] * 4),
        outcome(0, 0, []),
    ]
    found = {round(share, 3): (greedily, randomly) for share, greedily, randomly in curve(outcomes, 0.4)}
    steps = [found[share] for share in (0.0, 0.08, 0.1, 0.18, 0.2, 0.28, 0.3, 0.4)]
    assert [step[0] for step in steps] == [0.75, 0.75, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]
    assert [step[1] for step in steps] == [0.75, 0.75, 0.75, 0.75, 0.25, 0.25, 0.5, 0.5]


# ---------------------------------------------------------------------- a module, a DataModule

TEXTS = [
    ("film fine good", 1),
    ("bad film", 0),
    ("the bad film", 1),
    ("good", 1),
    ("the the the the the", 0),
    ("poor movie bad the film the", 0),
    ("good <unk> good film the the the nice", 1),
    ("fine fine the", 1),
    ("<unk> <unk>", 0),
    ("film the film the film the film", 0),
    ("nice decent", 1),
    ("fine bad", -1),
    ("the movie poor", 0),
]


class Data(LightningDataModule):
    """Texts sorted by length, in batches of different widths; of pairs with queries, and with candidates."""

    def __init__(self, rows: Sequence[tuple[str, int]] = TEXTS, batch_size: int = 3, pairs: bool = False) -> None:
        super().__init__()
        self.rows, self.batch_size, self.pairs = list(rows), batch_size, pairs

    def synonyms(self, word: str) -> list[str]:
        return SYNONYMS.get(word, [])

    def query(self, index: int) -> list[int]:
        return [2 + (index + k) % 9 for k in range(1 + index % 4)]

    def collated(self, places: list[int]) -> dict[str, Tensor]:
        def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
            tokens = pad_sequence([torch.tensor(r, dtype=torch.long) for r in rows], batch_first=True)
            return tokens, tokens > 0

        tokens, mask = padded([ids(self.rows[i][0]) for i in places])
        label = torch.tensor([self.rows[i][1] for i in places])
        batch = {"tokens": tokens, "attention_mask": mask, "label": label, "index": torch.tensor(places)}
        if self.pairs:
            batch["query"], batch["query_mask"] = padded([self.query(i) for i in places])
            batch["candidates"] = torch.tensor([[True, True, i % 2 == 0] for i in places])
        return {**batch, "domain": torch.zeros_like(label)}

    def loader(self) -> DataLoader[Any]:
        order = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i][0].split()))
        order = order[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        places: Any = range(len(self.rows))
        return DataLoader(places, batch_sampler=batches, collate_fn=self.collated)

    train_dataloader = test_dataloader = loader


class Adds(LightningModule):
    """The sum of what words add; queries count double, of the third class a little is added always."""

    def __init__(self, worth: Tensor | None = None) -> None:
        super().__init__()
        self.vocabulary, self.class_names = WORDS, ["down", "up"]
        self.embed = nn.Embedding.from_pretrained(binary() if worth is None else worth, freeze=False)
        self.drop = nn.Dropout(0.5)
        self.seen: list[dict[str, Tensor]] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.seen.append({name: value.clone() for name, value in batch.items()})
        found = (self.drop(self.embed(batch["tokens"])) * batch["attention_mask"][..., None]).sum(1)
        if "query" in batch:
            found = found + (self.embed(batch["query"]) * batch["query_mask"][..., None]).sum(1) / 8
        if "candidates" in batch:
            found = found.masked_fill(~batch["candidates"][:, : found.shape[1]], -math.inf)
        return found

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        known = batch["label"] >= 0
        return nn.functional.cross_entropy(self(batch)[known], batch["label"][known])

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self(batch)
        self.seen = []  # what is left are the evaluator's

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def attacked(
    folder: Path, module: LightningModule | None = None, data: Data | None = None, *others: Any, **options: Any
) -> tuple[WordSubstitution, dict[str, float]]:
    runner_options = {k: options.pop(k) for k in ("precision", "fast_dev_run") if k in options}
    evaluator = WordSubstitution(**{"max_share": 0.67, **options})
    runner = trainer(evaluator, *others, default_root_dir=folder, **runner_options)
    runner.test(module or Adds(), datamodule=data or Data(), verbose=False)
    return evaluator, {k.removeprefix("test/"): float(v) for k, v in runner.callback_metrics.items()}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "substitutions.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def by_hand(share: str = "0.67", worth: Tensor | None = None) -> list[tuple[bool, bool, float, int, str]]:
    """Of each text with a label: right before, right after, share replaced, queries, the text after."""
    weights = (binary() if worth is None else worth).double().numpy()
    synonyms = {i: known(i) for i in range(len(WORDS))}
    found = []
    for text, label in TEXTS:
        if label >= 0:
            row = ids(text)
            after, changed, asked = slow(row, label, weights, synonyms, Fraction(share))
            right = [probability(t, weights).argmax() == label for t in (row, after)]
            found.append(
                (right[0], right[0] and right[1], changed / len(row), asked, " ".join(WORDS[w] for w in after))
            )
    return found


def test_what_is_logged_is_what_the_slow_loop_finds(tmp_path: Path) -> None:
    evaluator, logged = attacked(tmp_path)
    wanted = by_hand()
    assert logged["synonym_clean_acc"] == pytest.approx(np.mean([w[0] for w in wanted]))
    assert logged["synonym_acc"] == pytest.approx(np.mean([w[1] for w in wanted]))
    assert 0 < logged["synonym_acc"] < logged["synonym_clean_acc"] < 1, "something happens"
    assert logged["synonym_changed"] == pytest.approx(np.mean([w[2] for w in wanted if w[0] and not w[1]]))
    assert logged["synonym_queries"] == pytest.approx(np.mean([w[3] for w in wanted]))
    assert logged["synonym_acc"] <= logged["synonym_random_acc"] <= logged["synonym_clean_acc"]
    p, n, z = logged["synonym_acc"], len(wanted), 1.96
    reach = z * math.sqrt(p * (1 - p) / n + (z / n / 2) ** 2) / (1 + z * z / n)
    centre = (p + z * z / n / 2) / (1 + z * z / n)
    assert logged["synonym_acc_low"] == pytest.approx(centre - reach)
    assert logged["synonym_acc_high"] == pytest.approx(centre + reach)
    assert evaluator.result["examples"] == 12 and evaluator.result["logged"].keys() == logged.keys()


def test_the_table_has_the_texts(tmp_path: Path) -> None:
    evaluator, _ = attacked(tmp_path)
    rows = table(tmp_path)
    labelled = [i for i, (_, label) in enumerate(TEXTS) if label >= 0]
    assert [int(row["index"]) for row in rows] == labelled
    for row, index, (before, after, share, asked, text) in zip(rows, labelled, by_hand(), strict=True):
        original, label = TEXTS[index]
        assert row["text"] == original and row["label"] == ["down", "up"][label] and row["query"] == ""
        assert row["substituted"].replace("[[", "").replace("]]", "") == text
        assert row["substituted"].count("[[") == int(row["changed"]) == round(share * int(row["words"]))
        assert int(row["words"]) == len(original.split()) and int(row["queries"]) == asked
        assert (row["predicted_before"] == row["label"]) == before
        assert (row["predicted_after"] == row["label"]) == after
    first = rows[0]
    assert first["substituted"] == "film [[poor]] [[decent]]"
    sure = [1 / (1 + math.exp(-4)), 1 / (1 + math.exp(-0.5))]
    assert [float(first[f"confidence_{when}"]) for when in ("before", "after")] == pytest.approx(sure, abs=1e-4)


def test_the_curve_is_that_of_smaller_shares(tmp_path: Path) -> None:
    evaluator, logged = attacked(tmp_path)
    points = evaluator.result["curve"]
    assert [p[0] for p in points] == pytest.approx(np.linspace(0, 0.67, 21))
    assert points[0][1:] == pytest.approx((logged["synonym_clean_acc"],) * 2)
    assert points[-1][1:] == pytest.approx((logged["synonym_acc"], logged["synonym_random_acc"]))
    assert len({p[1] for p in points}) > 2, "it falls in steps"
    for share, greedily, randomly in points[1::3]:
        _, smaller = attacked(tmp_path, max_share=share)
        assert smaller["synonym_acc"] == pytest.approx(greedily)
        assert smaller["synonym_random_acc"] == pytest.approx(randomly)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_examples_are_the_same_however_they_are_batched(batch_size: int, tmp_path: Path) -> None:
    _, logged = attacked(tmp_path, None, Data(batch_size=batch_size), examples=5)
    # the places (2 i + 1) 13 / 10: 1, 3, 6, 9, 11, of which the last has no label
    assert [int(row["index"]) for row in table(tmp_path)] == [1, 3, 6, 9]
    places = [1, 3, 6, 9]
    assert logged["synonym_acc"] == pytest.approx(np.mean([by_hand()[i][1] for i in places]))


def test_only_the_first_synonyms_are_tried(tmp_path: Path) -> None:
    attacked(tmp_path, max_synonyms=1)
    assert table(tmp_path)[0]["substituted"] == "film [[poor]] [[nice]]"


def test_padding_stands_behind_and_is_masked(tmp_path: Path) -> None:
    module = Adds()
    attacked(tmp_path, module)
    widths = set()
    for batch in module.seen:
        mask, tokens = batch["attention_mask"], batch["tokens"]
        assert mask.dtype == torch.bool and torch.equal(mask, tokens > 0)
        assert torch.equal(mask, torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True))
        assert bool(mask.any(0).all()), "no wider than the longest"
        for words, index in zip(tokens, batch["index"], strict=True):
            assert int((words > 0).sum()) == len(TEXTS[int(index)][0].split())
        widths.add(mask.shape[1])
    assert widths and len({len(b["index"]) for b in module.seen}) > 1


def test_the_query_and_what_may_be_answered_stay(tmp_path: Path) -> None:
    worth = torch.cat([binary(), torch.full((len(WORDS), 1), 0.1)], 1)
    module, data = Adds(worth), Data(pairs=True)
    module.class_names = ["down", "up", "both"]
    _, logged = attacked(tmp_path, module, data)
    changed = 0
    for batch in module.seen:
        for row, index in enumerate(batch["index"].tolist()):
            query = data.query(index)
            assert batch["query"][row, : len(query)].tolist() == query
            assert torch.equal(batch["query_mask"][row], batch["query"][row] > 0)
            assert int(batch["query_mask"][row].sum()) == len(query)
            assert batch["candidates"][row].tolist() == [True, True, index % 2 == 0]
            assert int(batch["label"][row]) == TEXTS[index][1]
            words = ids(TEXTS[index][0])
            changed += batch["tokens"][row, : len(words)].tolist() != words
    assert changed > 20
    wanted = []
    for index, (text, label) in enumerate(TEXTS):
        if label >= 0:
            logits = worth[ids(text)].sum(0) + worth[data.query(index)].sum(0) / 8
            wanted.append(int(logits[: 3 if index % 2 == 0 else 2].argmax()) == label)
    assert logged["synonym_clean_acc"] == pytest.approx(np.mean(wanted))
    assert [row["query"] for row in table(tmp_path)][2] == " ".join(WORDS[w] for w in data.query(2))


class Recurrent(Adds):
    """A GRU whose last state over the words decides: the order of the words matters, and where they end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.vectors, self.gru, self.head = nn.Embedding(len(WORDS), 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        states, _ = self.gru(3 * self.vectors(batch["tokens"]))
        last = batch["attention_mask"].sum(1) - 1
        return 4 * self.head(states[torch.arange(len(last)), last])


def test_a_text_fares_alike_beside_others_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, together = attacked(tmp_path, Recurrent())
    rows = table(tmp_path)
    monkeypatch.setattr(word_substitution, "TOKENS", 1)
    _, alone = attacked(tmp_path, Recurrent())
    assert alone == pytest.approx(together) and table(tmp_path) == rows
    assert sum(int(row["changed"]) > 0 for row in rows) >= 3


def test_an_example_that_comes_twice_counts_once_and_other_test_sets_do_not(tmp_path: Path) -> None:
    class Twice(Data):
        def test_dataloader(self) -> Any:
            places: Any = range(len(self.rows))
            batches = [[0, 1, 2], [2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 1]]
            other = Data([("bad bad", 1), ("bad", 1), ("the bad", 1)])
            return [DataLoader(places, batch_sampler=batches, collate_fn=self.collated), other.loader()]

    class Several(Adds):
        def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None: ...

    evaluator, found = attacked(tmp_path, Several(), Twice())
    assert evaluator.result["examples"] == 12
    assert found["synonym_clean_acc"] == pytest.approx(np.mean([w[0] for w in by_hand()]))


# ---------------------------------------------------------------------- what is said and drawn


def test_one_line_says_what_it_took(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Adds()
    with caplog.at_level(logging.INFO, "callbacks.word_substitution"):
        _, logged = attacked(tmp_path, module)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO and "synonyms" in r.getMessage()]
    assert len(lines) == 1 and "\n" not in lines[0]
    asked = sum(len(batch["index"]) for batch in module.seen)
    assert f"accuracy {logged['synonym_acc']:.3f} (95 %:" in lines[0] and f"; {asked} queries in " in lines[0]
    assert "of 12 texts with up to 67 % of the words" in lines[0] and "sanity rules are broken" in lines[0]
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("too few texts: with 12" in w for w in warned) and any("have a synonym" in w for w in warned)


def test_the_plot_is_drawn_beside_a_report_only(tmp_path: Path) -> None:
    for name, others in (("without", []), ("with", [Report()])):
        attacked(tmp_path / name, None, None, *others)
        assert (tmp_path / name / "substitutions.csv").exists()
    assert not (tmp_path / "without" / "plots").exists()
    assert (tmp_path / "with" / "plots" / "substitutions.png").stat().st_size > 5000


def test_the_plot_shows_both_curves() -> None:
    figure = draw_substitutions([(0.0, 0.9, 0.9), (0.1, 0.5, 0.8), (0.2, 0.3, 0.75)], 100)
    [axis] = figure.axes
    drawn = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axis.lines}
    assert sorted(drawn.values()) == [[0.9, 0.5, 0.3], [0.9, 0.8, 0.75]]
    assert [v for k, v in drawn.items() if "random" in k] == [[0.9, 0.8, 0.75]]
    assert axis.get_title() == "100 texts"


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    _, logged = attacked(tmp_path, None, Data(batch_size=50), Report(), fast_dev_run=True)
    assert "synonym_acc" in logged and not list(tmp_path.iterdir())


def test_where_no_text_is_fooled_none_was_changed(tmp_path: Path) -> None:
    _, logged = attacked(tmp_path, None, Data([("the the the", 0), ("good good good good", 1)]), max_share=0.2)
    assert logged["synonym_acc"] == 1.0 and math.isnan(logged["synonym_changed"])


def test_without_a_label_there_is_no_accuracy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluator, logged = attacked(tmp_path, None, Data([("good film", -1)]))
    assert not logged and not evaluator.result and "no text with a label" in caplog.text
    assert not (tmp_path / "substitutions.csv").exists()


def test_what_is_not_a_number_is_wrong(tmp_path: Path) -> None:
    _, logged = attacked(tmp_path, Adds(torch.full((len(WORDS), 2), math.nan)))
    assert logged["synonym_clean_acc"] == 0.0 == logged["synonym_acc"]


def test_a_second_test_starts_afresh(tmp_path: Path) -> None:
    evaluator = WordSubstitution(max_share=0.67)
    runner = trainer(evaluator, default_root_dir=tmp_path)
    found = []
    for data in (Data(), Data(TEXTS[:4]), Data()):
        runner.test(Adds(), datamodule=data, verbose=False)
        found.append(evaluator.result)
    assert found[0]["examples"] == 12 and found[1]["examples"] == 4
    assert found[0] == found[2]


def test_what_a_broken_test_has_seen_does_not_count(tmp_path: Path) -> None:
    class Breaks(Adds):
        def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            if batch_idx == 2:
                raise RuntimeError("broken")

    evaluator = WordSubstitution(max_share=0.67)
    runner = trainer(evaluator, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="broken"):
        runner.test(Breaks(), datamodule=Data(), verbose=False)
    runner.test(Adds(), datamodule=Data([("the", 0)]), verbose=False)
    assert evaluator.result["examples"] == 1


def test_texts_of_no_words_are_no_error(tmp_path: Path) -> None:
    evaluator, logged = attacked(tmp_path, None, Data([("", 0), ("", 1)]))
    assert logged["synonym_acc"] == 0.5 == logged["synonym_clean_acc"]
    assert evaluator.result["too_short"] == 1.0 and table(tmp_path)[0]["text"] == ""


# ---------------------------------------------------------------------- no trace


class Trains(Adds):
    """Tests with dropout as in training, and says what is left when all callbacks are through."""

    def on_test_epoch_start(self) -> None:
        self.drop.train()

    def on_test_epoch_end(self) -> None:
        self.left: dict[str, Any] = {
            "flags": [m.training for m in self.modules()],
            "needing": [p.requires_grad for p in self.parameters()],
            "gradients": [p.grad is None for p in self.parameters()],
            "inference": torch.is_inference_mode_enabled(),
            "weights": {k: v.tolist() for k, v in self.state_dict().items()},
            "random": (torch.get_rng_state().tolist(), torch.rand(4).tolist(), np.random.rand(), random.random()),
        }


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    left = []
    for evaluators in ([WordSubstitution(max_share=0.67)], []):
        module = Trains()
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        runner = trainer(*evaluators, default_root_dir=tmp_path)
        runner.test(module, datamodule=Data(), verbose=False)
        left.append((module.left, torch.rand(3).tolist(), [p.grad for p in module.parameters()]))
        if evaluators:  # in evaluation mode all the same
            wanted = np.mean([w[1] for w in by_hand()])
            assert float(runner.callback_metrics["test/synonym_acc"]) == pytest.approx(wanted)
    assert left[0] == left[1]
    assert left[0][0]["inference"] and True in left[0][0]["flags"], "else this shows nothing"


def test_the_batches_stay_as_they_are(tmp_path: Path) -> None:
    given: list[dict[str, Tensor]] = []

    class Kept(Data):
        def collated(self, places: list[int]) -> dict[str, Tensor]:
            given.append(super().collated(places))
            return given[-1]

    attacked(tmp_path, None, Kept(pairs=True))
    for batch in given:
        fresh = Data(pairs=True).collated(batch["index"].tolist())
        assert batch.keys() == fresh.keys() and all(torch.equal(batch[name], value) for name, value in fresh.items())
    assert sum(len(batch["index"]) for batch in given) == len(TEXTS)


class Typed(Adds):
    """Notes in which precision it is asked, outside of the test's own steps."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        found = super().forward(batch)
        modes = (torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled())
        self.modes = {*getattr(self, "modes", ()), (*modes, torch.is_grad_enabled())}
        return (found[:, None] @ torch.eye(2).to(found)).squeeze(1)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.modes = set()


@pytest.mark.parametrize(
    ("precision", "dtype", "autocast"),
    [("bf16-true", torch.bfloat16, False), ("bf16-mixed", torch.float32, True), ("64-true", torch.float64, False)],
)
def test_it_runs_in_the_precision_of_the_test(precision: Any, dtype: Any, autocast: bool, tmp_path: Path) -> None:
    module = Typed()
    _, logged = attacked(tmp_path, module, precision=precision)
    assert module.modes == {(dtype, autocast, False, False)}
    # worths are quarters, small enough to be exact in bf16
    assert logged["synonym_acc"] == pytest.approx(np.mean([w[1] for w in by_hand()]))
    assert logged["synonym_queries"] == pytest.approx(np.mean([w[3] for w in by_hand()]))


# ---------------------------------------------------------------------- two ranks

RANK = """
import json, os, pathlib, sys
from callbacks.word_substitution import WordSubstitution
from tests.callbacks.small import trainer
from tests.callbacks.test_word_substitution import Data, Recurrent

folder = pathlib.Path(sys.argv[1])
evaluator = WordSubstitution(max_share=0.67, examples=9)
runner = trainer(evaluator, devices=2, strategy="ddp", use_distributed_sampler=False, default_root_dir=folder)
runner.test(Recurrent(), datamodule=Data(), verbose=False)
logged = {k: float(v) for k, v in runner.callback_metrics.items()}
(folder / os.environ["RANK"]).write_text(json.dumps([evaluator.result, logged]))
"""


def test_two_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    ends = ranks([sys.executable, "-c", RANK, str(tmp_path)], 2, tmp_path, 100)
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    (first, logged), (second, also) = (json.loads((tmp_path / r).read_text()) for r in "01")
    evaluator, alone = attacked(tmp_path / "alone", Recurrent(), examples=9)
    assert first == second == json.loads(json.dumps(evaluator.result))
    assert logged == also == {f"test/{name}": value for name, value in alone.items()}
    assert 0 < alone["synonym_acc"] < alone["synonym_random_acc"] < alone["synonym_clean_acc"] < 1
    assert table(tmp_path) == table(tmp_path / "alone") and len(table(tmp_path)) == 9


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"examples": 0}, "examples must be at least 1, not 0"),
        ({"max_synonyms": 0}, "max_synonyms must be at least 1, not 0"),
        ({"max_share": 0.0}, r"max_share must lie in \(0, 1\], not 0.0"),
        ({"max_share": 1.1}, r"max_share must lie in \(0, 1\], not 1.1"),
        ({"max_share": math.nan}, r"max_share must lie in \(0, 1\], not nan"),
    ],
)
def test_settings_out_of_range_are_named(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        WordSubstitution(**setting)


class Wordless(Data):
    synonyms = None  # type: ignore[assignment]


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_data_without_synonyms_are_refused_at_the_start(verb: str) -> None:
    with pytest.raises(
        ValueError, match=r"^WordSubstitution needs data with synonyms\(word\), which Wordless haven't:"
    ):
        getattr(trainer(WordSubstitution()), verb)(Adds(), datamodule=Wordless())


def test_loaders_alone_are_refused() -> None:
    with pytest.raises(ValueError, match=r"which these haven't: [^\n]*$"):
        trainer(WordSubstitution()).test(Adds(), Data().loader(), verbose=False)


def test_a_module_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    module = Adds()
    module.vocabulary = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^WordSubstitution needs a module with its vocabulary, [^\n]*Adds hasn't:"):
        attacked(tmp_path, module)


def test_batches_without_an_index_are_refused(tmp_path: Path) -> None:
    class Nameless(Data):
        def collated(self, places: list[int]) -> dict[str, Tensor]:
            return {k: v for k, v in super().collated(places).items() if k != "index"}

    with pytest.raises(ValueError, match="needs batches that are dicts with tokens, attention_mask, label, index"):
        attacked(tmp_path, None, Nameless())


def test_an_index_beyond_the_test_set_is_refused(tmp_path: Path) -> None:
    class Elsewhere(Data):
        def collated(self, places: list[int]) -> dict[str, Tensor]:
            batch = super().collated(places)
            return {**batch, "index": batch["index"] + 5}

    with pytest.raises(
        ValueError, match="^WordSubstitution needs index to be a text's place among the 13 .*, not 1[3-7]$"
    ):
        attacked(tmp_path, None, Elsewhere())


def test_a_test_set_of_unknown_length_is_refused(tmp_path: Path) -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([Data().collated([0, 1])])

    class Streamed(Data):
        def test_dataloader(self) -> Any:
            return DataLoader(Endless(), batch_size=None)

    with pytest.raises(ValueError, match="^WordSubstitution needs a test set of known length: "):
        attacked(tmp_path, None, Streamed())


def test_one_number_a_text_is_no_logits(tmp_path: Path) -> None:
    class Single(Adds):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch)[:, 0]

    with pytest.raises(ValueError, match=r"forward gives logits \(B, classes\)"):
        attacked(tmp_path, Single())


def test_a_fit_alone_measures_nothing(tmp_path: Path) -> None:
    evaluator = WordSubstitution()
    trainer(evaluator, default_root_dir=tmp_path).fit(Adds(), datamodule=Data())
    assert not evaluator.result and not (tmp_path / "substitutions.csv").exists()
