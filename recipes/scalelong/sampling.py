"""From noise to images: noise levels, and the samplers of diffusers on any model that predicts the noise.

Everything is said in terms of sigma, the noise's deviation beside an image of scale one: a *variance-preserving*
state is ``x = (image + sigma * noise) / sqrt(1 + sigma ** 2)``. The VP-SDE of the paper (beta from 0.1 to 20) and EDM's
levels (0.002 to 80) are two tables of 1,000 such levels; diffusers' schedulers take them as ``trained_betas``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Sampler = Literal["ddim", "dpm++", "heun", "euler_maruyama"]
Objective = Literal["ddpm", "edm"]
#: Slope of the VP-SDE's noise at t = 0 and 1 (Song et al., arXiv 2011.13456).
BETA = (0.1, 20.0)
#: EDM's smallest and largest level and the exponent between them (Karras et al., arXiv 2206.00364, table 1).
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
#: Levels of the tables.
LEVELS = 1000


def vp_alpha_bar(t: Tensor) -> Tensor:
    """Share of the image's variance in the VP-SDE's state at times t in [0, 1]."""
    return torch.exp(-(BETA[0] * t + (BETA[1] - BETA[0]) * t**2 / 2))


def vp_sigma(t: Tensor) -> Tensor:
    """sigma of the VP-SDE at times t in (0, 1]."""
    return (1 / vp_alpha_bar(t) - 1).sqrt()


def vp_time(sigma: Tensor) -> Tensor:
    """The time at which the VP-SDE has this sigma: the inverse of :func:`vp_sigma`."""
    grown = torch.log1p(sigma**2)
    return 2 * grown / (BETA[0] + (BETA[0] ** 2 + 2 * (BETA[1] - BETA[0]) * grown).sqrt())


def levels(objective: Objective) -> Tensor:
    """The table of sigmas, rising, float64 (1000,): of the VP-SDE at t = 1/1000 ... 1, or EDM's."""
    if objective == "ddpm":
        return vp_sigma(torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS)
    ends = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return torch.linspace(*ends, LEVELS, dtype=torch.float64) ** RHO


def betas(objective: Objective) -> Tensor:
    """What diffusers' schedulers take as ``trained_betas``, float64 (1000,)."""
    alpha_bar = 1 / (1 + levels(objective) ** 2)
    return 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])


def scheduler(sampler: Sampler, steps: int, objective: Objective) -> Any:
    """A scheduler of diffusers, set to so many steps.

    Raises:
        ValueError: without diffusers, for an unknown sampler, or ``euler_maruyama`` with EDM's levels.
    """
    try:
        import diffusers
    except ImportError:
        raise ValueError('sampling needs diffusers: pip install -e ".[diffusion]"') from None
    if steps < 1:
        raise ValueError(f"sampling takes at least one step, not {steps}")
    common = {"num_train_timesteps": LEVELS, "trained_betas": betas(objective).tolist(), "prediction_type": "epsilon"}
    made: Any
    if sampler == "ddim":
        made = diffusers.DDIMScheduler(**common, clip_sample=False, timestep_spacing="trailing")
    elif sampler == "dpm++":
        made = diffusers.DPMSolverMultistepScheduler(**common, solver_order=2, timestep_spacing="trailing")
    elif sampler == "heun":
        made = diffusers.HeunDiscreteScheduler(**common, timestep_spacing="linspace")
    elif sampler == "euler_maruyama":
        if objective != "ddpm":
            raise ValueError("euler_maruyama is of the VP-SDE: with edm use heun, dpm++ or ddim")
        from diffusers.schedulers import ScoreSdeVpScheduler

        made = ScoreSdeVpScheduler(num_train_timesteps=LEVELS, beta_min=BETA[0], beta_max=BETA[1])
    else:
        raise ValueError(f"sampler must be ddim, dpm++, heun or euler_maruyama, not '{sampler}'")
    made.set_timesteps(steps)
    return made


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    sampler: Sampler,
    steps: int,
    objective: Objective,
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """Images (B, C, H, W) from noise; float32, whatever the model computes in.

    Args:
        predict: noise in a state: takes (B, C, H, W), which preserves variance, and sigma, a scalar tensor.
        start: standard normal (B, C, H, W).
        sampler: ``ddim``, ``dpm++`` (second order), ``heun`` (twice as many evaluations), ``euler_maruyama`` (draws).
        steps: of the sampler.
        objective: whose levels.
        generators: one for each example, of ``euler_maruyama``; so its noise doesn't depend on the batch.
    """
    schedule = scheduler(sampler, steps, objective)
    x = start.float()
    if sampler == "euler_maruyama":
        mean = x
        for t in schedule.timesteps:
            noise = predict(x, vp_sigma(t)).float()
            x, mean = schedule.step_pred(noise, x, t, generator=list(generators) or None)
        return mean  # of the last step, without its noise
    if sampler == "heun":
        x = x * schedule.init_noise_sigma
    for t in schedule.timesteps:
        state = schedule.scale_model_input(x, t)
        if sampler == "heun":
            sigma = schedule.sigmas[schedule.step_index]
        else:
            alpha_bar = schedule.alphas_cumprod[int(t)]
            sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
        x = schedule.step(predict(state, sigma).float(), t, x).prev_sample
    return x


def clip_denoised(noise: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The noise predicted in states (B, C, H, W) that preserve variance, so that the image it leaves is in [-1, 1].

    Near pure noise a small error of the noise is a large one of the image: ``sqrt(1 + sigma ** 2) x - sigma noise``.
    (Ho et al., arXiv 2006.11239, clip it likewise.)

    Args:
        noise: as predicted.
        x: the states.
        sigma: their level, a positive scalar.
    """
    scaled = (1 + sigma**2).sqrt() * x
    return (scaled - (scaled - sigma * noise).clamp(-1, 1)) / sigma


def preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EDM's c_skip, c_out, c_in and c_noise (table 1) of sigmas of any shape."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def golden(index: Tensor) -> Tensor:
    """Numbers in (0, 1), float32, spread evenly over any run of consecutive indices (B,)."""
    return ((index.double() + 0.5) * ((math.sqrt(5) - 1) / 2) % 1).clamp(1e-4, 1 - 1e-4).float()
