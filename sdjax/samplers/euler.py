"""Euler's method on the probability-flow ODE, and its ancestral variant."""

from __future__ import annotations

import math

from sdjax.samplers.run import Run, Value


def euler(run: Run, x: Value) -> Value:
    """Algorithm 2 of Karras et al. 2022, first order and without churn."""
    for now, after in run.steps():
        denoised = run.model(x, now).x0
        d = (x - denoised) / now.sigma
        x = run.end_step(x + (after.sigma - now.sigma) * d)
    return x


def euler_ancestral(run: Run, x: Value) -> Value:
    """Euler steps further down than the next noise level, and noise back up to it (k-diffusion)."""
    for now, after in run.steps():
        up = after.sigma * math.sqrt(1 - (after.sigma / now.sigma) ** 2)
        down = math.sqrt(after.sigma**2 - up**2)
        denoised = run.model(x, now).x0
        d = (x - denoised) / now.sigma
        x = run.end_step(x + (down - now.sigma) * d + up * run.noise(now, after))
    return x
