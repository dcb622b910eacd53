"""RES: the multistep exponential integrator that meets all of its order conditions, with noise if one likes."""

from __future__ import annotations

from sdjax.samplers.euler import ancestral
from sdjax.samplers.exponential import interpolated, of_data
from sdjax.samplers.run import Level, Run, Value


def res_multistep(run: Run, x: Value, *, eta: float = 0.0, s_noise: float = 1.0) -> Value:
    """The second-order multistep of refined exponential solvers (Zhang et al. 2023, section 3), on x0.

    Args:
      eta: above 0, steps end below the next noise level and noise leads back up, as in `euler_ancestral`.
      s_noise: factor of that noise.
    """
    past: list[tuple[Level, Value]] = []
    for now, after in run.steps():
        down, up = ancestral(now, after, eta, s_noise)
        to = run.level(down) if up else after
        past = [(now, run.model(x, now).x0), *past[:1]]
        integral = of_data(now, to)
        x = integral.keep * x + interpolated(past if to.sigma > 0 else past[:1], now, to, integral.moments)
        x = run.end_step(run.noised(after.alpha / to.alpha * x, after.alpha * up, now, after))
    return x
