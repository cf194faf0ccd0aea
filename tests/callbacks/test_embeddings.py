"""FreeLB and SMART against their algorithms written out, on tokens with padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.embeddings import FreeLB, freelb_start, freelb_step, smart_loss, smart_step
from callbacks.perturbation import accept_other_techniques
from tests.callbacks.small import trainer
from tests.laws import cells


class Words(LightningModule):
    """Embedding, dropout, mean over the tokens that aren't padding, two layers; on ids (B, 5)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        accept_other_techniques(self)
        torch.manual_seed(3)
        self.backbone = nn.ModuleDict(
            {
                "embed": nn.Embedding(11, 4),
                "drop": nn.Dropout(dropout),
                "inner": nn.Linear(4, 6),
                "outer": nn.Linear(6, 3),
            }
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.backbone["drop"](self.backbone["embed"](ids))
        h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.backbone["outer"](self.backbone["inner"](h).tanh())

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["ids"], batch["attention_mask"]), batch["label"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def batches(number: int = 2, size: int = 4) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    rows = []
    for i in range(number * size):
        mask = (torch.arange(5) < 2 + i % 4).float()
        ids = torch.randint(0, 11, (5,), generator=g)
        rows.append({"ids": ids, "attention_mask": mask, "label": torch.tensor(i % 3)})
    return DataLoader(rows, batch_size=size)  # type: ignore[arg-type]  # a list is a dataset


class Kept(FreeLB):
    """Notes where each step began and what the step's own pass saw."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.starts: list[Tensor] = []
        self.last: list[Tensor] = []

    def perturb(self, module: Any, batch: Any) -> None:
        self.starts.append(self.rows("start", torch.empty(len(batch["ids"]), 5, 4)))
        super().perturb(module, batch)
        assert self._added is not None and self._added.delta is not None
        self.last.append(self._added.delta.clone())


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("k", "eps"), [(1, None), (2, None), (3, 0.2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_freelb_is_its_algorithm(norm: Any, k: int, eps: float | None, accumulate: int) -> None:
    """arXiv 1909.11764, algorithm 1, example by example: the weights' gradient is the mean over the K steps."""
    technique = Kept(steps=k, alpha=0.3, mag=0.5, eps=eps, norm=norm)
    ours, twin = Words(), Words()
    fitted = trainer(technique, accumulate_grad_batches=accumulate)
    fitted.fit(ours, batches())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    optimizer.zero_grad()
    for i, (batch, u) in enumerate(zip(batches(), technique.starts, strict=True)):
        mask, ids = batch["attention_mask"], batch["ids"]
        delta = torch.zeros(len(ids), 5, 4)
        for b in range(len(ids)):
            n = int(mask[b].sum())
            size = 0.5 / math.sqrt(n * 4) if norm == "l2" else 0.5
            delta[b, :n] = (2 * u[b, :n] - 1) * size
        for step in range(k):
            delta.requires_grad_()
            h = twin.backbone["embed"](ids) + delta
            h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            logits = twin.backbone["outer"](twin.backbone["inner"](h).tanh())
            loss = F.cross_entropy(logits, batch["label"]) / (k * accumulate)
            (gradient,) = torch.autograd.grad(loss, delta, retain_graph=True)
            loss.backward()
            delta = delta.detach()
            if step == k - 1:
                torch.testing.assert_close(technique.last[i], delta, rtol=1e-4, atol=1e-6)
                break
            for b in range(len(ids)):
                size = gradient[b].norm() if norm == "l2" else gradient[b].abs().max()
                delta[b] += 0.3 * gradient[b] / size
                if eps is not None and norm == "l2":
                    delta[b] *= min(1.0, eps / float(delta[b].norm()))
                if eps is not None and norm == "linf":
                    delta[b].clamp_(-eps, eps)
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_freelb_draws_one_dropout_for_its_steps() -> None:
    """With no step and no start all K passes are the same, so their mean is one pass: only if dropout is, too."""
    plain, ours = Words(0.5), Words(0.5)
    torch.manual_seed(8)
    trainer().fit(plain, batches())
    torch.manual_seed(8)
    trainer(FreeLB(steps=4, alpha=0.0, mag=0.0)).fit(ours, batches())
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_padding_does_not_move() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    u, g = torch.rand(2, 3, 4), torch.randn(2, 3, 4)
    start = freelb_start(u, 0.7, "l2", mask)
    for moved in (start, freelb_step(start, g, 0.3, 0.5, "l2", mask), smart_step(0 * g, g, 0.1, 0.1, mask)):
        assert (moved[0, 2] == 0).all() and (moved[1, 1:] == 0).all() and (moved[0, :2] != 0).all()
    with pytest.raises(ValueError, match=r"mask's shape is \(2, 4\), but the tokens' is \(2, 3\)"):
        freelb_start(u, 0.7, "l2", torch.ones(2, 4))


def test_freelb_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="ResNet has no token embedding; name a layer. Layers: conv1"):
        trainer(FreeLB()).fit(cells.recipe("classifier"), datamodule=cells.data("classifier"))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        FreeLB(steps=0)


def test_smart_is_its_formula() -> None:
    z, z2 = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    total = 0.0
    for a, b in zip(z.tolist(), z2.tolist(), strict=True):
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (a, b))
        total += sum((s - t) * (math.log(s) - math.log(t)) for s, t in zip(p, q, strict=True))
    loss = smart_loss(z, z2)
    assert float(loss.detach()) == pytest.approx(total / 5, rel=1e-5)
    # each divergence takes its target as given, so the gradient by one is that of the terms in which it is the other
    p, q = z.softmax(-1).detach(), z2.softmax(-1).detach()
    terms = -(q * z.log_softmax(-1)).sum() - (p * z2.log_softmax(-1)).sum()
    wanted = torch.autograd.grad(terms / 5, (z, z2))
    for a, b in zip(torch.autograd.grad(loss, (z, z2)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    noise, g = 0.01 * torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    moved = smart_step(noise, g, 0.04, 0.05)
    for i in range(2):
        for t in range(3):
            largest = float(g[i, t].abs().max())
            steps = [float(n) + 0.04 * float(v) / largest for n, v in zip(noise[i, t], g[i, t], strict=True)]
            assert moved[i, t].tolist() == pytest.approx([max(-0.05, min(0.05, s)) for s in steps], abs=1e-6)
