"""Every spacing against its formula written out, and what holds for all of them."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from sdjax import spacings
from sdjax.schedule import KINDS, Schedule
from sdjax.spacings import (
    Beta,
    Distilled,
    Exponential,
    Karras,
    Sigmas,
    Timesteps,
    Whole,
    align_your_steps,
    fixed_length,
    leading,
    leading_open,
    linspace,
    linspace_open,
    sgm_uniform,
    simple,
    trailing,
)

TABLES = {name: getattr(spacings, name) for name in ("WHOLE", "DISTILLED", "FRACTIONAL", "KDPM2", "DPM")}
SD = Schedule()
ZERO = Schedule(zero_terminal_snr=True)
STEPS = (1, 2, 3, 7, 10, 20, 50, 999, 1000)
# NVIDIA's own timesteps and sigmas for Stable Diffusion 1.5 (research.nvidia.com/labs/toronto-ai/AlignYourSteps).
ALIGNED_TIMESTEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
ALIGNED_SIGMAS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def assert_descends(schedule, points, n):
    times, sigmas = points
    assert times.dtype == sigmas.dtype == np.float64
    assert times.shape == sigmas.shape == (n,)
    assert np.isfinite(sigmas).all()
    assert (sigmas > 0).all()
    assert (np.diff(sigmas) < 0).all()
    assert (np.diff(times) <= 0).all()
    assert times[0] <= schedule.num_train_timesteps - 1
    assert times[-1] >= 0


def points_of(spacing, *arguments):
    """The points, or the message by which they are refused."""
    try:
        return spacing(*arguments), ""
    except ValueError as error:
        return None, str(error)


def schedule_of(kind, zero, total):
    return Schedule(total, kind=kind, zero_terminal_snr=zero and total > 1)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    zero=st.booleans(),
    total=st.one_of(st.just(1000), st.integers(1, 100)),
    n=st.integers(1, 1000),
    offset=st.integers(0, 1),
)
def test_every_spacing_goes_from_noise_to_picture(kind, zero, total, n, offset):
    schedule = schedule_of(kind, zero, total)
    n = 1 + (n - 1) % total
    for table, (name, spacing) in ((table, row) for table, rows in TABLES.items() for row in rows):
        points, refusal = points_of(spacing, schedule, n, min(offset, total - 1))
        if refusal:
            # Levels made for one schedule, some of which others do not have or which whole timesteps do not resolve.
            reasons = {"align_your_steps": "the schedule has those|whole timesteps", "distilled": "original_inference"}
            assert re.search(reasons[name], refusal)
            continue
        assert_descends(schedule, points, n)
        if table in ("WHOLE", "DISTILLED"):
            assert np.array_equal(points[0], points[0].round())
            assert (np.diff(points[0]) < 0).all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    zero=st.booleans(),
    total=st.sampled_from((2, 10, 37, 1000)),
    n=st.integers(1, 1000),
    shape=st.floats(0.5, 12.0),
    low=st.floats(0.0, 0.45),
    high=st.floats(0.55, 1.0),
    whole=st.booleans(),
)
def test_every_formula_between_every_pair_of_ends(kind, zero, total, n, shape, low, high, whole):
    schedule, n = schedule_of(kind, zero, total), 1 + (n - 1) % total
    low, high = np.exp(np.interp([low, high], [0, 1], np.log(schedule.sigmas[[0, -1]])))
    ends = {"sigma_min": low, "sigma_max": high, "whole_times": whole}
    for spacing in (Karras(shape, **ends), Exponential(min(shape, 4.0), **ends), Beta(shape, 1 / shape, **ends)):
        points, refusal = points_of(spacing, schedule, n, 0)
        if refusal:  # lopsided quantiles of so many steps that their sigmas are the same number
            assert type(spacing) is Beta
            assert "each must be smaller" in refusal
            continue
        assert_descends(schedule, points, n)
        assert math.isclose(points[1][0], high, rel_tol=1e-12)
        assert n == 1 or math.isclose(points[1][-1], low, rel_tol=1e-12)
        assert not whole or np.array_equal(points[0], points[0].round())


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("total", [10, 1000])
def test_timesteps_of_the_tables_of_lin_et_al(total, offset):
    """Lin et al. 2023, table 2, counted out; and without the last of n + 1 points."""
    schedule = Schedule(total)
    for n in (n for n in STEPS if n <= total):
        found = {f: f(schedule, n, offset)[0] for f in (leading, leading_open, linspace, trailing)}
        stride = total // n
        if (n - 1) * stride + offset < total:
            assert list(found[leading]) == [(n - 1 - i) * stride + offset for i in range(n)]
        stride = total // (n + 1)
        if n < total and n * stride + offset < total:
            assert list(found[leading_open]) == [(n - i) * stride + offset for i in range(n)]
        even = [(total - 1) * i / (n - 1) for i in range(n)][::-1] if n > 1 else [0.0]
        np.testing.assert_allclose(found[linspace], even, atol=1e-11)
        assert list(found[trailing]) == [round(total - i * (total / n)) - 1 for i in range(n)]
        if n < total:
            assert list(linspace_open(schedule, n, offset)[0]) == [round((n - i) * ((total - 1) / n)) for i in range(n)]


@pytest.mark.parametrize("total", [1, 2, 10, 1000])
def test_as_many_steps_as_timesteps(total):
    """All of them, once each, whatever the offset: diffusers asks for some twice or for one that does not exist."""
    schedule = Schedule(total)
    for spacing, offset in itertools.product(
        (leading, leading_open, linspace_open, trailing, simple, Whole(linspace)), (0, min(1, total - 1))
    ):
        assert np.array_equal(spacing(schedule, total, offset)[0], np.arange(total)[::-1])


def test_the_offset_stays_within_training():
    assert list(leading(SD, 2, 998)[0]) == [999, 499]
    assert list(leading_open(SD, 999, 1)[0]) == list(range(999, 0, -1)[:999])
    assert list(leading_open(SD, 2, 400)[0]) == [999, 666]


def test_one_step():
    for spacing in (trailing, linspace_open, simple, sgm_uniform, Whole(trailing)):
        assert list(spacing(SD, 1, 0)[0]) == [999]
    for name, spacing in spacings.DPM:
        assert name == "leading" or spacing(SD, 1, 0)[0] == pytest.approx([999], rel=1e-10)
    assert list(leading_open(SD, 1, 0)[0]) == [500]
    for spacing in (leading, linspace, Karras(), Exponential(), Beta()):  # as diffusers' Euler
        assert spacing(SD, 1, 0)[0] == pytest.approx([0], abs=1e-12)
    assert Karras(sigma_max=3.0)(SD, 1, 0)[1] == pytest.approx([3.0], rel=1e-14)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("schedule", [SD, ZERO, Schedule(kind="squared_cosine")], ids=["sd", "zero", "cosine"])
def test_formulas_of_k_diffusion(schedule, n):
    """k_diffusion/sampling.py: get_sigmas_karras, get_sigmas_exponential, get_sigmas_polyexponential; one by one."""
    low, high = schedule.sigmas[0], schedule.sigmas[-1]
    ends = {"sigma_min": low, "sigma_max": high}
    for i in range(n):
        ramp = i / max(n - 1, 1)
        karras = (high ** (1 / 5) + ramp * (low ** (1 / 5) - high ** (1 / 5))) ** 5
        assert math.isclose(Karras(5.0, **ends)(schedule, n, 0)[1][i], karras, rel_tol=1e-12)
        polyexponential = low * (high / low) ** ((1 - ramp) ** 1.5)
        assert math.isclose(Exponential(1.5, **ends)(schedule, n, 0)[1][i], polyexponential, rel_tol=1e-12)
        if n > 20:
            break
    exponential = Exponential(**ends)(schedule, n, 0)[1]
    np.testing.assert_allclose(exponential, high * (low / high) ** np.linspace(0, 1, n), rtol=1e-12)
    assert dict(spacings.DPM)["lu"](schedule, n, 0)[1] == pytest.approx(exponential, rel=1e-12)


def test_beta_quantiles():
    """The share of the density below each of them, integrated, is where it stands in the run."""
    n, alpha, beta = 9, 0.6, 1.7
    sigmas = Beta(alpha, beta)(SD, n, 0)[1]
    place = (sigmas - SD.sigmas[0]) / (SD.sigmas[-1] - SD.sigmas[0])

    def mass(end):  # u = x^alpha takes the pole at 0 away, the pole at 1 is none with beta above 1
        return quad(lambda u: (1 - u ** (1 / alpha)) ** (beta - 1) / alpha, 0, end**alpha)[0]

    np.testing.assert_allclose([mass(x) / mass(1) for x in place], np.linspace(1, 0, n), atol=1e-7)
    # Symmetric where alpha and beta are the same, and arcsine's closed form at one half.
    arcsine = Beta(0.5, 0.5, sigma_min=1.0, sigma_max=3.0)(SD, n, 0)[1]
    np.testing.assert_allclose(arcsine, 1 + 2 * np.sin(np.pi / 2 * np.linspace(1, 0, n)) ** 2, rtol=1e-13)


@pytest.mark.parametrize("n", STEPS)
def test_rules_of_comfyui_and_a1111(n):
    """comfy/samplers.py and A1111's modules/sd_schedulers.py: simple_scheduler, and normal_scheduler with sgm."""
    ascending = [float(sigma) for sigma in SD.sigmas]
    assert list(simple(SD, n, 1)[1]) == [ascending[-(1 + int(x * (len(ascending) / n)))] for x in range(n)]
    times, sigmas = sgm_uniform(SD, n, 1)
    for i, (time, sigma) in enumerate(zip(times, sigmas, strict=True)):
        assert math.isclose(time, 999 - i * 999 / n, abs_tol=1e-9)
        below = math.floor(999 - i * 999 / n)
        above, part = min(below + 1, 999), 999 - i * 999 / n - below
        expected = math.exp((1 - part) * math.log(ascending[below]) + part * math.log(ascending[above]))
        assert math.isclose(sigma, expected, rel_tol=1e-10)
    np.testing.assert_allclose(SD.time_of(sigmas), times, atol=1e-9)


