"""Samplers of distilled models, which jump to the clean latents from anywhere and go back up with fresh noise."""

from __future__ import annotations

import math

from sdjax.samplers import options
from sdjax.samplers.ddim import transfer
from sdjax.samplers.run import Run, Value

SIGMA_DATA = 0.5


def lcm(run: Run, x: Value, *, timestep_scaling: float = 10.0) -> Value:
    """Multistep sampling of latent consistency models (Luo et al. 2023, Algorithm 3).

    Args:
      timestep_scaling: of the time in the boundary conditions c_skip and c_out (Song et al. 2023, eq. 5).
    """
    options.number("timestep_scaling", timestep_scaling, 0)
    for now, after in run.steps():
        scaled = timestep_scaling * now.time
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / math.sqrt(scaled**2 + SIGMA_DATA**2)
        x = c_skip * x + c_out * run.model(x, now).x0
        if run.remaining > 1:
            x = after.alpha * x + after.std * run.noise(now, after)
        x = run.end_step(x)
    return x


def tcd(run: Run, x: Value, *, eta: float = 0.3) -> Value:
    """Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024, Algorithm 4).

    Args:
      eta: the paper's gamma, 0 to 1: how far below the next point each jump goes before noise leads back up.
    """
    options.number("eta", eta, 0, 1)
    alphas_cumprod = run.schedule.alphas_cumprod
    for now, after in run.steps():
        last = run.remaining == 1
        to = 0 if last else int(after.time)
        below = alphas_cumprod[math.floor((1 - eta) * to)]
        x = transfer(x, run.model(x, now).epsilon, now.alpha_bar, below)
        if eta > 0 and not last:
            kept = alphas_cumprod[to] / below
            x = math.sqrt(kept) * x + math.sqrt(1 - kept) * run.noise(now, after)
        x = run.end_step(x)
    return x
