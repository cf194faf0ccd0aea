"""Adversarial training on attention: of any transformer, by its scores before the softmax.

Attention AT and Attention iAT, Kitada and Iyatomi, arXiv 2009.12064, are about the one attention layer of a recurrent
network (``recipes/attention_at`` is that); :class:`AttentionPerturbation` does the first to the layers of a ViT, of a
Hugging Face encoder, of CLIP's towers, of a U-ViT. The perturbation reaches the scores through the additive mask that
those layers take anyway, so their own code runs, fused kernels included.

What the released code calls iAT is minus AT: its directions are never read, and its step goes down the loss. With the
paper's own directions, each normalised by itself, iAT is AT; see :func:`attention_iat`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.layers import backbone_of, find_layers, layers_there
from callbacks.perturbation import Batch, Perturbation, batch_size, crafting

# ---------------------------------------------------------------------- functions


def _scaled(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of each example over its largest entry, at least float32; 0 on padding."""
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if mask is not None:
        g = torch.where(mask.bool(), g, 0.0)
    peak = g.abs().flatten(1).amax(1).view(-1, *[1] * (g.dim() - 1))
    return g / torch.where(peak > 0, peak, 1.0)


def attention_at(gradient: Tensor, mask: Tensor | None = None, xi: float = 1.0) -> Tensor:
    """Attention AT: a step of length xi up the loss, ``r = xi g / |g|``.

    Args:
        gradient: (B, ...) of the loss by the scores, finite and of any scale. As no example's direction looks at
            another, that of the mean loss will do.
        mask: True for real tokens, of a shape that goes with the gradient's; None: all are.
        xi: l2 length of an example's perturbation.

    Returns:
        (B, ...), at least float32: 0 on padding, and 0 for an example whose gradient is.
    """
    g = _scaled(gradient, mask)
    length = torch.linalg.vector_norm(g.flatten(1), dim=1).view(-1, *[1] * (g.dim() - 1))
    return xi * (g / torch.where(length > 0, length, 1.0))


def attention_iat(
    gradient: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    xi: float = 1.0,
    norm: Literal["row", "matrix"] = "matrix",
) -> Tensor:
    """Attention iAT: the same along the differences ``d_t = (s_t - s_k)_k`` between an example's own scores.

    ``r_t = alpha_t . d~_t`` with one normalised step of alpha up the loss, so ``alpha_tk ~ dL/dalpha_tk = g_t d~_tk``
    and ``r_t ~ g_t |d~_t|^2``. With each d~_t of unit length (``row``) this is Attention AT to the letter. With one
    norm for the whole T x T matrix, words whose score differs from the others' move more.

    Args:
        gradient: (B, T) of the loss by the scores, finite and of any scale.
        scores: (B, T), finite.
        mask: (B, T), True for real tokens; None: all are.
        xi: l2 length of an example's perturbation.
        norm: ``row`` or ``matrix``.

    Returns:
        (B, T), at least float32: 0 on padding. An example whose scores are all alike has no direction: 0 with either
        norm.

    Raises:
        ValueError: for another norm.
    """
    if norm not in ("row", "matrix"):
        raise ValueError(f"norm must be row or matrix, not '{norm}'")
    s = scores.to(torch.promote_types(scores.dtype, torch.float32))
    real = torch.ones_like(s, dtype=torch.bool) if mask is None else mask.bool().expand_as(s)
    low = torch.where(real, s, torch.inf).amin(1, keepdim=True)
    s = torch.where(real, s - low, 0.0)  # first: the mean of large scores that differ little is rounded
    spread = s.amax(1, keepdim=True)
    s = s / torch.where(spread > 0, spread, 1.0)
    n = real.sum(1, keepdim=True)
    apart = torch.where(real, s - s.sum(1, keepdim=True) / n.clamp_min(1), 0.0).square()
    # sum_k (s_t - s_k)^2, without the T x T matrix
    weight = n * apart + apart.sum(1, keepdim=True) if norm == "matrix" else torch.ones_like(s)
    return attention_at(_scaled(gradient, real) * weight * (spread > 0), real, xi)


