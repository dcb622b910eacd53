"""Heun's method on the probability-flow ODE, with churn, and with restarts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from sdjax.samplers import options
from sdjax.samplers.run import Level, Run, Value


def heun(
    run: Run,
    x: Value,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
) -> Value:
    """Algorithm 2 of Karras et al. 2022: the trapezoidal rule, after going back up a little in noise.

    Args:
      s_churn: how far up, over all steps together; 0 is the deterministic method.
      s_tmin, s_tmax: the sigmas between which there is churn; None is no upper one.
      s_noise: factor of the noise that is added.
    """
    for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_noise", s_noise)):
        options.number(name, value, 0)
    if s_tmax is not None:
        options.number("s_tmax", s_tmax, 0)
    for now, after in run.steps():
        if s_churn > 0 and s_tmin <= now.sigma and (s_tmax is None or now.sigma <= s_tmax):
            gamma = min(s_churn / run.num_inference_steps, math.sqrt(2) - 1)
            hat = run.level(now.sigma * (1 + gamma))
            x = x + math.sqrt(hat.sigma**2 - now.sigma**2) * s_noise * run.noise(hat, now)
            now = hat
        x = run.end_step(_trapezoid(run, x, now, after))
    return x


def restart(run: Run, x: Value, *, restarts: tuple[float, ...] = (0.1, 2.0, 9, 2)) -> Value:
    """Restart sampling (Xu et al. 2023, Algorithm 1): Heun's method, which goes back up in noise and down again.

    Args:
      restarts: low, high, steps, times, and again for each further one: on first reaching a sigma of `low` or less,
        noise is added up to `high`, and so many steps, even in sigma^(1/7), go down again; as often as `times` says.
    """
    waiting = sorted(_quadruples(restarts), reverse=True)
    for now, after in run.steps():
        x = _trapezoid(run, x, now, after)
        while waiting and after.sigma <= waiting[0][0] < now.sigma:
            _, high, steps, times = waiting.pop(0)
            if not 0 < after.sigma < high:
                continue
            for _ in range(times):
                top = run.level(high)
                x = x + math.sqrt(top.sigma**2 - after.sigma**2) * run.noise(top, after)
                for down, to in _between(run, top, after, steps):
                    x = _trapezoid(run, x, down, to)
        x = run.end_step(x)
    return x


def _quadruples(restarts: tuple[float, ...]) -> list[tuple[float, float, int, int]]:
    if not isinstance(restarts, tuple) or len(restarts) % 4:
        raise ValueError(f"restarts: expected low, high, steps, times for each, got {restarts!r}")
    found = [restarts[i : i + 4] for i in range(0, len(restarts), 4)]
    for low, high, steps, times in found:
        options.number("restarts: low", low, 0)
        options.number("restarts: high", high, 0)
        if not 0 < low < high:
            raise ValueError(f"restarts: expected 0 < low < high, got {low!r} and {high!r}")
        options.whole("restarts: steps", steps, 1, 1000)
        options.whole("restarts: times", times, 1, 1000)
    return [(low, high, int(steps), int(times)) for low, high, steps, times in found]


def _trapezoid(run: Run, x: Value, now: Level, after: Level) -> Value:
    """From one noise level to the next: the mean of the slopes at both ends, but the first alone down to none."""
    d = (x - run.model(x, now).x0) / now.sigma
    euler = x + (after.sigma - now.sigma) * d
    if after.sigma == 0:
        return euler
    d_after = (euler - run.model(euler, after).x0) / after.sigma
    return x + (after.sigma - now.sigma) * 0.5 * (d + d_after)


def _between(run: Run, top: Level, bottom: Level, steps: int) -> Iterable[tuple[Level, Level]]:
    """The levels of `steps` steps from the top to the bottom, even in sigma^(1/7)."""
    ends = top.sigma ** (1 / 7), bottom.sigma ** (1 / 7)
    inner = [run.level((ends[0] + i / steps * (ends[1] - ends[0])) ** 7) for i in range(1, steps)]
    levels = [top, *inner, bottom]
    return itertools.pairwise(levels)
