"""The midpoint method in the logarithm of sigma, and its ancestral variant."""

from __future__ import annotations

import math

from sdjax.samplers.euler import ancestral
from sdjax.samplers.run import Level, Run, Value


def dpm2(run: Run, x: Value) -> Value:
    """DPM-Solver-2 (Lu et al. 2022, Algorithm 1) as Karras et al. 2022 recast it; k-diffusion's DPM2."""
    for now, after in run.steps():
        x = run.end_step(_midpoint(run, x, now, after.sigma))
    return x


def dpm2_ancestral(run: Run, x: Value, *, eta: float = 1.0, s_noise: float = 1.0) -> Value:
    """The same down to below the next noise level, and noise back up to it (k-diffusion).

    Args:
      eta, s_noise: as for `euler_ancestral`.
    """
    for now, after in run.steps():
        down, up = ancestral(now, after, eta, s_noise)
        x = _midpoint(run, x, now, down)
        x = run.end_step(run.noised(x, up, now, after))
    return x


def _midpoint(run: Run, x: Value, now: Level, sigma: float) -> Value:
    d = (x - run.model(x, now).x0) / now.sigma
    if sigma == 0:
        return x - now.sigma * d
    middle = run.level(math.sqrt(now.sigma * sigma))
    half = x + (middle.sigma - now.sigma) * d
    d_middle = (half - run.model(half, middle).x0) / middle.sigma
    return x + (sigma - now.sigma) * d_middle
