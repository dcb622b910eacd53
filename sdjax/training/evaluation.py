"""The variational bound on the likelihood, term by term, in bits per dimension (Ho et al. 2020, eq. 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import noise
from sdjax.schedule import Schedule, add_noise, remove_noise

Model = Callable[[jax.Array, jax.Array], jax.Array]


class Bound(NamedTuple):
    """Bits per dimension of each picture; their sum bounds the negative logarithm of its likelihood from above."""

    prior: jax.Array  # (B,): KL(q(x_T | x0) || N(0, 1)), T the last timestep
    steps: jax.Array  # (T - 1, B): KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), for t = 1 to T - 1
    decoder: jax.Array  # (B,): -log p(x0 | x_0th timestep)

    @property
    def total(self) -> jax.Array:
        """(B,)."""
        return self.prior + self.steps.sum(0) + self.decoder


def variational_bound(
    model: Model,
    x0: jax.Array,
    schedule: Schedule,
    prediction: str = "epsilon",
    *,
    words: jax.Array | np.ndarray,
    levels: int | None = None,
) -> Bound:
    """One sample of the noise per timestep and picture; the mean of several is nearer to the bound itself.

    The reverse variances are the posterior's (fixed-small), but the first's, which is beta: there the posterior has
    none, and a density would be infinite.

    Args:
      model: (x, t) -> raw output, with x (B, h, w, C) float32 and t (B,) float32.
      x0: (B, h, w, C) float32.
      schedule, prediction: of the model.
      words: (B, 2) uint32, `noise.seed_words` of the noises.
      levels: x0 is one of so many even steps from -1 to 1, as pixels of 8 bits are with 256, and the decoder is the
        probability of that step (Ho et al., eq. 13). None: x0 is continuous, and it is a density.
    """
    schedule.check_prediction(prediction)
    shape, batch = x0.shape[1:], x0.shape[0]
    per_bit = math.prod(shape) * math.log(2)
    share = schedule.alphas_cumprod
    last = schedule.num_train_timesteps - 1

    def predicted(t: jax.Array) -> jax.Array:
        times = jnp.full((batch,), t, jnp.int32)
        x = add_noise(schedule, x0, noise.normal(words, noise.STEP, t, shape), times)
        return remove_noise(schedule, prediction, x, model(x, times.astype(jnp.float32)), times)[0]

    # KL(N(alpha x0, 1 - alpha²) || N(0, 1)).
    signal = jnp.asarray(share[last], jnp.float32)
    spread = (1.0 - signal) - 1.0 - jnp.log1p(-signal)
    prior = 0.5 * (spread + signal * jnp.square(x0)).sum((1, 2, 3)) / per_bit

    # Both are normal with the same variance: eq. 8 with the means' coefficients of x0 in place (Kingma et al. 2021,
    # eq. 14), half of the difference of two signal-to-noise ratios.
    snr = share / (1 - share)
    weights = jnp.asarray(0.5 * (snr[:-1] - snr[1:]), jnp.float32)

    def step(t: jax.Array) -> jax.Array:
        return weights[t - 1] * jnp.square(x0 - predicted(t)).sum((1, 2, 3)) / per_bit

    steps = jax.lax.map(step, jnp.arange(1, last + 1))
    mean, std = predicted(jnp.asarray(0)), math.sqrt(schedule.betas[0])
    if levels is None:
        nats = 0.5 * jnp.square((x0 - mean) / std) + math.log(std) + 0.5 * math.log(2 * math.pi)
    else:
        nats = -_log_probability(x0, mean, std, levels)
    return Bound(prior, steps, nats.sum((1, 2, 3)) / per_bit)


def _log_probability(x: jax.Array, mean: jax.Array, std: float, levels: int) -> jax.Array:
    """Of a normal within half a step of x, the outermost steps reaching to infinity (Ho et al., eq. 13)."""
    half = 1.0 / (levels - 1)
    above, below = (x + half - mean) / std, (x - half - mean) / std
    log_cdf = jax.scipy.stats.norm.logcdf
    # log(cdf(a) - cdf(b)) in the tail where both are small, by symmetry the lower one.
    flip = above + below > 0
    high, low = jnp.where(flip, -below, above), jnp.where(flip, -above, below)
    inside = log_cdf(high) + jnp.log1p(-jnp.exp(log_cdf(low) - log_cdf(high)))
    return jnp.where(x < -1 + half, log_cdf(above), jnp.where(x > 1 - half, log_cdf(-below), inside))
