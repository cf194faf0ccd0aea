"""Adversarial training of token embeddings: FreeLB as a technique, SMART's direction and loss as functions.

FreeLB, Zhu et al., arXiv 1909.11764: K ascent steps of a perturbation of the embeddings, of which each one's gradient
of the weights counts, at the price of K passes. SMART, Jiang et al., arXiv 1911.03437: a smoothness term in the
direction to which the output is most sensitive.

What is sound here and not in the released codes:

* FreeLB's K gradients meet in one backward pass of the trainer (the K - 1 earlier ones are added where the last one
  is accumulated), so accumulation, clipping, DDP and loss scaling see one step. Dropout is alike in the K passes, as
  the paper asks and a plain port forgets.
* SMART's perturbation follows the gradient, normalised for each token, within a radius. In the released code the step
  is so short beside the noise that the noise decides, each token ends at length 1, and padding moves, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from callbacks.balls import Norm, check, length
from callbacks.layers import Added, Behind, backbone_of, find_layers, layers_there
from callbacks.perturbation import Batch, Perturbation, crafting
from callbacks.sharded import needs_whole_weights

# ---------------------------------------------------------------------- functions


def embedding_layer(module: LightningModule) -> str:
    """The name of the backbone's token embedding: a ViT's ``patch_embed``, else the first ``nn.Embedding``.

    Raises:
        ValueError: if there is none.
    """
    backbone = backbone_of(module)
    for name, layer in backbone.named_modules():
        if name == "patch_embed" or isinstance(layer, nn.Embedding):
            return name
    raise ValueError(f"{type(backbone).__name__} has no token embedding; name a layer. {layers_there(backbone)}")


def moving_tokens(like: Tensor, mask: Tensor | None) -> Tensor:
    """1 for what may move, 0 for padding, to be multiplied with ``like`` (B, T, ...)."""
    if mask is None:
        return torch.ones_like(like[..., :1])
    if mask.shape != like.shape[:2]:
        raise ValueError(f"the mask's shape is {tuple(mask.shape)}, but the tokens' is {tuple(like.shape[:2])}")
    return mask.to(like.dtype).view(*mask.shape, *[1] * (like.dim() - 2))


def freelb_start(uniform: Tensor, mag: float, norm: Norm = "l2", mask: Tensor | None = None) -> Tensor:
    """Where FreeLB begins: U(-1, 1) times mag, in l2 over the root of the number of entries that move.

    Args:
        uniform: (B, T, D) numbers in [0, 1).
        mag: magnitude.
        norm: ``l2`` (of an example's tokens together) or ``linf``.
        mask: (B, T), 0 for padding; None: all tokens move.
    """
    moving = moving_tokens(uniform, mask)
    delta = (2 * uniform - 1) * moving * mag
    if norm == "l2":
        entries = moving.expand_as(uniform).flatten(1).sum(1).clamp_min(1)
        delta = delta / entries.sqrt().view(-1, *[1] * (uniform.dim() - 1))
    return delta


def freelb_step(
    delta: Tensor, gradient: Tensor, alpha: float, eps: float | None, norm: Norm = "l2", mask: Tensor | None = None
) -> Tensor:
    """One ascent step (arXiv 1909.11764, algorithm 1): alpha g / |g| of each example, then back to length eps."""
    gradient = gradient * moving_tokens(gradient, mask)
    order = 2.0 if norm == "l2" else torch.inf
    delta = delta + alpha * gradient / length(gradient, order).clamp_min(1e-12)
    if eps is None:
        return delta
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / length(delta).clamp_min(1e-12)).clamp_max(1.0)


def smart_step(noise: Tensor, gradient: Tensor, alpha: float, eps: float, mask: Tensor | None = None) -> Tensor:
    """One ascent step of (B, T, D): of each token alpha g / |g|_inf, then clipped to eps (arXiv 1911.03437, alg. 1)."""
    gradient = gradient / gradient.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    return ((noise + alpha * gradient) * moving_tokens(noise, mask)).clamp(-eps, eps)


def symmetric_divergence(logits: Tensor, adv_logits: Tensor) -> Tensor:
    """KL(sg p || p') + KL(sg p' || p) of each example, (B,), of two rows of logits (B, K)."""
    log_p, log_q = logits.float().log_softmax(-1), adv_logits.float().log_softmax(-1)
    one = F.kl_div(log_q, log_p.detach(), reduction="none", log_target=True)
    other = F.kl_div(log_p, log_q.detach(), reduction="none", log_target=True)
    return (one + other).sum(-1)


def smart_loss(logits: Tensor, adv_logits: Tensor) -> Tensor:
    """SMART's smoothness term (arXiv 1911.03437, eq. 3): the mean symmetric divergence over the batch."""
    return symmetric_divergence(logits, adv_logits).mean()


# ---------------------------------------------------------------------- the technique


class FreeLB(Perturbation):
    """The mean gradient of K adversarial embeddings, each a step further up the loss than the one before.

    Stacked on what moves the weights, the first K - 1 gradients are those at the weights as they were.

    Args:
        layer: whose output moves, (B, T, D) or any (B, ...); the token embedding if omitted.
        steps: K, of which the last is the training step's own.
        alpha: length of a step (published 0.1 to 0.15).
        mag: length of the random start (published 0.05 to 0.6).
        eps: largest length; null: any, as in most published settings.
        norm: ``l2``, of an example's tokens together, or ``linf``.
        mask: entry of the batch, (B, T), that is 0 for padding; without such an entry all tokens move.
        schedule: see :class:`callbacks.perturbation.Perturbation`.

    Raises:
        ValueError: for a setting out of range, or a layer that isn't there.
    """

    site: ClassVar[str] = "features"
    zero: ClassVar = {"mag": 0.0, "alpha": 0.0, "steps": 1}
    per_example: ClassVar = {}
    adds_gradients: ClassVar = True

    def __init__(
        self,
        layer: str | None = None,
        steps: int = 2,
        alpha: float = 0.1,
        mag: float = 0.6,
        eps: float | None = None,
        norm: Norm = "l2",
        mask: str = "attention_mask",
        **schedule: Any,
    ) -> None:
        super().__init__(**schedule)
        check(0.0 if eps is None else eps, norm)
        if steps < 1 or not alpha >= 0 or not mag >= 0:
            raise ValueError(f"steps must be at least 1, alpha and mag not negative: {steps}, {alpha} and {mag}")
        self.layer, self.steps, self.alpha, self.mag, self.eps = layer, steps, alpha, mag, eps
        self.norm, self.mask = norm, mask
        self._added: Added | None = None
        self._hooks: list[Any] = []

    def attach(self, module: LightningModule) -> None:
        self.layer = self.layer or embedding_layer(module)
        self._layer = find_layers(module, [self.layer])[self.layer]
        self._added = Added(self._layer)

    def detach(self, module: LightningModule) -> None:
        self._unhook()
        if self._added is not None:
            self._added.remove()
            self._added = None

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        assert self._added is not None
        loss: Callable[[Batch], Tensor] = module.loss  # type: ignore[assignment]  # nn.Module's attributes are untyped
        mask = batch.get(self.mask)
        with crafting(module, "train"):
            h = Behind(module, self._layer).reach(lambda: loss(batch))
        delta = freelb_start(self.rows("start", h), self.mag, self.norm, mask)
        weights = [p for p in module.parameters() if p.requires_grad]
        needs_whole_weights(self, weights if self.steps > 1 else ())
        sums: list[Tensor | None] = [None] * len(weights)
        for _ in range(self.steps - 1):
            with crafting(module, "train", parameters=True):  # each begins with the same random state
                self._added.delta = delta.requires_grad_()
                found = torch.autograd.grad(loss(batch), [delta, *weights], allow_unused=True)
            if found[0] is None:
                raise ValueError(f"layer '{self.layer}' has no influence on the loss")
            # of the mean loss; of an example's own, the direction is the same
            delta = freelb_step(delta.detach(), found[0].float(), self.alpha, self.eps, self.norm, mask)
            sums = [g if s is None else s if g is None else s + g for s, g in zip(sums, found[1:], strict=True)]
        self._added.delta = delta.detach()
        if self.steps > 1:
            self._meet(module, weights, sums)

    def _meet(self, module: LightningModule, weights: list[nn.Parameter], sums: list[Tensor | None]) -> None:
        """Where the step's gradients are accumulated (and DDP reduces them), add the earlier ones and take the mean."""
        trainer = module.trainer
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = (1.0 if scaler is None else scaler.get_scale()) / trainer.accumulate_grad_batches
        for weight, earlier in zip(weights, sums, strict=True):
            node: Any = weight.view_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]  # it has one

            def mean(gradients: tuple[Tensor, ...], earlier: Tensor | None = earlier) -> tuple[Tensor, ...]:
                own = gradients[0] if earlier is None else gradients[0] + factor * earlier
                return (own / self.steps,)

            self._hooks.append((node, node.register_prehook(mean)))  # the node lives as long as someone holds it

    def _unhook(self) -> None:
        for _, handle in self._hooks:
            handle.remove()
        self._hooks = []

    def restore(self, module: LightningModule) -> None:
        self._unhook()
        if self._added is not None:
            self._added.delta = None