def test_align_your_steps():
    """The published ten steps; others log-linearly, as loglinear_interp of the same page."""
    times, sigmas = align_your_steps(SD, 10, 0)
    np.testing.assert_allclose(sigmas, ALIGNED_SIGMAS[:10], rtol=4e-3)  # three digits; the timesteps are exact
    np.testing.assert_allclose(times, ALIGNED_TIMESTEPS, atol=1.0)
    whole, _ = dict(spacings.WHOLE)["align_your_steps"](SD, 10, 0)
    assert np.array_equal(whole, times.round())
    _, twenty = align_your_steps(SD, 20, 0)
    np.testing.assert_allclose(twenty[::2], sigmas, rtol=1e-14)
    between = np.sqrt(sigmas * np.append(sigmas[1:], 0.0291671582))
    np.testing.assert_allclose(twenty[1::2], between, rtol=1e-14)
    with pytest.raises(ValueError, match=r"align_your_steps: the schedule has those from .* to 0.239917, got 14.6146"):
        align_your_steps(Schedule(10), 5, 0)
    with pytest.raises(ValueError, match="1000 of align_your_steps do not fall on as many whole timesteps; take fewer"):
        Whole(align_your_steps)(SD, 1000, 0)


def test_times_and_sigmas_of_the_same_levels():
    for n in (2, 20, 300):
        for name, spacing in spacings.FRACTIONAL:
            times, sigmas = spacing(SD, n, 0)
            # Times go by the logarithm and sigmas not, which is (ratio of neighbours - 1)^2 / 8 at most.
            exact = name in ("leading", "linspace", "trailing", "simple")
            np.testing.assert_allclose(SD.sigma_at(times), sigmas, rtol=1e-14 if exact else 0.022)
        for _, spacing in spacings.DPM:
            times, sigmas = spacing(SD, n, 0)
            assert np.abs(SD.time_of(sigmas) - times).max() <= 0.5 + 1e-9


