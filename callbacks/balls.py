"""Balls around inputs, cut by a box: projection that is exact to the last bit, and random points."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
#: Smallest and largest value; None: any.
Bounds = tuple[float, float] | None


def own(x: Tensor) -> Tensor:
    """A tensor that may enter a graph, also where it comes from inference mode."""
    return x.clone() if x.is_inference() else x.detach()


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, ...), to be multiplied with ``like`` (B, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def length(x: Tensor, norm: float = 2.0) -> Tensor:
    """Norm of each example of (B, ...), as (B, 1, 1, ...)."""
    return per_example(torch.linalg.vector_norm(x.flatten(1), norm, dim=1), x)


def check(eps: float, norm: str) -> None:
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, but is {eps}")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be linf or l2, not '{norm}'")


class Ball:
    """The points within ``eps`` of ``x`` that lie in the box.

    Args:
        x: (B, ...) centres.
        eps: radius, not negative.
        norm: ``linf`` or ``l2`` (of a whole example).
        bounds: smallest and largest value; None: any.
    """

    def __init__(self, x: Tensor, eps: float, norm: Norm = "linf", bounds: Bounds = (0.0, 1.0)) -> None:
        check(eps, norm)
        self.x, self.eps, self.norm = x, eps, norm
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        if bounds is not None:
            self.low, self.high = x.clamp(max=bounds[0]), x.clamp(min=bounds[1])
        if norm == "linf":  # ball and box are one box
            low, high = _edge(x, -eps), _edge(x, eps)
            self.low = low if self.low is None else torch.maximum(low, self.low)
            self.high = high if self.high is None else torch.minimum(high, self.high)

    def take(self, rows: Tensor) -> Ball:
        """The balls of some of the examples."""
        ball = copy.copy(self)
        ball.x = self.x[rows]
        ball.low, ball.high = (None if edge is None else edge[rows] for edge in (self.low, self.high))
        return ball

    def project(self, y: Tensor) -> Tensor:
        """The nearest point of the ball, then of the box: what is clipped to the box stays in the ball."""
        if self.norm == "l2":
            moved = y - self.x
            y = self.x + moved * (self.eps / length(moved).clamp_min(torch.finfo(moved.dtype).tiny)).clamp_max(1.0)
        return y if self.low is None or self.high is None else torch.clamp(y, self.low, self.high)

    def exact(self, y: Tensor) -> Tensor:
        """:meth:`project`, rounded towards the centre where rounding would leave the ball; of x's dtype."""
        y = self.project(y.to(self.x.dtype))
        if self.norm == "linf":
            return y
        for shrink in (1e-6, 1e-3, 1e-2, 1e-1, 1.0):
            out = length(y.double() - self.x.double()) > self.eps
            if not out.any():
                break
            y = torch.where(out, (self.x + (y - self.x) * (1 - shrink)).to(y.dtype), y)
        return y


def _edge(x: Tensor, eps: float) -> Tensor:
    """``x + eps`` in x's dtype, rounded towards ``x`` so that it is no further than ``eps``."""
    exact = x.double() + eps  # rounding to x's dtype then is by half a unit at most
    y = exact.to(x.dtype)
    return torch.where((y.double() - x.double()).abs() > abs(eps), torch.nextafter(y, x), y)


def random_in_ball(x: Tensor, eps: float, norm: Norm = "linf", generator: torch.Generator | None = None) -> Tensor:
    """Perturbations (B, ...) drawn uniformly from the ball."""
    if norm == "linf":
        return torch.rand(x.shape, generator=generator, device=x.device).to(x.dtype).mul(2 * eps).sub(eps)
    direction = torch.randn(x.shape, generator=generator, device=x.device)
    radius = torch.rand(len(x), generator=generator, device=x.device)
    return on_ball(direction, radius, eps).to(x.dtype)


def on_ball(direction: Tensor, radius: Tensor, eps: float) -> Tensor:
    """Normal (B, ...) and uniform (B,) numbers as points drawn uniformly from an l2 ball."""
    reach = per_example(radius.pow(1 / direction[0].numel()), direction)
    return direction / length(direction).clamp_min(1e-12) * reach * eps


def random_noise(
    x: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    drawn: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The control of every attack: a random point at distance ``eps`` (signs in linf, a direction in l2), in the box.

    ``drawn``: the normal numbers (B, ...) that decide signs or direction; drawn here if omitted.
    """
    if drawn is None:
        drawn = torch.randn(x.shape, generator=generator, device=x.device)
    moved = eps * (drawn.sign() if norm == "linf" else drawn / length(drawn).clamp_min(1e-12))
    return Ball(own(x), eps, norm, bounds).exact(x + moved)
