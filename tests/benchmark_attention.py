"""What training on adversarial attention costs: a part of ``tests.benchmarks``, which says how it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.text import Mails
from recipes.attention_at import AttentionClassifier

WORDS = 10_000
#: Rows: what is measured, and settings.
ROWS: dict[str, dict[str, Any]] = {
    "Attention RP": {"technique": "attention_rp"},
    "Attention AT": {"technique": "attention_at"},
    "Attention iAT": {"technique": "attention_iat"},
    "Attention VAT": {"technique": "attention_vat"},
    "Word AT": {"technique": "word_at"},
    "Word iAT": {"technique": "word_iat"},
}


def model(technique: str, hidden: int) -> AttentionClassifier:
    torch.manual_seed(0)
    words = [str(i) for i in range(WORDS)]
    return AttentionClassifier(technique, vocabulary=words, hidden=hidden)  # type: ignore[arg-type]


def a_batch(size: int, tokens: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(size, tokens, dtype=torch.bool)
    label = torch.arange(size) % 2
    return {"tokens": torch.randint(2, WORDS, (size, tokens), generator=g), "attention_mask": mask, "label": label}


def our_step(module: AttentionClassifier, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    optimizer.zero_grad()
    module.loss(batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def released_step(module: AttentionClassifier, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """Attention AT in the order of the released code: three whole forward passes, two backward."""
    network, mask = module.backbone, batch["attention_mask"]

    def loss(r: Tensor | float) -> Tensor:
        h, q, scores = network.states(network.embed(batch["tokens"]), batch)
        return module.criterion(network.read(h, scores + r, mask, q), batch["label"])

    optimizer.zero_grad()
    clean = loss(0.0)
    zero = torch.zeros(mask.shape, requires_grad=True)
    loss(zero).backward()  # type: ignore[no-untyped-call]  # which leaves the clean gradient in the parameters
    assert zero.grad is not None
    r = module.xi * F.normalize(zero.grad, dim=1)
    (clean + module.lam * loss(r)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def ratios(technique: str, step: Callable[..., None], hidden: int, size: int, tokens: int, pairs: int) -> list[float]:
    """Times of a step over those of the vanilla step that follows at once."""
    batch, found = a_batch(size, tokens), []
    runs = [(model(technique, hidden), step), (model("vanilla", hidden), our_step)]
    made = [(m, torch.optim.Adam(m.parameters(), lr=1e-3, amsgrad=True), s) for m, s in runs]
    for i in range(pairs + 1):
        times = []
        for module, optimizer, take in made:
            begun = time.perf_counter()
            take(module, optimizer, batch)
            times.append(time.perf_counter() - begun)
        if i:
            found.append(times[0] / times[1])
    return found


def waste(batch_size: int) -> float:
    """The part of an epoch's tokens that is padding, of the embedded mails."""
    data = Mails(batch_size=batch_size)
    masks = [batch["attention_mask"] for batch in data.train_dataloader()]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def attention_table(size: int, tokens: int, hidden: int, pairs: int, shown: Callable[[list[float]], str]) -> None:
    """Prints a row for each technique, and what length bucketing leaves of padding."""
    print("\n| text classifier's step over vanilla's | time |\n| -- | -- |")
    for label, options in ROWS.items():
        found = ratios(options["technique"], our_step, hidden, size, tokens, pairs)
        print(f"| {label} | {shown(found)} |", flush=True)
    found = ratios("attention_at", released_step, hidden, size, tokens, pairs)
    print(f"| Attention AT, released arithmetic | {shown(found)} |", flush=True)
    print(f"\npadding: {waste(size):.3f} of the tokens of an epoch of mails, batch {size}")