def test_only_the_times_of_karras_are_whole_in_kdpm2():
    for (name, fractional), (same, kdpm2) in zip(spacings.FRACTIONAL, spacings.KDPM2, strict=True):
        assert name == same
        (times, sigmas), (theirs, as_before) = fractional(SD, 20, 0), kdpm2(SD, 20, 0)
        assert np.array_equal(sigmas, as_before)
        assert np.array_equal(times.round() if name == "karras" else times, theirs)


def test_zero_terminal_snr():
    """Where alphas_cumprod is looked up the first level has no picture; where sigma is, as little as diffusers'."""
    for spacing in (trailing, linspace_open, simple, dict(spacings.DPM)["karras"], Exponential()):
        times, sigmas = spacing(ZERO, 20, 0)
        assert times[0] == 999
        assert math.isclose(sigmas[0], math.sqrt(2**24 - 1), rel_tol=1e-12)
    for _, spacing in spacings.WHOLE[1:4]:
        sigma = spacing(ZERO, 20, 0)[1][0]
        alpha = 1 / math.sqrt(1 + sigma**2)
        assert alpha <= 1e-16
        assert sigma * alpha == 1.0
    times, sigmas = Whole(trailing)(ZERO, 20, 0)
    assert np.array_equal(sigmas[1:], ZERO.sigmas[times.astype(int)][1:])


