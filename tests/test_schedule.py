"""The schedule against its closed form and diffusers, timesteps of every spacing, and the forward process."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from sdjax.schedule import KINDS, PREDICTIONS, Schedule, add_noise, remove_noise, target

DIFFUSERS = dict(zip(KINDS, ("scaled_linear", "linear", "squaredcos_cap_v2", "sigmoid"), strict=True))
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (3, 4, 6, 4)


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def closed_form(kind, t):
    """beta of a timestep of a thousand, in Python's own floats."""
    if kind == "squared_cosine":  # Nichol & Dhariwal 2021, eq. 17

        def share(t):
            return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

        return min(1 - share(t + 1) / share(t), 0.999)
    if kind == "sigmoid":  # GeoDiff: a logistic curve from -6 to 6
        return 0.00085 + (0.012 - 0.00085) / (1 + math.exp(6 - 12 * t / 999))
    power = 2 if kind == "scaled_linear" else 1
    first, last = 0.00085 ** (1 / power), 0.012 ** (1 / power)
    return (first + (last - first) * t / 999) ** power


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form(kind):
    """Products and square roots written out."""
    schedule = Schedule(kind=kind)
    share = 1.0
    for t in range(1000):
        beta = closed_form(kind, t)
        share *= 1 - beta
        # The cosine's betas are differences of numbers near 1.
        assert math.isclose(schedule.betas[t], beta, rel_tol=1e-13, abs_tol=1e-15)
        assert math.isclose(schedule.alphas_cumprod[t], share, rel_tol=1e-12)
        assert math.isclose(schedule.sigmas[t], math.sqrt((1 - share) / share), rel_tol=1e-10)
    for table in (schedule.betas, schedule.alphas_cumprod, schedule.sigmas):
        assert table.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0.5  # it is cached and shared


def test_squared_cosine():
    """Its alpha bar is the cosine itself, but for the cap at the end; the ends of beta say nothing."""
    schedule = Schedule(kind="squared_cosine", beta_start=math.nan, beta_end=7.0)
    angle = (np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2
    cosine = np.cos(angle) ** 2 / np.cos(angle[0]) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], cosine[1:-1], rtol=1e-11)
    assert schedule.betas[-1] == 0.999
    assert np.array_equal(schedule.sigmas, Schedule(kind="squared_cosine").sigmas)


