"""The table and the program that runs it: against the sampler's own function in float64, and what the table promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import noise, samplers
from sdjax.samplers import REGISTERS
from sdjax.schedule import PREDICTIONS, Schedule, add_noise, target

from .oracle import KINDS, OPTIONS, SHAPE, assert_close, draws, jax_model, model, run

# Float32 against float64, for the largest of a run's numbers. Up to 1.1e-6 was seen, where few steps divide the
# model's rounding by the first alpha, 0.07.
TOLERANCE = 2e-6

sample = jax.jit(lambda x, rows, noise: samplers.sample(jax_model, x, rows, noise=noise))


@jax.jit
def trace(x, rows, noise):
    """Latents and predicted x0 after every row."""

    def body(registers, each):
        row, n = each

        def denoise(x_in, t):
            return (jax_model(x_in, jnp.broadcast_to(t, x_in.shape[:1])),) * 2

        registers, x0 = samplers.step(denoise, registers, row, n)
        return registers, (registers[0], x0)

    return jax.lax.scan(body, samplers.initial_registers(x), (rows[:], noise))[1]


@pytest.mark.parametrize(("name", "spacing", "prediction"), KINDS)
def test_a_table_does_what_the_function_does(name, spacing, prediction):
    x, noises = draws(64)
    for options in OPTIONS.get(name, ({},)):
        sampler = samplers.create(name, spacing=spacing, prediction=prediction, **options)
        for steps in (1, 2, 3, 7, 20, 50):
            for strength in (1.0, 0.63):
                if int(steps * strength) == 0:
                    continue
                rows = sampler.rows(steps, strength).padded(64)
                found = sample(x.astype(np.float32), rows, noises.astype(np.float32))
                latents, x0 = trace(x.astype(np.float32), rows, noises.astype(np.float32))
                expected, numbers = run(sampler, x, noises, steps, strength)
                assert_close(found, expected, TOLERANCE)
                for k, (one, other) in enumerate(zip(numbers.x0, numbers.latents, strict=True)):
                    assert_close(x0[k], one, TOLERANCE)
                    assert_close(latents[k], other, TOLERANCE)


@pytest.mark.parametrize("name", OPTIONS.keys() | {"euler", "euler_ancestral"})
def test_a_thousand_steps(name):
    x, noises = draws(1024)
    for prediction in PREDICTIONS:
        sampler = samplers.create(name, prediction=prediction)
        found = sample(x.astype(np.float32), sampler.rows(1000).padded(1024), noises.astype(np.float32))
        # Float32 rounds the latents a thousand times: 3e-6 was seen.
        assert_close(found, run(sampler, x, noises, 1000)[0], 1e-5)
