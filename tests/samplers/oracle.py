"""The other way to run a sampler, its own function on float64 numbers; and the model and the noise that tests share."""

import jax.numpy as jnp
import numpy as np

from sdjax import samplers
from sdjax.schedule import PREDICTIONS

SHAPE = (2, 4, 6, 4)
NAMES = [algorithm.name for algorithm in samplers.ALGORITHMS]
KINDS = [
    (algorithm.name, spacing, prediction)
    for algorithm in samplers.ALGORITHMS
    for spacing, _ in algorithm.spacings
    for prediction in PREDICTIONS
]
# The options under which each algorithm is tested; those not named here have none.
OPTIONS = {
    "ddpm": ({}, {"variance_type": "fixed_large"}),
    "ddim": ({}, {"eta": 0.5}, {"eta": 1.0, "set_alpha_to_one": True}, {"set_alpha_to_one": True}),
}


def draws(count, shape=SHAPE, seed=0):
    """Latents to start from and a noise for each of so many rows, in float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=(count, *shape))


def model(np, x, t):
    """A raw output that mixes neighbours, is not linear and depends on the time; in the arithmetic of `np`."""
    return (0.3 + 0.0006 * t) * x + 0.3 * np.sin(3.0 * np.roll(x, 1, 2) + t / 150.0)


def jax_model(x, t):
    return model(jnp, x, t.reshape(-1, 1, 1, 1))


class Numbers:
    """A machine that computes at once, with NumPy, and keeps what it saw: x0 of each call, latents of each step."""

    def __init__(self, noise, denoise=lambda x, t: (model(np, x, t),) * 2):
        self.noise = noise
        self.denoise = denoise
        self.x0 = []
        self.latents = []

    def evaluate(self, x_in, call):
        m, u = self.denoise(x_in, call.time)
        self.x0.append(call.to_x0[0] * x_in + call.to_x0[1] * m)
        return m, u

    def normal(self, row, span):
        return self.noise[row]

    def end_step(self, x, row, blend):
        self.latents.append(x)
        return x


def run(sampler, x, noise, steps, strength=1.0, **machine):
    """The algorithm itself, in float64: the clean latents, and the machine that ran it."""
    numbers = Numbers(noise, **machine)
    return sampler.run(numbers, x, steps, strength)[1], numbers


def assert_close(found, expected, tolerance):
    """Relative to the largest number expected, or to 1 where all are smaller."""
    found = np.asarray(found, np.float64)
    error = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
    assert error <= tolerance, f"off by {error:.2e}"
