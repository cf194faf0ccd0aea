"""Adversarial inputs: the attacks as pure functions, and the techniques that train on what they find.

An attack takes a loss function, an input and whatever else the loss needs, and returns an input within ``eps`` of the
first at which the loss is larger::

    x_adv = pgd(loss_fn, x, label, eps=8 / 255, alpha=2 / 255, steps=10)

``loss_fn(x, *args)`` gives one loss per example, (B,), or one for the batch, a scalar. A scalar will do, mean or sum,
but where single examples are compared (best of restarts, step sizes of APGD) the batch is then compared as a whole. It
may give a pair (loss, correct), ``correct`` being bool (B,): then an example is moved only until it is misclassified.
``args`` are tensors (B, ...); with them, examples that are done are left out of further passes.

Gradients are of the input alone, by ``torch.autograd.grad``: nothing is left in ``.grad`` of any parameter, and the
gradients of the weights, a third of a step's work, are never computed. All attacks work under ``no_grad`` and
``inference_mode``. The network's mode is the caller's business (:func:`callbacks.perturbation.crafting`).

Radii are in units of the input: of pixels in [0, 1] where normalisation sits inside the network. What is returned lies
in the ball and in the box (``bounds``) to the last bit, in the input's own precision. Where an input is outside of the
box already it isn't pushed further out.

Sources: FGSM, Goodfellow et al., arXiv 1412.6572; PGD, Madry et al., arXiv 1706.06083; FGSM-RS, Wong et al., arXiv
2001.03994; momentum, Dong et al., arXiv 1710.06081; APGD and DLR, Croce and Hein, arXiv 2003.01690. Where released
codes differ from this:

* several craft with ``loss.backward()``, which adds the crafting's gradients to those of the parameters;
* FGSM-RS works in normalised pixels with one radius per channel; here the radius is of pixels;
* APGD's released code compares the first step's loss with 0, ours with the loss at the start, as the paper says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from callbacks.balls import (
    Ball,
    Bounds,
    Norm,
    check,
    length,
    on_ball,
    own,
    per_example,
    random_in_ball,
    random_noise,
)
from callbacks.perturbation import Batch, Mode, Perturbation, crafting

Rule = Literal["sign", "normalised", "momentum"]
Start = Literal["uniform", "zero"] | Tensor
LossFn = Callable[..., Tensor | tuple[Tensor, Tensor]]

# ---------------------------------------------------------------------- losses to attack


def dlr_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Difference of logits ratio, (B,): the distance to the best other class, scale-free (arXiv 2003.01690, eq. 6).

    Raises:
        ValueError: for fewer than three classes, where it isn't defined.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least three classes, not {logits.shape[1]}: attack the cross-entropy")
    top = logits.topk(3, dim=1).values
    own = logits.gather(1, label[:, None]).squeeze(1)
    other = torch.where(logits.argmax(1) == label, top[:, 1], top[:, 0])
    return (other - own) / (top[:, 0] - top[:, 2] + 1e-12)


def classification(model: Callable[[Tensor], Tensor], loss: Literal["ce", "dlr"] = "ce") -> LossFn:
    """``loss_fn(x, label)`` of a classifier's logits, with whether it is still right."""

    def loss_fn(x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x).float()
        values = dlr_loss(logits, label) if loss == "dlr" else F.cross_entropy(logits, label, reduction="none")
        return values, logits.argmax(1) == label

    return loss_fn


