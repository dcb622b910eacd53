"""ER-SDE: solvers of a family of reverse-time SDEs, of which one with little noise at the end is taken."""

from __future__ import annotations

import math

import numpy as np

from sdjax.samplers import options
from sdjax.samplers.run import Run, Value

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)


def er_sde(run: Run, x: Value, *, order: int = 3, s_noise: float = 1.0) -> Value:
    """The extended reverse-time SDE solver (Cui et al. 2023, Algorithm 3, VE ER-SDE-Solver-3).

    Args:
      order: 1 to 3, the derivatives of x0 that are used, plus one; fewer at the start.
      s_noise: factor of the noise.
    """
    options.whole("order", order, 1, 3)
    options.number("s_noise", s_noise, 0)
    past: list[tuple[float, Value]] = []  # sigmas and x0, the newest first
    for now, after in run.steps():
        past = [(now.sigma, run.model(x, now).x0), *past[: order - 1]]
        if after.sigma == 0:
            x = run.end_step(past[0][1])
            continue
        ratio = noise_scale(after.sigma) / noise_scale(now.sigma)
        x = ratio * x + (1 - ratio) * past[0][1]
        first, second = _integrals(now.sigma, after.sigma)
        if len(past) > 1:
            slope = (past[0][1] - past[1][1]) / (past[0][0] - past[1][0])
            x = x + first * slope
        if len(past) > 2:
            before = (past[1][1] - past[2][1]) / (past[1][0] - past[2][0])
            x = x + second * ((slope - before) / (0.5 * (past[0][0] - past[2][0])))
        variance = after.sigma**2 - (now.sigma * ratio) ** 2
        x = run.end_step(run.noised(x, s_noise * math.sqrt(max(variance, 0.0)), now, after))
    return x


def noise_scale(sigma: float) -> float:
    """phi of the paper's section 4 (its "ER-SDE 5"): how latents shrink, sigma itself being the ODE."""
    return sigma * (math.exp(sigma**0.3) + 10)


def _integrals(start: float, stop: float) -> tuple[float, float]:
    """What the first and second derivative of x0 in sigma add up to over a step (Cui et al. 2023, eq. 19)."""
    # Gauss' rule in the logarithm of sigma, where the integrands are nearly straight.
    half = 0.5 * math.log(start / stop)
    sigmas = stop * np.exp(half * (1 + _NODES))
    density = half * _WEIGHTS * sigmas / np.array([noise_scale(sigma) for sigma in sigmas])
    there, length = noise_scale(stop), stop - start
    return length + there * density.sum(), 0.5 * length**2 + there * (density * (sigmas - start)).sum()
