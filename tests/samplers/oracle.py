"""The other way to run a sampler, its own function on float64 numbers; and the model and the noise that tests share."""

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import samplers
from sdjax.samplers import rows as table
from sdjax.schedule import PREDICTIONS

SHAPE = (2, 4, 6, 4)
# The options under which each algorithm is tested; those not named here have none.
OPTIONS = {
    "ddpm": ({}, {"variance_type": "fixed_large"}),
    "ddim": ({}, {"eta": 0.5}, {"eta": 1.0, "set_alpha_to_one": True}, {"set_alpha_to_one": True}),
}
KINDS = [
    (algorithm.name, spacing, prediction)
    for algorithm in samplers.ALGORITHMS
    for spacing, _ in algorithm.spacings
    for prediction in PREDICTIONS
]


def draws(count, shape=SHAPE, seed=0):
    """Latents to start from, and a noise for each of so many rows; float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=(count, *shape))


def model(np, x, t):
    """A raw output that mixes neighbours, is not linear and depends on the time; in the arithmetic of `np`."""
    return (0.3 + 0.0006 * t) * x + 0.3 * np.sin(3.0 * np.roll(x, 1, 2) + t / 150.0)


def jax_model(x, t):
    return model(jnp, x, t.reshape(-1, 1, 1, 1))


class Numbers:
    """A machine that computes at once, with NumPy, and keeps what it saw: x0 after each call, latents of each step."""

    def __init__(self, noise, denoise=lambda x, t: (model(np, x, t),) * 2):
        self.noise = noise
        self.denoise = denoise
        self.x0 = []
        self.latents = []
        self.blends = []

    def evaluate(self, x_in, call):
        m, u = self.denoise(x_in, call.time)
        self.x0.append(call.to_x0[0] * x_in + call.to_x0[1] * m)
        return m, u

    def normal(self, row, span):
        return self.noise[row]

    def end_step(self, x, row, blend):
        self.latents.append(x)
        self.blends.append(blend)
        return x


def run(sampler, x, noise, steps, strength=1.0, **machine):
    """The algorithm itself, in float64: the clean latents and the machine that ran it."""
    numbers = Numbers(noise, **machine)
    _, result = sampler.run(numbers, x, steps, strength)
    return result, numbers


@jax.jit
def trace(x, rows, noise, denoise=None):
    """Row by row with `samplers.step`: register 0 (T, B, h, w, C) and the predicted clean latents after each."""

    def body(state, each):
        row, n, time = each
        state, x0 = table.step(lambda x_in, t: (jax_model(x_in, jnp.broadcast_to(t, x.shape[:1])),) * 2, state, row, n)
        return state, (state[0], x0)

    _, (latents, x0) = jax.lax.scan(body, table.initial_registers(x), (rows[:], noise, rows.time))
    return latents, x0


def assert_close(found, expected, tolerance):
    """Of the largest number expected, or of 1 where all are smaller."""
    error = np.abs(np.asarray(found, np.float64) - expected).max() / max(1.0, np.abs(expected).max())
    assert error <= tolerance, f"off by {error:.2e}"
    return error
