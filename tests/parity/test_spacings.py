"""Timesteps and sigmas of every spacing that diffusers' schedulers have, of each family of them."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import AysSchedules

from sdjax import spacings
from sdjax.schedule import Schedule
from sdjax.spacings import Beta, Exponential, Karras, Sigmas, Timesteps, fixed_length

STEPS = (1, 2, 3, 7, 20, 50, 999)
NAMES = {"scaled_linear": "scaled_linear", "linear": "linear", "squared_cosine": "squaredcos_cap_v2"}
WHOLE = (DDPMScheduler, DDIMScheduler, PNDMScheduler)
FRACTIONAL = (EulerDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler)
KDPM2 = (KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler)
DPM = (DPMSolverMultistepScheduler, DEISMultistepScheduler, UniPCMultistepScheduler, SASolverScheduler)
SECOND_ORDER = (HeunDiscreteScheduler, *KDPM2)
SPACED = ("leading", "linspace", "trailing")
FORMULAS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}


@pytest.fixture(params=[(kind, zero) for kind in NAMES for zero in (False, True)], ids=str)
def schedule(request):
    kind, zero = request.param
    return Schedule(kind=kind, zero_terminal_snr=zero)


def scheduler_of(kind, schedule, **config):
    """With its schedule in float64, which diffusers computes to 2e-6 only; at zero terminal SNR as its `__init__`."""
    scheduler = kind(
        num_train_timesteps=schedule.num_train_timesteps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        beta_schedule=NAMES[schedule.kind],
        **config,
    )
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy())
    if schedule.zero_terminal_snr and kind not in WHOLE:
        scheduler.alphas_cumprod[-1] = 2**-24
    return scheduler


def theirs(scheduler, n):
    """The points of a run, without the evaluations between them and without the end."""
    scheduler.set_timesteps(n)
    stride = 2 if isinstance(scheduler, SECOND_ORDER) else 1
    return scheduler.timesteps.double().numpy()[::stride][:n], scheduler.sigmas.double().numpy()[::stride][:n]


def configurations(spacing):
    if spacing in SPACED:
        return {"timestep_spacing": spacing}
    return {"timestep_spacing": "linspace", FORMULAS[spacing]: True}


def cases(kind, spacing, schedule, **config):
    """Schedulers, numbers of steps and offsets; only "leading" takes notice of these.

    The long runs of a formula, over which diffusers loops in Python, are on one schedule only.
    """
    steps = STEPS if spacing in SPACED or schedule == Schedule() else STEPS[:-1]
    for offset in (0, 1) if spacing == "leading" else (1,):
        scheduler = scheduler_of(kind, schedule, **config, steps_offset=offset)
        for n in steps:
            yield scheduler, n, offset


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("spacing", SPACED)
def test_whole(kind, spacing, schedule):
    config = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    for scheduler, n, offset in cases(kind, spacing, schedule, timestep_spacing=spacing, **config):
        scheduler.set_timesteps(n)
        expected = scheduler.timesteps.numpy()
        if kind is PNDMScheduler:
            expected = np.unique(expected)[::-1]  # the second one is asked for twice
        expected = expected[:n]
        times, sigmas = dict(spacings.WHOLE)[spacing](schedule, n, offset)
        assert np.array_equal(times, expected)
        share = scheduler.alphas_cumprod.numpy()[expected]
        np.testing.assert_allclose(1 / (1 + sigmas**2), share, rtol=1e-12, atol=1e-30)


@pytest.mark.parametrize(
    ("kind", "spacing"),
    [
        *itertools.product([*FRACTIONAL, *KDPM2], [*SPACED, "karras", "exponential", "beta"]),
        *itertools.product([EulerAncestralDiscreteScheduler], SPACED),
    ],
)
def test_fractional(kind, spacing, schedule):
    table = dict(spacings.KDPM2 if kind in KDPM2 else spacings.FRACTIONAL)
    for scheduler, n, offset in cases(kind, spacing, schedule, **configurations(spacing)):
        times, sigmas = table[spacing](schedule, n, offset)
        if spacing == "linspace":  # whose times diffusers rounds to float32 before it takes their sigmas
            sigmas = schedule.sigma_at(times.astype(np.float32).astype(np.float64))
        check((times, sigmas), theirs(scheduler, n), whole=kind in KDPM2 and spacing == "karras")


@pytest.mark.parametrize("ends", SPACED)
def test_formulas_between_the_ends_of_every_spacing(ends):
    """diffusers has both at once: use_karras_sigmas and timestep_spacing."""
    for formula, spacing in (("karras", Karras), ("exponential", Exponential), ("beta", Beta)):
        config = {FORMULAS[formula]: True, "timestep_spacing": ends}
        for n, offset in ((1, 0), (7, 1), (20, 1)):
            expected = theirs(scheduler_of(EulerDiscreteScheduler, Schedule(), **config, steps_offset=offset), n)
            check(spacing(ends=dict(spacings.FRACTIONAL)[ends])(Schedule(), n, offset), expected)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_ends_of_ones_own(kind):
    for formula, spacing in (("karras", Karras), ("exponential", Exponential), ("beta", Beta)):
        config = {FORMULAS[formula]: True, "sigma_min": 0.1, "sigma_max": 9.0}
        for n in (1, 7, 20):
            found = spacing(sigma_min=0.1, sigma_max=9.0)(Schedule(), n, 0)
            np.testing.assert_allclose(found[1], theirs(scheduler_of(kind, Schedule(), **config), n)[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "spacing"),
    [
        *itertools.product(DPM, [*SPACED, "karras", "exponential", "beta"]),
        (DPMSolverMultistepScheduler, "lu"),
    ],
)
def test_dpm(kind, spacing, schedule):
    for scheduler, n, offset in cases(kind, spacing, schedule, **configurations(spacing)):
        times, sigmas = dict(spacings.DPM)[spacing](schedule, n, offset)
        expected = theirs(scheduler, n)
        if expected[0][0] > 999:
            assert (spacing, n, offset) == ("leading", 999, 1)  # diffusers asks for timestep 1000
            continue
        cosine = kind is DPMSolverMultistepScheduler and schedule.kind == "squared_cosine"
        if spacing in ("exponential", "beta") or (spacing in ("karras", "lu") and cosine):
            np.testing.assert_allclose(sigmas, expected[1], rtol=1e-6)
            # diffusers cuts off what others round; next to a whole number, one way or the other.
            exact = schedule.time_of(sigmas)
            assert np.array_equal(times, exact.round())
            assert ((expected[0] == np.floor(exact + 1e-6)) | (expected[0] == np.floor(exact - 1e-6))).all()
        else:
            check((times, sigmas), expected, whole=True)


@pytest.mark.parametrize("spacing", ["linspace", "karras"])
def test_dpm_singlestep(spacing, schedule):
    config = {} if spacing == "linspace" else {FORMULAS[spacing]: True}
    scheduler = scheduler_of(DPMSolverSinglestepScheduler, schedule, **config)
    for n in STEPS[:-1]:
        check(dict(spacings.DPM)[spacing](schedule, n, 0), theirs(scheduler, n), whole=True)


@pytest.mark.parametrize("spacing", SPACED)
def test_ten_timesteps(spacing):
    """As many steps as timesteps among them, where diffusers' DPM-Solvers ask for some timestep twice."""
    schedule, refused = Schedule(10), set()
    for table, kinds in ((spacings.WHOLE, WHOLE[:2]), (spacings.FRACTIONAL, FRACTIONAL), (spacings.DPM, DPM)):
        for kind, offset in itertools.product(kinds, (0, 1)):
            scheduler = scheduler_of(kind, schedule, timestep_spacing=spacing, steps_offset=offset)
            for n in range(1, 11):
                scheduler.set_timesteps(n)
                expected = scheduler.timesteps.numpy()[:: 2 if kind in SECOND_ORDER else 1][:n]
                times, _ = dict(table)[spacing](schedule, n, offset)
                if expected[0] > 9 or (np.diff(expected) == 0).any():
                    refused.add((n, offset))
                    assert np.array_equal(times, np.arange(10)[::-1][:n])
                else:
                    np.testing.assert_allclose(times, expected, rtol=1e-6)
    expected = {"leading": {(10, 0), (10, 1), (9, 1)}, "linspace": {(10, 0), (10, 1)}, "trailing": set()}
    assert refused == expected[spacing]