@pytest.mark.parametrize(
    "config",
    [
        STABLE_DIFFUSION,
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
        {"beta_start": 0.01, "beta_end": 0.01, "beta_schedule": "scaled_linear", "num_train_timesteps": 37},
        {"beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "linear", "num_train_timesteps": 1},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 10},
        {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "sigmoid"},
        {"beta_start": 0.01, "beta_end": 0.02, "beta_schedule": "sigmoid", "num_train_timesteps": 1},
    ],
)
def test_diffusers_tables(config):
    theirs = DDPMScheduler(**config)
    (kind,) = (kind for kind, name in DIFFUSERS.items() if name == config["beta_schedule"])
    ours = Schedule(kind=kind, **{name: value for name, value in config.items() if name != "beta_schedule"})
    # diffusers computes in float32: 9e-7 was seen, and 1.3e-5 where the cosine's last alpha is 1 - 0.999.
    np.testing.assert_allclose(ours.betas, theirs.betas, rtol=1e-6)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total", [2, 3, 10, 1000])
def test_zero_terminal_snr(kind, total):
    """Lin et al. 2023, Algorithm 1, step by step in Python's floats; and diffusers' function on the same betas."""
    plain, schedule = Schedule(total, kind=kind), Schedule(total, kind=kind, zero_terminal_snr=True)
    first, last = math.sqrt(plain.alphas_cumprod[0]), math.sqrt(plain.alphas_cumprod[-1])
    for t in range(total):
        shifted = (math.sqrt(plain.alphas_cumprod[t]) - last) * first / (first - last)
        # What is left of a difference of two numbers that both have their roundings.
        assert math.isclose(schedule.alphas_cumprod[t], shifted**2, rel_tol=1e-9)
    assert schedule.alphas_cumprod[-1] == 0.0
    assert schedule.betas[-1] == 1.0
    assert math.isclose(schedule.alphas_cumprod[0], plain.alphas_cumprod[0], rel_tol=1e-15)
    rescaled = rescale_zero_terminal_snr(torch.from_numpy(plain.betas.copy()))
    np.testing.assert_allclose(schedule.betas, rescaled, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_sigma_is_finite(kind):
    """2^-24 of signal, as diffusers' Euler has it."""
    schedule = Schedule(kind=kind, zero_terminal_snr=True)
    assert math.isclose(schedule.sigmas[-1], math.sqrt(2**24 - 1), rel_tol=1e-15)
    if kind != "sigmoid":
        euler = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule=DIFFUSERS[kind], rescale_betas_zero_snr=True
        )
        assert math.isclose(schedule.sigmas[-1], euler.sigmas[0], rel_tol=1e-6)
    assert schedule.time_of(schedule.sigmas[-1]) == 999
    assert schedule.time_of(np.array([1e9])) == 999
    assert schedule.sigma_at(np.array([999.0])) == schedule.sigmas[-1]
    middle = np.exp(np.log(schedule.sigmas[-2:]).mean())
    assert math.isclose(schedule.time_of(middle), 998.5, rel_tol=1e-12)
    # With more timesteps the last but one has as little, and the last must have less.
    for total in (2, 10_000, 100_000):
        sigmas = Schedule(total, kind="scaled_linear", zero_terminal_snr=True).sigmas
        assert np.isfinite(sigmas).all()
        assert (np.diff(sigmas) > 0).all()


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


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero", [False, True])
def test_removing_noise(prediction, zero):
    """What was added comes back from the target of every prediction type."""
    schedule = Schedule(zero_terminal_snr=zero)
    x0, noise, timesteps = batch()
    if zero and prediction == "epsilon":
        for function in (target, remove_noise):
            with pytest.raises(ValueError, match="prediction: 'epsilon' says nothing of the picture at zero terminal"):
                function(schedule, prediction, x0, noise, timesteps)
        return
    noisy = add_noise(schedule, x0, noise, timesteps)
    output = target(schedule, prediction, x0, noise, timesteps)
    found = jax.jit(lambda *batch: remove_noise(schedule, prediction, *batch))(noisy, output, timesteps)
    assert found[0].dtype == found[1].dtype == jnp.float32
    # Roundings of float32, divided by what there is of the other: 0.068 of picture at the end, 0.029 of noise first.
    np.testing.assert_allclose(found[0], x0, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], noise, rtol=0, atol=2e-5)


def test_the_last_timestep_at_zero_terminal_snr():
    """It is noise alone, and v is the picture, negated (Lin et al. 2023, section 3.2)."""
    schedule = Schedule(zero_terminal_snr=True)
    x0, noise, _ = batch()
    last = np.full(3, 999, np.int32)
    assert np.array_equal(add_noise(schedule, x0, noise, last), noise)
    assert np.array_equal(target(schedule, "v", x0, noise, last), -x0)
    found = remove_noise(schedule, "v", noise, -x0, last)
    assert np.array_equal(found[0], x0)
    assert np.array_equal(found[1], noise)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps: expected an integer from 1, got 0"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps: expected an integer from 1, got 10.0"),
        ({"beta_start": 0.0}, "beta_start, beta_end: expected 0 < start <= end < 1, got 0.0, 0.012"),
        ({"beta_end": 1.0}, "beta_start, beta_end: expected 0 < start <= end < 1, got 0.00085, 1.0"),
        ({"beta_end": 0.0001}, "beta_start, beta_end: expected 0 < start <= end < 1, got 0.00085, 0.0001"),
        ({"beta_end": math.nan}, "beta_start, beta_end: expected 0 < start <= end < 1, got 0.00085, nan"),
        (
            {"kind": "cosine"},
            "kind: 'cosine' is not a schedule; there are scaled_linear, linear, squared_cosine, sigmoid",
        ),
        ({"kind": "cosine", "beta_start": -1.0}, "kind: 'cosine' is not a schedule"),
        ({"zero_terminal_snr": 1}, "zero_terminal_snr: expected True or False, got 1"),
        ({"zero_terminal_snr": True, "num_train_timesteps": 1}, "zero_terminal_snr: .* must be 2 or more"),
        ({"beta_start": 0.5, "beta_end": 0.999}, "over 1000 timesteps 0.5 to 0.999 make noise levels that float64"),
        ({"beta_start": 1e-18}, "over 1000 timesteps 1e-18 to 0.012 make noise levels that float64 cannot tell apart"),
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
    assert Schedule() != Schedule(kind="linear") != Schedule(kind="linear", zero_terminal_snr=True)
