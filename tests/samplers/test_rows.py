"""The table and the program that runs it: against the sampler's own function in float64, and what both promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import noise, samplers
from sdjax.samplers import REGISTERS
from sdjax.schedule import PREDICTIONS, Schedule, add_noise, target

from .oracle import KINDS, NAMES, ONE_CALL, SHAPE, assert_close, draws, jax_model, options_of, run

# Float32 against float64, relative to a run's largest number.
TOLERANCE = 2e-6
# Not the table's but the model's rounding, multiplied by what the algorithm does to it: in a run of two or three steps
# it is divided by the first alphas, 0.07 and little more, and where steps differ much LMS extrapolates far. 7.3e-6 was
# seen.
AMPLIFIED = 2e-5

sample = jax.jit(lambda x, rows, noise: samplers.sample(jax_model, x, rows, noise=noise))


@jax.jit
def trace(x, rows, noise):
    """Register 0 and the predicted clean latents after every row, (T, B, h, w, C)."""

    def body(registers, each):
        row, n = each

        def denoise(x_in, t):
            output = jax_model(x_in, jnp.broadcast_to(t, x_in.shape[:1]))
            return output, output

        registers, x0 = samplers.step(denoise, registers, row, n)
        return registers, (registers[0], x0)

    return jax.lax.scan(body, samplers.initial_registers(x), (rows[:], noise))[1]


def float32(*arrays):
    return [array.astype(np.float32) for array in arrays]


@pytest.mark.parametrize(("name", "spacing", "prediction"), KINDS)
def test_a_table_does_what_the_function_does(name, spacing, prediction):
    x, noises = draws(256)
    # All options with the default spacing, and the others' with none.
    default = samplers.create(name).spacing
    for options in options_of(name) if spacing == default else ({},):
        sampler = samplers.create(name, spacing=spacing, prediction=prediction, **options)
        for steps, strength in ((1, 1.0), (2, 1.0), (3, 1.0), (7, 0.63), (20, 1.0), (50, 0.63)):
            rows = sampler.rows(steps, strength).padded(256)
            latents, x0 = (np.asarray(each) for each in trace(*float32(x), rows, *float32(noises)))
            expected, numbers = run(sampler, x, noises, steps, strength)
            tolerance = AMPLIFIED if steps < 7 or (name, spacing) == ("lms", "polyexponential") else TOLERANCE
            assert_close(sample(*float32(x), rows, *float32(noises)), expected, tolerance)
            for k, its_x0 in enumerate(numbers.x0):
                assert_close(x0[k], its_x0, tolerance)
            ends = np.flatnonzero(rows.blend.any(1))
            for k, its_latents in zip(ends, numbers.latents, strict=True):
                assert_close(latents[k], its_latents, tolerance)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc"])
def test_a_thousand_steps(name):
    x, noises = draws(1000)
    sampler = samplers.create(name)
    found = sample(*float32(x), sampler.rows(1000), *float32(noises))
    # A thousand roundings of the latents instead of 50: 2.7e-6 was seen.
    assert_close(found, run(sampler, x, noises, 1000)[0], 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_no_bit(name):
    x, noises = draws(64)
    rows = samplers.create(name).rows(7)
    found = [np.asarray(sample(*float32(x), r, *float32(noises[: len(r)]))) for r in (rows, rows.padded(64))]
    assert np.array_equal(found[0], found[1])
    assert len(rows.padded(64)) == 64
    assert rows.padded(64).active.sum() == len(rows)
    with pytest.raises(ValueError, match=rf"length: {len(rows)} rows do not fit into 6; take bucket\({len(rows)}\)"):
        rows.padded(6)


def test_buckets():
    assert [samplers.bucket(n) for n in (1, 64, 65, 256, 257, 1024, 1025, 4096)] == [
        64,
        64,
        *[256] * 2,
        *[1024] * 2,
        *[4096] * 2,
    ]
    with pytest.raises(ValueError, match="num_inference_steps: 4097 calls of the model; at most 4096 fit"):
        samplers.bucket(4097)


@pytest.mark.parametrize("name", ONE_CALL)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_of_a_perfect_model(name, prediction):
    """Where the model returns what it was trained to, every row predicts the clean latents."""
    schedule = Schedule()
    sampler = samplers.create(name, schedule, "leading", prediction)
    rows = sampler.rows(20, dtype=np.float64)
    clean, normal = draws(len(rows))[1][:2]
    for k in range(len(rows)):
        timesteps = np.full(SHAPE[0], int(rows.time[k]))
        x_in = add_noise(schedule, *float32(clean, normal), timesteps)
        output = target(schedule, prediction, *float32(clean, normal), timesteps)
        x0 = rows.to_x0[k, 0] * np.asarray(x_in, np.float64) + rows.to_x0[k, 1] * np.asarray(output, np.float64)
        # The rounding of x_in, divided by alpha >= 0.07: 5e-7 was seen.
        assert_close(x0, clean, 3e-6)


@pytest.mark.parametrize(("name", "spacing", "prediction"), [kind for kind in KINDS if kind[0] in ONE_CALL])
@pytest.mark.parametrize("strength", [1.0, 0.63])
def test_start_and_blend_are_noise_levels(name, spacing, prediction, strength):
    """Of the levels that are visited, in the scale that each is used in."""
    sampler = samplers.create(name, spacing=spacing, prediction=prediction)
    rows = sampler.rows(20, strength, dtype=np.float64)
    times, sigmas = sampler.points(sampler.schedule, 20, sampler.steps_offset)
    times, sigmas = times[20 - len(rows) :], sigmas[20 - len(rows) :]
    alphas = 1 / np.sqrt(1 + sigmas**2)
    assert np.array_equal(rows.time, times)
    np.testing.assert_allclose(rows.start, [alphas[0], sigmas[0] * alphas[0]], rtol=1e-14)
    after = np.stack([alphas, sigmas * alphas] if sampler.algorithm.scale == "vp" else [alphas / alphas, sigmas], 1)
    np.testing.assert_allclose(rows.blend, [*after[1:], (1.0, 0.0)], rtol=1e-12)
    assert np.array_equal(rows.step, np.arange(20 - len(rows), 20))


def test_the_start_from_noise():
    """1 where the latents have unit variance; the model's scale of sigma·noise for Euler's spacings from the top."""
    assert samplers.create("ddpm").rows(20).start_noise == 1.0
    assert samplers.create("euler", spacing="leading").rows(20).start_noise == 1.0
    for spacing in ("linspace", "trailing", "karras"):
        rows = samplers.create("euler", spacing=spacing).rows(20)
        sigma = Schedule().sigmas[-1]
        np.testing.assert_allclose(rows.start_noise, sigma / np.sqrt(1 + sigma**2), rtol=1e-6)
        assert np.array_equal(rows.from_noise().start, [0.0, rows.start_noise])
        assert rows.from_noise().start_noise == rows.start_noise


def test_restoring_the_known_part():
    """Where the mask is 0 the latents become the blend of the picture and the start's noise; zero means not yet."""
    registers, (clean, start) = *float32(draws(REGISTERS)[1]), float32(*draws(2, seed=1)[1])
    mask = np.zeros((*SHAPE[:3], 1), np.float32)
    mask[:, 1:3, 2:5] = 1
    row = samplers.create("euler").rows(3)[0]
    after = np.asarray(samplers.restore(jnp.asarray(registers), row, mask, clean, start))
    known = np.broadcast_to(mask == 0, SHAPE)
    assert np.array_equal(after[1:], registers[1:])
    assert np.array_equal(after[0][~known], registers[0][~known])
    np.testing.assert_allclose(after[0][known], (clean + row.blend[1] * start)[known], rtol=1e-6, atol=1e-6)
    middle = dataclasses.replace(row, blend=np.zeros(2, np.float32))
    assert np.array_equal(samplers.restore(jnp.asarray(registers), middle, mask, clean, start), registers)


