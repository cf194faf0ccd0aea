"""Feature statistics and what moves them: the mathematics of MixStyle, DSU, EFDMix and adversarial style augmentation.

Functions of tensors alone; noise, permutations and mixing weights are passed in. A *style* is the mean and standard
deviation of each channel of one example's feature map (B, C, H, W), or of its tokens (B, N, C). The callbacks that draw
the noise and hang on a network are in :mod:`callbacks.style`.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def feature_statistics(x: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each example's channels.

    Args:
        x: (B, C, H, W) feature map, or (B, N, C) tokens.
        eps: added to the (unbiased) variance under the root.

    Returns:
        ``mean`` and ``std``, (B, C) each, at least float32.

    Raises:
        ValueError: for another number of dimensions, or fewer than two positions.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(_positions(x))
    count = x.numel() // max(mean.numel(), 1)
    if count < 2:
        raise ValueError(f"a feature map of shape {tuple(x.shape)} has one position per channel, so no spread")
    centred = wide - _over(mean, x)  # in two passes: torch.var_mean takes one, and on a CPU ten times as long
    return mean, (_dot(centred, centred) / (count - 1) + eps).sqrt()


def batch_spread(statistic: Tensor, eps: float = EPS) -> Tensor:
    """How far a statistic (B, C) spreads over the batch: (C,), unbiased, with ``eps`` under the root (DSU, eq. 3-4)."""
    return (statistic.var(0) + eps).sqrt()


def gradient_reversal(x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """``x`` forward; the gradient is multiplied by ``-weight`` backward."""
    return (1 + weight) * x.detach() - weight * x


def mixstyle(x: Tensor, permutation: Tensor, lam: Tensor, eps: float = EPS) -> Tensor:
    """MixStyle: ``x`` in the style ``lam * own + (1 - lam) * other``; no gradient through statistics, as published.

    Args:
        x: (B, C, H, W) or (B, N, C).
        permutation: (B,) int64, the example whose style is mixed in.
        lam: (B,) in [0, 1], weight of the own style; published Beta(0.1, 0.1).
    """
    with torch.no_grad():
        mean, std = feature_statistics(x, eps)
        other = (1 - lam).unsqueeze(1).to(std.dtype)
        # (x - mean) / std * mixed_std + mixed_mean, as one affine map; at lam = 1 exactly x
        ratio = other * (std[permutation] - std) / std
        offset = other * (mean[permutation] - mean) - mean * ratio
    return torch.addcmul(_over(offset, x), x.to(ratio.dtype), _over(1 + ratio, x)).to(x.dtype)


def efdmix(x: Tensor, permutation: Tensor, lam: Tensor) -> Tensor:
    """EFDMix: the sorted values of each channel are mixed with those of another example, rank by rank.

    ``y = x + (1 - lam) * (other's value of the same rank - stopgrad(x))``, as published: gradient goes to both.

    Args:
        x: (B, C, H, W) or (B, N, C).
        permutation: (B,) int64.
        lam: (B,) in [0, 1], weight of the own values.
    """
    flat = (x.flatten(2) if x.dim() == 4 else x.transpose(1, 2)).to(torch.promote_types(x.dtype, torch.float32))
    ordered, order = flat.sort(dim=-1)
    # the released code sorts a second time, to invert the order; putting the values in their places needs no inverse
    matched = torch.empty_like(flat).scatter(-1, order, ordered[permutation])
    other = (1 - lam).view(-1, 1, 1).to(flat.dtype)
    mixed = flat + other * (matched - flat.detach())
    return (mixed.view_as(x) if x.dim() == 4 else mixed.transpose(1, 2)).to(x.dtype)


def dsu(x: Tensor, noise_mean: Tensor, noise_std: Tensor, strength: float = 1.0, eps: float = EPS) -> Tensor:
    """DSU: style + noise times the batch's spread of that style; gradient flows through all of it, as published.

    Args:
        x: (B, C, H, W) or (B, N, C), B > 1.
        noise_mean: (B, C) standard normal.
        noise_std: (B, C) standard normal.
        strength: multiplies the noise; 0 is the identity.
    """
    channels = noise_mean.shape[1]
    theta = noise_mean.new_zeros(2, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    weight = torch.tensor([[0.0], [strength]], device=x.device).expand(2, x.shape[0])
    return Shift.apply(x, theta, torch.stack((noise_mean, noise_std)), weight, True, False, eps)


def adversarial_style(
    x: Tensor,
    theta_mean: Tensor,
    theta_std: Tensor,
    noise_mean: Tensor,
    noise_std: Tensor,
    adv_weight: float = 1.0,
    eps: float = EPS,
) -> Tensor:
    """AdvStyle: ``y = x_hat * (std + e_std R(theta_std)) + (mean + e_mean R(theta_mean))``, R the gradient reversal.

    Args:
        x: (B, C, H, W) or (B, N, C).
        theta_mean: (C,) learned intensity of the mean.
        theta_std: (C,) learned intensity of the standard deviation.
        noise_mean: (B, C) standard normal.
        noise_std: (B, C) standard normal.
        adv_weight: lam of the reversal: theta ascends the loss with this weight.
    """
    theta = gradient_reversal(torch.stack((theta_mean, theta_std)), adv_weight)
    weight = torch.tensor([[1.0], [0.0]], device=x.device).expand(2, x.shape[0])
    return Shift.apply(x, theta, torch.stack((noise_mean, noise_std)), weight, False, False, eps)


def _positions(x: Tensor) -> tuple[int, ...]:
    if x.dim() == 4:
        return (2, 3)
    if x.dim() == 3:
        return (1,)
    raise ValueError(f"style needs a feature map (B, C, H, W) or tokens (B, N, C), not a tensor of {tuple(x.shape)}")


def _over(statistic: Tensor, x: Tensor) -> Tensor:
    """A (B, C) statistic in the shape that broadcasts over the positions of ``x``."""
    return statistic[:, :, None, None] if x.dim() == 4 else statistic[:, None, :]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum of ``x * y`` over positions, (B, C); on GPUs without the product in memory."""
    if x.dim() == 4:
        return torch.linalg.vecdot(x.flatten(2), y.flatten(2))
    return torch.linalg.vecdot(x, y, dim=1)


class Shift(torch.autograd.Function):
    """``y = x * (1 + d_std / std) + (d_mean - mean * d_std / std)`` with
    ``d = noise * (weight[0] * theta + weight[1] * spread)``; its gradient in closed form.

    ``spread`` is the batch's; it is left out, weight and all, unless ``use_spread``. With ``direction``, theta is
    multiplied by the norm of ``spread`` over channels, one for the mean and one for the deviation.

    What autograd would do in six passes over the feature map takes two here. Twice differentiable: asked for a graph,
    the backward pass recomputes the statistics with one.
    """

    @staticmethod
    def forward(ctx, x, theta, noise, weight, use_spread, direction, eps):  # type: ignore[no-untyped-def]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, std = feature_statistics(wide, eps)
        spread = _spreads(mean, std, eps) if use_spread or direction else None
        d_mean, ratio = _shift(std, theta, noise, weight, spread if use_spread else None, spread if direction else None)
        ctx.save_for_backward(x, theta, noise, weight, mean, std)
        ctx.use_spread, ctx.direction, ctx.eps = use_spread, direction, eps
        return torch.addcmul(_over(d_mean - mean * ratio, x), wide, _over(1 + ratio, x)).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, theta, noise, weight, mean, std = ctx.saved_tensors
        wide, g = x.to(mean.dtype), gradient.to(mean.dtype)
        if torch.is_grad_enabled():
            mean, std = feature_statistics(wide, ctx.eps)
        use_spread, direction = ctx.use_spread, ctx.direction
        spread = _spreads(mean, std, ctx.eps) if use_spread or direction else None
        _, ratio = _shift(std, theta, noise, weight, spread if use_spread else None, spread if direction else None)
        g_sum = g.sum(_positions(x))
        centred = _dot(g, wide) - mean * g_sum
        g_d = torch.stack((g_sum, centred / std))  # gradient of d_mean and d_std, (2, B, C)
        g_mean = -ratio * g_sum
        g_std = -ratio * centred / std
        g_theta = (g_d * noise * weight[0][:, None]).sum(1)
        if spread is not None:  # through the spread of the batch, back to every example's statistics
            g_spread = (g_d * noise * weight[1][:, None]).sum(1) if use_spread else torch.zeros_like(spread)
            if direction:
                length = spread.norm(dim=1, keepdim=True)
                g_spread = g_spread + (g_theta * theta).sum(1, keepdim=True) * spread / length
                g_theta = g_theta * length
            g_spread = g_spread / (spread * (len(x) - 1))
            g_mean = g_mean + g_spread[0] * (mean - mean.mean(0))
            g_std = g_std + g_spread[1] * (std - std.mean(0))
        none = (None,) * 5
        if not ctx.needs_input_grad[0]:
            return None, g_theta, *none
        count = wide.numel() // mean.numel()
        slope = g_std / (std * (count - 1))
        g_x = torch.addcmul(_over(g_mean / count - slope * mean, x), wide, _over(slope, x))
        g_x = torch.addcmul(g_x, g, _over(1 + ratio, x)) if g_x.requires_grad else g_x.addcmul_(g, _over(1 + ratio, x))
        return g_x.to(x.dtype), g_theta, *none


def _spreads(mean: Tensor, std: Tensor, eps: float) -> Tensor:
    """:func:`batch_spread` of both statistics, (2, C)."""
    return torch.stack((batch_spread(mean, eps), batch_spread(std, eps)))


def _shift(
    std: Tensor, theta: Tensor, noise: Tensor, weight: Tensor, spread: Tensor | None, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``d_mean`` and ``d_std / std``, (B, C) each; theta has the size of ``sizes`` where that is given."""
    if sizes is not None:
        theta = theta * sizes.norm(dim=1, keepdim=True)
    width = weight[0][:, None] * theta[:, None]
    if spread is not None:
        width = width + weight[1][:, None] * spread[:, None]
    d_mean, d_std = noise * width
    return d_mean, d_std / std


class Unused(torch.autograd.Function):
    """``x``, with a zero gradient for ``theta``, so that no parameter is unused under DDP; costs nothing."""

    @staticmethod
    def forward(ctx, x, theta):  # type: ignore[no-untyped-def]
        ctx.like = (theta.shape, theta.dtype, theta.device)
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        shape, dtype, device = ctx.like
        return gradient, torch.zeros(shape, dtype=dtype, device=device)


def spread_over_ranks(statistic: Tensor, eps: float = EPS) -> Tensor:
    """:func:`batch_spread` of the examples of all ranks: (C,), the same on every rank."""
    s = statistic.double()
    sums = torch.cat((s.new_tensor([len(s)]), s.sum(0), s.square().sum(0)))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    count, total, squares = sums[0], *sums[1:].chunk(2)
    variance = (squares - total.square() / count).clamp_min(0) / (count - 1)
    return (variance + eps).sqrt().to(statistic.dtype)
