"""The variational bound against its terms computed by hand, for normal data whose best denoiser is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import noise
from sdjax.schedule import Schedule, target
from sdjax.training.evaluation import variational_bound

SCHEDULE = Schedule(20, 0.01, 0.3, "linear")
STD = 0.5
SHAPE = (2, 32, 32, 4)
WORDS = noise.seed_words([1, 2])


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def data():
    return (STD * np.random.default_rng(0).normal(size=SHAPE)).astype(np.float32)


def shares(timesteps):
    share = jnp.asarray(SCHEDULE.alphas_cumprod, jnp.float32)[timesteps.astype(jnp.int32)]
    return share.reshape(-1, 1, 1, 1)


def best(prediction):
    """E[x0 | x_t] of data N(0, STD²), as an output of this kind."""

    def model(x, timesteps):
        share = shares(timesteps)
        x0 = STD**2 * jnp.sqrt(share) / (STD**2 * share + 1 - share) * x
        epsilon = (x - jnp.sqrt(share) * x0) / jnp.sqrt(1 - share)
        return target(SCHEDULE, prediction, x0, epsilon, timesteps.astype(jnp.int32))

    return model


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_terms_of_normal_data(prediction):
    x0 = data()
    bound = jax.jit(lambda x0: variational_bound(best(prediction), x0, SCHEDULE, prediction, words=WORDS))(x0)
    share, second = SCHEDULE.alphas_cumprod, np.square(x0.astype(np.float64)).mean((1, 2, 3))
    bits = 1 / math.log(2)
    last = share[-1]
    np.testing.assert_allclose(bound.prior, 0.5 * bits * (last * second - last - np.log(1 - last)), rtol=1e-4)
    # x0 - best = (1 - k alpha) x0 - k std n, with k as in `best`: its square is known but for the noise's sampling.
    k = STD**2 * np.sqrt(share) / (STD**2 * share + 1 - share)
    error = (1 - k * np.sqrt(share))[:, None] ** 2 * second + (k**2 * (1 - share))[:, None]
    snr = share / (1 - share)
    expected = 0.5 * bits * (snr[:-1] - snr[1:])[:, None] * error[1:]
    np.testing.assert_allclose(bound.steps, expected, rtol=0.1)  # of 4096 normals each: 2.2 % is one deviation
    np.testing.assert_allclose(bound.steps.sum(0), expected.sum(0), rtol=0.03)
    beta = SCHEDULE.betas[0]
    density = bits * (0.5 * error[0] / beta + 0.5 * math.log(2 * math.pi * beta))
    np.testing.assert_allclose(bound.decoder, density, rtol=0.06)
    np.testing.assert_allclose(bound.total, bound.prior + bound.steps.sum(0) + bound.decoder, rtol=1e-6)
    entropy = bits * 0.5 * math.log(2 * math.pi * math.e * STD**2)
    assert float(bound.total.mean()) > entropy  # which it bounds


def test_bits_of_pixels():
    """Of a model that knows the picture only the prior is left: the decoder's step of 1/255 is then certain enough."""
    levels = np.random.default_rng(1).integers(0, 256, SHAPE)
    x0 = (levels / 127.5 - 1).astype(np.float32)
    schedule = Schedule(10, 1e-6, 0.5, "linear")
    knows = jax.jit(lambda x0: variational_bound(lambda x, t: x0, x0, schedule, "sample", words=WORDS, levels=256))
    bound = knows(x0)
    assert np.array_equal(bound.steps, np.zeros((9, 2)))
    inside = 2 * 0.5 * math.erfc(-(1 / 255) / 1e-3 / math.sqrt(2)) - 1
    assert (levels == 0).any()
    np.testing.assert_allclose(bound.decoder, -math.log2(inside), atol=1e-5)
    off = jax.jit(lambda x0: variational_bound(lambda x, t: x0 + 0.02, x0, schedule, "sample", words=WORDS, levels=256))
    assert np.isfinite(off(x0).decoder).all()
    # Two and a half steps off: of a normal of deviation 1e-3 that is 16 deviations away from the pixel's interval.
    assert (np.asarray(off(x0).decoder) > 100).all()


def test_what_the_noise_depends_on():
    x0 = data()
    bound = jax.jit(lambda x0, words: variational_bound(best("v"), x0, SCHEDULE, "v", words=words).total)
    one = bound(x0, WORDS)
    assert np.array_equal(bound(x0[1:], WORDS[1:]), one[1:])
    assert not np.array_equal(bound(x0, noise.seed_words([3, 4])), one)