def test_a_key_for_each_image_or_for_the_batch(monkeypatch):
    """With one for the batch, image i has the key folded with i."""

    def visible(words, stream, row, shape):  # stands for the real one, which takes seconds to compile
        high, low = jnp.asarray(words).astype(jnp.float32).T / 2.0**32
        value = high + 3.0 * low + jnp.asarray(row, jnp.float32)
        return jnp.broadcast_to(value.reshape(-1, 1, 1, 1), (len(words), *shape))

    monkeypatch.setattr(noise, "normal", visible)
    x, words = draws(1)[0].astype(np.float32), noise.seed_words([7 << 30, 5 << 61])
    rows = samplers.create("ddpm").rows(3)
    keys, one = (
        jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32"),
        jax.random.key(3, impl="threefry2x32"),
    )
    folded = np.stack([jax.random.key_data(jax.random.fold_in(one, i)) for i in range(SHAPE[0])])
    for key, each in ((words, words), (keys, words), (one, folded), (jax.random.key_data(one), folded)):
        noises = np.stack([visible(each, noise.STEP, k, SHAPE[1:]) for k in range(3)])
        expected = np.asarray(sample(x, rows, noises))
        assert_close(samplers.sample(jax_model, x, rows, key=key), expected, TOLERANCE)


def test_every_step_has_its_own_noise():
    """The old Flax pipelines of diffusers added the same noise at every DDPM step: a model of zeros shows it."""
    words, shape = noise.seed_words([3, 2**40]), (2, 16, 16, 4)
    normal = jax.jit(noise.normal, static_argnums=3)
    x = normal(words, noise.START, 0, shape[1:])
    rows = samplers.create("ddpm").rows(20)

    @jax.jit
    def after(count):
        first = dataclasses.replace(rows.padded(64), active=jnp.arange(64) < count)
        return samplers.sample(lambda x, t: jnp.zeros_like(x), x, first, key=words)

    latents = [np.asarray(after(k), np.float64) for k in range(20)]  # the last step adds none
    drawn = [(latents[k + 1] - rows.update[k, 0, 0] * latents[k]) / rows.update[k, 0, REGISTERS] for k in range(19)]
    # Those of the noise module, whatever the bucket. The latents' rounding, divided by steps of 0.03: 8e-5 was seen.
    expected = [normal(words, noise.STEP, k, shape[1:]) for k in range(19)]
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=5e-4)
    of_images = np.stack([np.asarray(x), *drawn]).reshape(20 * 2, -1)
    assert np.abs(of_images.std(1) - 1).max() < 0.1
    correlations = np.corrcoef(of_images) - np.eye(40)
    assert np.abs(correlations).max() < 5 / 32  # 1024 numbers each: five standard deviations; 0.09 was seen


