"""An image's noise depends on its own seed, the stream and the row, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import noise

SHAPE = (4, 6, 4)
BIG = (64, 64, 64)  # 2^18 numbers


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


# Compiled once for each shape, which takes most of a second.
compiled = jax.jit(noise.normal, static_argnums=3)


def one(seed, stream=noise.STEP, row=0, shape=SHAPE):
    return np.asarray(compiled(noise.seed_words([seed]), stream, row, shape))[0]


def test_batch_and_position_change_no_bit():
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1, 42, 7]
    alone = [one(seed) for seed in seeds]
    for chosen in ([0, 1, 2], [5, 0, 3], range(8), range(7, -1, -1)):
        drawn = compiled(noise.seed_words([seeds[i] for i in chosen]), noise.STEP, 0, SHAPE)
        assert drawn.dtype == jnp.float32
        assert drawn.shape == (len(chosen), *SHAPE)
        for place, i in enumerate(chosen):
            assert np.array_equal(drawn[place], alone[i])


def test_the_key_written_out():
    """The seed as two words, then fold_in of the stream, then of the row."""

    @jax.jit
    def expected(words, stream, row):
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, stream), row), SHAPE)

    assert jax.config.jax_threefry_partitionable  # JAX's default, which is what is meant
    for seed, stream, row in ((3, 0, 0), (3, 1, 17), (2**32 + 3, 1, 4095), (2**64 - 1, 2, 0)):
        words = np.array([seed >> 32, seed % 2**32], np.uint32)
        assert np.array_equal(one(seed, stream, row), expected(words, stream, row))
    assert noise.seed_words([3]).tolist() == [jax.random.key_data(jax.random.key(3)).tolist()]


def test_bits_that_a_later_jax_must_still_draw():
    """A seed in a picture's recipe promises that picture: as jax 0.10.2 drew it, but for the last digit of erfinv."""
    drawn = one(2**32 + 1, noise.STEP, 5)[0, 0]
    np.testing.assert_allclose(drawn, [0.2707047, -0.3798767, -1.688434, 1.63656], rtol=1e-5)


def test_eager_compiled_and_scanned_are_one():
    words = noise.seed_words([5])
    assert np.array_equal(noise.normal(words, noise.STEP, 3, SHAPE)[0], one(5, row=3))
    scanned = jax.lax.map(lambda row: noise.normal(words, noise.STEP, row, SHAPE), jnp.arange(4))
    for row in range(4):
        assert np.array_equal(scanned[row, 0], one(5, row=row))


def test_settings_of_the_process_change_no_bit():
    words = noise.seed_words([2**40])
    with jax.threefry_partitionable(False), jax.enable_x64(True), jax.default_prng_impl("rbg"):
        drawn = jax.jit(lambda words: noise.normal(words, noise.STEP, 3, SHAPE))(words)
    assert drawn.dtype == jnp.float32
    assert np.array_equal(drawn[0], one(2**40, row=3))


def test_all_draws_are_different():
    """Seeds, also those equal in their low 32 bits or with words exchanged; rows; streams; images."""
    seeds = (0, 1, 2**32, 2**32 + 1, 2**33, 1 << 63)
    draws = [one(seed) for seed in seeds]
    draws += [one(0, noise.STEP, row) for row in (1, 2, 3, 63, 64, 1000, 4095)]
    draws += [one(0, noise.START), one(0, noise.ENCODE), one(0, noise.START, 1), one(1, noise.START)]
    correlations = np.corrcoef(np.reshape(draws, (len(draws), -1))) - np.eye(len(draws))
    assert np.abs(correlations).max() < 5 / np.sqrt(np.prod(SHAPE))  # five standard deviations; equal ones have 1


def test_streams_have_names_of_their_own():
    assert len({noise.START, noise.STEP, noise.ENCODE}) == 3


@pytest.mark.parametrize("row", [0, 1])
def test_it_is_a_standard_normal(row):
    """Each moment within five standard deviations of its estimate."""
    drawn = one(11, row=row, shape=BIG).astype(np.float64).ravel()
    count = drawn.size
    assert abs(drawn.mean()) < 5 * np.sqrt(1 / count)
    assert abs(drawn.var() - 1) < 5 * np.sqrt(2 / count)
    assert abs((drawn**3).mean()) < 5 * np.sqrt(15 / count)
    assert abs((drawn**4).mean() - 3) < 5 * np.sqrt(96 / count)
    assert 4 < np.abs(drawn).max() < 6.5
    # Neighbours along every axis know nothing of each other.
    cube = drawn.reshape(BIG)
    for axis in range(3):
        assert abs((cube * np.roll(cube, 1, axis)).mean()) < 5 * np.sqrt(1 / count)


def test_words():
    words = noise.seed_words([0, 5, 2**32, 2**64 - 1, np.int64(7), np.uint64(2**63)])
    assert words.dtype == np.uint32
    assert words.tolist() == [[0, 0], [0, 5], [1, 0], [2**32 - 1, 2**32 - 1], [0, 7], [2**31, 0]]
    assert noise.seed_words(np.arange(3)).tolist() == [[0, 0], [0, 1], [0, 2]]
    assert noise.seed_words([]).shape == (0, 2)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, np.True_, np.float32(1), None, "1"])
def test_seeds_that_do_not_exist(seed):
    with pytest.raises(ValueError, match=r"seed: expected an integer from 0 to 2\^64 - 1, got .* for picture 1"):
        noise.seed_words([0, seed])


brownian = jax.jit(noise.brownian, static_argnums=2)
SIGMAS = np.array([14.6, 9.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.03, 0.0], np.float32)


def spans(sigmas):
    return np.stack([sigmas[:-1], sigmas[1:]], 1)


def test_brownian_noises_are_independent_normals():
    drawn = np.asarray(brownian(noise.seed_words([3, 4]), spans(SIGMAS), (16, 16, 8)), np.float64)
    assert drawn.shape == (9, 2, 16, 16, 8)
    flat = drawn.reshape(18, -1)
    # 2048 numbers each: five standard deviations of a mean, a variance and a correlation.
    assert np.abs(flat.mean(1)).max() < 5 / 2048**0.5
    assert np.abs(flat.std(1) - 1).max() < 5 / (2 * 2048) ** 0.5
    assert np.abs(np.corrcoef(flat) - np.eye(18)).max() < 5 / 2048**0.5


def test_a_brownian_path_is_the_same_at_any_number_of_steps():
    """The noise of a long span is that of its parts, each weighted by the root of its share."""
    words = noise.seed_words([3])
    fine, coarse = (np.asarray(brownian(words, spans(s), SHAPE)) for s in (SIGMAS[:9], SIGMAS[:9:2]))
    lengths = np.sqrt(-np.diff(SIGMAS[:9])).reshape(4, 2, 1, 1, 1, 1)
    together = (lengths * fine.reshape(4, 2, *fine.shape[1:])).sum(1) / np.sqrt((lengths**2).sum(1))
    np.testing.assert_allclose(together, coarse, atol=2e-4)


def test_brownian_noise_of_an_image_is_its_own():
    alone, both = (np.asarray(brownian(noise.seed_words(seeds), spans(SIGMAS), SHAPE)) for seeds in ([7], [5, 7]))
    assert np.array_equal(alone[:, 0], both[:, 1])
    assert not np.array_equal(both[:, 0], both[:, 1])


def test_no_span_no_noise():
    drawn = np.asarray(brownian(noise.seed_words([7]), np.array([[2.0, 1.0], [0.0, 0.0]]), SHAPE))
    assert drawn[0].any()
    assert not drawn[1].any()
