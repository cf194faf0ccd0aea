"""Attention AT and iAT against T x T matrices and autograd; the technique against attention written out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.attention import (
    AttentionPerturbation,
    attention_at,
    attention_iat,
    attention_layers,
    random_direction,
)
from callbacks.embeddings import FreeLB
from callbacks.latent import LatentAdversarial
from callbacks.perturbation import accept_other_techniques
from callbacks.weights import SAM
from recipes.scalelong.uvit import UViT
from tests.callbacks.small import trainer
from tests.laws import cells, laws
from tests.laws.test_laws import channels_last, compiled

# ---------------------------------------------------------------------- functions

sentences = st.lists(st.integers(1, 7), min_size=1, max_size=4)
scales = st.sampled_from([1e-30, 1e-8, 1.0, 1e20, 1e30])


def drawn(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, scores and a mask of sentences of these lengths, some padding behind all of them."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 2)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return torch.randn(shape, generator=g), 3 * torch.randn(shape, generator=g), mask


@given(sentences, st.integers(0, 99), scales, st.just(0.0) | st.floats(1e-6, 50))
def test_at_is_a_step_of_length_xi(lengths: list[int], seed: int, scale: float, xi: float) -> None:
    g, _, mask = drawn(lengths, seed)
    r = attention_at(g * scale, mask, xi)
    assert r.dtype == torch.float32 and bool((r[~mask] == 0).all())
    for row, gradient, n in zip(r, g, lengths, strict=True):
        assert float(row.norm()) == pytest.approx(xi, rel=1e-6)
        torch.testing.assert_close(row[:n], xi * gradient[:n] / gradient[:n].norm(), rtol=1e-5, atol=1e-6 * xi)
    assert bool((attention_at(g * 0, mask, xi) == 0).all())
    torch.testing.assert_close(attention_at((g * scale).nan_to_num().where(mask, torch.nan), mask, xi), r)


def test_at_takes_heads_and_half_precision() -> None:
    g, mask = torch.randn(2, 3, 4, 4).bfloat16(), torch.rand(2, 1, 1, 4) > 0.3
    r = attention_at(g, mask, 2.0)
    exact = g.double() * mask
    exact = 2 * exact / exact.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    assert r.dtype == torch.float32
    torch.testing.assert_close(r.double(), exact, rtol=1e-6, atol=1e-7)
    assert attention_at(g.double()).dtype == torch.float64


@settings(deadline=None, max_examples=60)
@given(sentences, st.integers(0, 99), scales, st.sampled_from(["row", "matrix"]), st.sampled_from([0.0, 1000.0]))
def test_iat_is_a_step_of_alpha(lengths: list[int], seed: int, scale: float, norm: Any, offset: float) -> None:
    """The differences as a matrix, the gradient by alpha from autograd."""
    g, s, mask = drawn(lengths, seed)
    s = s + offset
    r = attention_iat(g * scale, s, mask, 0.7, norm)
    assert bool((r[~mask] == 0).all())
    for b, n in enumerate(lengths):
        real = s[b, :n].double()
        d = real[:, None] - real[None]
        if n == 1:
            assert float(r[b].abs().max()) == 0
            continue
        d = d / (d.norm(dim=1, keepdim=True) if norm == "row" else d.norm())
        alpha = torch.zeros(n, n, dtype=torch.float64, requires_grad=True)
        loss = (g[b, :n].double() * (alpha * d).sum(1)).sum()  # of which g is the gradient by the scores
        (slope,) = torch.autograd.grad(loss, alpha)
        wanted = ((slope / slope.norm()) * d).sum(1)
        wanted = 0.7 * wanted / wanted.norm()
        torch.testing.assert_close(r[b, :n].double(), wanted, rtol=2e-4, atol=1e-5)
        assert float(r[b].norm()) == pytest.approx(0.7, rel=1e-6)
        if norm == "row":
            torch.testing.assert_close(r[b], attention_at(g * scale, mask, 0.7)[b])


@pytest.mark.parametrize("norm", ["row", "matrix"])
def test_iat_of_scores_that_are_alike_is_zero(norm: Any) -> None:
    s = torch.full((1, 4), 0.1)
    mask = torch.tensor([[True, True, True, False]])
    assert attention_iat(torch.randn(1, 4), s.index_fill(1, torch.tensor(3), 9.0), mask, 1.0, norm).tolist() == [
        [0.0] * 4
    ]
    r = attention_iat(torch.randn(1, 4), s.index_fill(1, torch.tensor(1), 9.0), mask, 1.0, norm)
    assert float(r.norm()) == pytest.approx(1)


def test_iat_names_its_norms() -> None:
    with pytest.raises(ValueError, match="norm must be row or matrix, not 'column'"):
        attention_iat(torch.ones(1, 2), torch.ones(1, 2), norm="column")  # type: ignore[arg-type]


@given(sentences, st.integers(0, 99), st.floats(0.1, 9))
def test_random_directions_have_length_xi(lengths: list[int], seed: int, xi: float) -> None:
    _, _, mask = drawn(lengths, 0)
    u = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed))
    r = random_direction(u, mask, xi)
    for row, n in zip(r, lengths, strict=True):
        assert float(row[:n].norm()) == pytest.approx(xi, rel=1e-6) and bool((row[n:] == 0).all())
    torch.testing.assert_close(random_direction(u[:, :-1], mask[:, :-1], xi), r[:, :-1])
    behind = random_direction(u, mask.flip(1), xi)  # padding in front
    for row, other, n in zip(r, behind, lengths, strict=True):
        torch.testing.assert_close(other[len(row) - n :], row[:n])


def test_random_directions_are_normal_ones() -> None:
    u = torch.tensor([[0.1, 0.3, 0.9, 0.5]])
    z = torch.distributions.Normal(0.0, 1.0).icdf(u.double())
    torch.testing.assert_close(random_direction(u).double(), z / z.norm(), rtol=1e-5, atol=1e-6)
    for end in (0.0, 0.5, 0.5 - 2**-25, 1 - 2**-24):
        assert float(random_direction(torch.tensor([[end]])).norm()) == pytest.approx(1)
    assert float(random_direction(torch.tensor([[1 - 2**-53]], dtype=torch.float64)).norm()) == pytest.approx(1)
    r = random_direction(torch.rand(20000, 3, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(r.T @ r / len(r), torch.eye(3) / 3, rtol=0, atol=0.01)  # no direction is preferred
    assert float((r.abs().max(1).values ** 4).mean()) == pytest.approx(float(_sphere() ** 4), rel=0.02)


@functools.cache
def _sphere() -> float:
    z = torch.randn(200000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return float(((z / z.norm(dim=1, keepdim=True)).abs().max(1).values ** 4).mean()) ** 0.25


# ---------------------------------------------------------------------- attention written out


class Net(LightningModule):
    """One layer of attention and a loss on what comes out, on tokens (B, N, D) and a mask (B, N)."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor], width: int = 8) -> None:
        super().__init__()
        accept_other_techniques(self)
        self.backbone = nn.ModuleDict({"attn": layer, "head": nn.Linear(width, 3)})
        self.call = call
        self.double()

    def out(self, attended: Tensor, batch: Any) -> Tensor:
        mask = batch["attention_mask"]
        pooled = (attended * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.cross_entropy(self.backbone["head"](pooled).tanh() * 3, batch["label"])

    def loss(self, batch: Any) -> Tensor:
        return self.out(self.call(self.backbone["attn"], batch["x"], batch["attention_mask"]), batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def heads(x: Tensor, linear: Callable[[Tensor], Tensor], h: int = 2) -> Tensor:
    return linear(x).unflatten(-1, (h, -1)).transpose(1, 2)


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, r: Tensor) -> Tensor:
    """softmax(q k / sqrt(d) + r) v, over what is seen (B, 1, N, N)."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + r
    weights = scores.exp() * seen
    return ((weights / weights.sum(-1, keepdim=True)) @ v).transpose(1, 2).flatten(2)


Case = tuple[nn.Module, Callable[..., Tensor], Callable[..., Tensor]]


def timm_case(fused: bool, causal: bool = False, boolean: bool = True) -> Case:
    layer = timm.layers.Attention(8, 2, qkv_bias=True)
    layer.fused_attn = fused  # type: ignore[assignment, misc]  # marked final for TorchScript

    def call(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        if causal:
            return layer(x, is_causal=True)
        shown = mask[:, None, None, :]
        return layer(x, shown if boolean else torch.zeros(shown.shape).double().masked_fill(~shown, -10000.0))

    def plain(layer: Any, x: Tensor, mask: Tensor, r: Tensor) -> Tensor:
        q, k, v = (heads(x, part) for part in thirds(layer.qkv.weight, layer.qkv.bias))
        seen = torch.ones(x.shape[1], x.shape[1]).tril()[None, None] if causal else mask[:, None, None, :]
        return layer.proj(written_out(q, k, v, seen, r))

    return layer, call, plain


def thirds(weight: Tensor, bias: Tensor) -> list[Callable[[Tensor], Tensor]]:
    return [functools.partial(F.linear, weight=w, bias=b) for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True)]


def torch_case(first: bool, padding: str = "bool", causal: bool = False) -> Case:
    def call(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        x = x if first else x.transpose(0, 1)
        options: dict[str, Any] = {"key_padding_mask": ~mask} if padding == "bool" else {}
        if padding == "float":
            options["key_padding_mask"] = torch.zeros(mask.shape).double().masked_fill(~mask, -math.inf)
        if padding == "each":
            options["attn_mask"] = (~mask)[:, None, None, :].expand(-1, 2, x.shape[int(first)], -1).flatten(0, 1)
        if causal:
            options.update(attn_mask=torch.ones(mask.shape[1], mask.shape[1]).triu(1).bool(), is_causal=True)
        out = layer(x, x, x, need_weights=False, **options)[0]
        return out if first else out.transpose(0, 1)

    def plain(layer: Any, x: Tensor, mask: Tensor, r: Tensor) -> Tensor:
        q, k, v = (heads(x, part) for part in thirds(layer.in_proj_weight, layer.in_proj_bias))
        seen = torch.ones(x.shape[1], x.shape[1]).tril()[None, None] if causal else mask[:, None, None, :]
        return layer.out_proj(written_out(q, k, v, seen, r))

    return nn.MultiheadAttention(8, 2, batch_first=first), call, plain


def bert_case(kind: str, causal: bool = False) -> Case:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention

    config = BertConfig(hidden_size=8, num_attention_heads=2, attention_probs_dropout_prob=0.0)
    config._attn_implementation = kind

    def call(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        shown = mask[:, None, None, :]
        if kind == "eager":
            shown = torch.zeros(shown.shape).double().masked_fill(~shown, torch.finfo(torch.float64).min)
        return layer(x, None if causal else shown)[0]

    def plain(layer: Any, x: Tensor, mask: Tensor, r: Tensor) -> Tensor:
        q, k, v = (heads(x, part) for part in (layer.query, layer.key, layer.value))
        seen = torch.ones(x.shape[1], x.shape[1]).tril()[None, None] if causal else mask[:, None, None, :]
        return written_out(q, k, v, seen, r)

    return BertSelfAttention(config, is_causal=causal), call, plain


CASES: dict[str, Callable[[], Case]] = {
    "timm, fused": lambda: timm_case(True),
    "timm, unfused": lambda: timm_case(False),
    "timm, -10000": lambda: timm_case(True, boolean=False),
    "timm, causal": lambda: timm_case(True, causal=True),
    "torch": lambda: torch_case(True),
    "torch, batch second": lambda: torch_case(False),
    "torch, float padding": lambda: torch_case(True, "float"),
    "torch, a mask for each": lambda: torch_case(False, "each"),
    "torch, causal": lambda: torch_case(True, "none", causal=True),
    "BERT, eager": lambda: bert_case("eager"),
    "BERT, sdpa": lambda: bert_case("sdpa"),
    "BERT, causal": lambda: bert_case("sdpa", causal=True),
}


def tokens(size: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:size, None]
    x = 2 * torch.randn(size, 5, 8, generator=g, dtype=torch.float64)
    return {"x": x, "attention_mask": mask, "label": torch.arange(size) % 3}


@pytest.mark.filterwarnings("error:Support for mismatched")
@pytest.mark.parametrize("case", CASES)
def test_step_is_that_of_attention_written_out(case: str) -> None:
    torch.manual_seed(2)
    layer, call, plain = CASES[case]()
    module, batch = Net(layer, call), tokens()

    def other(r: Tensor) -> Tensor:
        return module.out(plain(layer, batch["x"], batch["attention_mask"], r), batch)

    before = module.loss(batch).detach()
    torch.testing.assert_close(before, other(torch.zeros(4, 2, 5, 5)), rtol=1e-9, atol=1e-9)
    g = torch.zeros(4, 2, 5, 5, dtype=torch.float64)  # by differences
    with torch.no_grad():
        for place in range(g.numel()):
            h = torch.zeros_like(g)
            h.view(-1)[place] = 1e-5
            g.view(-1)[place] = (other(h) - other(-h)) / 2e-5
    for kind in ("at", "random"):
        technique = AttentionPerturbation(xi=0.5, layers=["attn"], kind=kind)  # type: ignore[arg-type]
        technique.attach(module)
        technique.perturb(module, batch)
        r = technique._scores[0].r
        assert r is not None and not r.requires_grad
        seen = torch.ones(4, 1, 5, 5, dtype=torch.bool)
        if "causal" in case:
            seen = seen.tril()
        else:
            seen = seen & batch["attention_mask"][:, None, None, :] & batch["attention_mask"][:, None, :, None]
        seen = seen.expand_as(r)
        assert bool((r[~seen] == 0).all())
        lengths = r.flatten(1).norm(dim=1).tolist()
        if kind == "at":
            total = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            wanted = torch.where(total > 1e-9, 0.5 * g / total, 0.0)
            torch.testing.assert_close(r, wanted, rtol=1e-5, atol=1e-6)
            # the third text is one token, which attends to itself whatever its score is
            assert lengths == pytest.approx([0.5, 0.5, 0.0, 0.5])
        else:
            assert lengths == pytest.approx([0.5] * 4) and bool((r[seen] != 0).all())
        torch.testing.assert_close(module.loss(batch), other(r.double()), rtol=1e-9, atol=1e-9)
        assert kind == "random" or float(module.loss(batch).detach()) > float(before)
        technique.restore(module)
        assert torch.equal(module.loss(batch).detach(), before)
        technique.detach(module)
        assert not layer._forward_pre_hooks


def test_scores_that_come_out_of_a_layer() -> None:
    """A network that adds up words by attention, as recipes/attention_at; padding is hidden behind the scores."""
    torch.manual_seed(2)
    layer = nn.ModuleDict({"score": nn.Linear(8, 1), "scores": nn.Identity()})
    seen = []

    def call(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
        s = layer["scores"](layer["score"](x).squeeze(-1))
        seen.append(s.detach())
        return x * s.masked_fill(~mask, -math.inf).softmax(-1)[..., None]

    module, batch = Net(layer, call), tokens()
    before, plain = module.loss(batch).detach(), seen[-1]
    s = plain.clone().requires_grad_()
    weighed = batch["x"] * s.masked_fill(~batch["attention_mask"], -math.inf).softmax(-1)[..., None]
    (g,) = torch.autograd.grad(module.out(weighed, batch), s)
    for kind in ("at", "random"):
        technique = AttentionPerturbation(xi=0.5, layers=["attn.scores"], kind=kind)  # type: ignore[arg-type]
        technique.attach(module)
        technique.perturb(module, batch)
        after = module.loss(batch).detach()
        r = seen[-1] - plain
        assert bool((r[~batch["attention_mask"]] == 0).all())
        if kind == "at":
            torch.testing.assert_close(r, attention_at(g, batch["attention_mask"], 0.5), rtol=1e-6, atol=1e-9)
            assert float(after) > float(before)
        else:
            torch.testing.assert_close(r.norm(dim=1), torch.full((4,), 0.5).double(), rtol=1e-5, atol=0.0)
        technique.detach(module)


def test_each_layer_has_its_own_length_and_one_called_twice_has_one_perturbation() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.other = timm.layers.Attention(8, 2), timm.layers.Attention(8, 2)

        def forward(self, x: Tensor, r: Any = (None, None, None)) -> Tensor:
            for layer, added in zip((self.shared, self.other, self.shared), r, strict=True):
                x = x + layer(x, added)
            return x

    torch.manual_seed(2)
    twice = Twice()
    module, batch = Net(twice, lambda layer, x, mask: layer(x)), tokens()
    technique = AttentionPerturbation(xi=0.5, layers=["attn"])  # stands for both in it
    technique.attach(module)
    assert [s.name for s in technique._scores] == ["attn.shared", "attn.other"]
    technique.perturb(module, batch)
    shared, other = (s.r for s in technique._scores)
    assert shared is not None and other is not None
    zeros = [torch.zeros(4, 2, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    after = module.loss(batch)
    technique.restore(module)
    technique.kind = "random"
    technique.perturb(module, batch)
    one, two = (s.r for s in technique._scores)
    assert one is not None and two is not None and not torch.allclose(one, two, atol=1e-2)
    technique.detach(module)
    g = torch.autograd.grad(module.out(twice(batch["x"], zeros), batch), zeros)
    torch.testing.assert_close(shared, attention_at(g[0] + g[2], None, 0.5))
    torch.testing.assert_close(other, attention_at(g[1], None, 0.5))
    torch.testing.assert_close(after, module.out(twice(batch["x"], (shared, other, shared)), batch))


# ---------------------------------------------------------------------- whole networks

VIT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_args": {
        **{"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8},
        **{"drop_rate": 0.1, "attn_drop_rate": 0.1},
    },
}


def images() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"image": torch.rand(6, 3, 32, 32, generator=g), "label": torch.arange(6) % 3}


class Reader(LightningModule):
    """A small BERT that classifies."""

    def __init__(self, kind: str, name: str = "bert", **more: Any) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForSequenceClassification

        torch.manual_seed(0)
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        small |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32} if name == "distilbert" else {}
        config = AutoConfig.for_model(name, vocab_size=30, num_labels=3, pad_token_id=0, **small, **more)
        self.backbone = AutoModelForSequenceClassification.from_config(config, attn_implementation=kind)
        for parameter in self.backbone.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.4)

    def loss(self, batch: Any) -> Tensor:
        mask = batch["attention_mask"].long()
        return F.cross_entropy(self.backbone(batch["tokens"], attention_mask=mask).logits, batch["label"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def texts() -> dict[str, Tensor]:
    lengths = torch.tensor([7, 3, 5, 1])
    mask = torch.arange(7) < lengths[:, None]
    found = torch.randint(2, 30, (4, 7), generator=torch.Generator().manual_seed(1))
    return {"tokens": found * mask, "attention_mask": mask, "label": torch.tensor([0, 1, 2, 0])}


NETWORKS: dict[str, Callable[[], tuple[Any, dict[str, Tensor], str]]] = {
    "ViT": lambda: (cells.recipe("classifier", drop=False, **VIT), images(), "blocks.1.attn"),
    "BERT, eager": lambda: (Reader("eager"), texts(), "bert.encoder.layer.1.attention.self"),
    "BERT, sdpa": lambda: (Reader("sdpa"), texts(), "bert.encoder.layer.1.attention.self"),
    "DistilBERT": lambda: (Reader("sdpa", "distilbert"), texts(), "distilbert.transformer.layer.1.attention"),
    "ALBERT": lambda: (
        Reader("sdpa", "albert", embedding_size=16),
        texts(),
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention",
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_loss_rises_by_what_the_gradient_says(network: str) -> None:
    module, batch, last = NETWORKS[network]()
    module.double().eval()
    for name, value in batch.items():
        batch[name] = value.double() if value.is_floating_point() else value
    rises, lengths = {}, {}
    for kind in ("at", "random"):
        technique = AttentionPerturbation(xi=1e-3, kind=kind)  # type: ignore[arg-type]
        technique.attach(module)
        (scores,) = technique._scores
        assert scores.name == last
        before = module.loss(batch).detach()
        technique.perturb(module, batch)
        r = scores.r
        assert r is not None
        rises[kind] = float(module.loss(batch).detach() - before)
        lengths[kind] = r.flatten(1).norm(dim=1)
        if "attention_mask" in batch:
            padding = ~batch["attention_mask"]
            assert bool((r.transpose(1, 3)[padding] == 0).all()), "a padded key moved"
            assert bool((r.transpose(1, 2)[padding] == 0).all()), "a padded query moved"
        with torch.enable_grad():  # what a step of this length gains, at most
            scores.r = (zero := torch.zeros_like(r).requires_grad_())
            (g,) = torch.autograd.grad(module.loss(batch), zero)
        most = 1e-3 * float(g.flatten(1).norm(dim=1).sum())
        technique.detach(module)
        assert abs(rises[kind]) <= most * 1.01 and most > 0
        if kind == "at":
            assert rises[kind] == pytest.approx(most, rel=0.01)
    assert rises["at"] > 3 * abs(rises["random"])
    few = (lengths["at"] == 0).nonzero().flatten().tolist()  # a text of one word, whose attention can't move
    assert few == ([3] if "attention_mask" in batch else [])
    for kind in ("at", "random"):
        rest = [v for i, v in enumerate(lengths[kind].tolist()) if kind == "random" or i not in few]
        assert rest == pytest.approx([1e-3] * len(rest), rel=1e-6)


def test_it_is_crafted_on_the_dropout_of_the_step() -> None:
    module, batch, technique = cells.recipe("classifier", **VIT).train(), images(), AttentionPerturbation()
    technique.attach(module)
    torch.manual_seed(3)
    technique.perturb(module, batch)
    (scores,) = technique._scores
    r, scores.r = scores.r, torch.zeros(6, 2, 17, 17, requires_grad=True)
    (g,) = torch.autograd.grad(module.loss(batch), scores.r)  # type: ignore[operator]  # nn.Module's are untyped
    torch.testing.assert_close(r, attention_at(g))
    technique.detach(module)


def test_random_directions_do_not_depend_on_padding() -> None:
    module, batch = Reader("sdpa").eval(), texts()
    shorter = {"tokens": batch["tokens"][1:2, :3], "attention_mask": batch["attention_mask"][1:2, :3]}
    longer = {"tokens": batch["tokens"][1:2], "attention_mask": batch["attention_mask"][1:2]}
    found: list[Any] = []
    for part in (longer, shorter):
        technique = AttentionPerturbation(kind="random")
        technique.attach(module)
        technique.perturb(module, {**part, "label": torch.tensor([1])})
        found.append(technique._scores[0].r)
        technique.detach(module)
    torch.testing.assert_close(found[0][:, :, :3, :3], found[1])


def test_layers_are_found() -> None:
    open_clip = pytest.importorskip("open_clip")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert attention_layers(vit) == ["blocks.0.attn", "blocks.1.attn"]
    assert attention_layers(timm.create_model("resnet10t")) == []
    bert = Reader("sdpa").backbone  # whose outer modules know the heads, too
    assert attention_layers(bert) == [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
    assert attention_layers(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1))) == []
    assert attention_layers(UViT(8, 3, 4, 8, 2, 2))[-1] == "out_blocks.0.attn"
    vision = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
    text = {"context_length": 8, "vocab_size": 7, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(16, vision, text)
    assert attention_layers(clip.visual) == ["transformer.resblocks.0.attn", "transformer.resblocks.1.attn"]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2, enable_nested_tensor=False)
    assert attention_layers(encoder) == ["layers.0.self_attn", "layers.1.self_attn"]


def test_attention_pooling_brings_its_own_queries() -> None:
    pool = timm.layers.AttentionPoolLatent(8, num_heads=2, latent_len=3, pool_type="")
    module = Net(pool, lambda layer, x, mask: layer(x).mean(1, keepdim=True))
    batch = {**tokens(), "attention_mask": torch.ones(4, 1)}
    technique, before = AttentionPerturbation(xi=0.01), float(module.loss(batch).detach())
    technique.attach(module)
    technique.perturb(module, batch)
    assert technique._scores[0].r is not None and technique._scores[0].r.shape == (4, 2, 3, 5)
    assert float(module.loss(batch).detach()) > before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_a_perturbation_the_call_is_as_it_was(checkpointing: bool) -> None:
    """In a step the layer gets a constant mask, so torch may keep its fused kernel; else it gets none."""
    module: Any = cells.recipe("classifier", **VIT)
    module.backbone.set_grad_checkpointing(checkpointing)
    masks: list[Any] = []
    layer = module.backbone.blocks[1].attn
    original = layer.forward

    def noting(x: Tensor, attn_mask: Any = None, **named: Any) -> Tensor:
        masks.append(None if attn_mask is None else attn_mask.requires_grad)
        return original(x, attn_mask, **named)

    layer.forward = noting  # type: ignore[method-assign]
    technique = AttentionPerturbation(every_n_steps=2)
    cells.trainer(technique).fit(module, datamodule=cells.data("classifier"))
    times = 1 + checkpointing
    steps = [*[True] * times, *[False] * times, *[None] * times, *[True] * times, *[False] * times]
    assert masks[: len(steps)] == steps and set(masks[len(steps) :]) == {None}  # the rest: validation
    masks.clear()
    cells.trainer(AttentionPerturbation(xi=0.0)).fit(module, datamodule=cells.data("classifier"))
    assert set(masks) == {None}


# ---------------------------------------------------------------------- what it says


def said(module: Any, batch: Any, **settings: Any) -> str:
    technique = AttentionPerturbation(**settings)
    with pytest.raises(ValueError) as error:
        technique.attach(module)
        technique.perturb(module, batch)
    technique.restore(module)
    technique.detach(module)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_it_says_what_is_wrong() -> None:
    wrong: dict[str, Any]
    for wrong in ({"xi": -1.0}, {"xi": math.nan}, {"kind": "vat"}, {"layers": []}, {"layers": "attn"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AttentionPerturbation(**wrong)
    resnet = cells.recipe("classifier")
    assert "ResNet has no attention layer that takes a mask" in said(resnet, images())
    assert "no layer 'nowhere'" in said(resnet, images(), layers=["nowhere"])
    swin = cells.recipe(
        "classifier", backbone="swin_tiny_patch4_window7_224", backbone_args={"depths": (1, 1), "embed_dim": 24}
    )
    assert "SwinTransformer has no attention" in said(swin, images())
    found = said(swin, images(), layers=["layers.0.blocks.0.attn"])
    assert "'layers.0.blocks.0.attn' (WindowAttention) takes no attn_mask or attention_mask" in found
    torch.manual_seed(0)
    never = Net(timm.layers.Attention(8, 2), lambda layer, x, mask: x)
    assert "'attn' is never called in the loss" in said(never, tokens())
    cut = Net(timm.layers.Attention(8, 2), lambda layer, x, mask: layer(x).detach())
    assert "its scores have no influence" in said(cut, tokens())
    assert "its scores have no influence" in said(cut, tokens(), kind="random")
    halves = Net(timm.layers.Attention(8, 2), lambda layer, x, mask: layer(torch.cat([x, x]))[:4])
    assert "sees 8 rows of a batch of 4" in said(halves, tokens())
    both = Net(timm.layers.Attention(8, 2), lambda layer, x, mask: layer(x) + layer(x[:, :2]).mean(1, keepdim=True))
    assert "(4, 2, 5, 5) and (4, 2, 2, 2) in one loss" in said(both, tokens())
    image = Net(timm.layers.Attention2d(8, num_heads=2), lambda layer, x, mask: layer(x.mT[..., None])[..., 0].mT)
    assert "is given (4, 8, 5, 1), and no tokens (B, N, D)" in said(image, tokens())
    number = Net(timm.layers.Attention(8, 2), lambda layer, x, mask: layer(x, mask[:, None, None].long()))
    assert "takes a mask of torch.int64, which isn't added" in said(number, tokens())


def test_it_says_what_is_wrong_of_transformers() -> None:
    from transformers import SwinConfig, SwinForImageClassification

    module = Reader("sdpa")
    module.backbone.config._attn_implementation = "flash_attention_2"
    assert "runs flash_attention_2, which takes no scores: load the network with attn" in said(module, texts())
    module = Reader("eager", "deberta-v2")
    assert "takes a mask of torch.int64, which isn't added" in said(module, texts())
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4, "num_labels": 3}
    config = SwinConfig(**sizes, depths=[1], num_heads=[2])

    class Windows(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = SwinForImageClassification(config)

        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.backbone(batch["image"]).logits, batch["label"])

    found = said(Windows(), images())
    assert "sees 24 rows of a batch of 6: examples cut into windows" in found and ".0.attention'" in found


# ---------------------------------------------------------------------- the laws on a ViT (that on ResNets it has none)


@pytest.fixture(autouse=True)
def vit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A recipe 'vit': the classifier with a small ViT."""
    recipe = cells.recipe

    def found(name: str, **more: Any) -> LightningModule:
        return recipe("classifier", **VIT, **more) if name == "vit" else recipe(name, **more)

    monkeypatch.setattr(cells, "recipe", found)
    yield


def make(**more: Any) -> laws.Make:
    return functools.partial(AttentionPerturbation, **more)


@pytest.mark.parametrize("kind", ["at", "random"])
def test_laws_1_to_5_hold_on_a_vit(kind: Any, tmp_path: Path) -> None:
    all_layers = make(kind=kind, layers=["blocks"])
    laws.no_trace("vit", all_layers)
    laws.no_trace_of_a_failed_step("vit", all_layers)
    laws.zero_is_nothing("vit", make(kind=kind, **AttentionPerturbation.zero))
    laws.off_at_evaluation("vit", all_layers)
    laws.resume_is_exact("vit", make(kind=kind, probability=0.7), tmp_path, 5)


@pytest.mark.parametrize(
    "other",
    [
        functools.partial(SAM, name="other"),
        functools.partial(FreeLB, name="other"),
        functools.partial(LatentAdversarial, layer="blocks.0", steps=2, name="other"),
        functools.partial(LatentAdversarial, layer="blocks.1", steps=2, name="other"),
        make(kind="random", name="other"),
    ],
    ids=["SAM", "FreeLB", "LatentAdversarial before", "LatentAdversarial behind", "itself"],
)
def test_law_6_holds_on_a_vit(other: laws.Make) -> None:
    laws.composes("vit", make(), other)
    laws.composes("vit", other, make())


@pytest.mark.parametrize("kind", ["at", "random"])
def test_law_7_holds_on_a_vit(kind: Any) -> None:
    laws.accumulates("vit", make(kind=kind))
    laws.same_in("vit", make(kind=kind), 0.1, precision="bf16-mixed")
    laws.same_in("vit", make(kind=kind), 1e-3, channels_last)
    laws.same_in("vit", make(kind=kind), 1e-3, compiled, limit_val_batches=0)


def test_bert_fits_in_bf16_and_compiled() -> None:
    rows = [{k: v[i] for k, v in texts().items()} for i in range(4)] * 2
    for kind in ("eager", "sdpa"):
        losses = []
        for precision, change in (("32-true", None), ("bf16-mixed", None), ("bf16-true", None), ("32-true", compiled)):
            module, seen = Reader(kind), laws._Losses()
            if change is not None:
                change(module.backbone)
            fitted = trainer(AttentionPerturbation(layers=["bert.encoder.layer.0"]), seen, precision=precision)
            fitted.fit(module, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]  # a list is a dataset
            losses.append(seen.losses)
        plain, mixed, half, graph = losses
        assert len(plain) == 2 and graph == pytest.approx(plain, rel=1e-3)
        assert mixed == pytest.approx(plain, rel=0.1) and half == pytest.approx(plain, rel=0.1)