def test_explicit_timesteps_and_sigmas():
    spacing = Timesteps(list(ALIGNED_TIMESTEPS))
    times, sigmas = spacing(SD, 10, 1)
    assert tuple(times) == ALIGNED_TIMESTEPS
    assert np.array_equal(sigmas, SD.sigmas[list(ALIGNED_TIMESTEPS)])
    assert spacing == Timesteps(np.array(ALIGNED_TIMESTEPS)) == Timesteps(ALIGNED_TIMESTEPS)
    assert hash(spacing) == hash(Timesteps(ALIGNED_TIMESTEPS))
    assert np.array_equal(Whole(spacing)(SD, 10, 0)[1], sigmas)

    spacing = Sigmas(ALIGNED_SIGMAS)
    times, sigmas = spacing(SD, 11, 1)
    assert tuple(sigmas) == ALIGNED_SIGMAS
    assert np.array_equal(times, SD.time_of(sigmas))
    assert times[0] == 999
    assert times[-1] == 0
    assert spacing == Sigmas(list(ALIGNED_SIGMAS))
    assert hash(spacing) == hash(Sigmas(np.array(ALIGNED_SIGMAS)))

    lengths = [fixed_length(s) for s in (spacing, Timesteps((3, 1)), Whole(Sigmas((9.0,))), leading, Whole(Karras()))]
    assert lengths == [11, 2, 1, None, None]


def test_distilled():
    """The consistency model's own timesteps: 50 of them, 20 apart."""
    assert list(Distilled()(SD, 4, 1)[0]) == [999, 759, 499, 259]
    assert list(Distilled()(SD, 50, 0)[0]) == list(range(999, 0, -20))
    assert list(Distilled(10)(Schedule(10), 2, 0)[0]) == [9, 4]


def test_values():
    """Equal ones are one static argument of a program."""
    for _, spacing in itertools.chain.from_iterable(TABLES.values()):
        hash(spacing)
    assert Karras() == Karras(7.0) != Karras(7.0, whole_times=True)
    assert Exponential(2.0) != Exponential(2.0, sigma_min=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Karras(0.0), "rho: expected a number above 0, got 0.0"),
        (lambda: Exponential(math.inf), "rho: expected a number above 0, got inf"),
        (lambda: Karras(rho="7"), "rho: expected a number above 0, got '7'"),
        (lambda: Beta(alpha=-1), "alpha: expected a number above 0, got -1"),
        (lambda: Beta(beta=math.nan), "beta: expected a number above 0, got nan"),
        (lambda: Karras(sigma_min=0), "sigma_min: expected a number above 0, got 0"),
        (lambda: Karras(sigma_max=True), "sigma_max: expected a number above 0, got True"),
        (lambda: Beta(whole_times=1), "whole_times: expected True or False, got 1"),
        (lambda: Karras(sigma_max=80.0)(SD, 5, 0), "karras: the schedule has those from 0.0288755 to 14.7608, got 80"),
        (lambda: Exponential(sigma_min=1.0, sigma_max=0.5)(SD, 2, 0), "exponential: each must be smaller"),
        (lambda: Beta(0.001, 0.001)(SD, 9, 0), "beta: each must be smaller than the one before, from noise to picture"),
        (lambda: Timesteps(()), r"timesteps: expected one or more whole numbers, got \(\)"),
        (lambda: Timesteps((9.5, 3)), r"timesteps: expected one or more whole numbers, got \(9.5, 3\)"),
        (lambda: Timesteps((3, 9)), "timesteps: each must be smaller than the one before, from noise to picture; 9 is"),
        (lambda: Timesteps((9, 9)), "timesteps: each must be smaller than the one before"),
        (lambda: Timesteps((1000, 9))(SD, 2, 0), "timesteps: the schedule has those from 0 to 999, got 1000"),
        (lambda: Timesteps((9, -1))(SD, 2, 0), "timesteps: the schedule has those from 0 to 999, got -1"),
        (lambda: Timesteps((9, 3))(SD, 5, 0), "num_inference_steps: there are 2 timesteps, so it must be that, got 5"),
        (lambda: Sigmas([]), r"sigmas: expected one or more numbers, got \[\]"),
        (lambda: Sigmas(["a"]), r"sigmas: expected one or more numbers, got \['a'\]"),
        (lambda: Sigmas((14.6, 1.0, 0.0)), "sigmas: the last one is 0; leave it out, the sampler appends it"),
        (lambda: Sigmas((1.0, math.nan)), "sigmas: each must be smaller than the one before"),
        (lambda: Sigmas((15.0, 1.0))(SD, 2, 0), "sigmas: the schedule has those from 0.0288755 to 14.7608, got 15"),
        (lambda: Sigmas((14.0, 1.0))(SD, 3, 0), "num_inference_steps: there are 2 sigmas, so it must be that, got 3"),
        (lambda: Distilled(0), "original_inference_steps: expected a whole number from 1, got 0"),
        (lambda: Distilled()(SD, 51, 0), "expected from 51, the number of steps, to 1000, that of timesteps, got 50"),
        (lambda: Distilled()(Schedule(10), 2, 0), "expected from 2, .* to 10, that of timesteps, got 50"),
        (lambda: Whole(Karras())(SD, 50, 0), r"50 of Karras\(.* do not fall on as many whole timesteps; take fewer"),
    ],
)  # fmt: skip
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