def input_gradient(
    loss_fn: LossFn, x: Tensor, *args: Tensor, needed: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient (B, ...) of the summed loss by the input, the loss of each example (B,) and which are still right.

    Without ``needed`` the gradient isn't computed, and x stands in its place.
    """
    with torch.inference_mode(False), torch.set_grad_enabled(needed):
        x = own(x).requires_grad_(needed)
        found = loss_fn(x, *args)
        loss, correct = found if isinstance(found, tuple) else (found, None)
        gradient = torch.autograd.grad(loss.sum(), x)[0] if needed else x
    return gradient, loss.detach().expand(len(x)), None if correct is None else correct.detach()


# ---------------------------------------------------------------------- attacks


class _Rule:
    """How an attack goes from one point to the next; what it remembers of each example can be cut to some of them."""

    def __init__(self, ball: Ball) -> None:
        self.ball = ball
        self.state: list[Tensor] = []

    def take(self, rows: Tensor) -> None:
        self.ball, self.state = self.ball.take(rows), [values[rows] for values in self.state]

    def step(self, y: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        """The next point, after ``y`` with its loss (B,) and the loss's gradient."""
        raise NotImplementedError

    def last(self, y: Tensor, loss: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The point that the attack settles on, and its loss, after ``y`` with its loss."""
        return y, loss


class _Steps(_Rule):
    """Steps of one length: sign, normalised or with momentum; see :func:`pgd`."""

    def __init__(self, ball: Ball, alpha: float, rule: Rule | None, momentum: float) -> None:
        super().__init__(ball)
        self.alpha, self.rule, self.momentum = alpha, rule, momentum
        self.state = [torch.zeros_like(ball.x)] if rule == "momentum" else []

    def step(self, y: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        if self.rule == "momentum":
            gradient = self.momentum * self.state[0] + gradient / length(gradient, 1.0).clamp_min(1e-12)
            self.state = [gradient]
        if self.ball.norm == "l2" or self.rule == "normalised":
            moved = gradient / (length(gradient, 2.0 if self.ball.norm == "l2" else torch.inf) + 1e-10)
        else:
            moved = gradient.sign()
        return self.ball.project(y.add(moved, alpha=self.alpha))


class _AutoSteps(_Rule):
    """Steps that begin at 2 ``eps``, with momentum, and are halved from the best point when they no longer help.

    arXiv 2003.01690, algorithm 1: 0.75 of a step and 0.25 of the one before; step sizes are looked at after 0.22 of all
    steps and then at intervals that shrink by 0.03 to 0.06 of all steps.
    """

    def __init__(self, ball: Ball, steps: int, rho: float) -> None:
        super().__init__(ball)
        self.rho, self.period = rho, max(int(0.22 * steps), 1)
        self.shortest, self.shrink = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
        self.taken, self.since = 0, 0

    def step(self, y: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        if self.taken == 0:
            size = per_example(torch.full_like(loss, 2 * self.ball.eps), y)
            old, best, best_gradient, best_loss, last_loss, checked_loss = y, y, gradient, loss, loss, loss
            rises, halved = torch.zeros_like(loss), torch.ones_like(loss, dtype=torch.bool)
        else:
            old, best, best_gradient, best_loss, last_loss, checked_loss, size, rises, halved = self.state
            rises = rises + (loss > last_loss)
            better = per_example(loss > best_loss, y)
            best, best_gradient = torch.where(better, y, best), torch.where(better, gradient, best_gradient)
            best_loss = torch.maximum(loss, best_loss)
        if self.since == self.period:
            stuck = (rises <= self.rho * self.period) | (~halved & (checked_loss >= best_loss))
            size = torch.where(per_example(stuck, y), size / 2, size)
            y, gradient = (torch.where(per_example(stuck, y), b, v) for b, v in ((best, y), (best_gradient, gradient)))
            halved, checked_loss, rises = stuck, best_loss, torch.zeros_like(rises)
            self.period, self.since = max(self.period - self.shrink, self.shortest), 0
        ball = self.ball
        moved = gradient.sign() if ball.norm == "linf" else gradient / (length(gradient) + 1e-12)
        new = ball.project(y + size * moved)
        share = 1.0 if self.taken == 0 else 0.75
        new = ball.project(y + (new - y) * share + (y - old) * (1 - share))
        self.state = [y, best, best_gradient, best_loss, loss, checked_loss, size, rises, halved]
        self.taken, self.since = self.taken + 1, self.since + 1
        return new

    def last(self, y: Tensor, loss: Tensor | None) -> tuple[Tensor, Tensor | None]:
        best, best_loss = self.state[1], self.state[3]
        assert loss is not None
        return torch.where(per_example(loss > best_loss, y), y, best), torch.maximum(loss, best_loss)


def _run(
    loss_fn: LossFn, rule: _Rule, y: Tensor, args: tuple[Tensor, ...], steps: int, targeted: bool, judge: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One start of an attack: the points (B, ...), their losses (B,) if judged, and which examples are done (B,)."""
    points, finished = y.clone(), torch.zeros(len(y), dtype=torch.bool, device=y.device)
    losses = torch.full((len(y),), -torch.inf, device=y.device)
    rows = torch.arange(len(y), device=y.device)
    sign = -1 if targeted else 1
    loss: Tensor | None = None
    for i in range(steps + judge):
        gradient, loss, correct = input_gradient(loss_fn, y, *args, needed=i < steps)
        loss = sign * loss
        if correct is not None:
            done = (correct if targeted else ~correct) & ~finished[rows]
            points[rows[done]], losses[rows[done]], finished[rows[done]] = y[done], loss[done].float(), True
            if args and done.any():  # leave them out
                left = ~done
                rows, y, loss, gradient = rows[left], y[left], loss[left], gradient[left]
                args = tuple(values[left] for values in args)
                if i > 0 or isinstance(rule, _Steps):
                    rule.take(left)
                else:
                    rule.ball = rule.ball.take(left)
                if not len(rows):
                    return points, losses, finished
        if i < steps:
            y = rule.step(y, sign * gradient, loss)
    y, loss = rule.last(y, loss if judge else None)
    left = ~finished[rows]
    points[rows[left]] = y[left]
    if loss is not None:
        losses[rows[left]] = loss[left].float()
    return points, losses if judge else None, finished


def _attack(
    loss_fn: LossFn,
    x: Tensor,
    args: tuple[Tensor, ...],
    make: Callable[[Ball], _Rule],
    *,
    eps: float,
    steps: int,
    norm: Norm,
    start: Start,
    restarts: int,
    targeted: bool,
    bounds: Bounds,
    generator: torch.Generator | None,
    judge: bool,
) -> Tensor:
    """The best of several starts of an attack, in float32 or better whatever x is."""
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    if not all(isinstance(a, Tensor) for a in args):
        raise ValueError("what follows x must be tensors for loss_fn; give eps and the other settings by name")
    given = Ball(own(x), eps, norm, bounds)
    args = tuple(own(values) for values in args)
    low = x.dtype in (torch.float16, torch.bfloat16)
    dtype, centre = x.dtype, given.x.float() if low else given.x
    ball = Ball(centre, eps, norm, bounds) if low else given

    def in_dtype(y: Tensor, *rest: Tensor) -> Any:
        return loss_fn(y.to(dtype), *rest)

    result = centre
    finished = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    best = torch.full((len(x),), -torch.inf, device=x.device)
    with torch.inference_mode(False), torch.no_grad():
        for number in range(restarts):
            rows = (~finished).nonzero().squeeze(1) if args else torch.arange(len(x), device=x.device)
            part = ball if len(rows) == len(x) else ball.take(rows)
            if number > 0 or (isinstance(start, str) and start == "uniform"):
                begin = random_in_ball(part.x, eps, norm, generator)
            else:
                begin = torch.zeros_like(part.x) if isinstance(start, str) else start
            points, losses, done = _run(
                in_dtype if low else loss_fn,
                make(part),
                part.project(part.x + begin),
                tuple(values[rows] for values in args),
                steps,
                targeted,
                judge or restarts > 1,
            )
            if number == 0:
                result, finished, best = points, done, best if losses is None else losses
            else:
                assert losses is not None
                better = ~finished[rows] & (done | (losses > best[rows]))
                result[rows[better]], best[rows[better]] = points[better], losses[better]
                finished[rows[better]] |= done[better]
            if bool(finished.all()):
                break
        return given.exact(result)


def fgsm(
    loss_fn: LossFn,
    x: Tensor,
    *args: Tensor,
    eps: float,
    norm: Norm = "linf",
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> Tensor:
    """One step of length ``eps`` along the gradient's sign (or, in l2, the gradient) from the input itself."""
    options: dict[str, Any] = {"norm": norm, "targeted": targeted, "bounds": bounds}
    return pgd(loss_fn, x, *args, eps=eps, alpha=eps, steps=1, start="zero", **options)


def fgsm_rs(
    loss_fn: LossFn,
    x: Tensor,
    *args: Tensor,
    eps: float,
    alpha: float | None = None,
    norm: Norm = "linf",
    start: Start = "uniform",
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """FGSM from a random start: one step of ``alpha`` (1.25 ``eps`` if omitted), then back into the ball."""
    options: dict[str, Any] = {"norm": norm, "targeted": targeted, "bounds": bounds, "generator": generator}
    alpha = 1.25 * eps if alpha is None else alpha
    return pgd(loss_fn, x, *args, eps=eps, alpha=alpha, steps=1, start=start, **options)


def pgd(
    loss_fn: LossFn,
    x: Tensor,
    *args: Tensor,
    eps: float,
    alpha: float | None = None,
    steps: int = 10,
    norm: Norm = "linf",
    start: Start = "uniform",
    rule: Rule | None = None,
    momentum: float = 1.0,
    restarts: int = 1,
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient ascent.

    Args:
        loss_fn: see the head of this file.
        x: (B, ...) inputs.
        args: further tensors (B, ...) for ``loss_fn``, such as the labels.
        eps: radius.
        alpha: length of a step; ``eps / 4`` if omitted, which is Madry's 2/255 for 8/255.
        steps: gradient steps, at least 1.
        norm: ``linf`` or ``l2``.
        start: a point drawn uniformly from the ball, the input itself, or perturbations (B, ...) to begin with.
        rule: a step is ``alpha`` times the gradient's sign (``sign``, the rule of linf) or the gradient over its norm
            (``normalised``, the rule of l2; in linf over its largest value), or one of these of a ``momentum``,
            mu m + g / |g|_1, in the gradient's place.
        momentum: mu.
        restarts: the best of so many starts for each example; all but the first are random. Examples that are done
            take no part in further ones.
        targeted: descend, towards the labels in ``args``; an example is done when it is ``correct``, else when not.
        bounds: of the input's values.
        generator: for random starts; torch's global one if omitted.

    Returns:
        (B, ...) of x's dtype: where it is known what is correct, the first point at which the attack was done; else the
        last point (of one start) or that of the largest loss (of several).

    Raises:
        ValueError: for a setting out of range.
    """
    if rule not in (None, "sign", "normalised", "momentum"):
        raise ValueError(f"rule must be sign, normalised or momentum, not '{rule}'")
    if alpha is not None and not alpha >= 0:
        raise ValueError(f"alpha must not be negative, but is {alpha}")
    size = eps / 4 if alpha is None else alpha
    return _attack(
        loss_fn,
        x,
        args,
        lambda ball: _Steps(ball, size, rule, momentum),
        eps=eps,
        steps=steps,
        norm=norm,
        start=start,
        restarts=restarts,
        targeted=targeted,
        bounds=bounds,
        generator=generator,
        judge=False,
    )


def apgd(
    loss_fn: LossFn,
    x: Tensor,
    *args: Tensor,
    eps: float,
    steps: int = 100,
    norm: Norm = "linf",
    start: Start = "uniform",
    rho: float = 0.75,
    restarts: int = 1,
    targeted: bool = False,
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Auto-PGD: ascent with momentum that halves its steps by itself; no step size to choose.

    ``rho``: a step size is halved if the loss rose in no more than this share of the steps since it was last looked at.
    The other arguments and what is returned: see :func:`pgd`; where it isn't known what is correct, the point of the
    largest loss. Attack ``classification(model, "ce")`` and ``"dlr"`` for APGD-CE and APGD-DLR.
    """
    return _attack(
        loss_fn,
        x,
        args,
        lambda ball: _AutoSteps(ball, steps, rho),
        eps=eps,
        steps=steps,
        norm=norm,
        start=start,
        restarts=restarts,
        targeted=targeted,
        bounds=bounds,
        generator=generator,
        judge=True,
    )


# ---------------------------------------------------------------------- the techniques


class AdversarialInput(Perturbation):
    """Trains on adversarial inputs: an entry of the batch is replaced by what an attack finds.

    What is attacked is ``module.loss(batch)``, so with the targets (soft ones, too) that the step is trained on, and
    with whatever else perturbs it.

    Args:
        attack: ``pgd``, ``fgsm``, ``fgsm_rs``, ``apgd``, or ``noise``: random, of the same radius, the control.
        eps: radius, in units of the entry.
        alpha: length of a step; ``eps / 4`` if omitted, 1.25 ``eps`` for ``fgsm_rs``.
        steps: of ``pgd`` and ``apgd``.
        norm: ``linf`` or ``l2``.
        rule: ``sign``, ``normalised`` or ``momentum``, of ``pgd``; see :func:`pgd`.
        start: ``uniform`` in the ball, or ``zero``; ``fgsm`` always begins at the input.
        entry: which entry of the batch: float, (B, ...).
        bounds: its smallest and largest value; null: any.
        attack_mode: mode of the network while the attack runs; see :func:`callbacks.perturbation.crafting`.
        schedule: see :class:`callbacks.perturbation.Perturbation`.

    Raises:
        ValueError: for a setting out of range, or a batch that has no such entry.
    """

    zero: ClassVar = {"eps": 0.0}
    #: In l2: the sign of a gradient that is zero but for rounding differs from one batch size to another.
    per_example: ClassVar = {"norm": "l2", "eps": 0.5}

    def __init__(
        self,
        attack: Literal["pgd", "fgsm", "fgsm_rs", "apgd", "noise"] = "pgd",
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int = 10,
        norm: Norm = "linf",
        rule: Rule | None = None,
        start: Literal["uniform", "zero"] = "uniform",
        entry: str = "image",
        bounds: Bounds = (0.0, 1.0),
        attack_mode: Mode = "eval",
        **schedule: Any,
    ) -> None:
        super().__init__(**schedule)
        check(eps, norm)
        if attack not in ("pgd", "fgsm", "fgsm_rs", "apgd", "noise"):
            raise ValueError(f"attack must be pgd, fgsm, fgsm_rs, apgd or noise, not '{attack}'")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.attack, self.eps, self.alpha, self.steps, self.norm = attack, eps, alpha, steps, norm
        self.rule, self.start, self.entry, self.bounds, self.attack_mode = rule, start, entry, bounds, attack_mode

    def begin(self, x: Tensor) -> Tensor:
        """Where the attack begins, relative to the input."""
        if self.start == "zero":
            return torch.zeros_like(x)
        if self.norm == "linf":
            return (self.rows("start", x) * (2 * self.eps) - self.eps).to(x.dtype)
        direction = self.rows("start", x, "normal")
        return on_ball(direction, self.uniform("radius", len(x), device=x.device), self.eps).to(x.dtype)

    def loss_of(self, module: LightningModule, batch: Batch) -> LossFn:
        """The loss to attack, as a function of the entry: summed over the batch, so that no precision underflows."""
        loss: Callable[[Batch], Tensor] = module.loss  # type: ignore[assignment]  # nn.Module's attributes are untyped
        return lambda x: loss({**batch, self.entry: x}) * len(x)

    def craft(self, module: LightningModule, batch: Batch) -> Tensor:
        """The adversarial entry, (B, ...)."""
        x = batch.get(self.entry)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            known = ", ".join(k for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point())
            raise ValueError(f"the batch has no entry '{self.entry}' of floats to attack; it has: {known or 'none'}")
        x = x.detach()
        common: dict[str, Any] = {"eps": self.eps, "norm": self.norm, "bounds": self.bounds}
        if self.attack == "noise":
            return random_noise(x, drawn=self.rows("start", x, "normal"), **common)
        with crafting(module, self.attack_mode):
            loss_fn = self.loss_of(module, batch)
            if self.attack == "fgsm":
                return fgsm(loss_fn, x, **common)
            begin = self.begin(x)
            if self.attack == "fgsm_rs":
                return fgsm_rs(loss_fn, x, alpha=self.alpha, start=begin, **common)
            if self.attack == "apgd":
                return apgd(loss_fn, x, steps=self.steps, start=begin, **common)
            return pgd(loss_fn, x, alpha=self.alpha, steps=self.steps, rule=self.rule, start=begin, **common)

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        batch[self.entry] = self.craft(module, batch)
