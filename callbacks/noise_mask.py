"""Noise masks over the input, fixed or from a learned policy (Yavuz & Yang, arXiv 2406.14568).

While a network trains, each image is multiplied by a mask of its own: one number for each cell of a grid, drawn from a
Beta distribution, enlarged to the image and blurred. A small second network, the policy, sees the image and gives the
two concentrations of each cell; it learns by REINFORCE which masks leave the loss small.

Where paper and released code (ogrenenmakine/Policy-Gradient-Driven-Noise-Mask) are unsound we differ:

* ``objective: textbook``: the cost is each image's own, a baseline is taken off it, and the log-probability is that of
  the whole mask, the *sum* of the cells' logs; the classifier's gradient is the plain one of the masked images. The
  gradient that the policy gets is an unbiased estimate of that of the expected cost.
* ``objective: released``: the loss is the batch's cross-entropy times the log of the *sum* of the cells' densities. So
  the policy's gradient belongs to no objective, and the classifier's is multiplied by that log: about log(cells) at the
  start, 8.5 for 64x64, which is a learning rate 8.5 times larger; where densities fall below 1 / cells the sign turns
  and the classifier is trained to be wrong.
* Masks multiply the distance from the mean colour, which is what multiplying a normalised image does; so they act alike
  in any recipe.
* Concentrations are kept within exp(-4) and exp(4), in float32 at least. The release overflows.
* The running averages of the concentrations are buffers, alike on all ranks. The release keeps one per rank, saves the
  first one's, and can't run in one process.
* The heads normalise by layer, not by batch, and run once; so with the small extractor a batch of one works and two
  ranks do what one does.
* The policy has no weight decay (released 1e-4), and the schedule of the network's learning rate (released: a cosine).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributions import Beta
from torchvision.transforms.v2.functional import gaussian_blur

from callbacks.perturbation import Batch, Perturbation, device_of, fold_seed, run_seed
from callbacks.report import Report, new_figure, save_figure, wanted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Objective = Literal["textbook", "released"]
Kind = Literal["policy", "beta", "gaussian", "cutout"]
#: Log-concentrations stay within plus and minus this.
LIMIT = 4.0
#: Share of the running average in an image's log-concentrations, and what the average keeps at each step (released).
RUNNING, MOMENTUM = 0.9, 0.99
#: Columns of epochs and rows of classes in the plots.
COLUMNS, ROWS = 8, 24


# ---------------------------------------------------------------------- the mathematics


def sample_mask(log_alpha: Tensor, log_beta: Tensor, seeds: Iterable[int] | None = None) -> Tensor:
    """Draw masks from Beta(alpha, beta), given as their logits: the mask is the sigmoid.

    The logit is kept since a mask near 0 or 1 rounds to it, and its density there is infinite. Drawn as the difference
    of the logs of two gamma variables, ``log G(a) = log G(a + 1) + log(U) / a``, which doesn't underflow for small a.

    Args:
        log_alpha: (B, ...), float32 or float64.
        log_beta: the same shape.
        seeds: one for each of the B masks, so that a mask doesn't depend on those beside it; None: torch's own stream.

    Returns:
        (B, ...), without a gradient.
    """
    alpha, beta = log_alpha.detach().exp(), log_beta.detach().exp()
    pair = torch.stack([alpha, beta], 1)  # (B, 2, ...)
    gamma, uniform = torch.empty_like(pair), torch.empty_like(pair)
    if seeds is None:
        gamma, uniform = torch._standard_gamma(pair + 1), uniform.uniform_()
    else:
        generator = torch.Generator(device=pair.device)
        for i, seed in enumerate(seeds):
            generator.manual_seed(seed)
            gamma[i] = torch._standard_gamma(pair[i] + 1, generator=generator)
            uniform[i].uniform_(generator=generator)
    tiny = torch.finfo(pair.dtype).tiny
    logs = gamma.clamp_min(tiny).log() + uniform.clamp_min(tiny).log() / pair
    return logs[:, 0] - logs[:, 1]


def log_density(log_alpha: Tensor, log_beta: Tensor, logit: Tensor) -> Tensor:
    """Log of the Beta density at the sigmoid of ``logit``, cell by cell: all (B, ...)."""
    alpha, beta = log_alpha.exp(), log_beta.exp()
    norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return (alpha - 1) * F.logsigmoid(logit) + (beta - 1) * F.logsigmoid(-logit) - norm


def policy_loss(
    log_alpha: Tensor,
    log_beta: Tensor,
    logit: Tensor,
    cost: Tensor,
    baseline: Tensor | float = 0.0,
    objective: Objective = "textbook",
) -> Tensor:
    """What the policy descends, a scalar; its gradient in the log-concentrations is what matters, not its value.

    ``textbook``: the mean over images of ``(cost - baseline) * log p(mask)``, whose expected gradient is that of the
    expected cost as long as the baseline doesn't depend on the image's own mask. ``released``: the mean cost times the
    mean of ``log sum p(cell)``, as the released code has it.

    Args:
        log_alpha: (B, ...).
        log_beta: (B, ...).
        logit: what :func:`sample_mask` drew, (B, ...).
        cost: (B,), what each masked image cost.
        baseline: taken off the cost, (B,) or a number; of ``textbook``.
        objective: which of the two.

    Raises:
        ValueError: for another objective.
    """
    logs = log_density(log_alpha, log_beta, logit).flatten(1)
    if objective == "textbook":
        return ((cost - baseline).detach() * logs.sum(1)).mean()
    if objective == "released":
        return cost.detach().mean() * logs.logsumexp(1).mean()
    raise ValueError(f"objective must be textbook or released, not '{objective}'")


def leave_one_out(cost: Tensor) -> Tensor:
    """For each of the costs (B,) the mean of the others; of a single one, itself."""
    return (cost.sum() - cost) / (len(cost) - 1) if len(cost) > 1 else cost


def enlarge(
    mask: Tensor, size: tuple[int, int], upsample: Literal["nearest", "bilinear"], kernel: int, sigma: float
) -> Tensor:
    """Masks (B, G, G) at the size of images, (B, 1, H, W), blurred by a Gaussian of ``kernel`` pixels (0: not)."""
    mask = F.interpolate(mask[:, None], size, mode=upsample)
    return gaussian_blur(mask, [kernel, kernel], [sigma, sigma]) if kernel else mask


# ---------------------------------------------------------------------- the policy


class Policy(nn.Module):
    """From images (B, C, H, W) to the log-concentrations of their masks, twice (B, G, G), before the running average.

    Args:
        in_chans: C.
        grid: G.
        extractor: ``small``, three convolutions; or a timm model, ``resnet10t`` as published.
        reduce: the policy sees the image at this fraction of its size.
        width: of the heads' two hidden layers.
    """

    running: Tensor
    baseline: Tensor
    steps: Tensor

    def __init__(self, in_chans: int, grid: int, extractor: str = "small", reduce: int = 4, width: int = 512) -> None:
        super().__init__()
        self.grid, self.reduce = grid, reduce
        if extractor == "small":
            layers: list[nn.Module] = []
            for before, after in ((in_chans, 16), (16, 32), (32, 64)):
                layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.ReLU()]
            self.extractor: nn.Module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
            features = 256
        else:
            net = timm.create_model(extractor, pretrained=False, num_classes=0, in_chans=in_chans)
            self.extractor, features = net, int(cast(Any, net).num_features)

        def head() -> nn.Sequential:
            hidden = [(features, width), (width, width)]
            parts = [nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()) for a, b in hidden]
            return nn.Sequential(*parts, nn.Linear(width, grid * grid))

        self.alpha, self.beta = head(), head()
        #: Running means of the log-concentrations, (2, G, G), in [0, 1) at the start; and that of the cost.
        self.register_buffer("running", torch.rand(2, grid, grid))
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Policy:
        """The averages stay in float32 at least: in bfloat16 a step of one percent is none."""
        kept = {name: getattr(self, name) for name in ("running", "baseline")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            now = getattr(self, name)
            if torch.finfo(now.dtype).bits < 32:
                setattr(self, name, value.to(now.device, torch.float32))
        return self

    def forward(self, image: Tensor) -> Tensor:
        """What the heads say of images (B, C, H, W), (2, B, G, G); at least float32."""
        if self.reduce > 1:
            image = F.avg_pool2d(image, self.reduce, ceil_mode=True)
        features = self.extractor(image.to(next(self.parameters()).dtype))
        said = torch.stack([self.alpha(features), self.beta(features)])
        said = said.view(2, len(image), self.grid, self.grid)
        return said if said.dtype == torch.float64 else said.float()

    def concentrations(self, said: Tensor) -> tuple[Tensor, Tensor]:
        """Log-concentrations of alpha and beta, (B, G, G) each: mostly the running average, and what was said."""
        raw = RUNNING * self.running[:, None].to(said) + (1 - RUNNING) * said
        bounded = raw + (raw.clamp(-LIMIT, LIMIT) - raw).detach()  # the gradient still leads back from the bound
        return bounded[0], bounded[1]

    @torch.no_grad()
    def learn(self, said: Tensor, cost: Tensor, world: int) -> None:
        """Move the running averages by what was said and what it cost, over all ranks."""
        sums = torch.cat([said.sum(1).flatten(), cost.sum().view(1).to(said), cost.new_tensor([len(cost)]).to(said)])
        if world > 1:
            dist.all_reduce(sums)
        means = (sums[:-1] / sums[-1]).to(self.running)
        self.running.lerp_(means[:-1].view_as(self.running), 1 - MOMENTUM)
        self.baseline.lerp_(means[-1], torch.where(self.steps == 0, 1.0, 1 - MOMENTUM).to(means))
        self.steps += 1


# ---------------------------------------------------------------------- the technique


class NoiseMask(Perturbation):
    """Multiplies each training image by a mask of its own, from a learned policy or drawn blindly.

    Off in validation and test. The policy is a part of checkpoints, under ``perturbations.noise_mask``; a checkpoint
    opens without it. Its cost of an image is the cross-entropy of what the network says of it, where the batch has
    labels and the network gives logits; else the batch's loss, for all its images.

    Args:
        kind: ``policy``; or the controls ``beta`` (each cell from Beta(alpha, beta)), ``gaussian`` (1 + std * normal)
            and ``cutout`` (a square of ``hole`` x ``hole`` cells is 0, the others 1).
        objective: of the policy, ``textbook`` or ``released``; see above.
        baseline: of textbook, ``ema`` of the costs, or ``leave_one_out``: the mean of the batch's other images (the
            average, where images have no costs of their own).
        adversarial: the policy looks for masks that make the loss large; of textbook.
        policy_weight: of the policy's loss. With SGD the policy learns at ``policy_weight * lr`` (released 0.01 / 0.1,
            but with a gradient that is spread over the cells; at 0.1 a textbook policy's masks collapse by chance).
            Adam divides it out again: there the policy learns at ``lr``.
        extractor: of the policy's features: ``small``, or a timm model (released: ``resnet10t``).
        reduce: the policy sees the image at this fraction of its size (released: 1).
        width: of the heads' hidden layers (released: 512).
        grid: cells along each side (released: 64, for 224 pixels).
        upsample: ``nearest`` (released) or ``bilinear``.
        blur_kernel: pixels of the Gaussian blur, odd; 0: none (released: 13).
        blur_sigma: its deviation in pixels (released: 6).
        alpha: of ``beta``.
        beta: of ``beta``.
        std: of ``gaussian``.
        hole: of ``cutout``.
        strength: 1: the mask; below it the mask's distance from 1 is so much smaller; 0: off.
        schedule: see :class:`callbacks.perturbation.Perturbation`.

    With a :class:`callbacks.report.Report` beside it (every run from the command line has one) it draws
    ``mask-examples.png``, the mean masks of each domain and class by epoch (``mask-domains.png``, ``mask-classes.png``)
    (the first 24) and, of a policy, reward and entropy (``mask-curves.png``). Beside FreeLB, whose step takes the mean
    of K gradients, the policy's, which comes with the last of them, counts one K-th.

    A module that has stages says by its attribute ``masked`` whether masks are wanted at the moment.

    Raises:
        ValueError: for a setting out of range, a batch without images.
    """

    site: ClassVar[str] = "data"
    zero: ClassVar = {"strength": 0.0}
    per_example: ClassVar = {}

    def __init__(
        self,
        kind: Kind = "policy",
        objective: Objective = "textbook",
        baseline: Literal["ema", "leave_one_out"] = "ema",
        adversarial: bool = False,
        policy_weight: float = 0.01,
        extractor: str = "small",
        reduce: int = 4,
        width: int = 128,
        grid: int = 8,
        upsample: Literal["nearest", "bilinear"] = "nearest",
        blur_kernel: int = 5,
        blur_sigma: float = 2.0,
        alpha: float = 2.0,
        beta: float = 2.0,
        std: float = 0.5,
        hole: int = 4,
        strength: float = 1.0,
        **schedule: Any,
    ) -> None:
        super().__init__(**schedule)
        for name, value, known in (
            ("kind", kind, ("policy", "beta", "gaussian", "cutout")),
            ("objective", objective, ("textbook", "released")),
            ("baseline", baseline, ("ema", "leave_one_out")),
            ("upsample", upsample, ("nearest", "bilinear")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, not '{value}'")
        if min(grid, reduce, width) < 1 or not 1 <= hole <= grid:
            raise ValueError("grid, reduce and width must be at least 1, hole lie between 1 and grid")
        if blur_kernel < 0 or (blur_kernel and blur_kernel % 2 == 0) or blur_sigma <= 0:
            raise ValueError(
                f"blur_kernel must be odd, or 0 for none, and blur_sigma positive, not {blur_kernel}, {blur_sigma}"
            )
        if min(alpha, beta) <= 0 or std < 0 or policy_weight < 0 or not 0 <= strength <= 1:
            raise ValueError(
                "alpha and beta must be positive, std and policy_weight not negative, strength lie in [0, 1]"
            )
        if adversarial and objective == "released":
            raise ValueError("adversarial is of the objective textbook")
        self.kind, self.objective, self.strength = kind, objective, strength
        self.baseline, self.adversarial, self.policy_weight = baseline, adversarial, policy_weight
        self.extractor, self.reduce, self.width = extractor, reduce, width
        self.grid, self.upsample = grid, upsample
        self.blur_kernel, self.blur_sigma = blur_kernel, blur_sigma
        self.alpha, self.beta, self.std, self.hole = alpha, beta, std, hole
        self._open: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # said, the two concentrations, the logit
        self._logits: Tensor | None = None
        self._put_back: Callable[[], None] | None = None
        #: For the plots: sums of this epoch's masks and their number, (domains + classes, G * G + 1); means by epoch.
        self._sums: Tensor | None = None
        self._epochs: list[tuple[int, Tensor]] = []
        self._curves: dict[str, list[tuple[int, float]]] = {}
        self._example: tuple[Tensor, Tensor, Tensor] | None = None

    # ------------------------------------------------------------------ hanging the policy on the module

    def attach(self, module: LightningModule) -> None:
        if self.kind != "policy" or self.strength == 0:
            return
        own = self.own(module)
        if self.name not in own:
            seed = run_seed() if self.seed is None else self.seed
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(fold_seed(seed, self.name, "policy"))
                example = module.example_input_array
                known = isinstance(example, Tensor) and example.dim() == 4
                chans = int(example.shape[1]) if known else int(module.hparams.get("in_chans", 3))  # type: ignore[union-attr]
                try:
                    policy = Policy(chans, self.grid, self.extractor, self.reduce, self.width)
                except RuntimeError as error:  # of timm, for an unknown name
                    raise ValueError(f"no policy extractor '{self.extractor}': {error}") from error
            weights = next(module.parameters())
            own[self.name] = policy.to(device_of(module), weights.dtype)
        if not module.trainer.training:
            return
        held = vars(module).get("training_step")
        original = module.training_step

        live = [True]

        def training_step(batch: Any, *args: Any, **more: Any) -> Any:
            self._logits = None
            output = original(batch, *args, **more)
            return self._with_policy(module, batch, output) if live else output

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self._logits = output.detach() if isinstance(output, Tensor) else None

        hook = module.register_forward_hook(keep)
        module.training_step = training_step  # type: ignore[method-assign]

        def put_back() -> None:
            hook.remove()
            live.clear()  # another technique may have wrapped it in turn, and keep it
            if vars(module).get("training_step") is not training_step:
                return
            if held is None:
                del module.training_step
            else:
                module.training_step = held  # type: ignore[method-assign]

        self._put_back = put_back

    def detach(self, module: LightningModule) -> None:
        if self._put_back is not None:
            self._put_back()
            self._put_back = None

    def active(self, trainer: Trainer) -> bool:
        wanted_now = getattr(trainer.lightning_module, "masked", True)
        return self.strength > 0 and bool(wanted_now) and super().active(trainer)

    # ------------------------------------------------------------------ a step

    def perturb(self, module: LightningModule, batch: Batch) -> None:
        image = batch.get("image")
        if not isinstance(image, Tensor) or image.dim() != 4 or not image.is_floating_point():
            raise ValueError(f"{type(self).__name__} masks images: the batch needs 'image', floats (B, C, H, W)")
        image = image.detach()
        mean = getattr(module, "mean", None)
        mean = mean if isinstance(mean, Tensor) and mean.numel() in (1, image.shape[1]) else image.new_tensor(0.5)
        mean = mean.to(image).view(1, -1, 1, 1)
        cells, probable = self._cells(module, image, mean)
        full = enlarge(cells, (image.shape[-2], image.shape[-1]), self.upsample, self.blur_kernel, self.blur_sigma).to(
            image
        )
        scale = 1 - self.strength * (1 - full)
        batch["image"] = mean + (image - mean) * scale
        self._collect(module, probable, batch)
        if self._example is None:
            self._example = image[:8], scale[:8], batch["image"][:8]

    def _cells(self, module: LightningModule, image: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Masks (B, G, G) of images, and what they are on average."""
        shape = (len(image), self.grid, self.grid)
        like = torch.empty(shape, device=image.device, dtype=torch.float32)
        if self.kind == "policy":
            policy = cast(Policy, self.own(module)[self.name])
            with torch.enable_grad():
                said = policy(image - mean)
                log_alpha, log_beta = policy.concentrations(said)
            logit = sample_mask(log_alpha, log_beta, self.row_seeds("mask", len(image)))
            self._open = said, log_alpha, log_beta, logit
            return logit.sigmoid(), (log_alpha - log_beta).detach().sigmoid()
        if self.kind == "beta":
            logs = [torch.full_like(like, math.log(c)) for c in (self.alpha, self.beta)]
            cells = sample_mask(logs[0], logs[1], self.row_seeds("mask", len(image))).sigmoid()
        elif self.kind == "gaussian":
            cells = 1 + self.std * self.rows("mask", like, "normal")
        else:
            corner = (self.rows("mask", like[:, 0, :1].expand(-1, 2).contiguous()) * (self.grid - self.hole + 1)).long()
            line = torch.arange(self.grid, device=image.device)
            inside = [(line >= corner[:, i, None]) & (line < corner[:, i, None] + self.hole) for i in (0, 1)]
            cells = 1 - (inside[0][:, :, None] & inside[1][:, None]).to(like)
        return cells, cells

    def _with_policy(self, module: LightningModule, batch: Any, output: Any) -> Any:
        """The step's output with the policy's loss in its gradient."""
        policy = cast(Policy, self.own(module)[self.name])
        loss = output["loss"] if isinstance(output, dict) else output
        if not isinstance(loss, Tensor):
            return output
        if self._open is None:  # no mask at this step: no gradient either, but DDP waits for one
            total = loss + 0.0 * sum(p.sum() for p in policy.parameters())
        else:
            said, *drawn = self._open
            cost, own_costs = self._cost(module, batch, loss)
            cost = cost.to(said)
            total = self._total(policy, loss, cost, own_costs, *drawn)
            self._log(module, drawn[0], drawn[1], cost)
            policy.learn(said.detach(), cost, self._world)
        return {**output, "loss": total} if isinstance(output, dict) else total

    def _total(
        self,
        policy: Policy,
        loss: Tensor,
        cost: Tensor,
        own_costs: bool,
        log_alpha: Tensor,
        log_beta: Tensor,
        logit: Tensor,
    ) -> Tensor:
        """The loss of the step, with the policy's in its gradient."""
        if self.objective == "released":
            factor = log_density(log_alpha, log_beta, logit).flatten(1).logsumexp(1).mean().detach()
            own = policy_loss(log_alpha, log_beta, logit, cost, objective="released")
            loss = loss * factor.to(loss)
        else:
            others = self.baseline == "leave_one_out" and own_costs and len(cost) > 1
            expected = leave_one_out(cost) if others else policy.baseline.to(cost)
            # of the first step there is no average: it teaches nothing
            advantage = torch.where(policy.steps > 0, cost - expected, torch.zeros_like(cost))
            advantage = -advantage if self.adversarial else advantage
            own = policy_loss(log_alpha, log_beta, logit, advantage)
        own = self.policy_weight * own
        return loss + (own - own.detach()).to(loss)  # the loss that is shown stays the network's

    def _cost(self, module: LightningModule, batch: Any, loss: Tensor) -> tuple[Tensor, bool]:
        """What each image cost, (B,), and whether that is its own cost and not the batch's."""
        assert self._open is not None
        size, logits = len(self._open[1]), self._logits
        label = batch.get("label") if isinstance(batch, dict) else None
        classes = module.hparams.get("num_classes")
        if (
            isinstance(label, Tensor)
            and label.shape == (size,)
            and not label.is_floating_point()
            and logits is not None
            and logits.shape == (size, classes)
        ):
            return F.cross_entropy(logits.float(), label, reduction="none", ignore_index=-1), True
        mean = loss.detach().clone()
        if self._world > 1:  # as one process would, with the batches of all
            dist.all_reduce(mean)
            mean /= self._world
        return mean.expand(size), False

    def _log(self, module: LightningModule, log_alpha: Tensor, log_beta: Tensor, cost: Tensor) -> None:
        with torch.no_grad():
            alpha, beta = log_alpha.detach().exp(), log_beta.detach().exp()
            entropy = Beta(alpha, beta, validate_args=False).entropy().mean()
            found = {"reward": -cost.mean(), "entropy": entropy, "mean": (alpha / (alpha + beta)).mean()}
        for name, value in found.items():
            module.log(f"mask/{name}", value, on_step=False, on_epoch=True, batch_size=len(cost), sync_dist=True)

    def restore(self, module: LightningModule) -> None:
        self._open = self._logits = None

    # ------------------------------------------------------------------ pictures

    def state_dict(self) -> dict[str, Any]:
        sums = None if self._sums is None else self._sums.clone()
        if sums is not None and self._world > 1:  # called on all ranks
            dist.all_reduce(sums)
        return {"sums": None if sums is None else sums.cpu(), "epochs": self._epochs, "curves": self._curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        sums: Tensor | None = state_dict["sums"]
        if sums is not None and sums.shape[1] == self.grid**2 + 1:
            self._sums = sums.clone() if self._rank == 0 else torch.zeros_like(sums)
        # of another grid they can't stand beside these
        self._epochs = [(epoch, means) for epoch, means in state_dict["epochs"] if means.shape[1] == self.grid]
        self._curves = state_dict["curves"]

    def _collect(self, module: LightningModule, mask: Tensor, batch: Batch) -> None:
        """Add masks (B, G, G) to the sums of their domain and their class."""
        flat = mask.detach().flatten(1).float()
        flat = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)
        domains, classes = _names(module)
        if self._sums is None:
            self._sums = flat.new_zeros(len(domains) + len(classes), flat.shape[1])
        self._sums = self._sums.to(flat.device)
        first = 0
        for entry, names in (("domain", domains), ("label", classes)):
            value = batch.get(entry)
            if isinstance(value, Tensor) and value.shape == (len(mask),) and not value.is_floating_point():
                known = ((value >= 0) & (value < len(names))).to(flat)
                self._sums.index_add_(0, first + value.clamp(0, len(names) - 1), flat * known[:, None])
            first += len(names)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        sums, self._sums = self._sums, None
        example, self._example = self._example, None
        if sums is None:
            return
        if self._world > 1:
            dist.all_reduce(sums)
        side = math.isqrt(sums.shape[1] - 1)
        means = (sums[:, :-1] / sums[:, -1:]).view(-1, side, side).cpu()  # nan where there was no image
        self._epochs.append((trainer.current_epoch + 1, means))
        if len(self._epochs) > 2 * COLUMNS:
            self._epochs = self._epochs[:-1:2] + self._epochs[-1:]
        metrics = trainer.callback_metrics  # read on all ranks: that reduces those that are synced
        for key in ("mask/reward", "mask/entropy"):
            if key in metrics:
                self._curves.setdefault(key, []).append((trainer.current_epoch + 1, float(metrics[key])))
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it dynamically
        if not wanted(trainer) or not any(isinstance(c, Report) for c in callbacks):
            return
        if example is not None:
            save_figure(trainer, "mask-examples", draw_examples(*example))
        domains, classes = _names(pl_module)
        for name, names, first in (("mask-domains", domains, 0), ("mask-classes", classes, len(domains))):
            kept = [(epoch, means[first : first + len(names)]) for epoch, means in self._epochs]
            save_figure(trainer, name, draw_means(kept, names))
        if self._curves:
            save_figure(trainer, "mask-curves", draw_learning(self._curves))