def test_one_program_for_all_samplers(monkeypatch):
    compilations = []
    monkeypatch.setattr(jax._src.monitoring, "_event_duration_secs_listeners", [])
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    )
    program = jax.jit(lambda x, rows, noise: samplers.sample(jax_model, x, rows, noise=noise))
    x, noises = float32(*draws(256))
    program(x, samplers.create("ddpm").rows(5).padded(256), noises)
    assert len(compilations) == 1  # what is counted happens at all
    for name, spacing, prediction in KINDS:
        sampler = samplers.create(name, spacing=spacing, prediction=prediction)
        for steps, strength in ((50, 0.63), (7, 1.0)):
            program(x, sampler.rows(steps, strength).padded(256), noises)
    assert len(compilations) == 1


@jax.jit
def loss(coefficients, rows, x, noises):
    learnt = dataclasses.replace(rows, **coefficients)
    return jnp.mean(jnp.square(samplers.sample(jax_model, x, learnt, noise=noises)))


gradient_of_loss = jax.jit(jax.grad(loss))


@pytest.mark.parametrize("name", NAMES)
def test_samplers_can_be_learnt(name):
    """The gradient by every coefficient of the table is that of finite differences along a direction."""
    x, noises = float32(*draws(64))
    rows = samplers.create(name).rows(4).padded(64)
    rng = np.random.default_rng(0)
    coefficients = {field: getattr(rows, field) for field in ("input", "update", "time")}
    direction = {f: (rng.normal(size=c.shape) * (c != 0)).astype(np.float32) for f, c in coefficients.items()}
    gradient = gradient_of_loss(coefficients, rows, x, noises)
    slope = 0.0
    for field, coefficient in coefficients.items():
        assert np.isfinite(gradient[field]).all()
        # Latents that are carried through the middle of a step without need have a 1.
        assert np.all(np.asarray(gradient[field])[(coefficient != 0) & (coefficient != 1)] != 0)
        slope += float((gradient[field] * direction[field]).sum())

    def difference(h):
        ahead, behind = (
            loss({f: c + np.float32(s) * direction[f] for f, c in coefficients.items()}, rows, x, noises)
            for s in (h, -h)
        )
        return float(ahead - behind) / (2 * h)

    # Extrapolated from two lengths, which takes the error of second order away.
    h = 2e-3
    np.testing.assert_allclose((4 * difference(h) - difference(2 * h)) / 3, slope, rtol=1e-2)


def test_what_sample_refuses():
    x, noises = float32(*draws(5))
    rows = samplers.create("ddpm").rows(5)
    words = noise.seed_words([1, 2])
    for arguments, message in (
        ({}, "key, noise: this sampler draws noise; give one of them"),
        ({"key": words, "noise": noises}, "key, noise: give one of them, not both"),
        ({"noise": noises[:4]}, r"noise: expected one per row, \(5, 2, 4, 6, 4\), got \(4, 2, 4, 6, 4\)"),
        ({"key": noise.seed_words([1, 2, 3])}, r"key: expected one threefry key or 2, got words uint32\[3, 2\]"),
        ({"key": jax.random.key(0, impl="rbg")}, r"key: expected one threefry key or 2, got words uint32\[4\]"),
        ({"key": np.zeros(2, np.int32)}, r"key: expected one threefry key or 2, got words int32\[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            samplers.sample(jax_model, x, rows, **arguments)
    for sampler in (samplers.create("ddim"), samplers.create("euler")):  # these need none
        samplers.sample(jax_model, x, sampler.rows(2))


def test_rows_are_a_pytree():
    rows = samplers.create("ddpm").rows(5)
    assert len(rows) == 5
    assert rows[2].time == rows.time[2]
    assert rows[2].update.shape == (REGISTERS, REGISTERS + 3)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(rows[:])} == {5}
    assert len(jax.tree.leaves(rows)) == len(jax.tree.leaves(rows[:])) + 2  # and the start
    assert samplers.create("ddpm").rows(5, dtype=np.float64).update.dtype == np.float64
    assert rows.update.dtype == rows.start.dtype == rows.start_noise.dtype == np.float32
    registers = samplers.initial_registers(np.ones(SHAPE, np.float16))
    assert registers.shape == (REGISTERS, *SHAPE)
    assert registers.dtype == jnp.float32
    assert np.array_equal(registers[0], np.ones(SHAPE))
    assert not registers[1:].any()
