"""Exponential integrators: the linear part of the ODE or SDE exactly, a polynomial through the model's outputs.

In lambda, half the logarithm of the signal-to-noise ratio, the ODE's solution from s to t is (Lu et al. 2022b, eq. 9)

    x_t = sigma_t / sigma_s x_s + alpha_t ∫ exp(lambda - lambda_t) x0(lambda) dlambda,

and the same with alpha and sigma exchanged for the noise in place of x0 (Lu et al. 2022a, eq. 3.4). DPM-Solver, DEIS,
UniPC, SA-Solver and RES differ in which outputs the polynomial goes through, and in how the lowest orders round it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sdjax.samplers.run import Level, Value


class Integral(NamedTuple):
    """The exact solution over one step, x_t = keep x_s + sum of moments[k] c_k + noise n.

    Here c_k are the coefficients of the output as a polynomial of u, which runs from 0 at s to 1 at t.
    """

    keep: float
    moments: tuple[float, ...]
    noise: float = 0.0


def of_data(s: Level, t: Level, eta: float = 0.0) -> Integral:
    """For x0; with eta above 0 in the reverse-time SDE with that share of its noise (Xue et al. 2023, their tau²)."""
    h = t.lam - s.lam
    if t.sigma == 0:
        return Integral(0.0, (t.alpha,) * 4)
    noise = t.std * math.sqrt(-math.expm1(-2 * eta * h))
    return Integral(t.std / s.std * math.exp(-eta * h), _moments(-t.alpha, -(1 + eta) * h), noise)


def of_noise(s: Level, t: Level) -> Integral:
    """For the noise. Down to no noise only the first moment exists."""
    if t.sigma == 0:
        return Integral(t.alpha / s.alpha, (-s.sigma * t.alpha,))
    return Integral(t.alpha / s.alpha, _moments(-t.std, t.lam - s.lam))


def _moments(scale: float, z: float) -> tuple[float, ...]:
    """scale · z ∫ exp(z (1 - u)) u^k du over [0, 1], for k = 0 to 3, by parts."""
    if abs(z) < 0.02:  # where the recursion would lose its digits: the series of the exponential
        term = [scale * z / (k + 1) for k in range(4)]
        total = list(term)
        for n in range(1, 8):
            term = [value * z / (k + 1 + n) for k, value in enumerate(term)]
            total = [a + b for a, b in zip(total, term, strict=True)]
        return tuple(total)
    moments = [math.expm1(z)]
    for k in range(1, 4):
        moments.append(k * moments[-1] / z - 1)
    return tuple(scale * moment for moment in moments)


def interpolated(outputs: Sequence[tuple[Level, Value]], s: Level, t: Level, moments: Sequence[float]) -> Value:
    """The integral of the polynomial through outputs at their noise levels: sum of moments[k] c_k."""
    count = len(outputs)
    if count == 1:
        return moments[0] * outputs[0][1]
    u = np.array([(level.lam - s.lam) / (t.lam - s.lam) for level, _ in outputs])
    weights = np.linalg.solve(u ** np.arange(count)[:, None], moments[:count])
    total = weights[0] * outputs[0][1]
    for weight, (_, value) in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * value
    return total


def by_difference(outputs: Sequence[tuple[Level, Value]], s: Level, t: Level, first: float, second: float) -> Value:
    """first c_0 + second c_1 of the line through two outputs: where a method rounds its second moment."""
    (start, value), (other, there) = outputs
    slope = (t.lam - s.lam) / (other.lam - start.lam) * (there - value)
    return first * value + second * slope