def _names(module: nn.Module) -> tuple[list[str], list[str]]:
    """Names of a module's domains and of its first classes."""
    domains, classes = (list(getattr(module, name, None) or ["all"]) for name in ("domain_names", "class_names"))
    return domains, classes[:ROWS]


def draw_examples(images: Tensor, masks: Tensor, masked: Tensor) -> Figure:
    """Images (N, C, H, W), their masks (N, 1, H, W), and the images under them."""
    figure = new_figure(1.1 * len(images), 3.6)
    axes = figure.subplots(3, len(images), squeeze=False)
    for row, (what, values) in enumerate((("image", images), ("mask", masks), ("what the step saw", masked))):
        for axis, value in zip(axes[row], values.detach().float().cpu(), strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if what == "mask":
                axis.imshow(value[0].numpy(), cmap="gray", vmin=0, vmax=max(1.0, float(masks.max())))
            else:
                colours = value.clamp(0, 1) if len(value) in (1, 3) else value[:1].clamp(0, 1)
                axis.imshow(colours.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axes[row][0].set_ylabel(what, fontsize=8)
    figure.suptitle("masks of the epoch's first step", fontsize=9)
    return figure


def draw_means(epochs: list[tuple[int, Tensor]], names: list[str]) -> Figure:
    """Mean masks, each (names, G, G), a column for an epoch and a row for a name; grey where there was no image."""
    chosen = sorted({round(i * (len(epochs) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
    shown = [epochs[i] for i in chosen]
    figure = new_figure(0.85 * len(shown) + 2.0, 0.8 * len(names) + 0.9)
    axes = figure.subplots(len(names), len(shown), squeeze=False)
    values = torch.stack([means for _, means in shown])
    known = values[values.isfinite()]
    low, high = (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)
    for column, (epoch, means) in enumerate(shown):
        for row, name in enumerate(names):
            axis = axes[row][column]
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_facecolor("0.8")
            drawn = axis.imshow(means[row].numpy(), vmin=low, vmax=high, cmap="viridis")
            if row == 0:
                axis.set_title(f"epoch {epoch}", fontsize=7)
            if column == 0:
                axis.set_ylabel(name if len(name) < 18 else f"{name[:17]}…", fontsize=7, rotation=0, ha="right")
    figure.colorbar(drawn, ax=axes, shrink=min(1.0, 3 / len(names)), label="mean mask")
    return figure


def draw_learning(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """The policy's reward (minus the cost) and the entropy of a cell's distribution, over the epochs."""
    figure = new_figure(4.2 * len(curves), 3.0)
    for axis, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True), "o-", markersize=3)
        axis.set_title(name.removeprefix("mask/") + (" (minus the cost)" if name.endswith("reward") else " of a cell"))
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure
