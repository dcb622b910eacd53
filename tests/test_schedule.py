"""The schedule against its closed form and diffusers, timesteps of every spacing, and the forward process."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from sdjax import schedule as schedules
from sdjax.schedule import PREDICTIONS, Schedule, add_noise, target

STEPS = (1, 2, 3, 7, 20, 50, 999, 1000)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (3, 4, 6, 4)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_closed_form(kind):
    """Products and square roots written out, in Python's own floats."""
    schedule = Schedule(kind=kind)
    power = 2 if kind == "scaled_linear" else 1
    first, last = 0.00085 ** (1 / power), 0.012 ** (1 / power)
    share = 1.0
    for t in range(1000):
        beta = (first + (last - first) * t / 999) ** power
        share *= 1 - beta
        assert math.isclose(schedule.betas[t], beta, rel_tol=1e-13)
        assert math.isclose(schedule.alphas_cumprod[t], share, rel_tol=1e-12)
        assert math.isclose(schedule.sigmas[t], math.sqrt((1 - share) / share), rel_tol=1e-10)
    for table in (schedule.betas, schedule.alphas_cumprod, schedule.sigmas):
        assert table.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0.5  # it is cached and shared


@pytest.mark.parametrize(
    "config",
    [
        STABLE_DIFFUSION,
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
        {"beta_start": 0.01, "beta_end": 0.01, "beta_schedule": "scaled_linear", "num_train_timesteps": 37},
        {"beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "linear", "num_train_timesteps": 1},
    ],
)
def test_diffusers_tables(config):
    theirs = DDPMScheduler(**config)
    ours = Schedule(**{"kind" if name == "beta_schedule" else name: value for name, value in config.items()})
    # diffusers computes in float32: 2e-7 and 9e-7 were seen.
    np.testing.assert_allclose(ours.betas, theirs.betas, rtol=1e-6)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=5e-6)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_of_diffusers(spacing, offset):
    """Whole ones are the same integers, fractional ones differ by the rounding of diffusers' float32."""
    whole = DDPMScheduler(**STABLE_DIFFUSION, timestep_spacing=spacing, steps_offset=offset)
    fractional = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing=spacing, steps_offset=offset)
    fractional.alphas_cumprod = torch.from_numpy(Schedule().alphas_cumprod.copy())
    for steps in STEPS:
        if spacing == "leading" and steps * (1000 // steps) - (1000 // steps) + offset > 999:
            continue  # diffusers asks for timestep 1000, which does not exist
        name = {"linspace": "linspace_rounded"}.get(spacing, spacing)
        times, sigmas = getattr(schedules, name)(Schedule(), steps, offset)
        whole.set_timesteps(steps)
        assert times.dtype == sigmas.dtype == np.float64
        assert np.array_equal(times, whole.timesteps)
        assert np.array_equal(sigmas, Schedule().sigmas[whole.timesteps.numpy()])

        times, sigmas = getattr(schedules, spacing)(Schedule(), steps, offset)
        fractional.set_timesteps(steps)
        np.testing.assert_allclose(times, fractional.timesteps, rtol=1e-6)
        np.testing.assert_allclose(sigmas, fractional.sigmas[:-1], rtol=1e-6)


def test_trailing_has_as_many_timesteps_as_steps():
    """diffusers' loop makes one more for some numbers of steps, because 1000 / n is not a float."""
    scheduler = DDPMScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing")
    longer = 0
    for steps in range(1, 1001):
        times, _ = schedules.trailing(Schedule(), steps, 0)
        scheduler.set_timesteps(steps)
        longer += len(scheduler.timesteps) > steps
        assert np.array_equal(times, scheduler.timesteps[:steps])
        assert times[0] == 999
        assert times[-1] >= 0
    assert longer > 0


def test_the_offset_stays_within_training():
    """Where diffusers asks for timestep 1000 the offset is smaller by what does not fit."""
    times, _ = schedules.leading(Schedule(), 1000, 1)
    assert np.array_equal(times, np.arange(1000)[::-1])
    times, _ = schedules.leading(Schedule(), 2, 998)
    assert list(times) == [999, 499]


@pytest.mark.parametrize("steps", STEPS)
def test_karras_of_diffusers(steps):
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, use_karras_sigmas=True)
    scheduler.alphas_cumprod = torch.from_numpy(Schedule().alphas_cumprod.copy())
    scheduler.set_timesteps(steps)
    times, sigmas = schedules.karras(Schedule(), steps, 0)
    np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1], rtol=1e-6)
    # diffusers rounds sigmas and times to float32: 3e-5 of a timestep was seen.
    np.testing.assert_allclose(times, scheduler.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "linspace_rounded", "trailing", "karras"])
def test_every_spacing_goes_from_noise_to_picture(spacing):
    for total, offset in itertools.product((1000, 37), (0, 1)):
        schedule = Schedule(num_train_timesteps=total)
        for steps in range(1, min(total, 130) + 1):
            times, sigmas = getattr(schedules, spacing)(schedule, steps, offset)
            assert times.shape == sigmas.shape == (steps,)
            assert (np.diff(times) < 0).all()
            assert (np.diff(sigmas) < 0).all()
            assert times[0] <= total - 1
            assert times[-1] >= 0
            # Both tell of the same levels. Between timesteps Karras' times go by the logarithm, which is off by
            # (ratio of neighbours - 1)^2 / 8 at most: 0.021 at the clean end.
            np.testing.assert_allclose(schedule.sigma_at(times), sigmas, rtol=0.022 if spacing == "karras" else 1e-14)


def test_times_and_sigmas_are_inverse_at_timesteps():
    schedule = Schedule()
    np.testing.assert_allclose(schedule.time_of(schedule.sigmas), np.arange(1000), atol=1e-9)
    assert np.array_equal(schedule.sigma_at(np.arange(1000)), schedule.sigmas)
    np.testing.assert_allclose(schedule.sigma_at(np.array([10.25])), schedule.sigmas[10:12] @ [0.75, 0.25])
    middle = np.sqrt(schedule.sigmas[10] * schedule.sigmas[11])  # halfway between the logarithms
    np.testing.assert_allclose(schedule.time_of(middle), 10.5)


def batch():
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    return x0, noise, np.array([0, 500, 999], np.int32)


def test_the_forward_process():
    """Ho et al. 2020, eq. 4, in float64; and diffusers."""
    x0, noise, timesteps = batch()
    found = add_noise(Schedule(), x0, noise, timesteps)
    assert found.dtype == jnp.float32
    share = Schedule().alphas_cumprod[timesteps].reshape(3, 1, 1, 1)
    # Two roundings of float32: 2.2e-7 was seen; of diffusers' float32 table 1.4e-6.
    np.testing.assert_allclose(found, np.sqrt(share) * x0 + np.sqrt(1 - share) * noise, rtol=0, atol=1e-6)
    theirs = DDPMScheduler(**STABLE_DIFFUSION)
    reference = theirs.add_noise(*map(torch.from_numpy, (x0, noise, timesteps)))
    np.testing.assert_allclose(found, reference, rtol=0, atol=5e-6)
    # Both coefficients are rounded once, also where 1 - alpha bar would lose its digits.
    zeros, ones = np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)
    np.testing.assert_allclose(add_noise(Schedule(), ones, zeros, timesteps)[:, :1, :1, :1], np.sqrt(share), rtol=1e-7)
    np.testing.assert_allclose(
        jax.jit(lambda *batch: add_noise(Schedule(), *batch))(zeros, ones, timesteps)[:, :1, :1, :1],
        np.sqrt(1 - share),
        rtol=1e-7,
    )


def test_targets():
    """epsilon, x0, and v = alpha epsilon - std x0, from which both come back."""
    x0, noise, timesteps = batch()
    schedule = Schedule()
    assert np.array_equal(target(schedule, "epsilon", x0, noise, timesteps), noise)
    assert np.array_equal(target(schedule, "sample", x0, noise, timesteps), x0)
    v = target(schedule, "v", x0, noise, timesteps)
    reference = DDPMScheduler(**STABLE_DIFFUSION).get_velocity(*map(torch.from_numpy, (x0, noise, timesteps)))
    np.testing.assert_allclose(v, reference, rtol=0, atol=5e-6)
    share = schedule.alphas_cumprod[timesteps].reshape(3, 1, 1, 1)
    noisy = add_noise(schedule, x0, noise, timesteps)
    np.testing.assert_allclose(np.sqrt(share) * noisy - np.sqrt(1 - share) * v, x0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.sqrt(1 - share) * noisy + np.sqrt(share) * v, noise, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps: expected an integer from 1, got 0"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps: expected an integer from 1, got 10.0"),
        ({"beta_start": 0.0}, "beta_start, beta_end: expected 0 < start <= end < 1, got 0.0, 0.012"),
        ({"beta_end": 1.0}, "beta_start, beta_end: expected 0 < start <= end < 1, got 0.00085, 1.0"),
        ({"beta_end": 0.0001}, "beta_start, beta_end: expected 0 < start <= end < 1, got 0.00085, 0.0001"),
        ({"beta_end": math.nan}, "beta_start, beta_end: expected 0 < start <= end < 1, got 0.00085, nan"),
        ({"kind": "cosine"}, "kind: 'cosine' is not a schedule; there are scaled_linear, linear"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


def test_an_unknown_prediction():
    assert PREDICTIONS == ("epsilon", "v", "sample")
    with pytest.raises(ValueError, match="prediction: 'x0' is not a prediction type; there are epsilon, v, sample"):
        target(Schedule(), "x0", *batch())


def test_schedules_are_values():
    """Equal ones are one static argument of a program."""
    assert Schedule() == Schedule()
    assert hash(Schedule()) == hash(Schedule())
    assert Schedule() != Schedule(kind="linear")