def test_distilled():
    for kind in (LCMScheduler, TCDScheduler):
        for original, n in ((50, 1), (50, 4), (50, 7), (50, 50), (100, 8)):
            scheduler = kind(original_inference_steps=original)
            scheduler.set_timesteps(n)
            times, _ = spacings.Distilled(original)(Schedule(), n, 1)
            assert np.array_equal(times, scheduler.timesteps)


def test_explicit_points():
    timesteps, sigmas = AysSchedules["StableDiffusionTimesteps"], AysSchedules["StableDiffusionSigmas"]
    spacing = Timesteps(timesteps)
    for kind in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        scheduler = scheduler_of(kind, Schedule())
        scheduler.set_timesteps(timesteps=timesteps)
        expected = scheduler.timesteps.double().numpy(), scheduler.sigmas.double().numpy()[:-1]
        check(spacing(Schedule(), fixed_length(spacing), 1), expected, whole=True)

    scheduler, spacing = scheduler_of(EulerDiscreteScheduler, Schedule()), Sigmas(sigmas[:-1])
    scheduler.set_timesteps(sigmas=sigmas)
    expected = scheduler.timesteps.double().numpy(), scheduler.sigmas.double().numpy()[:-1]
    check(spacing(Schedule(), fixed_length(spacing), 1), expected)


def check(found, expected, whole=False):
    """Relative: diffusers rounds both to float32."""
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
    if whole:
        assert np.array_equal(found[0], expected[0])
    else:
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6, atol=1e-4)
