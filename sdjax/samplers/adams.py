"""Linear multistep methods on the probability-flow ODE: slopes of past steps in place of more calls of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sdjax.samplers import options
from sdjax.samplers.ddim import alpha_bar_after, transfer
from sdjax.samplers.run import Level, Run, Value

# Adams and Bashforth's weights of the newest and the older slopes, where all steps are equally long.
_WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def lms(run: Run, x: Value, *, order: int = 4) -> Value:
    """Adams-Bashforth in sigma, with the steps as long as they are (k-diffusion's LMS).

    Args:
      order: 1 to 4, the number of slopes; fewer at the start.
    """
    options.whole("order", order, 1, 4)
    past: list[tuple[float, Value]] = []  # sigmas and slopes, the newest first
    for now, after in run.steps():
        denoised = run.model(x, now).x0
        past = [(now.sigma, (x - denoised) / now.sigma), *past[: order - 1]]
        weights = integrals([sigma for sigma, _ in past], now.sigma, after.sigma)
        for weight, (_, slope) in zip(weights, past, strict=True):
            x = x + weight * slope
        x = run.end_step(x)
    return x


def ipndm(run: Run, x: Value, *, order: int = 4) -> Value:
    """Improved PNDM (Zhang & Chen 2022, appendix H; k-diffusion's iPNDM): Adams-Bashforth as if steps were equal.

    Args:
      order: 1 to 4, the number of slopes; fewer at the start.
    """
    options.whole("order", order, 1, 4)
    past: list[Value] = []
    for now, after in run.steps():
        denoised = run.model(x, now).x0
        past = [(x - denoised) / now.sigma, *past[: order - 1]]
        x = run.end_step(x + (after.sigma - now.sigma) * _combined(past))
    return x


def plms(run: Run, x: Value, *, set_alpha_to_one: bool = False) -> Value:
    """Pseudo linear multistep (Liu et al. 2022, eq. 12, without the Runge-Kutta start): Stable Diffusion's first.

    In the first step the slope is the mean of both its ends', so that a run of n steps calls the model n + 1 times.

    Args:
      set_alpha_to_one: as for `ddim`.
    """
    options.flag("set_alpha_to_one", set_alpha_to_one)
    alphas_cumprod = run.schedule.alphas_cumprod
    past: list[Value] = []
    for now, after in run.steps():
        epsilon = run.model(x, now).epsilon
        below = alpha_bar_after(run, now, after, set_alpha_to_one)
        if past or run.remaining == 1:
            past = [epsilon, *past[:3]]
            x = transfer(x, _combined(past), now.alpha_bar, below)
        else:
            past = [epsilon]
            there = run.model(transfer(x, epsilon, now.alpha_bar, below), after).epsilon
            # As diffusers: of its spacings between the next point and a stride above it, also where strides are uneven.
            above = alphas_cumprod[int(after.time) + run.stride] if run.strided else now.alpha_bar
            x = transfer(x, 0.5 * (epsilon + there), above, after.alpha_bar)
        x = run.end_step(x)
    return x


def pndm(run: Run, x: Value, *, set_alpha_to_one: bool = False) -> Value:
    """Pseudo numerical methods (Liu et al. 2022, Algorithm 2): three Runge-Kutta steps, then linear multistep.

    Args:
      set_alpha_to_one: as for `ddim`.
    """
    options.flag("set_alpha_to_one", set_alpha_to_one)
    past: list[Value] = []
    for number, (now, after) in enumerate(run.steps()):
        first = run.model(x, now).epsilon
        past = [first, *past[:3]]
        if number >= 3 or run.remaining == 1:
            below = alpha_bar_after(run, now, after, set_alpha_to_one)
            x = transfer(x, _combined(past), now.alpha_bar, below)
        else:
            x = transfer(x, _runge_kutta(run, x, now, after, first), now.alpha_bar, after.alpha_bar)
        x = run.end_step(x)
    return x


def _runge_kutta(run: Run, x: Value, now: Level, after: Level, first: Value) -> Value:
    """The slope of the classical fourth-order method, from the first of its four (Liu et al. 2022, eq. 13)."""
    stride = run.stride if run.strided else int(now.time - after.time)
    time = int(after.time) + stride // 2
    middle = Level(time, run.schedule.sigmas[time])
    second = run.model(transfer(x, first, now.alpha_bar, middle.alpha_bar), middle).epsilon
    third = run.model(transfer(x, second, now.alpha_bar, middle.alpha_bar), middle).epsilon
    fourth = run.model(transfer(x, third, now.alpha_bar, after.alpha_bar), after).epsilon
    return (first + 2 * second + 2 * third + fourth) / 6


def integrals(points: Sequence[float], start: float, stop: float) -> np.ndarray:
    """Weights of values at these points in the integral from start to stop of the polynomial through them.

    Solved from their moments, in units of the interval: a polynomial's powers must come out exactly.
    """
    length = stop - start
    u = (np.asarray(points) - start) / length
    powers = np.arange(len(u))
    return length * np.linalg.solve(u ** powers[:, None], 1.0 / (powers + 1))


def _combined(past: Sequence[Value]) -> Value:
    """The slope that Adams and Bashforth make of past ones, the newest first."""
    weights = _WEIGHTS[len(past) - 1]
    total = weights[0] * past[0]
    for weight, slope in zip(weights[1:], past[1:], strict=True):
        total = total + weight * slope
    return total
