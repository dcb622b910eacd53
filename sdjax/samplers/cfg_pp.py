"""CFG++ (Chung et al. 2024): the guided picture but the unguided noise, with guidance scales between 0 and 1."""

from __future__ import annotations

import math

from sdjax.samplers import options
from sdjax.samplers.ddim import alpha_bar_after
from sdjax.samplers.euler import ancestral
from sdjax.samplers.run import Level, Run, Value


def ddim_cfg_pp(run: Run, x: Value, *, set_alpha_to_one: bool = False) -> Value:
    """DDIM with CFG++ (Chung et al. 2024, Algorithm 2).

    Args:
      set_alpha_to_one: as for `ddim`.
    """
    options.flag("set_alpha_to_one", set_alpha_to_one)
    for now, after in run.steps():
        alpha_bar = alpha_bar_after(run, now, after, set_alpha_to_one)
        output = run.model(x, now)
        x = run.end_step(math.sqrt(alpha_bar) * output.x0 + math.sqrt(1 - alpha_bar) * output.unguided_epsilon)
    return x


def euler_cfg_pp(run: Run, x: Value) -> Value:
    """Euler's method with CFG++."""
    return euler_ancestral_cfg_pp(run, x, eta=0.0)


def euler_ancestral_cfg_pp(run: Run, x: Value, *, eta: float = 1.0, s_noise: float = 1.0) -> Value:
    """Euler ancestral with CFG++.

    Args:
      eta, s_noise: as for `euler_ancestral`.
    """
    for now, after in run.steps():
        down, up = ancestral(now, after, eta, s_noise)
        output = run.model(x, now)
        d = (x - output.unguided_x0) / now.sigma
        x = output.x0 + down * d
        x = run.end_step(run.noised(x, up, now, after))
    return x


def dpmpp_2m_cfg_pp(run: Run, x: Value) -> Value:
    """DPM++ 2M with CFG++ (Chung et al. 2024, Algorithm 5)."""
    past: list[tuple[Level, Value]] = []
    for now, after in run.steps():
        output = run.model(x, now)
        ratio = after.sigma / now.sigma
        d = x - output.unguided_x0
        x = output.x0 + ratio * d
        if past and after.sigma > 0:
            before, unguided = past[0]
            r = (now.lam - before.lam) / (after.lam - now.lam)
            x = x + (1 - ratio) / (2 * r) * (output.x0 - unguided)
        past = [(now, output.unguided_x0)]
        x = run.end_step(x)
    return x
