"""DPM-Solver++ with two calls of the model in a step, and noise: k-diffusion's DPM++ 2S a and DPM++ SDE."""

from __future__ import annotations

import math

from sdjax.samplers import options
from sdjax.samplers.euler import ancestral
from sdjax.samplers.run import Run, Value


def dpmpp_2s_ancestral(run: Run, x: Value, *, eta: float = 1.0, s_noise: float = 1.0) -> Value:
    """DPM-Solver++ 2S (Lu et al. 2022b, Algorithm 1, r = 1/2) to below the next noise level, and noise back up to it.

    Args:
      eta, s_noise: as for `euler_ancestral`.
    """
    for now, after in run.steps():
        down, up = ancestral(now, after, eta, s_noise)
        denoised = run.model(x, now).x0
        if down > 0:
            middle = run.level(math.sqrt(now.sigma * down))
            denoised = run.model(_toward(x, denoised, now.sigma, middle.sigma), middle).x0
        x = _toward(x, denoised, now.sigma, down)
        x = run.end_step(run.noised(x, up, now, after))
    return x


def dpmpp_sde(run: Run, x: Value, *, r: float = 0.5, eta: float = 1.0, s_noise: float = 1.0) -> Value:
    """DPM-Solver++ for the SDE with a call of the model in between (k-diffusion's DPM++ SDE).

    Both noises of a step belong to one Brownian motion in sigma: the whole step's is that up to the middle, and a fresh
    one from there.

    Args:
      r: where in lambda the middle lies, 0 to 1 exclusive.
      eta, s_noise: as for `euler_ancestral`.
    """
    options.number("r", r, 1e-3, 1 - 1e-3)
    for now, after in run.steps():
        down, up = ancestral(now, after, eta, s_noise)
        denoised = run.model(x, now).x0
        if after.sigma > 0:
            middle = run.level(now.sigma ** (1 - r) * after.sigma**r)
            half_down, half_up = ancestral(now, middle, eta, s_noise)
            half = _toward(x, denoised, now.sigma, half_down)
            if half_up:
                first = run.noise(now, middle)
                half = half + half_up * first
            there = run.model(half, middle).x0
            denoised = (1 - 1 / (2 * r)) * denoised + 1 / (2 * r) * there
            x = _toward(x, denoised, now.sigma, down)
            if up:
                share = (now.sigma - middle.sigma) / (now.sigma - after.sigma)
                x = x + up * (math.sqrt(share) * first + math.sqrt(1 - share) * run.noise(middle, after))
        else:
            x = denoised
        x = run.end_step(x)
    return x


def _toward(x: Value, denoised: Value, sigma: float, to: float) -> Value:
    """The ODE's solution from one sigma to another where the denoised latents stay the same."""
    return to / sigma * x + (1 - to / sigma) * denoised
