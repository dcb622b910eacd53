"""Every draw belongs to a seed, a purpose and a row, and to nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import noise, samplers

SHAPE = (16, 12, 4)


def draw(seeds, stream=noise.STEP, row=3, shape=SHAPE):
    return np.asarray(noise.normal(noise.seed_words(seeds), stream, row, shape))


def test_is_the_documented_key():
    words = jnp.array([2**63 >> 32, 5], jnp.uint32)
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, noise.STEP), 3)
    assert np.array_equal(draw([2**63 + 5])[0], jax.random.normal(key, SHAPE, jnp.float32))


def test_of_a_small_seed_is_jax_own_key():
    assert np.array_equal(noise.seed_words([7])[0], jax.random.key_data(jax.random.key(7)))


@pytest.mark.parametrize(("batch", "place"), [(1, 0), (3, 2), (8, 5)])
@pytest.mark.parametrize("jit", [False, True])
def test_does_not_depend_on_the_batch(batch, place, jit):
    seeds = list(range(100, 100 + batch))
    seeds[place] = 2**40 + 1
    words = noise.seed_words(seeds)

    def normal(words, row):
        return noise.normal(words, noise.STEP, row, SHAPE)

    many = (jax.jit(normal) if jit else normal)(words, jnp.int32(3))
    assert np.array_equal(np.asarray(many)[place], draw([2**40 + 1])[0])


def test_all_64_bits_count():
    draws = [draw([seed])[0] for seed in (1, 1 + 2**32, 1 + 2**63, 2, 0)]
    for a, b in itertools.combinations(draws, 2):
        assert not np.array_equal(a, b)


def test_rows_and_streams_are_uncorrelated():
    """768 numbers each: correlations have a deviation of 0.036; 190 pairs stay within 4.5 of them."""
    draws = [draw([1], stream, row)[0].ravel() for stream in (0, 1) for row in range(10)]
    correlations = np.corrcoef(draws)[np.triu_indices(len(draws), 1)]
    assert np.abs(correlations).max() < 0.16
    assert np.abs(correlations).std() > 0.01


def test_is_a_standard_normal():
    numbers = draw([9], shape=(200_000,))[0].astype(np.float64)
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.std() - 1) < 0.01
    assert abs((numbers**4).mean() - 3) < 0.1


def test_ddpm_adds_another_noise_at_each_step():
    """The Flax pipelines of old split no key: every step added the same noise."""
    rows = samplers.create("ddpm").rows(20)

    x = jnp.zeros((1, *SHAPE))
    registers = samplers.initial_registers(x)
    words = noise.seed_words([4])
    increments = []
    for k in range(len(rows)):
        row = rows[k]
        normal = noise.normal(words, noise.STEP, k, SHAPE)
        with_noise, _ = samplers.step(lambda x, t: (jnp.zeros_like(x),) * 2, registers, row, normal)
        without, _ = samplers.step(lambda x, t: (jnp.zeros_like(x),) * 2, registers, row, 0 * normal)
        if k < len(rows) - 1:
            increments.append(np.asarray(with_noise[0] - without[0]).ravel())
        registers = with_noise
    correlations = np.corrcoef(increments)[np.triu_indices(len(increments), 1)]
    assert np.abs(correlations).max() < 0.18
    # And the driver draws just these.
    result = samplers.sample(lambda x, t: jnp.zeros_like(x), x, rows, key=jnp.asarray(words))
    np.testing.assert_allclose(result, registers[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "1"])
def test_refuses_what_is_no_seed(seed):
    with pytest.raises(ValueError, match="seed: expected an integer from 0"):
        noise.seed_words([seed])
