"""The ODE's adaptive solver and likelihoods, where data are normal and all is known in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.samplers import flow
from sdjax.schedule import Schedule

SCHEDULE = Schedule()
STD = 0.6


def best(prediction):
    """The exact denoiser of data N(0, STD²), at fractional timesteps too."""
    log_sigmas, times = np.log(SCHEDULE.sigmas).astype(np.float32), np.arange(1000, dtype=np.float32)

    def model(x, t):
        sigma = jnp.exp(jnp.interp(t, times, log_sigmas)).reshape(-1, 1, 1, 1)
        alpha = 1 / jnp.sqrt(1 + sigma**2)
        x0 = STD**2 / (STD**2 + sigma**2) * x / alpha
        epsilon = (x / alpha - x0) / sigma
        return {"epsilon": epsilon, "sample": x0, "v": alpha * epsilon - sigma * alpha * x0}[prediction]

    return model


def spread(sigma):
    """The deviation of latents in the variance-preserving scale."""
    return math.sqrt((STD**2 + sigma**2) / (1 + sigma**2))


@pytest.fixture(autouse=True)
def _exempt():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # diffrax is not ours
        yield


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_the_solution_stays_as_many_deviations_away(prediction):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    low, high = SCHEDULE.sigmas[0], SCHEDULE.sigmas[-1]
    found = flow.solve(best(prediction), x, SCHEDULE, prediction)
    np.testing.assert_allclose(found, x * spread(low) / spread(high), atol=1e-4)
    back = flow.solve(best(prediction), found, SCHEDULE, prediction, start=low, stop=high)
    np.testing.assert_allclose(back, x, atol=1e-4)


def test_likelihood_of_normal_data():
    x = (STD * np.random.default_rng(0).normal(size=(3, 4, 4, 4))).astype(np.float32)
    found = flow.log_likelihood(best("epsilon"), x, SCHEDULE, key=jax.random.key(0))
    low, high = SCHEDULE.sigmas[0], SCHEDULE.sigmas[-1]
    ratio = spread(high) / spread(low)  # how far the ODE carries x, which then counts as standard normal
    expected = -0.5 * (np.square(x * ratio) + math.log(2 * math.pi)) + math.log(ratio)
    np.testing.assert_allclose(found, expected.sum((1, 2, 3)), atol=0.02)


def test_what_is_refused():
    x = np.zeros((1, 2, 2, 4), np.float32)
    with pytest.raises(ValueError, match="stop: expected a sigma above 0, got 0"):
        flow.solve(best("epsilon"), x, SCHEDULE, stop=0)
    with pytest.raises(ValueError, match="prediction"):
        flow.solve(best("epsilon"), x, SCHEDULE, "noise")
