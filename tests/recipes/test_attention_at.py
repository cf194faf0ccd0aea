"""Attention AT, iAT and their family against their formulas, worked out here sentence by sentence."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn

from recipes._cli import run
from recipes.attention_at import AttentionClassifier, attention_at, attention_iat
from recipes.attention_at.module import NEIGHBOURS, accuracy, divergence, f1, neighbours, word_iat
from recipes.attention_at.network import AttentionNetwork
from tests.laws import cells, laws, right

MODEL = "recipes.attention_at.module.AttentionClassifier"
WORDS = ["<pad>", "<unk>", *(f"w{i}" for i in range(28))]
GOLD = ("word_at", "word_iat", "attention_rp", "attention_at", "attention_iat", "released_iat")
VIRTUAL = ("attention_vat", "attention_ivat")
ALL = ("vanilla", *GOLD, *VIRTUAL)
LENGTHS = (7, 1, 4, 6)


def make(technique: str = "attention_at", **more: Any) -> AttentionClassifier:
    torch.manual_seed(3)
    common: dict[str, Any] = {"vocabulary": WORDS, "embedding_dim": 6, "hidden": 5, "class_counts": (30, 10), **more}
    module = AttentionClassifier(technique, **common)  # type: ignore[arg-type]
    with torch.no_grad():  # as after some training: scores that differ
        for parameter in module.backbone.attention.parameters():
            parameter.mul_(3)
    return module


def a_batch(classes: int = 2, pairs: bool = False, width: int = 0) -> dict[str, Any]:
    g, lengths = torch.Generator().manual_seed(0), LENGTHS
    longest = max(*lengths, width)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(1, len(WORDS), (len(lengths), max(lengths)), generator=g)
    tokens = F.pad(tokens, (0, longest - max(lengths))) * mask
    label = torch.arange(len(lengths)) % classes
    batch = {"tokens": tokens, "attention_mask": mask, "label": label}
    batch |= {"domain": torch.zeros_like(label), "index": torch.arange(len(lengths))}
    if pairs:
        batch["query"] = torch.randint(1, len(WORDS), (len(lengths), 3), generator=g)
        batch["query_mask"] = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
        batch["query"] = batch["query"] * batch["query_mask"]
    return batch


# ---------------------------------------------------------------------- the network, one sentence at a time


def alone(network: AttentionNetwork, batch: dict[str, Any], i: int, r: Tensor | None = None) -> dict[str, Tensor]:
    """What the network makes of example i, without batch, padding or any code of the network but its weights."""
    words = batch["tokens"][i][batch["attention_mask"][i]]
    h = network.encoder.rnn(network.embed.weight[words][None])[0][0]
    layer, q = network.attention, None
    if network.query_encoder is not None:
        question = batch["query"][i][batch["query_mask"][i]]
        out, last = network.query_encoder.rnn(network.embed.weight[question][None])
        hidden = last[0] if isinstance(last, tuple) else last
        q = torch.cat([hidden[0, 0], hidden[1, 0]])
    if layer.kind == "additive":
        inside = h @ layer.state.weight.T + layer.state.bias
        if q is not None:
            inside = inside + layer.question.weight @ q
        s = torch.tanh(inside) @ layer.v.weight[0]
    else:
        s = h @ (q if q is not None else layer.v.weight[0]) / math.sqrt(h.shape[1])
    moved = s if r is None else s + r[: len(s)]
    a = torch.exp(moved - moved.max())
    a = a / a.sum()
    context = (a[:, None] * h).sum(0)
    if q is not None:
        text, query = network.join["text"], network.join["query"]
        context = torch.tanh(text.weight @ context + text.bias + query.weight @ q + query.bias)
    return {"scores": s, "weights": a, "out": network.head.weight @ context + network.head.bias}


@pytest.mark.parametrize("rnn", ["lstm", "gru"])
@pytest.mark.parametrize("attention", ["additive", "dot"])
@pytest.mark.parametrize(("classes", "pairs"), [(2, False), (4, True), (2, True), (3, False)])
def test_the_network_is_its_formula(rnn: str, attention: str, classes: int, pairs: bool) -> None:
    module = make(rnn=rnn, attention=attention, num_classes=classes, pairs=pairs)
    batch = a_batch(classes, pairs)
    seen: dict[str, Tensor] = {}
    for name in ("scores", "weights"):
        layer = getattr(module.backbone.attention, name)
        layer.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out))
    logits = module(batch)
    for i, length in enumerate(LENGTHS):
        wanted = alone(module.backbone, batch, i)
        torch.testing.assert_close(seen["scores"][i, :length], wanted["scores"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen["weights"][i, :length], wanted["weights"], rtol=1e-4, atol=1e-6)
        assert not seen["weights"][i, length:].any()
        out = wanted["out"] if classes > 2 else torch.cat([torch.zeros(1), wanted["out"]])
        torch.testing.assert_close(logits[i], out, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("technique", ALL)
def test_padding_changes_nothing(technique: str) -> None:
    results = []
    for width in (0, 12):
        module, batch = make(technique), a_batch(width=width)
        batch["uniform"] = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))[:, : batch["tokens"].shape[1]]
        loss = module.loss(batch)
        found = torch.autograd.grad(loss, [p for p in module.parameters()])
        results.append((loss, found))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_only_candidates_are_answered() -> None:
    module, batch = make(num_classes=4), a_batch(4)
    batch["candidates"] = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]]).bool()
    probability = module(batch).softmax(-1)
    assert not probability[~batch["candidates"]].any()
    for technique in ALL:
        module = make(technique, num_classes=4)
        loss = module.loss(batch)
        found = torch.autograd.grad(loss, list(module.parameters()))
        assert loss.isfinite() and all(bool(g.isfinite().all()) for g in found), technique


# ---------------------------------------------------------------------- the losses


def bce(out: Tensor, label: int, weight: float) -> Tensor:
    """Binary cross-entropy of one logit, the second class weighted."""
    p = 1 / (1 + torch.exp(-out))
    return -weight * torch.log(p) if label else -torch.log(1 - p)


def plain(module: AttentionClassifier, batch: dict[str, Any], r: Tensor | None = None, weight: float = 3.0) -> Tensor:
    """The mean loss over the batch, of scores moved by r (B, T)."""
    terms = []
    for i in range(len(batch["label"])):
        out = alone(module.backbone, batch, i, None if r is None else r[i])["out"]
        terms.append(bce(out[0], int(batch["label"][i]), weight))
    return torch.stack(terms).mean()


def gradient_of_scores(module: AttentionClassifier, batch: dict[str, Any]) -> list[Tensor]:
    """dL_i / dr at r = 0 for each sentence, by itself."""
    found = []
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        r = torch.zeros(length, requires_grad=True)
        loss = bce(alone(module.backbone, batch, i, r)["out"][0], int(batch["label"][i]), 3.0)
        found.append(torch.autograd.grad(loss, r)[0])
    return found


def wanted_r(technique: str, module: AttentionClassifier, batch: dict[str, Any], xi: float, norm: str) -> Tensor:
    """The perturbation by the paper's formulas, T x T differences and all."""
    r = torch.zeros(batch["tokens"].shape)
    for i, g in enumerate(gradient_of_scores(module, batch)):
        s = alone(module.backbone, batch, i)["scores"].detach()
        if technique == "attention_iat":
            d = s[:, None] - s[None, :]
            length = d.norm(dim=1, keepdim=True) if norm == "row" else d.norm()
            d = d / torch.where(length > 0, length, 1.0)
            alpha = torch.zeros(d.shape, requires_grad=True)
            direction = torch.autograd.grad((g * (alpha * d).sum(1)).sum(), alpha)[0]  # to first order
            step = (direction * d).sum(1)
        else:
            step = -g if technique == "released_iat" else g
        r[i, : len(g)] = xi * step / step.norm().clamp_min(1e-30)
    return r


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("technique", "norm"),
    [("attention_at", "row"), ("attention_iat", "row"), ("attention_iat", "matrix"), ("released_iat", "row")],
)
def test_loss_and_gradients_are_those_of_the_formula(technique: str, norm: str, lam: float) -> None:
    module, batch = make(technique, lam=lam, xi=0.7, iat_norm=norm), a_batch()
    twin = copy.deepcopy(module)
    r = wanted_r(technique, twin, batch, 0.7, norm)
    wanted = plain(twin, batch) + lam * plain(twin, batch, r)
    wanted.backward()  # type: ignore[no-untyped-call]
    loss = module.loss(batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    for (name, own), other in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_released_arithmetic_would_be_seen() -> None:
    """Where the crafting's backward pass stays in .grad, the clean term counts twice: gradients differ much."""
    module, batch = make(xi=0.7), a_batch()
    r = wanted_r("attention_at", module, batch, 0.7, "row")
    ours = torch.autograd.grad(module.loss(batch), list(module.parameters()))
    theirs = torch.autograd.grad(2 * plain(module, batch) + plain(module, batch, r), list(module.parameters()))
    apart = sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True)) ** 0.5
    assert apart > 0.3 * sum(float(a.square().sum()) for a in ours) ** 0.5