def random_direction(uniform: Tensor, mask: Tensor | None = None, xi: float = 1.0) -> Tensor:
    """The control: a direction drawn evenly from the sphere of radius xi.

    An example's numbers are dealt out to its real tokens in order, so its direction is the same however much padding
    there is beside them.

    Args:
        uniform: (B, ...) numbers in [0, 1).
        mask: True for real tokens, of a shape that goes with the numbers'; None: all are.
        xi: l2 length of an example's perturbation.

    Returns:
        (B, ...), at least float32, 0 on padding.
    """
    u = uniform.to(torch.promote_types(uniform.dtype, torch.float32))
    if mask is not None:
        place = mask.bool().expand_as(u).flatten(1).cumsum(1) - 1
        u = u.flatten(1).gather(1, place.clamp_min(0)).view_as(u)
    cell = 2.0**-24  # torch's float32 numbers are its multiples; the middle of a cell is neither 0 nor an end
    x = (2 * u - 1 + cell).clamp(cell - 1, 1 - cell)
    return attention_at(torch.erfinv(torch.where(x == 0, cell, x)), mask, xi)


# ---------------------------------------------------------------------- attention layers

#: Names of what is added to the scores, and of the number of heads, in torch, timm, open_clip and transformers.
_MASKS = ("attn_mask", "attention_mask")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
#: A mask this low hides a token for good; some networks write -10000 for minus infinity.
_HIDDEN = -5e3


def _heads(layer: nn.Module) -> int | None:
    """How many heads a layer says that it has; None: it is no attention layer."""
    found = (getattr(place, name, None) for place in (layer, getattr(layer, "config", None)) for name in _HEADS)
    return next((n for n in found if isinstance(n, int)), None)


def _mask_argument(layer: nn.Module) -> str | None:
    names = inspect.signature(layer.forward).parameters
    return next((name for name in _MASKS if name in names), None)


def attention_layers(network: nn.Module) -> list[str]:
    """Names of a network's attention layers whose scores can be perturbed, in its order.

    They are the innermost modules whose ``forward`` takes an ``attn_mask`` or ``attention_mask`` and that know the
    number of their heads.
    """
    taking = [n for n, m in network.named_modules() if _mask_argument(m) and _heads(m)]
    return [n for n in taking if n and not any(other.startswith(f"{n}.") for other in taking)]


