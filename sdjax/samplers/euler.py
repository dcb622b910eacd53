"""Euler's method on the probability-flow ODE, and its ancestral variant."""

from __future__ import annotations

import math

from sdjax.samplers import options
from sdjax.samplers.run import Level, Run, Value


def euler(run: Run, x: Value) -> Value:
    """Algorithm 2 of Karras et al. 2022, first order and without churn."""
    for now, after in run.steps():
        denoised = run.model(x, now).x0
        d = (x - denoised) / now.sigma
        x = run.end_step(x + (after.sigma - now.sigma) * d)
    return x


def euler_ancestral(run: Run, x: Value, *, eta: float = 1.0, s_noise: float = 1.0) -> Value:
    """Euler steps further down than the next noise level, and noise back up to it (k-diffusion).

    Args:
      eta: share of the posterior's noise, 0 to 1; 0 is Euler's method.
      s_noise: factor of the noise that is added.
    """
    for now, after in run.steps():
        down, up = ancestral(now, after, eta, s_noise)
        denoised = run.model(x, now).x0
        d = (x - denoised) / now.sigma
        x = run.end_step(run.noised(x + (down - now.sigma) * d, up, now, after))
    return x


def ancestral(now: Level, after: Level, eta: float, s_noise: float) -> tuple[float, float]:
    """The sigma to go down to, and the noise that leads up from there to the next level: the posterior's variance."""
    options.number("eta", eta, 0, 1)
    options.number("s_noise", s_noise, 0)
    up = eta * after.sigma * math.sqrt(1 - (after.sigma / now.sigma) ** 2)
    return math.sqrt(after.sigma**2 - up**2), s_noise * up
