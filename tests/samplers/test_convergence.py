"""Data of a normal distribution, whose exact denoiser and ODE are known: orders, means and variances.

In continuous time: on even grids in each method's own variable, down to a noise level above 0, in float64. LCM, TCD and
CFG++ do not converge to the data and are tested against their formulas only.
"""

import numpy as np
import pytest

from sdjax import samplers
from sdjax.samplers import Level
from sdjax.schedule import Schedule

from .oracle import Numbers

SCHEDULE = Schedule(1000, 0.0001, 0.05, "linear")  # sigmas up to 300,000
STD = 1.0  # of the data, around 0
TIMES = np.arange(1000.0)


def sigma_of(time):
    """The inverse of `Schedule.time_of`."""
    return np.exp(np.interp(time, TIMES, np.log(SCHEDULE.sigmas)))


def denoise(x_in, time):
    """The exact x0 (a model of prediction type "sample"), of latents in the variance-preserving scale."""
    sigma = sigma_of(time)
    best = STD**2 / (STD**2 + sigma**2) * np.sqrt(1 + sigma**2) * x_in
    return best, best


# The runs begin where x0 hardly depends on sigma yet: in their first steps multistep methods have a lower order.
LOW = 0.5


def even_in_sigma(n):
    return np.linspace(14.6, LOW, n + 1)


def even_in_lambda(n):
    return np.exp(np.linspace(np.log(500.0), np.log(LOW), n + 1))


def solve(name, sigmas, x, noise=None, **options):
    """The latents at the last of these noise levels, divided by their alpha, from x at the first of them."""
    sampler = samplers.create(name, SCHEDULE, prediction="sample", **options)
    levels = tuple(Level(float(SCHEDULE.time_of(s)), float(s)) for s in sigmas)
    numbers = Numbers(noise, denoise)
    _, result = sampler.run_over(numbers, x * levels[0].alpha, levels, 0, len(sigmas) - 1)
    return result / (levels[-1].alpha if sampler.algorithm.scale == "vp" else 1.0)


ORDERS = [
    ("euler", {}, even_in_sigma, 1),
    ("heun", {}, even_in_sigma, 2),
    ("dpm2", {}, even_in_sigma, 2),
    ("lms", {"order": 1}, even_in_sigma, 1),
    ("lms", {"order": 2}, even_in_sigma, 2),
    ("lms", {"order": 3}, even_in_sigma, 3),
    ("lms", {"order": 4}, even_in_sigma, 4),
    ("ipndm", {"order": 3}, even_in_sigma, 3),
    ("ipndm", {"order": 4}, even_in_sigma, 4),
    ("dpmpp_2m", {"order": 1}, even_in_lambda, 1),
    ("dpmpp_2m", {}, even_in_lambda, 2),
    ("dpmpp_2m", {"solver_type": "heun"}, even_in_lambda, 2),
    ("dpmpp_3m", {}, even_in_lambda, 3),
    ("dpm_multistep", {}, even_in_lambda, 2),
    ("dpm_multistep", {"solver_type": "heun"}, even_in_lambda, 2),
    ("dpm_multistep", {"order": 3}, even_in_lambda, 3),
    ("deis", {"order": 2}, even_in_lambda, 2),
    ("deis", {"order": 3}, even_in_lambda, 3),
    ("dpmpp_2s", {}, even_in_lambda, 2),
    ("dpmpp_2s", {"solver_type": "heun"}, even_in_lambda, 2),
    ("dpmpp_3s", {"solver_type": "heun"}, even_in_lambda, 3),
    ("dpm_singlestep", {}, even_in_lambda, 2),
    ("dpm_singlestep", {"order": 3, "solver_type": "heun"}, even_in_lambda, 3),
    ("dpmpp_2s_ancestral", {"eta": 0.0}, even_in_lambda, 2),
    ("dpmpp_sde", {"eta": 0.0}, even_in_lambda, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, even_in_lambda, 2),
    ("res_multistep", {}, even_in_lambda, 2),
    ("unipc", {"order": 1, "final_sigma": "min"}, even_in_lambda, 2),  # the corrector adds one
    ("unipc", {"order": 2, "final_sigma": "min"}, even_in_lambda, 3),
    ("unipc", {"order": 3, "final_sigma": "min"}, even_in_lambda, 4),
    ("unipc", {"order": 2, "solver_type": "bh1", "final_sigma": "min"}, even_in_lambda, 3),
    ("sa_solver", {"tau": 0.0, "predictor_order": 1, "corrector_order": 1}, even_in_lambda, 1),
    ("sa_solver", {"tau": 0.0}, even_in_lambda, 2),
    ("sa_solver", {"tau": 0.0, "predictor_order": 3, "corrector_order": 3}, even_in_lambda, 3),
]