class Gradients(Callback):
    """What the optimizer is given, and the batch it came from."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch, self.before = dict(batch), {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        grads = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.found.append((self.batch, self.before, grads))


def test_a_run_steps_along_exactly_these_gradients() -> None:
    module, watch = cells.recipe("attention_at", technique="attention_at", xi=0.5, lam=0.8), Gradients()
    cells.trainer(watch).fit(module, datamodule=cells.data("attention_at"))
    assert len(watch.found) == cells.STEPS
    for batch, before, grads in watch.found:
        twin = cells.recipe("attention_at", technique="vanilla")
        twin.load_state_dict(before, strict=False)
        terms, moved = [], []
        for i in range(len(batch["label"])):
            length = int(batch["attention_mask"][i].sum())
            r = torch.zeros(length, requires_grad=True)

            def term(r: Tensor | None, i: int = i, batch: Any = batch, twin: Any = twin) -> Tensor:
                out = alone(twin.backbone, batch, i, r)["out"]
                return F.cross_entropy(out[None], batch["label"][i : i + 1])

            g = torch.autograd.grad(term(r), r)[0]
            terms.append(term(None))
            moved.append(term(0.5 * g / g.norm().clamp_min(1e-30)))
        named = list(twin.named_parameters())
        total = torch.stack(terms).mean() + 0.8 * torch.stack(moved).mean()
        wanted = torch.autograd.grad(total, [p for _, p in named])
        for (name, _), gradient in zip(named, wanted, strict=True):
            torch.testing.assert_close(grads[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("technique", ["attention_at", "attention_iat", "released_iat"])
def test_small_steps_raise_the_loss_and_the_released_ones_lower_it(technique: str) -> None:
    xi = 0.02
    module, batch = make(technique, xi=xi), a_batch()
    before = plain(module, batch)
    adversarial = module.loss(batch) - before
    slope = sum(float(g.norm()) for g in gradient_of_scores(module, batch)) / len(LENGTHS)
    gain = float((adversarial - before).detach()) / xi
    if technique == "released_iat":
        assert gain == pytest.approx(-slope, rel=0.05)
    elif technique == "attention_at":
        assert gain == pytest.approx(slope, rel=0.05)
    else:
        assert 0 < gain < slope


@pytest.mark.parametrize("technique", ["attention_rp", "attention_at", "attention_iat", *VIRTUAL, "released_iat"])
def test_r_has_length_xi_on_words_and_none_on_padding(technique: str) -> None:
    module, batch = make(technique, xi=2.5), a_batch(width=9)
    kept: list[Tensor] = []
    craft = module.craft
    module.craft = lambda *a: kept.append(craft(*a)) or kept[-1]  # type: ignore[method-assign,func-returns-value]
    module.loss(batch)
    (r,) = kept
    assert not r[~batch["attention_mask"]].any() and not r.requires_grad
    many = torch.tensor(LENGTHS) > 1  # the only word has all the attention whatever its score is
    torch.testing.assert_close(r.norm(dim=1)[many], torch.full((int(many.sum()),), 2.5))
    if technique != "attention_rp":
        assert float(r[1].norm()) in (0.0, pytest.approx(2.5))


@pytest.mark.parametrize("technique", GOLD)
def test_at_xi_0_the_loss_is_1_plus_lam_times_the_plain_one(technique: str) -> None:
    module, batch = make(technique, xi=0.0, lam=0.6), a_batch()
    torch.testing.assert_close(module.loss(batch), 1.6 * plain(module, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("technique", [*GOLD, *VIRTUAL])
def test_at_lam_0_a_run_is_vanilla_bit_by_bit(technique: str) -> None:
    found = []
    for settings_ in ({"technique": "vanilla"}, {"technique": technique, "lam": 0.0}):
        module = cells.recipe("attention_at", **settings_)
        cells.trainer(max_epochs=2).fit(module, datamodule=cells.data("attention_at"))
        found.append(cells.weights(module))
    assert not cells.differing(*found)


@pytest.mark.parametrize("technique", [*GOLD, *VIRTUAL])
def test_with_lam_a_run_is_another(technique: str) -> None:
    found = []
    for settings_ in ({"technique": "vanilla"}, {"technique": technique}):
        module = cells.recipe("attention_at", **settings_)
        cells.trainer(max_epochs=1).fit(module, datamodule=cells.data("attention_at"))
        found.append(cells.weights(module))
    assert cells.differing(*found)


@pytest.mark.parametrize(
    ("technique", "encoder", "heads"),
    [("vanilla", 1, 1), ("attention_rp", 1, 2), ("attention_at", 1, 3), ("attention_vat", 1, 4), ("word_at", 3, 3)],
)
def test_the_encoder_runs_once_where_attention_is_perturbed(technique: str, encoder: int, heads: int) -> None:
    module, batch = make(technique), a_batch()
    calls = {"encoder": 0, "head": 0}
    for name in calls:
        layer = getattr(module.backbone, name)
        layer.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    module.loss(batch)
    assert calls == {"encoder": encoder, "head": heads}


# ---------------------------------------------------------------------- without labels


def test_vat_is_its_formula() -> None:
    """r along the gradient of KL(p || p(s + d)) at a small random d; the second term is KL(p || p(s + r))."""
    module, batch = make("attention_vat", xi=1.5, lam=0.4), a_batch()
    batch["label"] = torch.tensor([1, -1, -1, 0])
    batch["uniform"] = torch.rand(batch["tokens"].shape, generator=torch.Generator().manual_seed(4))

    def kl(i: int, r: Tensor) -> Tensor:
        p, q = (torch.sigmoid(alone(module.backbone, batch, i, x)["out"][0]) for x in (None, r))
        p = p.detach()
        return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))

    first, last = (alone(module.backbone, batch, i)["out"][0] for i in (0, 3))
    clean = (bce(first, 1, 3.0) + bce(last, 0, 3.0)) / 2
    terms = []
    for i, length in enumerate(LENGTHS):
        normal = torch.erfinv(2 * batch["uniform"][i, :length].double() - 1)
        d = (0.1 * normal / normal.norm()).float().requires_grad_()
        g = torch.autograd.grad(kl(i, d), d)[0]
        terms.append(kl(i, 1.5 * g / g.norm().clamp_min(1e-30)))
    wanted = clean + 0.4 * torch.stack(terms).mean()
    torch.testing.assert_close(module.loss(batch), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("technique", VIRTUAL)
def test_unlabelled_texts_take_part(technique: str) -> None:
    module, batch = make(technique), a_batch()
    batch["label"] = torch.full((4,), -1)
    gradients = torch.autograd.grad(module.loss(batch), list(module.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients) and any(bool(g.any()) for g in gradients)


def test_others_refuse_data_without_labels() -> None:
    data = cells.data("attention_at")
    data.labelled = 6
    with pytest.raises(ValueError, match="attention_at needs a label for each text, but only 6 have one"):
        cells.trainer().fit(cells.recipe("attention_at"), datamodule=data)


def test_divergence_is_kl() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 4, generator=g), torch.randn(5, 4, generator=g)
    a[:, 2] = b[:, 2] = -torch.inf
    p, q = a.softmax(-1), b.softmax(-1)
    wanted = torch.where(p > 0, p * (p / q.where(p > 0, 1.0)).log(), 0.0).nansum(-1)
    torch.testing.assert_close(divergence(a, b), wanted)


# ---------------------------------------------------------------------- words


def test_word_at_is_its_formula() -> None:
    module, batch = make("word_at", xi=0.9, lam=0.5), a_batch()

    def through(embedded: Tensor) -> Tensor:
        network = module.backbone
        h, q, s = network.states(embedded, batch)
        out = network.read(h, s, batch["attention_mask"], q)[:, 1]
        return torch.stack([bce(o, int(y), 3.0) for o, y in zip(out, batch["label"], strict=True)]).mean()

    e = module.backbone.embed(batch["tokens"])
    leaf = e.detach().requires_grad_()
    g = torch.autograd.grad(through(leaf), leaf)[0] * batch["attention_mask"][..., None]
    r = 0.9 * g / g.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(module.loss(batch), through(e) + 0.5 * through(e + r), rtol=1e-5, atol=1e-6)


def test_neighbours_are_the_nearest_words_by_cosine() -> None:
    g = torch.Generator().manual_seed(0)
    table = torch.randn(30, 6, generator=g)
    tokens = torch.tensor([[4, 9, 1, 0], [4, 4, 29, 2]])
    found = neighbours(tokens, table, 5)
    assert found.shape == (2, 4, 5, 6)
    for place in ((0, 0), (0, 1), (0, 2), (1, 2), (1, 3)):
        word = int(tokens[place])
        cosine = F.cosine_similarity(table, table[word][None])
        near = sorted((k for k in range(2, 30) if k != word), key=lambda k: -float(cosine[k]))  # noqa: B023
        for k, direction in zip(near[:5], found[place], strict=True):
            torch.testing.assert_close(direction, (table[k] - table[word]) / (table[k] - table[word]).norm())
    assert neighbours(tokens.clamp_max(11), table[:12], NEIGHBOURS).shape == (2, 4, 9, 6)


def test_word_iat_steps_along_differences() -> None:
    g = torch.Generator().manual_seed(0)
    gradient, d = torch.randn(3, 5, 6, generator=g), F.normalize(torch.randn(3, 5, 4, 6, generator=g), dim=-1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    found = word_iat(gradient, d, mask, 0.8)
    for i in range(3):
        alpha = torch.zeros(5, 4, requires_grad=True)
        r = (alpha[..., None] * d[i]).sum(1)
        step = torch.autograd.grad((r[mask[i]] * gradient[i][mask[i]]).sum(), alpha)[0]
        step = 0.8 * step / step.norm()
        torch.testing.assert_close(found[i], (step[..., None] * d[i]).sum(1), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- metrics


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40), st.sampled_from([2, 3]))
def test_accuracy_and_f1_are_scikit_learns(pairs: list[tuple[int, int]], classes: int) -> None:
    truth, answer = ([min(p[i], classes - 1) for p in pairs] for i in (0, 1))
    counts = torch.zeros(classes, classes, dtype=torch.long)
    for t, a in zip(truth, answer, strict=True):
        counts[t, a] += 1
    assert float(accuracy(counts)) == pytest.approx(accuracy_score(truth, answer))
    average = {"pos_label": 1, "average": "binary"} if classes == 2 else {"average": "macro"}
    assert float(f1(counts)) == pytest.approx(f1_score(truth, answer, zero_division=0, **average))


def test_the_threshold_is_one_half_of_the_probability() -> None:
    """The released code compares the logit with 0.5: a logit of 0.3 is the second class."""
    module, batch = make("vanilla"), a_batch()
    with torch.no_grad():
        module.backbone.head.weight.zero_()
        module.backbone.head.bias.fill_(0.3)
    assert module(batch).argmax(-1).tolist() == [1] * 4
    assert module.predict_step(batch, 0)["probability"][:, 1].tolist() == pytest.approx([1 / (1 + math.exp(-0.3))] * 4)


# ---------------------------------------------------------------------- the laws, for each technique


@pytest.mark.parametrize("technique", ALL)
def test_the_laws(technique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cells.RECIPES, "attention_at", {**cells.RECIPES["attention_at"], "technique": technique})
    laws._plain_norm_steps.cache_clear()
    laws._plain_run.cache_clear()
    laws.no_trace("attention_at", right.Nothing)
    laws.off_at_evaluation("attention_at", right.Nothing)
    laws.resume_is_exact("attention_at", right.Nothing, tmp_path, 5)
    laws.accumulates("attention_at", right.Nothing)
    laws.runs_in("attention_at", right.Nothing, gradient_clip_val=0.01)
    laws._plain_norm_steps.cache_clear()
    laws._plain_run.cache_clear()


# ---------------------------------------------------------------------- settings, checkpoints, the command


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"xi": -1.0}, "xi and lam must not be negative"),
        ({"lam": float("nan")}, "xi and lam must not be negative"),
        ({"hidden": 0}, "embedding_dim and hidden must be at least 1"),
        ({"num_classes": 1}, "a classifier needs two classes"),
    ],
)
def test_settings_out_of_range(given_: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**given_)


def test_classes_weigh_as_published() -> None:
    assert make().class_weight == (1.0, 3.0)
    assert make(balanced=False).class_weight is None and make(num_classes=3).class_weight is None
    assert make(class_counts=()).class_weight is None


def test_attention_has_no_weight_decay() -> None:
    module = cells.recipe("attention_at")
    cells.trainer(max_epochs=1).fit(module, datamodule=cells.data("attention_at"))
    optimizer = module.configure_optimizers()
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert groups["model"]["weight_decay"] == 1e-5 and groups["attention"]["weight_decay"] == 0
    assert optimizer.defaults["amsgrad"]
    inside = {id(p) for p in module.backbone.attention.parameters()}
    assert {id(p) for p in groups["attention"]["params"]} == inside and inside
    assert sum(len(g["params"]) for g in groups.values()) == len(list(module.parameters()))


def test_names() -> None:
    assert callable(attention_at) and callable(attention_iat)
    assert isinstance(make().backbone.attention.scores, nn.Identity)
    assert run(MODEL, "attention_at", ["--help"]) == 0
