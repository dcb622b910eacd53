"""Implicit models: the same training, fewer steps, and as little noise as one likes; and their way back."""

from __future__ import annotations

import math

from sdjax.samplers import options
from sdjax.samplers.run import Level, Run, Value


def ddim(run: Run, x: Value, *, eta: float = 0.0, set_alpha_to_one: bool = False) -> Value:
    """Denoising diffusion implicit models (Song et al. 2020, eqs. 12 and 16).

    Args:
      eta: in [0, 1]; 0 adds no noise, 1 as much as DDPM.
      set_alpha_to_one: whether the last step ends at the clean latents, or at the first timestep's noise level, as
        Stable Diffusion's does.
    """
    options.number("eta", eta, 0, 1)
    options.flag("set_alpha_to_one", set_alpha_to_one)
    for now, after in run.steps():
        alpha_bar = alpha_bar_after(run, now, after, set_alpha_to_one)
        current = run.schedule.alphas_cumprod[int(now.time)]  # not by sigma: the last variance is then exactly 0
        std = eta * math.sqrt((1 - alpha_bar) / (1 - current) * (1 - current / alpha_bar))
        output = run.model(x, now)
        x = math.sqrt(alpha_bar) * output.x0 + math.sqrt(1 - alpha_bar - std**2) * output.epsilon
        x = run.end_step(run.noised(x, std, now, after))
    return x


def ddim_inverse(run: Run, x: Value, *, set_alpha_to_one: bool = False, iterations: int = 1) -> Value:
    """From clean latents to the noise that `ddim` makes them of: its step with eta 0, solved for the noisier end.

    The step asks for the model's output at that end, which is what is looked for. One iteration takes it at the
    latents of the other end (diffusers' DDIMInverseScheduler); each further one takes it at the last solution, a
    fixed-point iteration that converges where steps are short (Pan et al. 2023, AIDI).

    Args:
      set_alpha_to_one: as `ddim` was or will be told.
      iterations: calls of the model in each step.
    """
    options.flag("set_alpha_to_one", set_alpha_to_one)
    options.whole("iterations", iterations, 1, 100)
    for lower, above in run.steps():
        below = alpha_bar_after(run, above, lower, set_alpha_to_one)
        # What the model is told is the noisier level; what it is shown first is the other.
        shown, level = x, Level(above.time, math.sqrt(1 / below - 1)) if below < 1 else above
        for _ in range(iterations):
            epsilon = run.model(shown, level).epsilon
            shown, level = transfer(x, epsilon, below, above.alpha_bar), above
        x = run.end_step(shown)
    return x


def transfer(x: Value, epsilon: Value, alpha_bar: float, other: float) -> Value:
    """Latents of one noise level at another, where the noise in them is known (Song et al. 2020, eq. 12 at eta 0)."""
    x0 = (x - math.sqrt(1 - alpha_bar) * epsilon) / math.sqrt(alpha_bar)
    return math.sqrt(other) * x0 + math.sqrt(1 - other) * epsilon


def alpha_bar_after(run: Run, now: Level, after: Level, set_alpha_to_one: bool) -> float:
    """Alpha bar where a step ends: the next level's.

    Of diffusers' own spacings it is that of one stride down, as it takes it, where the steps do not divide T, too.
    """
    if run.strided and int(now.time) >= run.stride:
        return run.schedule.alphas_cumprod[int(now.time) - run.stride]
    if after.sigma > 0 and not run.strided:
        return after.alpha_bar
    return 1.0 if set_alpha_to_one else run.schedule.alphas_cumprod[0]