@pytest.mark.parametrize(("name", "options", "grid", "order"), ORDERS)
def test_order(name, options, grid, order):
    """Halving the steps divides the error by 2^order; the exact solution stays as many deviations from the mean."""
    x = np.array([-1.5, 0.3, 1.0])
    low_order_ends = "lower_order_final" in samplers.create(name).algorithm.options
    options = options | ({"lower_order_final": False} if low_order_ends else {})
    errors = []
    for n in (24, 48, 96) if order == 4 and grid is even_in_lambda else (96, 192, 384):  # above float64's rounding
        sigmas = grid(n)
        exact = x * np.sqrt((STD**2 + LOW**2) / (STD**2 + sigmas[0] ** 2))
        errors.append(np.abs(solve(name, sigmas, x, **options) - exact).max())
    found = np.log2(np.divide(errors[:-1], errors[1:]))
    assert found[-1] > order - 0.25
    assert errors[-1] < 0.02


STOCHASTIC = [
    ("euler_ancestral", {}),
    ("dpm2_ancestral", {}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_sde", {}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.5}),
    ("dpmpp_3m_sde", {}),
    ("sa_solver", {"tau_start": 0.0, "tau_end": 1000.0}),
    ("sa_solver", {}),
    ("res_multistep", {"eta": 1.0}),
    ("er_sde", {}),
    ("heun", {"s_churn": 20.0}),
]


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
def test_mean_and_variance(name, options):
    """All is linear here, so one run on unit vectors gives the distribution of the result exactly."""
    errors = []
    for n in (50, 100, 200):
        rows = 3 * n
        sigmas = even_in_lambda(n)
        start = np.eye(1, rows + 1)[0]  # the start's part, and one for every row's noise
        noise = [np.eye(1, rows + 1, k + 1)[0] for k in range(rows)]
        parts = solve(name, sigmas, start, noise, **options)
        assert np.abs(parts[1:]).max() > 0
        variance = parts[0] ** 2 * (STD**2 + sigmas[0] ** 2) + np.square(parts[1:]).sum()
        errors.append(abs(np.sqrt(variance / (STD**2 + LOW**2)) - 1))
    assert errors[-1] < 0.02
    assert errors[-1] < 0.6 * errors[-2] or errors[-1] < 1e-4


def fine(times):
    """A schedule of so many times more timesteps with the same noise at the ends, where whole timesteps are fine."""
    return Schedule(1000 * times, 0.00085 / times, 0.012 / times)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("plms", 2), ("pndm", 2)])
def test_order_on_whole_timesteps(name, order):
    schedule, x, errors = fine(64), np.array([-1.5, 0.3, 1.0]), []
    for n in (80, 160, 320):
        sampler = samplers.create(name, schedule, prediction="sample", steps_offset=0)

        def exact(x_in, time):
            sigma = schedule.sigmas[int(time)]
            best = STD**2 / (STD**2 + sigma**2) * np.sqrt(1 + sigma**2) * x_in
            return best, best

        times = np.arange(n + 1)[::-1] * (schedule.num_train_timesteps // n // 2) + schedule.num_train_timesteps // 4
        levels = tuple(Level(float(t), float(schedule.sigmas[t])) for t in times)
        numbers = Numbers(None, exact)
        _, result = sampler.run_over(numbers, x * levels[0].alpha, levels, 0, 2 * n)
        high, low = levels[0].sigma, levels[-1].sigma
        errors.append(np.abs(result / levels[-1].alpha - x * np.sqrt((1 + low**2) / (1 + high**2))).max())
    found = np.log2(np.divide(errors[:-1], errors[1:]))
    assert found[-1] > order - 0.25


def test_restarts_leave_the_distribution_as_it_is():
    """Going back up and down again leaves the distribution as it is."""
    sampler = samplers.create("restart", SCHEDULE, prediction="sample", restarts=(0.6, 2.0, 20, 2))
    sigmas = even_in_lambda(80)
    rows = 500
    levels = tuple(Level(float(SCHEDULE.time_of(s)), float(s)) for s in sigmas)
    noise = [np.eye(1, rows + 1, k + 1)[0] for k in range(rows)]
    numbers = Numbers(noise, denoise)
    _, parts = sampler.run_over(numbers, np.eye(1, rows + 1)[0] * levels[0].alpha, levels, 0, 80)
    assert (parts[1:] != 0).sum() == 2
    variance = parts[0] ** 2 * (STD**2 + sigmas[0] ** 2) + np.square(parts[1:]).sum()
    assert abs(np.sqrt(variance / (STD**2 + LOW**2)) - 1) < 2e-3
