"""A recurrent network with one layer of attention, over a text alone or over a text in the light of a question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Lookup(nn.Module):
    """Rows (B, T, D) of a table (V, D) that another layer owns."""

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        return F.embedding(tokens, table, padding_idx=0)


class BiRNN(nn.Module):
    """An LSTM or GRU in both directions, (B, T, D) to (B, T, 2 hidden); padding is neither read nor written (zeros)."""

    def __init__(self, kind: Literal["lstm", "gru"], dim: int, hidden: int) -> None:
        super().__init__()
        cell = {"lstm": nn.LSTM, "gru": nn.GRU}[kind]
        self.hidden = hidden
        self.rnn = cell(dim, hidden, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1).cpu()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]

    def last(self, outputs: Tensor, mask: Tensor) -> Tensor:
        """The last state of each direction, (B, 2 hidden), of what came out."""
        end = (mask.sum(1) - 1).view(-1, 1, 1).expand(-1, 1, self.hidden)
        forward = outputs[..., : self.hidden].gather(1, end).squeeze(1)
        return torch.cat([forward, outputs[:, 0, self.hidden :]], -1)


class Weights(nn.Module):
    """Softmax over the real tokens, in float32 at least: scores (B, T) and mask (B, T) to weights, 0 on padding."""

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        exact = scores if scores.dtype == torch.float64 else scores.float()
        return exact.masked_fill(~mask, -torch.inf).softmax(-1)


class Attention(nn.Module):
    """Scores (B, T), before the softmax, of states (B, T, H), with a question's state (B, H) or without.

    * ``additive``: v . tanh(W h_t + b), with a question v . tanh(W h_t + b + U q).
    * ``dot``: v . h_t / sqrt(H), with a question q . h_t / sqrt(H).
    """

    def __init__(self, kind: Literal["additive", "dot"], dim: int, hidden: int, pairs: bool) -> None:
        super().__init__()
        self.kind = kind
        if kind == "additive":
            self.state = nn.Linear(dim, hidden)
            self.question = nn.Linear(dim, hidden, bias=False) if pairs else None
            self.v: nn.Linear | None = nn.Linear(hidden, 1, bias=False)
        else:
            self.v = None if pairs else nn.Linear(dim, 1, bias=False)
        self.scores = nn.Identity()  # where techniques and evaluators hang
        self.weights = Weights()

    def forward(self, h: Tensor, q: Tensor | None = None) -> Tensor:
        if self.kind == "additive":
            inside = self.state(h)
            if self.question is not None:
                assert q is not None
                inside = inside + self.question(q)[:, None]
            assert self.v is not None
            return self.scores(self.v(inside.tanh()).squeeze(-1))
        found = self.v(h).squeeze(-1) if self.v is not None else (h @ q[:, :, None]).squeeze(-1)  # type: ignore[index]
        return self.scores(found / h.shape[-1] ** 0.5)


class AttentionNetwork(nn.Module):
    """Words to logits.

    Args:
        words: size of the vocabulary, of which 0 is padding.
        num_classes: K; two classes have a single logit z, and count as (0, z).
        pairs: whether there is a question.
        rnn: ``lstm`` or ``gru``.
        attention: ``additive`` or ``dot``; see :class:`Attention`.
        embedding_dim: D, width of a word's vector.
        hidden: states of each direction; also the width of additive attention.
    """

    def __init__(
        self,
        words: int,
        num_classes: int,
        pairs: bool,
        rnn: Literal["lstm", "gru"],
        attention: Literal["additive", "dot"],
        embedding_dim: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        dim, outputs = 2 * hidden, 1 if num_classes == 2 else num_classes
        self.embed = self.table(words, embedding_dim)
        self.embed_query = Lookup() if pairs else None
        self.encoder = BiRNN(rnn, embedding_dim, hidden)
        self.query_encoder = BiRNN(rnn, embedding_dim, hidden) if pairs else None
        self.attention = Attention(attention, dim, hidden, pairs)
        self.join = nn.ModuleDict({"text": nn.Linear(dim, hidden), "query": nn.Linear(dim, hidden)}) if pairs else None
        self.head = nn.Linear(hidden if pairs else dim, outputs)

    @staticmethod
    def table(words: int, dim: int) -> nn.Embedding:
        """Vectors of words, drawn with deviation 0.1; that of padding is zero."""
        embed = nn.Embedding(words, dim, padding_idx=0)
        with torch.no_grad():
            embed.weight.mul_(0.1)
        return embed

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles what torch can trace: a recurrent layer is one kernel of its own, which it can't."""
        self.attention.compile(*args, **options)
        self.head.compile(*args, **options)

    def question(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The question's state (B, 2 hidden); None where there are no pairs."""
        if self.embed_query is None or self.query_encoder is None:
            return None
        mask = batch["query_mask"]
        return self.query_encoder.last(
            self.query_encoder(self.embed_query(batch["query"], self.embed.weight), mask), mask
        )

    def read(
        self, h: Tensor, scores: Tensor, mask: Tensor, q: Tensor | None = None, candidates: Tensor | None = None
    ) -> Tensor:
        """Logits (B, K), float32 at least, of states (B, T, 2 hidden) attended to with these scores (B, T).

        Out of mixed precision: it is a small part of the work, and what is crafted on it are small differences.
        """
        weights, kind = self.attention.weights(scores, mask), self.head.weight.dtype
        with torch.autocast(h.device.type, enabled=False):
            context = (weights[:, None] @ h.to(weights.dtype)).squeeze(1).to(kind)
            if self.join is not None:
                assert q is not None
                context = (self.join["text"](context) + self.join["query"](q.to(kind))).tanh()
            logits = self.head(context).to(weights.dtype)
        if logits.shape[-1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], -1)
        return logits if candidates is None else logits.masked_fill(~candidates, -torch.inf)

    def states(self, embedded: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """States (B, T, 2 hidden), the question's (B, 2 hidden) or None, and scores (B, T) of embedded words."""
        h, q = self.encoder(embedded, batch["attention_mask"]), self.question(batch)
        return h, q, self.attention(h, q)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, K) of a batch; see :mod:`datamodules.text`."""
        h, q, scores = self.states(self.embed(batch["tokens"]), batch)
        return self.read(h, scores, batch["attention_mask"], q, batch.get("candidates"))
