"""Explanations: each measure against its definition, what a test logs against one text at a time, and no trace."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import WandbLogger
from scipy.spatial.distance import jensenshannon
from scipy.stats import kendalltau, pearsonr
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

from callbacks import explanations
from callbacks.explanations import (
    Explanations,
    attention_attack,
    choose,
    chunks,
    importance,
    js_divergence,
    kendall_tau,
    log_odds,
    pearson,
    remaining,
    without,
)
from callbacks.heatmap import COLOUR, OPACITY, Heat, Shown, page, strengths
from callbacks.report import Report, save_page
from tests.callbacks.small import trainer
from tests.processes import ranks

WORDS = ["<pad>", "<unk>", *(f"w{i}" for i in range(28))]

# ---------------------------------------------------------------------- a small reader and its texts


class Encoder(nn.Module):
    """A GRU, (B, T, D) to (B, T, 2 H), zeros on padding."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 4, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class Weights(nn.Module):
    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.scores, self.weights = nn.Linear(8, 1), nn.Identity(), Weights()

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        return self.weights(self.scores(self.v(h.tanh()).squeeze(-1)), mask)


class Backbone(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed, self.embed_query = nn.Embedding(len(WORDS), 6, padding_idx=0), nn.EmbeddingBag(len(WORDS), 8)
        self.drop = nn.Dropout(0.5)
        self.encoder, self.attention, self.head = Encoder(), Attention(), nn.Linear(8, classes)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"]
        h = self.encoder(self.drop(self.embed(batch["tokens"])), mask)
        context = (self.attention(h, mask)[:, None] @ h).squeeze(1)
        if "query" in batch:
            context = context + self.embed_query(batch["query"])
        logits = self.head(context)
        return logits.masked_fill(~batch["candidates"], -torch.inf) if "candidates" in batch else logits


class Reader(LightningModule):
    """A text classifier: words, a GRU, additive attention and a linear head."""

    def __init__(self, vocabulary: list[str], seed: int = 0, classes: int = 2, sharp: float = 4.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.vocabulary, self.class_names = vocabulary, ["<ham>", "spam & co", "third"][:classes]
        self.backbone = Backbone(classes)
        with torch.no_grad():
            self.backbone.attention.v.weight.mul_(sharp)
            self.backbone.head.weight.mul_(3)
        self.broken = False

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.backbone(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/acc", (self(batch).argmax(1) == batch["label"]).float().mean(), batch_size=len(batch["label"]))


def texts(
    size: int = 40, seed: int = 1, lengths: tuple[int, int] = (1, 14), pairs: bool = False
) -> list[dict[str, Tensor]]:
    """Texts in the order of their length; the label hangs a little on the first word."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for length in sorted(torch.randint(lengths[0], lengths[1] + 1, (size,), generator=g).tolist()):
        tokens = torch.randint(1, len(WORDS), (length,), generator=g)
        text = {"tokens": tokens, "label": (tokens[0] + torch.randint(3, (), generator=g)) % 2}
        if pairs:
            text["query"] = torch.randint(1, len(WORDS), (3,), generator=g)
            text["candidates"] = torch.tensor([True, True, length % 2 == 0])
        found.append(text)
    for index, place in enumerate(torch.randperm(size, generator=g).tolist()):
        found[place]["index"] = torch.tensor(index)
    return found


def together(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A padded batch."""
    batch = {k: torch.stack([row[k] for row in rows]) for k in rows[0] if k != "tokens"}
    batch["tokens"] = pad_sequence([row["tokens"] for row in rows], True)
    batch["attention_mask"] = batch["tokens"] > 0
    return {**batch, "domain": torch.zeros_like(batch["label"])}


class Texts(LightningDataModule):
    """Batches of texts of like length, cut by rank."""

    def __init__(self, rows: list[dict[str, Tensor]], batch_size: int = 6) -> None:
        super().__init__()
        self.rows, self.batch_size = rows, batch_size

    def test_dataloader(self) -> DataLoader[Any]:
        rank, world = (int(os.environ.get(name, value)) for name, value in (("RANK", 0), ("WORLD_SIZE", 1)))
        places = list(range(len(self.rows)))[rank::world]
        batches = [places[i : i + self.batch_size] for i in range(0, len(places), self.batch_size)]
        return DataLoader(self.rows, batch_sampler=batches, collate_fn=together)  # type: ignore[arg-type]


def reader(**options: Any) -> Reader:
    return Reader(WORDS, **options)


def explained(folder: Path, rows: Any = None, module: Any = None, report: bool = False, **options: Any) -> Any:
    """The callback after a test, and what was logged."""
    data = rows if isinstance(rows, LightningDataModule) else Texts(texts() if rows is None else rows)
    callback = Explanations(**options)
    runner = trainer(*([Report()] if report else []), callback, default_root_dir=folder)
    runner.test(module or reader(), datamodule=data, verbose=False)
    return callback, {name.removeprefix("test/"): float(v) for name, v in runner.callback_metrics.items()}


# ---------------------------------------------------------------------- tau, r, divergence

ROW = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=12)


def padded(rows: list[list[tuple[int, int]]], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two numbers for each token; on padding what would spoil any of the measures."""
    width = max(map(len, rows))
    x, y, mask = (
        torch.full((len(rows), width), 1e9),
        torch.full((len(rows), width), -7.0),
        torch.zeros(len(rows), width),
    )
    for row, values in enumerate(rows):
        for place, (a, b) in enumerate(values):
            x[row, place], y[row, place], mask[row, place] = a * scale, b / scale, 1
    return x, y, mask.bool()


@given(st.lists(ROW, min_size=1, max_size=4), st.sampled_from([1e-9, 1.0, 1e6]))
@settings(max_examples=100, deadline=None)
def test_tau_and_r_are_scipys_with_ties_and_padding(rows: list[list[tuple[int, int]]], scale: float) -> None:
    x, y, mask = padded(rows, scale)
    tau, r = kendall_tau(x, y, mask), pearson(x, y, mask)
    assert tau.shape == r.shape == (len(rows),) and tau.dtype == torch.float64
    for row, values in enumerate(rows):
        a, b = (np.array([v[i] for v in values], dtype=float) for i in (0, 1))
        if len(set(a)) < 2 or len(set(b)) < 2:
            assert math.isnan(tau[row]) and math.isnan(r[row])
        else:
            assert float(tau[row]) == pytest.approx(kendalltau(a, b).statistic, abs=1e-12)
            assert float(r[row]) == pytest.approx(pearsonr(a, b).statistic, abs=1e-6)


def test_equal_numbers_have_no_r_whatever_rounding_does() -> None:
    x = torch.full((1, 7), 1 / 7)
    assert pearson(x, torch.rand(1, 7), torch.ones(1, 7).bool()).isnan().all()


@given(st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_divergence_is_scipys(length: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(3, length, generator=g).mul(4).softmax(1) for _ in range(2))
    p[:, -1] = 0 if length > 1 else 1  # as on padding, or where a softmax underflows
    p = p / p.sum(1, keepdim=True)
    wanted = [jensenshannon(a, b) ** 2 for a, b in zip(p.double().numpy(), q.double().numpy(), strict=True)]
    found = js_divergence(p, q)
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)
    assert ((found >= 0) & (found <= math.log(2))).all()


def test_attention_that_has_nothing_in_common_diverges_by_ln_2() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert float(js_divergence(p, q)) == pytest.approx(math.log(2), abs=1e-12) and float(js_divergence(p, p)) == 0


# ---------------------------------------------------------------------- importance


def test_log_odds_are_those_of_the_softmax_and_never_saturate() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -torch.inf]])
    p = logits.double().softmax(1)
    wanted = [math.log(p[0, 2] / (1 - p[0, 2])), 3.0]
    assert log_odds(logits, torch.tensor([2, 1])).tolist() == pytest.approx(wanted, abs=1e-6)
    sure = torch.tensor([[0.0, 200.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(log_odds(sure, torch.tensor([1])).sum(), sure)
    assert gradient.tolist() == [[-1.0, 1.0]]
    alone = torch.tensor([[-torch.inf, 2.0], [1.0, -torch.inf]], requires_grad=True)  # no other; ruled out itself
    (gradient,) = torch.autograd.grad(log_odds(alone, torch.tensor([1, 1])).sum(), alone)
    assert gradient.isfinite().all()


def by_hand(module: Reader, row: dict[str, Tensor], held: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """A text's attention (T,), Jain and Wallace's importance (T,), of p itself, and logits (K,), word for word."""
    net: Any = module.backbone
    e = net.embed.weight[row["tokens"]].detach().requires_grad_()
    h = net.encoder.rnn(e[None])[0][0]
    a = (net.attention.v(h.tanh())[:, 0]).softmax(0)
    context = ((a.detach() if held else a)[:, None] * h).sum(0)
    logits = net.head(context)
    p = logits.softmax(0).max()
    (g,) = torch.autograd.grad(p, e)
    return a.detach(), torch.stack([(x * y).sum().abs() for x, y in zip(e.detach(), g, strict=True)]), logits.detach()


def test_importance_is_jain_and_wallaces_but_for_a_factor_of_the_text() -> None:
    module, rows = reader(classes=3).double().eval(), texts(12)
    batch = together(rows)
    net: Any = module.backbone
    predicted = module(batch).argmax(1)
    found = importance(module, batch, predicted, net.embed, net.attention.weights)
    assert found.shape == batch["tokens"].shape and (found[~batch["attention_mask"]] == 0).all()
    apart = 0
    for row, text in enumerate(rows):
        n = len(text["tokens"])
        _, wanted, logits = by_hand(module, text)
        p = logits.softmax(0).max()
        torch.testing.assert_close(found[row, :n] * p * (1 - p), wanted, rtol=1e-8, atol=1e-12)
        apart += not torch.allclose(wanted, by_hand(module, text, held=False)[1], rtol=1e-3)
    assert apart > 6, "whether the attention is held makes a difference"
    assert not net.embed._forward_hooks and not net.attention.weights._forward_hooks


def test_cudnn_is_off_where_a_gradient_goes_through_the_recurrent_layer(tmp_path: Path) -> None:
    """Its backward pass would refuse evaluation mode."""
    seen = []
    module = reader()
    net: Any = module.backbone
    net.encoder.rnn.register_forward_hook(
        lambda layer, args, out: seen.append((out[0].data.requires_grad, torch.backends.cudnn.enabled, layer.training))
    )
    explained(tmp_path, texts(6), module)
    assert (False, True, False) in seen and (True, False, False) in seen, "the test and the gradient"
    assert (True, True, False) not in seen and torch.backends.cudnn.enabled


@pytest.mark.parametrize(
    ("layer", "words"), [("head", r"embeddings of shape \(2, .*, D\)"), ("embed_query", "0 times")]
)
def test_a_layer_that_gives_something_else_is_named(layer: str, words: str) -> None:
    module, batch = reader().eval(), together(texts(2))
    net: Any = module.backbone
    with pytest.raises(ValueError, match=words):
        importance(module, batch, batch["label"], getattr(net, layer), net.attention.weights)
    assert not any(m._forward_hooks for m in module.modules())


# ---------------------------------------------------------------------- adversarial attention


def head_of(module: Reader, batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
    """Logits by scores, and the scores, by the small reader's own formula."""
    net: Any = module.backbone
    with torch.no_grad():
        h = net.encoder(net.embed(batch["tokens"]), batch["attention_mask"])
        scores = net.attention.v(h.tanh()).squeeze(-1)
    return lambda s: net.head((net.attention.weights(s, batch["attention_mask"])[:, None] @ h).squeeze(1)), scores


def test_the_adversary_keeps_to_its_radius_and_to_real_words_and_never_gets_weaker() -> None:
    module, batch = reader(classes=3).eval(), together(texts(30))
    head, scores = head_of(module, batch)
    label, mask = head(scores).argmax(1), batch["attention_mask"]
    sizes = (4.0, 0.25, 1.0)
    loss = torch.nn.functional.cross_entropy(head(scores), label, reduction="none")
    before = torch.ones(30).bool()
    found = list(attention_attack(head, scores, mask, label, sizes, 10))
    assert [size for size, *_ in found] == sorted(sizes)
    for size, delta, right in found:
        assert (delta.norm(dim=1) <= size * (1 + 1e-6)).all() and (delta[~mask] == 0).all()
        moved = torch.nn.functional.cross_entropy(head(scores + delta), label, reduction="none")
        assert (moved >= loss - 1e-7).all() and (moved[mask.sum(1) > 1] > loss[mask.sum(1) > 1]).float().mean() > 0.9
        r = scores.clone().requires_grad_()  # the paper's one step
        (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(head(r), label, reduction="sum"), r)
        step = scores + size * g / g.norm(dim=1, keepdim=True).clamp_min(1e-12)
        one = torch.nn.functional.cross_entropy(head(step), label, reduction="none")
        assert (moved >= one - 1e-5).all() and not (right & (head(step).argmax(1) != label)).any()
        assert not (right & ~before).any(), "fooled once, fooled for good"
        loss, before = moved, right
    assert before.float().mean() < 0.9


def test_the_adversary_finds_the_worst_of_two_words() -> None:
    values = torch.tensor([[[1.0, -1.0], [-2.0, 1.5]]])  # (1, T, K): what the words say for the classes

    def head(scores: Tensor) -> Tensor:
        return (scores.softmax(1)[:, None] @ values.expand(len(scores), -1, -1)).squeeze(1) * 3

    scores, label = torch.tensor([[0.7, -0.4]]), torch.tensor([0])
    angle = torch.linspace(0, 2 * math.pi, 721)
    for size, delta, _ in attention_attack(head, scores, torch.ones(1, 2).bool(), label, (0.3, 2.0), 10):
        circle = scores + size * torch.stack([angle.cos(), angle.sin()], 1)
        worst = (-log_odds(head(circle), torch.zeros(721, dtype=torch.long))).max()
        assert float(-log_odds(head(scores + delta), label)) == pytest.approx(float(worst), abs=1e-3)


def test_the_worst_of_the_smaller_sizes_stays_the_worst() -> None:
    def head(scores: Tensor) -> Tensor:  # wrong near 1/2 alone
        margin = (scores[:, 0] - 0.5).square() - 0.1
        return torch.stack([margin, torch.zeros_like(margin), torch.full_like(margin, -9)], 1)

    label, mask = torch.tensor([0]), torch.ones(1, 2).bool()
    found = list(attention_attack(head, torch.zeros(1, 2), mask, label, (0.5, 50.0), 1))
    assert [delta.tolist() for _, delta, _ in found] == [[[pytest.approx(0.5), 0.0]]] * 2
    assert not any(right.any() for *_, right in found)


def test_a_sure_answer_is_attacked_as_hard_as_another() -> None:
    """The gradient of the cross-entropy vanishes there; its direction doesn't."""

    def head(scores: Tensor, sure: float = 500.0) -> Tensor:
        margin = sure * (scores.softmax(1)[:, 0] - 0.5)
        return torch.stack([margin, -margin], 1)

    [(_, delta, right)] = attention_attack(
        head, torch.zeros(1, 2) + torch.tensor([1.0, 0.0]), torch.ones(1, 2).bool(), torch.tensor([0]), (2.0,), 10
    )
    assert not right.any() and float(delta.norm()) == pytest.approx(2.0, rel=1e-5)


# ---------------------------------------------------------------------- erasure


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=15), min_size=1, max_size=4), st.floats(0.01, 1.0))
@settings(max_examples=100, deadline=None)
def test_erasure_is_deletion_by_hand(rows: list[list[int]], share: float) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 30, (len(row),), generator=g) for row in rows]
    order = pad_sequence([torch.tensor(row, dtype=torch.float) for row in rows], True, padding_value=99.0)
    batch = {"tokens": pad_sequence(tokens, True), "query": torch.arange(len(rows))[:, None]}
    batch["attention_mask"] = batch["tokens"] > 0
    found = without(batch, remaining(order, batch["attention_mask"], share))
    for row, (values, words) in enumerate(zip(rows, tokens, strict=True)):
        gone = min(math.ceil(round(share * len(values), 9)), len(values) - 1)
        left = sorted(range(len(values)), key=lambda i: (-values[i], i))[gone:]
        wanted = [int(words[i]) for i in sorted(left)]
        n = int(found["attention_mask"][row].sum())
        assert found["tokens"][row, :n].tolist() == wanted and found["attention_mask"][row, :n].all()
        assert (found["tokens"][row, n:] == 0).all()
    assert torch.equal(found["query"], batch["query"]) and found["attention_mask"].any(0).all()


