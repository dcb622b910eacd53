"""Ancestral sampling of the diffusion that the model was trained on."""

from __future__ import annotations

import math

from sdjax.samplers import options
from sdjax.samplers.run import Run, Value

VARIANCES = ("fixed_small", "fixed_large")


def ddpm(run: Run, x: Value, *, variance_type: str = "fixed_small") -> Value:
    """Denoising diffusion probabilistic models (Ho et al. 2020, Algorithm 2), over any subset of the timesteps.

    Args:
      variance_type: of the reverse step; "fixed_small" is the posterior's (eq. 7), "fixed_large" is beta. The two
        choices of section 3.2.
    """
    options.choice("variance_type", variance_type, VARIANCES)
    for now, after in run.steps():
        x0 = run.model(x, now).x0
        alpha = now.alpha_bar / after.alpha_bar
        beta = 1 - alpha
        remaining = (1 - after.alpha_bar) / (1 - now.alpha_bar)
        # Eqs. 6 and 7, the posterior's mean and variance.
        mean = math.sqrt(after.alpha_bar) * beta / (1 - now.alpha_bar) * x0 + math.sqrt(alpha) * remaining * x
        variance = beta * remaining if variance_type == "fixed_small" else beta
        if now.time > 0:  # as diffusers: where the offset makes timestep 1 the last, "fixed_large" adds noise there too
            mean = mean + math.sqrt(variance) * run.noise(now, after)
        x = run.end_step(mean)
    return x
