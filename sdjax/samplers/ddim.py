"""Implicit models: the same training, fewer steps, and as little noise as one likes."""

from __future__ import annotations

import math
from numbers import Real

from sdjax.samplers.run import Run, Value


def ddim(run: Run, x: Value, *, eta: float = 0.0, set_alpha_to_one: bool = False) -> Value:
    """Denoising diffusion implicit models (Song et al. 2020, eqs. 12 and 16).

    Args:
      eta: in [0, 1]; 0 adds no noise, 1 as much as DDPM.
      set_alpha_to_one: whether the last step ends at the clean latents, or at the first timestep's noise level, as
        Stable Diffusion's does.
    """
    if not (isinstance(eta, Real) and 0 <= eta <= 1):
        raise ValueError(f"eta: expected a number from 0 to 1, got {eta!r}")
    if not isinstance(set_alpha_to_one, bool):
        raise ValueError(f"set_alpha_to_one: expected True or False, got {set_alpha_to_one!r}")
    alphas_cumprod = run.schedule.alphas_cumprod
    # diffusers goes back by a whole stride, which is not the next timestep where the steps do not divide T.
    stride = run.schedule.num_train_timesteps // run.num_inference_steps
    for now, after in run.steps():
        before = int(now.time) - stride
        alpha_bar = alphas_cumprod[before] if before >= 0 else 1.0 if set_alpha_to_one else alphas_cumprod[0]
        current = alphas_cumprod[int(now.time)]  # not by way of sigma: the last step's variance is then exactly 0
        std = eta * math.sqrt((1 - alpha_bar) / (1 - current) * (1 - current / alpha_bar))
        output = run.model(x, now)
        x = math.sqrt(alpha_bar) * output.x0 + math.sqrt(1 - alpha_bar - std**2) * output.epsilon
        if std > 0:
            x = x + std * run.noise(now, after)
        x = run.end_step(x)
    return x
