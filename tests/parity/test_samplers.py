"""Every step of a run against diffusers' schedulers, driven as its pipelines drive them, with all noise injected."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

from sdjax import samplers
from sdjax.samplers import REGISTERS
from sdjax.schedule import Schedule

SHAPE = (2, 4, 6, 4)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
# Scheduler, its configuration, what its step is given.
CASES = [
    (DDPMScheduler, {"variance_type": "fixed_small"}, {}),
    (DDPMScheduler, {"variance_type": "fixed_large"}, {}),
    (DDIMScheduler, {"set_alpha_to_one": False}, {}),
    (DDIMScheduler, {"set_alpha_to_one": False}, {"eta": 0.5}),
    (DDIMScheduler, {"set_alpha_to_one": True}, {"eta": 1.0}),
    (DDIMScheduler, {"set_alpha_to_one": True}, {"eta": 0.0}),
    (EulerDiscreteScheduler, {}, {}),
    (EulerAncestralDiscreteScheduler, {}, {}),
]
DRAWS = np.random.default_rng(0)
NOISE, CLEAN = DRAWS.normal(size=SHAPE), 0.8 * DRAWS.normal(size=SHAPE)
NOISES = DRAWS.normal(size=(1000, *SHAPE))
ALL = np.ones((*SHAPE[:3], 1))
REPAINT = (DRAWS.random(ALL.shape) < 0.7).astype(np.float64)


def model(np, x, t):
    """A raw output that mixes neighbours, is not linear and depends on the time."""
    return (0.3 + 0.0006 * t) * x + 0.3 * np.sin(3.0 * np.roll(x, 1, 2) + t / 150.0)


def to_torch(array, dtype):
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy()).to(dtype)


def to_numpy(tensor):
    return np.moveaxis(tensor.numpy(), -3, -1)


def scheduler_of(kind, config, spacing, prediction, offset):
    """Stable Diffusion's, with the schedule in float64, which diffusers computes to 2e-6 only."""
    config = {"timestep_spacing": spacing, **config}
    if spacing == "karras":
        config |= {"timestep_spacing": "linspace", "use_karras_sigmas": True}
    if kind in (DDPMScheduler, DDIMScheduler):
        config |= {"clip_sample": False}
    scheduler = kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=offset,
        prediction_type=PREDICTIONS[prediction],
        **config,
    )
    scheduler.alphas_cumprod = torch.from_numpy(Schedule().alphas_cumprod.copy())
    if not config.get("set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def theirs(scheduler, options, steps, strength, repaint, dtype, monkeypatch):
    """The start and the latents after every step, as StableDiffusionInpaintPipeline makes them."""
    noise, clean, noises = (to_torch(array, dtype) for array in (NOISE, CLEAN, NOISES[:steps]))
    mask = to_torch(repaint, dtype)
    scheduler.set_timesteps(steps)
    first = max(steps - min(int(steps * strength), steps), 0)
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if strength == 1.0:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(clean, noise, timesteps[:1].repeat(SHAPE[0]))
    drawn = iter(())
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", lambda *_, **__: next(drawn))
    seen = [latents]
    for i, t in enumerate(timesteps):
        drawn = iter([noises[i]])
        x = to_numpy(scheduler.scale_model_input(latents, t))
        latents = scheduler.step(to_torch(model(np, x, float(t)), dtype), t, latents, **options).prev_sample
        known = clean
        if i < len(timesteps) - 1:
            known = scheduler.add_noise(clean, noise, torch.tensor([timesteps[i + 1]]))
        latents = (1 - mask) * known + mask * latents
        seen.append(latents)
    return to_numpy(torch.stack(seen).double())


@jax.jit
def in_float32(rows, noise, clean, noises, repaint):
    """Our program: the start, in the model's scale, and the latents after every row."""

    def body(registers, each):
        row, n = each

        def denoise(x, t):
            output = model(jnp, x, t)
            return output, output

        registers, _ = samplers.step(denoise, registers, row, n)
        registers = samplers.restore(registers, row, repaint, clean, noise)
        return registers, registers[0]

    x = rows.start[0] * clean + rows.start[1] * noise
    return x, jax.lax.scan(body, samplers.initial_registers(x), (rows[:], noises))[1]


def in_float64(rows, noise, clean, noises, repaint):
    """The same by NumPy: what the table is worth without rounding."""
    x = rows.start[0] * clean + rows.start[1] * noise
    registers, seen = np.concatenate([x[None], np.zeros((REGISTERS - 1, *SHAPE))]), []
    for k in range(len(rows)):
        known = np.concatenate([registers, noises[k][None]])
        m = model(np, np.tensordot(rows.input[k], known, 1), rows.time[k])
        registers = np.tensordot(rows.update[k], np.concatenate([known, m[None], m[None]]), 1)
        registers[0] = repaint * registers[0] + (1 - repaint) * (rows.blend[k, 0] * clean + rows.blend[k, 1] * noise)
        seen.append(registers[0])
    return x, np.array(seen)


def compare(case, spacing, prediction, offset, steps, strength, repaint, monkeypatch):
    """The largest error of any step, relative to its latents; in float32 and, where diffusers can, in float64."""
    kind, config, options = case
    sampler = samplers.create(
        kind.__name__, spacing=spacing, prediction=prediction, steps_offset=offset, **config, **options
    )
    errors = []
    for dtype, run in ((torch.float32, in_float32), (torch.float64, in_float64)):
        if dtype == torch.float64 and sampler.algorithm.scale == "ve":
            break  # diffusers keeps Euler's sigmas, and casts its latents, to float32
        scheduler = scheduler_of(kind, config, spacing, prediction, offset)
        expected = theirs(scheduler, options, steps, strength, repaint, dtype, monkeypatch)
        rows = sampler.rows(steps, strength, str(dtype).removeprefix("torch."))
        count = len(rows)
        assert count == len(expected) - 1 == int(steps * strength)
        size = 1.0 if sampler.algorithm.scale == "vp" else 1.0 / rows.start[0]
        rows = rows.from_noise() if strength == 1.0 else rows
        rows = rows.padded(samplers.bucket(count)) if run is in_float32 else rows
        noises = np.resize(NOISES, (len(rows), *SHAPE))
        start, latents = run(rows, *(a.astype(rows.update.dtype) for a in (NOISE, CLEAN, noises, repaint)))
        found = [size * np.asarray(start), *np.asarray(latents[:count])]
        errors.append(max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, expected, strict=True)))
    return errors