class _Scores:
    """A perturbation r added to an attention layer's scores, while there is one.

    Args:
        name: for messages.
        layer: a layer of :func:`attention_layers`, or any that gives the scores (B, ...) themselves.

    Raises:
        ValueError: for attention whose scores are nowhere.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.layer = name, layer
        #: (B, heads, queries, keys), or of the shape of the scores that come out; None: nothing is added.
        self.r: Tensor | None = None
        #: True where a pass may attend, of a shape that goes with r's; None: everywhere.
        self.real: Tensor | None = None
        #: Examples of the batch, in the pass that makes an r of zeros; 0: in no such pass.
        self.noting = 0
        kind = getattr(getattr(layer, "config", None), "_attn_implementation", None)
        if kind not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attention layer '{name}' runs {kind}, which takes no scores: load the network with "
                "attn_implementation='sdpa'"
            )
        self._torch = isinstance(layer, nn.MultiheadAttention)
        self._heads = _heads(layer) or 1
        #: transformers has torch hide what comes later where there is no mask
        self._causal = kind == "sdpa" and getattr(layer, "is_causal", True)
        self._argument = _mask_argument(layer) or ""
        self._names = list(inspect.signature(layer.forward).parameters)
        if not self._argument:
            if any(_heads(m) for m in layer.modules()):
                raise ValueError(
                    f"attention layer '{name}' ({type(layer).__name__}) takes no {' or '.join(_MASKS)}, so its scores "
                    "can't be perturbed"
                )
            self._handle = layer.register_forward_hook(self._after)
        else:
            self._handle = layer.register_forward_pre_hook(self._before, with_kwargs=True)

    def remove(self) -> None:
        self._handle.remove()

    def clear(self) -> None:
        self.r, self.real, self.noting = None, None, 0

    def _note(self, shape: tuple[int, ...], like: Tensor, real: Tensor | None) -> None:
        if shape[0] != self.noting:
            raise ValueError(
                f"attention layer '{self.name}' sees {shape[0]} rows of a batch of {self.noting}: examples cut into "
                "windows, or joined, have no perturbation of their own"
            )
        if self.r is None:
            exact = torch.promote_types(like.dtype, torch.float32)
            self.r = torch.zeros(shape, dtype=exact, device=like.device, requires_grad=torch.is_grad_enabled())
            self.real = real
        elif self.r.shape != shape:
            raise ValueError(
                f"attention layer '{self.name}' is called with scores of the shapes {tuple(self.r.shape)} and {shape} "
                "in one loss, so they can't share a perturbation"
            )

    def _after(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.noting:
            if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
                raise ValueError(f"layer '{self.name}' ({type(layer).__name__}) gives no scores (B, ...)")
            self._note(tuple(output.shape), output, None)
        return None if self.r is None else output + self.r.to(output.dtype)

    def _before(self, layer: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if self.r is None and not self.noting:
            return None
        # all by name, so that it doesn't matter which were given by place
        given = {**dict(zip(self._names, args, strict=False)), **named}
        x, mask = given[self._names[0]], given.get(self._argument)
        if x.dim() != 3:
            raise ValueError(
                f"attention layer '{self.name}' ({type(layer).__name__}) is given {tuple(x.shape)}, and no tokens "
                "(B, N, D) to perturb attention between"
            )
        key = given["key"] if self._torch else x
        rows, n, keys = (x.shape[0], x.shape[1], key.shape[1])
        if not getattr(layer, "batch_first", True):
            rows, n, keys = (x.shape[1], x.shape[0], key.shape[0])
        n = getattr(layer, "latent_len", n)  # timm's attention pooling, which brings its own queries
        causal = given.get("is_causal")
        if mask is None and (self._causal if causal is None else causal):
            mask = torch.ones(n, keys, dtype=torch.bool, device=x.device).tril()
        if causal:
            given["is_causal"] = False  # the mask says it
        if mask is not None and not self._torch and mask.shape[-1] > 1:
            keys = mask.shape[-1]  # of tokens from elsewhere, where it is cross-attention
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"attention layer '{self.name}' ({type(layer).__name__}) takes a mask of {mask.dtype}, which isn't "
                "added to its scores"
            )
        padding = given.get("key_padding_mask") if self._torch else None
        if padding is not None:
            padding = given["key_padding_mask"] = self._additive(padding, x)
        if mask is not None:
            mask = self._additive(mask, x)
        if self.noting:
            shape = (rows, self._heads, n, keys)
            self._note(shape, x, None if mask is None and padding is None else self._real(shape, mask, padding))
        r = self.r
        assert r is not None
        if self._torch:
            r = r.flatten(0, 1)
        given[self._argument] = r.to(x.dtype) if mask is None else mask + r.to(mask.dtype)
        return (), given

    def _additive(self, mask: Tensor, x: Tensor) -> Tensor:
        """A mask of yes and no (torch.nn's says what is hidden, all others' what is seen) as 0 and minus infinity."""
        if mask.dtype != torch.bool:
            return mask
        hidden = mask if self._torch else ~mask
        return torch.zeros(mask.shape, dtype=x.dtype, device=mask.device).masked_fill(hidden, -math.inf)

    def _real(self, shape: tuple[int, ...], mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """Where attention may go, (B, heads, N, N): a key that no query sees is padding, and so is its own query."""
        real = torch.ones(shape, dtype=torch.bool, device=(padding if mask is None else mask).device)  # type: ignore[union-attr]
        if mask is not None:
            real = real & ((mask.reshape(shape) if self._torch and mask.dim() == 3 else mask) > _HIDDEN)
        if padding is not None:
            real = real & (padding > _HIDDEN)[:, None, None, :]
        return real & real.any(-2)[..., None] if shape[-1] == shape[-2] else real


# ---------------------------------------------------------------------- the technique


class AttentionPerturbation(Perturbation):
    """One training step sees the attention scores of some layers plus a perturbation up the loss (Attention AT).

    ``r = xi g / |g|`` of each example and layer, g the gradient of the loss by the layer's scores, of all heads,
    queries and keys together. Costs a forward pass more, and the backward pass from the loss to the first of the
    layers; and memory for the scores, (B, heads, N, N) in float32, which fused kernels never write down. A layer that
    runs more than once in a loss has the same r each time.

    Args:
        xi: l2 length of r.
        layers: names in the backbone: attention layers, or modules with attention layers in them, which stand for
            those; or a module that gives the scores themselves, (B, ...), before the softmax. If omitted, the last
            attention layer.
        kind: ``at``, or ``random``: the control, in a random direction of the same length.
        mask: entry of the batch that is 0 for padding, for layers that give scores of its shape (B, T). Attention
            layers have a mask of their own.
        schedule: see :class:`callbacks.perturbation.Perturbation`.

    Raises:
        ValueError: for a setting out of range, a layer that isn't there, a network without attention, or attention
            that can't be perturbed: behind a kernel that takes no mask, or in windows.
    """

    site: ClassVar[str] = "attention"
    zero: ClassVar = {"xi": 0.0}
    per_example: ClassVar = {}

    def __init__(
        self,
        xi: float = 1.0,
        layers: Sequence[str] | None = None,
        kind: Literal["at", "random"] = "at",
        mask: str = "attention_mask",
        **schedule: Any,
    ) -> None:
        super().__init__(**schedule)
        if not 0 <= xi < math.inf:
            raise ValueError(f"xi must not be negative, but is {xi}")
        if kind not in ("at", "random"):
            raise ValueError(f"kind must be at or random, not '{kind}'")
        if layers is not None and (isinstance(layers, str) or not layers):
            raise ValueError(f"layers must be a list of names, not {layers!r}")
        self.xi, self.layers, self.kind, self.mask = xi, layers, kind, mask
        self._scores: list[_Scores] = []
        self._tried = False

    def attach(self, module: LightningModule) -> None:
        backbone = backbone_of(module)
        there = attention_layers(backbone)
        if self.layers is None:
            if not there:
                raise ValueError(
                    f"{type(backbone).__name__} has no attention layer that takes a mask ({' or '.join(_MASKS)}); name "
                    f"a layer that gives scores. {layers_there(backbone)}"
                )
            found = there[-1:]
        else:
            find_layers(module, self.layers)
            inside = {name: [n for n in there if f"{n}.".startswith(f"{name}.")] or [name] for name in self.layers}
            found = list(dict.fromkeys(n for names in inside.values() for n in names))
        self._tried = False
        self.detach(module)
        for name, layer in find_layers(module, found).items():
            self._scores.append(_Scores(name, layer))

    def detach(self, module: LightningModule) -> None:
        for scores in self._scores:
            scores.remove()
        self._scores = []

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        if self.xi == 0:
            return
        ascends = self.kind == "at"
        gradients = self._pass(module, batch, ascends or not self._tried)
        self._tried = True
        for scores, gradient in zip(self._scores, gradients, strict=True):
            assert scores.r is not None
            real = scores.real if scores.real is not None else self._padding(scores.r, batch)
            if ascends:
                scores.r = attention_at(gradient, real, self.xi)  # of the mean loss; an example's own points as well
            else:
                scores.r = random_direction(self.rows(scores.name, scores.r), real, self.xi)

    def restore(self, module: LightningModule) -> None:
        for scores in self._scores:
            scores.clear()

    def _padding(self, r: Tensor, batch: Batch) -> Tensor | None:
        mask = batch.get(self.mask)
        return mask if isinstance(mask, Tensor) and mask.shape == r.shape else None

    def _pass(self, module: LightningModule, batch: Batch, differentiate: bool) -> Sequence[Tensor]:
        """One pass at r = 0, which shows the scores' shapes; the gradients by them, where asked for."""
        loss: Callable[[Batch], Tensor] = module.loss  # type: ignore[assignment]  # nn.Module's attributes are untyped
        for scores in self._scores:
            scores.noting = batch_size(batch)
        with crafting(module, "train"), torch.compiler.set_stance("force_eager"):
            with torch.set_grad_enabled(differentiate):
                found = loss(batch)
            for scores in self._scores:
                scores.noting = 0
                if scores.r is None:
                    raise ValueError(f"attention layer '{scores.name}' is never called in the loss")
            zeros = [scores.r for scores in self._scores if scores.r is not None]
            if not differentiate:
                return zeros
            gradients = torch.autograd.grad(found, zeros, allow_unused=True) if found.requires_grad else []
            for i, scores in enumerate(self._scores):
                if not gradients or gradients[i] is None:
                    raise ValueError(f"attention layer '{scores.name}': its scores have no influence on the loss")
            return gradients
