"""The probability-flow ODE by an adaptive solver, and likelihoods along it. Needs `pip install "sdjax[ode]"`.

In latents of the scale x0 + sigma·noise the ODE is dx / dsigma = epsilon(x, sigma) (Karras et al. 2022, eq. 3), and in
s = log sigma, where its solutions are smooth at all noise levels, dx / ds = sigma epsilon. The fixed-step samplers
converge to its solution; it is their reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.schedule import Schedule, separate

Model = Callable[[jax.Array, jax.Array], jax.Array]


def solve(
    model: Model,
    x: jax.Array,
    schedule: Schedule,
    prediction: str = "epsilon",
    *,
    start: float | None = None,
    stop: float | None = None,
    tolerance: float = 1e-5,
    max_steps: int = 4096,
) -> jax.Array:
    """Latents at one noise level, carried along the ODE to another; either may be the noisier.

    Args:
      model: (x, t) -> raw output, with x (B, h, w, C) in the variance-preserving scale and t (B,) float32.
      x: (B, h, w, C) float32, in the variance-preserving scale at `start`.
      schedule, prediction: of the model.
      start, stop: sigmas; the schedule's last and first where None.
      tolerance: relative and absolute, of the solver (Dormand and Prince's of order 5).
      max_steps: after so many it gives up.

    Returns:
      (B, h, w, C) float32, in the variance-preserving scale at `stop`.

    Raises:
      ValueError: a prediction type or sigma that does not exist.
      RuntimeError: the solver gave up.
    """
    start, stop = _ends(schedule, start, stop)
    slope = _slope(model, schedule, prediction)
    x = jnp.asarray(x, jnp.float32) * math.sqrt(1 + start**2)
    return _integrate(slope, x, start, stop, tolerance, max_steps) / math.sqrt(1 + stop**2)


def log_likelihood(
    model: Model,
    x: jax.Array,
    schedule: Schedule,
    prediction: str = "epsilon",
    *,
    key: jax.Array,
    probes: int = 1,
    tolerance: float = 1e-5,
    max_steps: int = 4096,
) -> jax.Array:
    """The natural logarithm of the density that the ODE gives to latents (Song et al. 2021, section 4.3).

    The density is that at the first timestep's noise level, where the ODE begins; the noisiest level is taken for a
    standard normal. The divergence is estimated with random signs (Hutchinson), without bias.

    Args:
      model, schedule, prediction, tolerance, max_steps: as for `solve`.
      x: (B, h, w, C) float32, clean latents (or slightly noisy ones, in the variance-preserving scale).
      key: of the random signs.
      probes: how many vectors of signs the divergence is averaged over.

    Returns:
      (B,) float32. Divided by -log(2) and the number of dimensions they are bits per dimension.
    """
    start, stop = _ends(schedule, float(schedule.sigmas[0]), float(schedule.sigmas[-1]))
    slope = _slope(model, schedule, prediction)
    signs = jax.random.rademacher(key, (probes, *x.shape), jnp.float32)
    dimensions = math.prod(x.shape[1:])

    def extended(s: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda x: slope(s, x), state[0])
        divergence = jnp.stack([(pull(sign)[0] * sign).sum((1, 2, 3)) for sign in signs]).mean(0)
        return value, divergence

    scale = math.sqrt(1 + start**2)
    state = (jnp.asarray(x, jnp.float32) * scale, jnp.zeros(x.shape[0], jnp.float32))
    end, change = _integrate(extended, state, start, stop, tolerance, max_steps)
    # Densities change with the scale of latents: by its logarithm for each dimension.
    final = end / math.sqrt(1 + stop**2)
    normal = -0.5 * (jnp.square(final).sum((1, 2, 3)) + dimensions * math.log(2 * math.pi))
    return normal + change + dimensions * (math.log(scale) - 0.5 * math.log(1 + stop**2))


def _ends(schedule: Schedule, start: float | None, stop: float | None) -> tuple[float, float]:
    sigmas = schedule.sigmas
    start = float(sigmas[-1]) if start is None else start
    stop = float(sigmas[0]) if stop is None else stop
    for name, sigma in (("start", start), ("stop", stop)):
        if not (0 < sigma < math.inf):
            raise ValueError(f"{name}: expected a sigma above 0, got {sigma!r}")
    return start, stop


def _slope(model: Model, schedule: Schedule, prediction: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """dx / ds of latents x0 + sigma·noise, s = log sigma."""
    schedule.check_prediction(prediction)
    log_sigmas = jnp.log(jnp.asarray(schedule.sigmas, jnp.float32))
    times = jnp.arange(schedule.num_train_timesteps, dtype=jnp.float32)

    def slope(s: jax.Array, x: jax.Array) -> jax.Array:
        s = jnp.asarray(s, jnp.float32)
        sigma = jnp.exp(s)
        alpha = jax.lax.rsqrt(1.0 + sigma * sigma)
        x_in = alpha * x
        output = model(x_in, jnp.broadcast_to(jnp.interp(s, log_sigmas, times), x.shape[:1])).astype(jnp.float32)
        return sigma * separate(prediction, x_in, output, alpha, sigma * alpha)[1]

    return slope


def _integrate(
    slope: Callable[[Any, Any], Any], state: Any, start: float, stop: float, tolerance: float, max_steps: int
) -> Any:
    """The state, an array or several, carried from one sigma to another."""
    import diffrax  # optional, and a second of imports that only this needs

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda s, y, _: slope(s, y)),
        diffrax.Dopri5(),
        t0=math.log(start),
        t1=math.log(stop),
        dt0=None,
        y0=state,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=max_steps,
    )
    return jax.tree.map(lambda y: y[-1], solution.ys)