def test_a_share_is_counted_exactly() -> None:
    mask = torch.ones(1, 100).bool()
    assert [int(remaining(torch.rand(1, 100), mask, s).sum()) for s in (0.07, 0.29, 0.5, 0.001)] == [93, 71, 50, 99]


# ---------------------------------------------------------------------- which texts


def test_batches_are_of_like_length_and_bounded() -> None:
    lengths = {i: 1 + (7 * i) % 23 for i in range(60)} | {99: 500}
    found = list(chunks(lengths, 50))
    assert sorted(i for group in found for i in group) == sorted(lengths)
    assert all(len(group) * max(lengths[i] for i in group) <= 50 or len(group) == 1 for group in found)
    assert found[-1] == [99] and len(found) < 25


def test_right_and_wrong_of_all_classes_are_shown() -> None:
    answers = {i: (i % 2, 0 if i < 30 else i % 2) for i in range(60)}  # class 0 is always right
    found = choose(answers, 6)
    assert found == [0, 2, 1, 3, 31, 33] and choose(answers, 6) == found
    assert len(choose(answers, 500)) == 60 and choose({}, 3) == []
    many = choose({i: (i // 2, (i // 2 + i % 2) % 20) for i in range(40)}, 12)
    assert sum(i % 2 for i in many) == 6, "as many wrong as right, also where classes are many"


class Watched(Explanations):
    def _measure(self, module: LightningModule, batch: dict[str, Tensor]) -> Any:
        self.seen = [*getattr(self, "seen", []), *batch["index"].tolist()]
        return super()._measure(module, batch)


def test_the_texts_are_of_all_lengths_and_the_same_whatever_the_batches(tmp_path: Path) -> None:
    rows, seen = texts(60), []
    rows[3]["label"] = torch.tensor(-1)
    for batch_size in (1, 6, 60):
        callback = Watched(examples=20, sizes=[1.0], size=1.0, steps=1, draws=1)
        data = Texts(rows if batch_size != 60 else rows[::-1], batch_size)
        trainer(callback, default_root_dir=tmp_path).test(reader(), datamodule=data, verbose=False)
        seen.append(sorted(callback.seen))
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 20
    length = {int(row["index"]): place for place, row in enumerate(rows)}
    assert 20 < np.mean([length[i] for i in seen[0]]) < 40, "neither the short nor the long ones"


def test_texts_without_a_label_are_left_out(tmp_path: Path) -> None:
    rows = texts(10)
    for row in rows[:4]:
        row["label"] = torch.tensor(-1)
    assert explained(tmp_path, rows)[0].result["examples"] == 6


# ---------------------------------------------------------------------- what is logged


def test_what_is_logged_is_what_one_text_at_a_time_gives(tmp_path: Path) -> None:
    module, rows = reader(classes=3), texts(40)
    callback, logged = explained(tmp_path, rows, module, size=1.0, share=0.5)
    module.eval()
    taus, rs, clean, erased, important = [], [], [], [], []
    for row in rows:
        a, g, logits = by_hand(module, row)
        n, label = len(row["tokens"]), int(row["label"])
        if n > 1:
            taus.append(kendalltau(a.numpy(), g.numpy()).statistic)
            rs.append(pearsonr(a.double().numpy(), g.double().numpy()).statistic)
        clean.append(int(logits.argmax()) == label)
        for by, into in ((a, erased), (g, important)):
            left = sorted(by.argsort(descending=True)[min(math.ceil(n / 2), n - 1) :].tolist())
            into.append(int(by_hand(module, {"tokens": row["tokens"][left]})[2].argmax()) == label)
    assert logged["tau"] == pytest.approx(np.mean(taus), abs=1e-3) and logged["pearson"] == pytest.approx(
        np.mean(rs), abs=1e-3
    )
    assert logged["erasure_acc"] == pytest.approx(np.mean(erased)) and 0.3 < np.mean(erased) < 0.9
    curves = {name: dict(points) for name, points in callback.result["curves"].items()}
    assert len({round(v, 4) for v in curves["erasure_attention"].values()}) > 2, "the share makes a difference"
    assert curves["erasure_gradient"][0.5] == pytest.approx(np.mean(important))
    assert curves["attention_acc"][0.0] == curves["erasure_random"][0.0] == pytest.approx(np.mean(clean))
    assert callback.result["examples"] == 40 and callback.result["without_tau"] == 40 - len(taus) > 0
    assert sorted(callback.result["taus"]) == pytest.approx(sorted(taus), abs=1e-6)

    batch = together(rows)
    head, scores = head_of(module, batch)
    attention = module.backbone.attention.weights(scores, batch["attention_mask"])  # type: ignore[union-attr]
    for size, delta, right in attention_attack(
        head, scores, batch["attention_mask"], batch["label"], callback.sizes, 10
    ):
        moved = (scores + delta).masked_fill(~batch["attention_mask"], -torch.inf).softmax(1)
        wanted = np.mean(
            [jensenshannon(p, q) ** 2 for p, q in zip(attention.detach().numpy(), moved.numpy(), strict=True)]
        )
        assert curves["attention_acc"][size] == pytest.approx(float(right.float().mean()))
        assert curves["attention_js"][size] == pytest.approx(wanted, abs=1e-4)
        if size == 1.0:
            assert (
                logged["attention_acc"] == pytest.approx(curves["attention_acc"][1.0]) and logged["attention_js"] > 0.01
            )
    values = [v for _, v in sorted(curves["attention_acc"].items())]
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


def test_random_words_are_the_mean_of_some_draws_of_their_own(tmp_path: Path) -> None:
    one = explained(tmp_path, draws=1)[0].result["curves"]["erasure_random"]
    three = explained(tmp_path, draws=3)[0].result["curves"]["erasure_random"]
    again = explained(tmp_path, Texts(texts(), 1), draws=3)[0].result["curves"]["erasure_random"]
    assert one != three and again == three
    assert all(abs(120 * v - round(120 * v)) < 1e-6 for _, v in three)


def test_the_curves_are_in_a_csv(tmp_path: Path) -> None:
    callback, logged = explained(tmp_path, sizes=[1.0, 2.0])
    rows = list(csv.DictReader((tmp_path / "explanations.csv").open()))
    assert set(rows[0]) == {"what", "x", "value"}
    found = {(row["what"], row["x"]): float(row["value"]) for row in rows}
    assert found["attention_js", "2.0"] == pytest.approx(logged["attention_js"], abs=1e-6)
    assert found["erasure_attention", "0.2"] == pytest.approx(logged["erasure_acc"]) and found["examples", ""] == 40
    assert {what for what, x in found if x == "0.5"} == {f"erasure_{n}" for n in ("attention", "gradient", "random")}
    assert not (tmp_path / "plots").exists(), "drawn where there is a Report"


def test_texts_without_tau_are_counted_and_named_if_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback, logged = explained(tmp_path, texts(8, lengths=(1, 1)))
    assert callback.result["without_tau"] == 8 and math.isnan(logged["tau"]) and logged["erasure_acc"] >= 0
    assert "8 of 8 texts have no tau" in caplog.text
    caplog.clear()
    explained(tmp_path, texts(8, lengths=(3, 5)))
    assert "tau" not in caplog.text


def test_the_time_is_said_where_it_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(explanations, "LONG", 0.0)
    with caplog.at_level(logging.INFO, logger="callbacks.explanations"):
        explained(tmp_path, texts(4, lengths=(3, 5)))
    assert [
        r.getMessage().startswith("explanations of 4 texts took ") for r in caplog.records if "callbacks" in r.name
    ] == [True]


def test_pairs_with_candidates_keep_their_query(tmp_path: Path) -> None:
    asked: list[Tensor] = []
    module = reader(classes=3)
    module.backbone.embed_query.register_forward_hook(lambda m, args, out: asked.append(args[0].clone()))  # type: ignore[union-attr]
    callback, logged = explained(tmp_path, texts(20, pairs=True), module, report=True)
    assert all(q.shape[1] == 3 and (q > 0).all() for q in asked) and not math.isnan(logged["tau"])
    assert "query: w" in (tmp_path / "plots" / "attention.html").read_text()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_runs_in_half_precision(tmp_path: Path, precision: Any) -> None:
    callback = Explanations(examples=10)
    runner = trainer(callback, precision=precision, default_root_dir=tmp_path)
    runner.test(reader(), datamodule=Texts(texts(20)), verbose=False)
    full = explained(tmp_path, texts(20), examples=10)[0].result
    assert callback.result["attention_js"] == pytest.approx(full["attention_js"], abs=0.05)
    assert callback.result["tau"] == pytest.approx(full["tau"], abs=0.2)


# ---------------------------------------------------------------------- no trace


class Trains(Reader):
    """Tests with dropout on, and says what is left when all callbacks are through."""

    def on_test_epoch_start(self) -> None:
        self.backbone.drop.train()  # type: ignore[union-attr]

    def on_test_epoch_end(self) -> None:
        self.left = {
            "flags": [m.training for m in self.modules()],
            "needed": [p.requires_grad for p in self.parameters()],
            "gradients": [p.grad for p in self.parameters()],
            "weights": {k: v.clone() for k, v in self.state_dict().items()},
            "random": [torch.get_rng_state().tolist(), np.random.rand()],
            "hooks": [len(m._forward_hooks) for m in self.modules()],
            "forward": [m for m in self.modules() if "forward" in m.__dict__],
            "cudnn": torch.backends.cudnn.enabled,
        }


def left(folder: Path, *callbacks: Any) -> dict[str, Any]:
    module = Trains(WORDS)
    module.backbone.head.bias.requires_grad_(False)  # type: ignore[union-attr]
    torch.manual_seed(3), np.random.seed(3)
    runner = trainer(*callbacks, default_root_dir=folder)
    runner.test(module, datamodule=Texts(texts(20)), verbose=False)
    return module.left


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    saved = tmp_path / "plain.ckpt"
    save(Trains(WORDS, 5), saved)
    found, wanted = left(tmp_path, Report(), Explanations(beside=str(saved))), left(tmp_path)
    weights, before = found.pop("weights"), wanted.pop("weights")
    assert found == wanted and all(torch.equal(weights[k], before[k]) for k in before)


def test_dropout_is_off(tmp_path: Path) -> None:
    plain = explained(tmp_path, texts(20), Reader(WORDS))[0].result
    assert explained(tmp_path, texts(20), Trains(WORDS))[0].result == plain


@pytest.mark.parametrize("at", [1, 2, 4, 6, 40])
def test_hooks_go_also_after_an_error(tmp_path: Path, at: int) -> None:
    class Breaks(Reader):
        passes = -4  # of the test itself: 4 batches

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            logits = super().forward(batch)
            self.passes += 1
            if self.passes == at:
                raise RuntimeError("broken")
            return logits

    module = Breaks(WORDS)
    with pytest.raises(RuntimeError, match="broken"):
        explained(tmp_path, texts(20), module)
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in module.modules())
    assert all(p.requires_grad and p.grad is None for p in module.parameters()) and torch.backends.cudnn.enabled


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path) -> None:
    callback = Explanations()
    runner = trainer(Report(), callback, fast_dev_run=True, default_root_dir=tmp_path)
    runner.test(reader(), datamodule=Texts(texts(20)), verbose=False)
    assert callback.result["examples"] == 6 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- the page and the figure


class Page(HTMLParser):
    """The words of a page with their background's opacity, and whether its tags are closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[tuple[str, float]] = []
        self.links: list[str] = []
        self.within: float | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.links += [v for k, v in given.items() if k in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)
        self.within = None
        if given.get("class") == "word":
            self.within = float(given["style"].rpartition(",")[2].strip(" )"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.within = None

    def handle_data(self, data: str) -> None:
        if self.within is not None:
            self.words.append((data, self.within))


def test_the_page_shows_each_word_as_strongly_as_it_is_attended_to() -> None:
    heat = Heat([0.5, 0.25, 0.0, 0.25], "<ham>", 0.75)
    text = page([Shown(3, ["<b>", "a&b", "", '"q"'], ["who", "<?"], "spam", heat)])
    read = Page(text)
    assert not read.open and not read.links and "http" not in text and "<script" not in text
    assert read.words[5:] == [("<b>", 0.6), ("a&b", 0.3), ('"q"', 0.3)], "the legend is first; an empty word is nothing"
    assert (
        "&lt;ham&gt;" in text
        and "(0.75), ✗ wrong" in text
        and "who &lt;?" in text
        and "color-scheme: light dark" in text
    )
    assert "beside" not in text.lower().split("</style>")[1]


def test_words_are_readable_on_the_strongest_background_in_light_and_dark() -> None:
    """WCAG's contrast, which should be 4.5 at least."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for paper, ink in ((1.0, 0.0), (0.0, 1.0), (0.07, 1.0)):
        back = [OPACITY * int(c) / 255 + (1 - OPACITY) * paper for c in COLOUR.split(",")]
        low, high = sorted([luminance(back), luminance([ink] * 3)])
        assert (high + 0.05) / (low + 0.05) > 4.5


def test_strengths_are_scaled_by_text() -> None:
    assert (
        strengths([0.1, 0.05, 0.0]) == [1.0, 0.5, 0.0] and strengths([0.0, 0.0]) == [0.0, 0.0] and strengths([]) == []
    )


def test_a_report_draws_the_figure_and_the_page(tmp_path: Path) -> None:
    rows = texts(40, lengths=(3, 9))
    callback, _ = explained(tmp_path, rows, report=True, shown=5)
    assert (tmp_path / "plots" / "explanations.png").stat().st_size > 20_000
    text = (tmp_path / "plots" / "attention.html").read_text()
    read = Page(text)
    assert not read.open and text.count("<article>") == 5 and "✓ right" in text and "✗ wrong" in text
    first = next(row for row in rows if f"text {int(row['index'])}," in text.split("<article>")[1])
    attention, _, logits = by_hand(reader().eval(), first)
    n = len(attention)
    assert [w for w, _ in read.words[5 : 5 + n]] == [WORDS[i] for i in first["tokens"].tolist()]
    wanted = (0.6 * attention / attention.max()).tolist()
    assert [s for _, s in read.words[5 : 5 + n]] == pytest.approx(wanted, abs=1e-3)
    assert f"({float(logits.softmax(0).max()):.2f})" in text.split("<article>")[1]
    assert "of class &lt;ham&gt;</h2>" in text and "of class spam &amp; co</h2>" in text, "both classes"


def save(module: LightningModule, file: Path) -> None:
    trainer_ = trainer()
    trainer_.strategy.connect(module)
    trainer_.save_checkpoint(file)


def test_another_network_stands_beside(tmp_path: Path) -> None:
    save(reader(seed=7), tmp_path / "plain.ckpt")
    explained(tmp_path, texts(20, lengths=(3, 9)), report=True, shown=2, beside=str(tmp_path / "plain.ckpt"))
    text = (tmp_path / "plots" / "attention.html").read_text()
    first = text.split("<article>")[1].split("</article>")[0]
    row = next(row for row in texts(20, lengths=(3, 9)) if f"text {int(row['index'])}," in first)
    read, sides, n = Page(first), first.split('<div class="side">')[1:], len(row["tokens"])
    assert len(sides) == 2 and "plain.ckpt" in sides[1] and len(read.words) == 2 * n
    for place, seed in enumerate((0, 7)):
        attention, _, logits = by_hand(reader(seed=seed).eval(), row)
        assert f"({float(logits.softmax(0).max()):.2f})" in sides[place]
        wanted = (0.6 * attention / attention.max()).tolist()
        assert [s for _, s in read.words[place * n : (place + 1) * n]] == pytest.approx(wanted, abs=1e-3)


def test_words_are_the_datas_own_where_it_has_them(tmp_path: Path) -> None:
    class Own(Texts):
        def words(self, part: str, index: list[int]) -> list[list[str]]:
            return [[f"{part}-{n}-{i}" for i in range(100)] for n in index]  # more than the network reads

    explained(tmp_path, Own(texts(10, lengths=(3, 9))), report=True, shown=1)
    text = (tmp_path / "plots" / "attention.html").read_text()
    words = [w for w, _ in Page(text).words[5:]]
    index = int(words[0].split("-")[1])
    assert (
        f"text {index}," in text and words == [f"test-{index}-{i}" for i in range(len(words))] and 3 <= len(words) <= 9
    )


def test_the_page_goes_to_wandb(tmp_path: Path) -> None:
    logged: dict[str, Any] = {}

    class Fake(WandbLogger):
        def __init__(self) -> None:
            pass

        experiment = SimpleNamespace(log=logged.update)  # type: ignore[assignment]

    save_page(SimpleNamespace(default_root_dir=tmp_path, loggers=[Fake()]), "attention", page([]) + "\ud800")  # type: ignore[arg-type]
    assert list(logged) == ["plots/attention"] and type(logged["plots/attention"]).__name__ == "Html"
    assert "http" not in logged["plots/attention"].html and (tmp_path / "plots" / "attention.html").is_file()


# ---------------------------------------------------------------------- two ranks

RANK = """
import json, os, pathlib, sys
from callbacks.explanations import Explanations
from callbacks.report import Report
from tests.callbacks.small import trainer
from tests.callbacks.test_explanations import Texts, reader, texts

callback = Explanations(examples=25)
two = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
runner = trainer(Report(), callback, **two, default_root_dir=sys.argv[1])
rows = texts(40)
runner.test(reader(), datamodule=Texts([*rows, *rows[:3]]), verbose=False)
logged = {k: float(v) for k, v in runner.callback_metrics.items() if k != "test/acc"}
(pathlib.Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps([callback.result, logged]))
"""


def test_two_ranks_log_and_show_what_one_process_does(tmp_path: Path) -> None:
    """Also where a text comes on both."""
    ends = ranks([sys.executable, "-c", RANK, str(tmp_path)], 2, tmp_path, 100)
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    (first, logged), (second, also) = (json.loads((tmp_path / f"{r}.json").read_text()) for r in "01")
    callback, one = explained(tmp_path / "one", report=True, examples=25)
    assert first == second and logged == also
    wanted = json.loads(json.dumps(callback.result))
    for name, value in wanted.items():
        if name == "curves":
            assert {k: sum(v, []) for k, v in first[name].items()} == {
                k: pytest.approx(sum(v, []), abs=1e-5) for k, v in value.items()
            }
        else:
            assert first[name] == pytest.approx(value, abs=1e-5)
    assert logged["test/tau"] == pytest.approx(one["tau"], abs=1e-5)
    pages = [Page((folder / "plots" / "attention.html").read_text()).words for folder in (tmp_path, tmp_path / "one")]
    assert [w for w, _ in pages[0]] == [w for w, _ in pages[1]] and len(pages[0]) > 30


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"examples": 0}, "examples must be at least 1"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"sizes": [1.0, -1.0], "size": 1.0}, "sizes must be positive"),
        ({"size": 3.0}, "size must be one of sizes"),
        ({"shares": [0.2, 1.5]}, r"shares must lie in \(0, 1\]"),
        ({"share": 0.3}, "share must be one of shares"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Explanations(**options)


def refused(tmp_path: Path, error: type[Exception], words: str, **options: Any) -> None:
    with pytest.raises(error, match=words) as found:
        explained(tmp_path, **options)
    assert "\n" not in str(found.value)


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused(tmp_path, ValueError, "no layer 'attn'", weights="attn")
    refused(tmp_path, ValueError, "scores of shape", scores="encoder")
    with pytest.raises(ValueError, match="no layer 'attn'"):
        Explanations(scores="attn").setup(trainer(), reader(), "fit")  # before the training, not after it


def test_a_checkpoint_that_is_missing_or_of_something_else_is_named_before_the_test(tmp_path: Path) -> None:
    refused(tmp_path, FileNotFoundError, "there is no checkpoint .*nowhere.ckpt: 'beside' takes", beside="nowhere.ckpt")
    (tmp_path / "text.ckpt").write_text("no\nthing")
    refused(tmp_path, ValueError, "text.ckpt can't be opened as Reader", beside=str(tmp_path / "text.ckpt"))
    save(Reader(WORDS[:-1] + ["other"]), tmp_path / "other.ckpt")
    refused(tmp_path, ValueError, "another vocabulary than this run", beside=str(tmp_path / "other.ckpt"))
    save(reader(classes=3), tmp_path / "classes.ckpt")
    refused(tmp_path, ValueError, "another class_names than this run", beside=str(tmp_path / "classes.ckpt"))


def test_batches_of_something_else_are_refused(tmp_path: Path) -> None:
    class Images(Texts):
        def test_dataloader(self) -> DataLoader[Any]:
            return DataLoader([{"image": torch.zeros(3)}], batch_size=1)  # type: ignore[arg-type]

    class Any_(Reader):
        def test_step(self, batch: Any, batch_idx: int) -> None: ...

    refused(tmp_path, ValueError, "Explanations needs batches of texts", rows=Images([]), module=Any_(WORDS))