def assert_equal(errors, kind, tolerance=1e-5):
    """The tolerance in float32 is for runs of up to 50 steps: 1.7e-6 was seen."""
    assert errors[0] < tolerance
    # Float64: 1.4e-9 was seen of the noise of variance 1e-20 that diffusers' DDPM adds at the end, else 4e-14.
    assert all(error < (1e-8 if kind is DDPMScheduler else 1e-12) for error in errors[1:])


def exists(case, spacing, prediction):
    """Whether diffusers has it."""
    karras = spacing != "karras" or case[0] is EulerDiscreteScheduler
    return karras and (prediction != "sample" or case[0] is not EulerAncestralDiscreteScheduler)


KINDS = [
    pytest.param(case, spacing, prediction, id="-".join(map(str, (name, *config.values(), spacing, prediction))))
    for case in CASES
    for spacing in ("leading", "linspace", "trailing", "karras")
    for prediction in PREDICTIONS
    if exists(case, spacing, prediction)
    for name, config in [(case[0].__name__, case[1] | case[2])]
]


@pytest.mark.parametrize(("case", "spacing", "prediction"), KINDS)
def test_every_step(case, spacing, prediction, monkeypatch):
    for offset in (0, 1) if spacing == "leading" else (1,):
        for steps, strength in ((1, 1.0), (2, 0.63), (7, 1.0), (50, 0.63)):
            errors = compare(case, spacing, prediction, offset, steps, strength, ALL, monkeypatch)
            assert_equal(errors, case[0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strength", [1.0, 0.63])
def test_inpainting(case, strength, monkeypatch):
    """Where the picture is known it is put back after every step, at the level of noise that the next begins with."""
    for spacing in ("leading", "linspace"):
        assert_equal(compare(case, spacing, "epsilon", 1, 20, strength, REPAINT, monkeypatch), case[0])


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6], CASES[7]])
def test_as_many_steps_as_in_training(case, monkeypatch):
    # Float32 is rounded a thousand times: 7.4e-6 was seen.
    assert_equal(compare(case, "leading", "v", 0, 1000, 1.0, ALL, monkeypatch), case[0], 3e-5)
