"""What holds for every sampler there is, and how `create` and `rows` refuse what does not exist."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax import samplers
from sdjax.samplers import REGISTERS
from sdjax.schedule import Schedule
from sdjax.spacings import Timesteps, fixed_length

from .oracle import KINDS, NAMES, Numbers, draws, jax_model, options_of

X, NOISES = (array.astype(np.float32) for array in draws(256))
sample = jax.jit(lambda rows: samplers.sample(jax_model, X, rows, noise=NOISES))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    option=st.integers(0, 3),
    steps=st.integers(1, 50),
    strength=st.one_of(st.just(1.0), st.floats(0.001, 1.0)),
    offset=st.integers(0, 1),
)
def test_every_table(kind, option, steps, strength, offset):
    name, spacing, prediction = kind
    options = options_of(name)[option % len(options_of(name))]
    sampler = samplers.create(name, spacing=spacing, prediction=prediction, steps_offset=offset, **options)
    count = int(steps * strength)
    if count == 0:
        with pytest.raises(ValueError, match=r"strength: .* leaves no step to run"):
            sampler.rows(steps, strength)
        return
    rows = sampler.rows(steps, strength)

    again = samplers.create(name, spacing=spacing, prediction=prediction, steps_offset=offset, **options)
    assert again == sampler
    assert hash(again) == hash(sampler)
    for one, other in zip(jax.tree.leaves(rows), jax.tree.leaves(again.rows(steps, strength)), strict=True):
        assert np.array_equal(one, other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(rows))
    assert all(leaf.dtype in (np.float32, np.int32, bool) for leaf in jax.tree.leaves(rows))

    assert rows.update.shape[1:] == (REGISTERS, REGISTERS + 3)
    assert rows.active.all()
    inverse = sampler.algorithm.inverse
    assert sorted(set(rows.step)) == list(range(count) if inverse else range(steps - count, steps))
    assert (np.diff(rows.step) >= 0).all()
    assert (rows.time >= 0).all()
    assert (rows.time <= 999).all()
    np.testing.assert_allclose(np.square(rows.start).sum(), 1.0, rtol=1e-6)

    # Every step ends at a known noise level, the last at none.
    ends = np.append(np.diff(rows.step) > 0, True)
    assert np.array_equal(rows.blend.any(1), ends)
    assert np.array_equal(rows.blend[-1], [1.0, 0.0])
    # A noise that is drawn acts between two levels.
    noisy = rows.input[:, REGISTERS].astype(bool) | rows.update[:, :, REGISTERS].any(1)
    assert np.array_equal(noisy, rows.span[:, 0] > rows.span[:, 1])
    assert (rows.span >= 0).all()

    assert np.isfinite(sample(rows.padded(256))).all()


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler_ancestral", "er_sde", "lcm", "tcd"])
def test_one_step_algorithms_hold_only_their_latents(name):
    """One-step methods need one register: the tracer keeps nothing that no row reads."""
    rows = samplers.create(name, **({"order": 1} if name == "er_sde" else {})).rows(20)
    assert not rows.input[:, 1:REGISTERS].any()
    assert not rows.update[:, 1:].any()
    assert not rows.reads_unguided


@pytest.mark.parametrize("algorithm", samplers.ALGORITHMS, ids=NAMES)
def test_names(algorithm):
    expected = samplers.create(algorithm)
    for name in algorithm.names:
        for spelling in (name, name.upper(), name.lower(), name.swapcase()):
            assert samplers.create(spelling) == expected
    assert expected.name == algorithm.name


def test_names_of_other_programs():
    for theirs, ours in (
        ("DDPMScheduler", "ddpm"),
        ("DDIMScheduler", "ddim"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("DDIM", "ddim"),
        ("Euler", "euler"),
        ("Euler a", "euler_ancestral"),
        ("PLMS", "plms"),
        ("PNDMScheduler", "plms"),
        ("Heun", "heun"),
        ("LMS", "lms"),
        ("DPM2 a", "dpm2_ancestral"),
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DPM++ 2S a", "dpmpp_2s_ancestral"),
        ("DPM++ SDE", "dpmpp_sde"),
        ("DPM++ 3M SDE", "dpmpp_3m_sde"),
        ("UniPC", "unipc"),
        ("LCM", "lcm"),
    ):
        assert samplers.create(theirs).name == ours
    known = [name.casefold() for algorithm in samplers.ALGORITHMS for name in algorithm.names]
    assert len(set(known)) == len(known)


BAD = [int, math.nan, math.inf, -1e9, "a", (1, 2), ("a",) * 4, [0.1, 2, "b", 1]]


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("algorithm", samplers.ALGORITHMS, ids=NAMES)
def test_every_option_is_checked_at_once(algorithm, bad):
    for option in algorithm.options:
        with pytest.raises(ValueError, match=option):
            samplers.create(algorithm, **{option: bad})


UNEVEN = [
    {"spacing": Timesteps((999, 500, 499, 30, 0))},
    {"spacing": Timesteps((999, 998))},
    {"spacing": Timesteps((999, 998, 997))},
    {"spacing": "align_your_steps"},
    {"spacing": "simple"},
]


@pytest.mark.parametrize("options", UNEVEN, ids=lambda options: str(options["spacing"]))
@pytest.mark.parametrize("name", ["ddim", "ddim_inverse", "ddim_cfg_pp", "plms", "pndm"])
def test_the_model_is_shown_what_it_is_told(name, options):
    """With the same x0 and noise in the latents throughout these are exact, over whatever timesteps."""
    schedule, x0, epsilon = Schedule(), 1.7, -0.6
    inverse = name == "ddim_inverse"

    def at(time):
        share = schedule.alphas_cumprod[int(time)]
        return np.sqrt(share) * x0 + np.sqrt(1 - share) * epsilon

    seen = []

    def denoise(x, time):
        seen.append((x, at(time)))
        return epsilon, epsilon

    sampler = samplers.create(name, schedule, **options, **({"iterations": 3} if inverse else {}))
    steps = fixed_length(sampler.points) or 7
    first = 0 if inverse else sampler.points(schedule, steps, 1)[0][0]
    _, end = sampler.run(Numbers(None, denoise), at(first), steps)
    if inverse:  # of each step's three calls the first is of the other end's latents
        seen = [pair for i, pair in enumerate(seen) if i % 3]
    else:
        seen.append((end, at(0)))  # set_alpha_to_one is off
    found, expected = np.array(seen).T
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["no such", "", None, 3])
def test_an_unknown_sampler(name):
    with pytest.raises(ValueError, match=re.escape(f"sampler: {name!r} is not known; there are ddpm, DDPM")) as error:
        samplers.create(name)
    for algorithm in samplers.ALGORITHMS:
        assert all(known in str(error.value) for known in algorithm.names)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "ddpm",
            {"spacing": "karras"},
            "spacing: ddpm has no spacing 'karras'; there are leading, linspace, trailing, simple, align_your_steps",
        ),
        (
            "dpm2",
            {"spacing": ""},
            "spacing: dpm2 has no spacing ''; there are leading, linspace, trailing, karras, exponential,"
            " polyexponential, beta, sgm_uniform, simple, align_your_steps",
        ),
        ("ddpm", {"prediction": "noise"}, "prediction: 'noise' is not a prediction type; there are epsilon, v, sample"),
        ("ddpm", {"eta": 1.0}, "eta: ddpm has no such option; it has variance_type"),
        ("euler", {"eta": 1.0}, "eta: euler has no such option; it has none"),
        ("ddim", {"ETA": 1.0}, "ETA: ddim has no such option; it has eta, set_alpha_to_one"),
        ("ddim", {"eta": 1.1}, "eta: expected a number from 0 to 1, got 1.1"),
        ("ddim", {"eta": float("nan")}, "eta: expected a number from 0 to 1, got nan"),
        ("ddim", {"eta": "1"}, "eta: expected a number from 0 to 1, got '1'"),
        ("ddim", {"set_alpha_to_one": "no"}, "set_alpha_to_one: expected True or False, got 'no'"),
        (
            "ddpm",
            {"variance_type": "learned"},
            "variance_type: 'learned' is not known; there are fixed_small, fixed_large",
        ),
        ("ddpm", {"steps_offset": -1}, "steps_offset: expected an integer from 0 to 999, got -1"),
        ("ddpm", {"steps_offset": 1000}, "steps_offset: expected an integer from 0 to 999, got 1000"),
        ("ddpm", {"steps_offset": 0.5}, "steps_offset: expected an integer from 0 to 999, got 0.5"),
        ("ddpm", {"steps_offset": True}, "steps_offset: expected an integer from 0 to 999, got True"),
    ],
)
def test_what_create_refuses(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        samplers.create(name, **options)


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, None, "5"])
def test_steps_that_do_not_exist(steps):
    with pytest.raises(ValueError, match=f"num_inference_steps: expected an integer from 1 to 1000, got {steps!r}$"):
        samplers.create("ddpm").rows(steps)


@pytest.mark.parametrize("strength", [0, 0.0, -0.5, 1.01, float("nan"), float("inf"), True, None, "1"])
def test_strengths_that_do_not_exist(strength):
    with pytest.raises(ValueError, match=f"strength: expected a number above 0 and up to 1, got {strength!r}$"):
        samplers.create("ddpm").rows(10, strength)


def test_a_strength_that_leaves_no_step():
    """The message names a strength that works."""
    sampler = samplers.create("euler")
    for steps in (*range(2, 60), 99, 300, 700, 999, 1000):
        with pytest.raises(ValueError, match=r"strength: 0.0009 .* leaves no step to run") as error:
            sampler.rows(steps, 0.0009)
        advice = float(re.search(r"at least ([\d.]+) or more steps", str(error.value))[1])
        assert len(sampler.rows(steps, advice)) == 1


def test_numbers_of_numpy_are_numbers():
    sampler = samplers.create("ddim", eta=np.float32(0.5), steps_offset=np.int64(1))
    assert len(sampler.rows(np.int64(10), np.float32(0.5))) == 5
    assert len(samplers.create("ddpm", Schedule(num_train_timesteps=10)).rows(10)) == 10


def test_a_sampler_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        samplers.create("ddpm").prediction = "v"
