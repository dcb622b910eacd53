"""The registered algorithms against their papers' equations and against problems with known solutions."""

import math

import numpy as np
import pytest

from sdjax import samplers
from sdjax.samplers import REGISTERS
from sdjax.schedule import Schedule

from .oracle import run

X, N, M = 0, REGISTERS, REGISTERS + 1  # columns: latents, noise, model output


def coefficients(sampler, steps):
    """Of the latents, the noise and the model's output in the latents after each row, float64."""
    rows = sampler.rows(steps, dtype=np.float64)
    return rows.update[:, 0, X], rows.update[:, 0, N], rows.update[:, 0, M]


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_is_the_posterior(variance):
    """Ho et al. 2020, eqs. 6 and 7, over all the timesteps of training."""
    sampler = samplers.create("ddpm", prediction="sample", steps_offset=0, variance_type=variance)
    x, n, m = (column[::-1] for column in coefficients(sampler, 1000))  # from t = 0 on
    betas = sampler.schedule.betas
    alphas = 1 - betas
    alpha_bars = np.cumprod(alphas)
    before = np.append(1.0, alpha_bars[:-1])
    np.testing.assert_allclose(m, np.sqrt(before) * betas / (1 - alpha_bars), rtol=1e-9)
    np.testing.assert_allclose(x, np.sqrt(alphas) * (1 - before) / (1 - alpha_bars), rtol=1e-9, atol=1e-15)
    if variance == "fixed_small":
        np.testing.assert_allclose(n**2, (1 - before) / (1 - alpha_bars) * betas, rtol=1e-9, atol=1e-15)
    else:
        np.testing.assert_allclose(n**2, np.append(0.0, betas[1:]), rtol=1e-9)


def test_ddim_with_eta_1_is_ddpm():
    """Song et al. 2020, section 4.1: but for the last step, which Stable Diffusion's DDIM ends elsewhere."""
    for prediction in ("epsilon", "v", "sample"):
        one = coefficients(samplers.create("ddim", prediction=prediction, eta=1.0), 50)
        other = coefficients(samplers.create("ddpm", prediction=prediction), 50)
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a[:-1], b[:-1], rtol=1e-9, atol=1e-12)


def test_ddim_draws_no_noise_where_it_stays():
    """Without the offset the last step ends where it began: exactly, with no noise of 1e-9 nor the root of -1e-17."""
    for start in np.linspace(0.0005, 0.002, 30):
        sampler = samplers.create("ddim", Schedule(beta_start=start), steps_offset=0, eta=1.0)
        assert coefficients(sampler, 50)[1][-1] == 0


def test_ddim_without_noise():
    """Song et al. 2020, eq. 12 at eta 0: sqrt(a') x0 + sqrt(1 - a') epsilon, and the two ends of the last step."""
    share = Schedule().alphas_cumprod
    now, before = share[1::20][::-1], np.append(share[1:981:20][::-1], share[0])
    for to_one in (False, True):
        before[-1] = 1.0 if to_one else share[0]
        x, n, m = coefficients(samplers.create("ddim", set_alpha_to_one=to_one), 50)
        np.testing.assert_allclose(x, np.sqrt(before / now), rtol=1e-12)
        np.testing.assert_allclose(m, np.sqrt(1 - before) - np.sqrt(before / now * (1 - now)), rtol=1e-9)
        assert not n.any()


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddpm", {}), ("ddim", {"set_alpha_to_one": True}), ("ddim", {"set_alpha_to_one": True, "eta": 0.7})]
    + [(name, {}) for name in ("euler", "euler_ancestral")],
)
def test_marginals_are_the_schedule_s(name, options):
    """Where x0 is known, latents alpha x0 + std n at one noise level come out like that at the next."""
    sampler = samplers.create(name, spacing="leading", prediction="sample", **options)
    rows = sampler.rows(50, dtype=np.float64)
    x, n, m = coefficients(sampler, 50)
    alphas, stds = np.concatenate([[rows.start], rows.blend]).T  # only the start is in the model's scale for all
    np.testing.assert_allclose(x * alphas[:-1] + m, alphas[1:], rtol=1e-12)
    np.testing.assert_allclose(np.square(x * stds[:-1]) + np.square(n), np.square(stds[1:]), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("spacing", ["linspace", "karras"])  # the others' ends move with the number of steps
def test_euler_s_error_halves_with_the_step(spacing):
    """First order. On pictures of N(0, 0.7²) the ODE's solution is known: latents stay as many deviations away."""
    sampler = samplers.create("euler", spacing=spacing, prediction="sample")
    x, std, errors = np.linspace(-2, 2, 9), 0.7, []
    for steps in (50, 100, 200, 400):
        times, sigmas = sampler.points(sampler.schedule, steps, 1)
        sigma_of = dict(zip(times, sigmas, strict=True))

        def denoise(x_in, time, sigma_of=sigma_of):
            sigma = sigma_of[time]
            best = std**2 / (std**2 + sigma**2) * math.sqrt(1 + sigma**2) * x_in
            return best, best

        _, numbers = run(sampler, x, None, steps, denoise=denoise)
        spread = np.sqrt(std**2 + np.square(sigmas))
        exact = x * math.sqrt(1 + sigmas[0] ** 2) * spread[-1] / spread[0]
        errors.append(np.abs(numbers.latents[-2] - exact).max())  # the step to sigma 0 does not shrink with the others
    ratios = np.divide(errors[:-1], errors[1:])
    assert (np.abs(ratios - 2) < 0.15).all(), ratios
    assert errors[-1] < 0.02
