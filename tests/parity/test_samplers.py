"""Samplers and timesteps against diffusers' schedulers, at every step, with injected noise."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sdjax import samplers
from sdjax.schedule import Schedule, add_noise

SHAPE = (2, 3, 4, 2)
COMMON = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
# Their schedules are float32, but for alphas_cumprod, which is patched; 1e-5 was the most that was seen.
TOLERANCE = 1e-4

# (ours, its options, theirs, their options); `scale` is that of their latents.
PAIRS = {
    "ddpm": ("ddpm", {}, diffusers.DDPMScheduler, {"clip_sample": False}),
    "ddpm large": (
        "ddpm",
        {"variance_type": "fixed_large"},
        diffusers.DDPMScheduler,
        {"clip_sample": False, "variance_type": "fixed_large"},
    ),
    "ddim": ("ddim", {}, diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddim to one": (
        "ddim",
        {"set_alpha_to_one": True},
        diffusers.DDIMScheduler,
        {"clip_sample": False, "set_alpha_to_one": True},
    ),
    "ddim eta 0.5": (
        "ddim",
        {"eta": 0.5},
        diffusers.DDIMScheduler,
        {"clip_sample": False, "set_alpha_to_one": False},
    ),
    "ddim eta 1": ("ddim", {"eta": 1.0}, diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("euler", {}, diffusers.EulerDiscreteScheduler, {}),
    "euler ancestral": ("euler_ancestral", {}, diffusers.EulerAncestralDiscreteScheduler, {}),
}
CASES = [
    (pair, spacing, prediction, steps, strength)
    for pair in PAIRS
    for spacing, prediction, steps, strength in [
        *((spacing, "epsilon", 20, 1.0) for spacing in ("leading", "linspace", "trailing", "karras")),
        *(("leading", prediction, 7, 0.63) for prediction in ("v", "sample")),
        *(("trailing", "v", steps, 1.0) for steps in (1, 2, 3)),
        ("leading", "epsilon", 50, 0.63),
        ("linspace", "v", 50, 1.0),
    ]
    if spacing != "karras" or pair == "euler"  # of these four only diffusers' Euler has it
    if not (prediction == "sample" and pair == "euler ancestral")  # theirs raises NotImplementedError
]


def denoiser(x, t):
    """Torch or JAX: not linear, of a size like a model's output."""
    library = torch if isinstance(x, torch.Tensor) else jnp
    t = t / 1000
    return library.tanh(0.7 * x + library.sin(2.0 * x + t)) * (0.5 + 0.5 * t) + 0.1 * t


def scheduler_of(pair, spacing, prediction, offset):
    _, _, kind, options = PAIRS[pair]
    karras = {"use_karras_sigmas": True} if spacing == "karras" else {}
    theirs = kind(
        **COMMON,
        **options,
        **karras,
        steps_offset=offset,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing="linspace" if spacing == "karras" else spacing,
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs.alphas_cumprod = torch.cumprod(1 - betas, 0)
    if hasattr(theirs, "final_alpha_cumprod") and not options.get("set_alpha_to_one"):
        theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    return theirs


@pytest.mark.parametrize(("pair", "spacing", "prediction", "steps", "strength"), CASES)
@pytest.mark.parametrize("offset", [0, 1])
def test_trajectory(pair, spacing, prediction, steps, strength, offset, monkeypatch):
    ours_name, ours_options, _, _ = PAIRS[pair]
    sampler = samplers.create(ours_name, spacing=spacing, prediction=prediction, steps_offset=offset, **ours_options)
    rows = sampler.rows(steps, strength)
    rng = np.random.default_rng(0)
    clean, start, *noises = rng.normal(size=(2 + len(rows), *SHAPE))

    theirs = scheduler_of(pair, spacing, prediction, offset)
    theirs.set_timesteps(steps)
    times = theirs.timesteps[steps - int(steps * strength) :]
    np.testing.assert_allclose(rows.time, times.numpy().astype(np.float64), rtol=1e-5, atol=1e-4)

    step = 0
    monkeypatch.setattr(f"{type(theirs).__module__}.randn_tensor", lambda *_, **__: torch.from_numpy(noises[step]))
    eta = {"eta": ours_options["eta"]} if "eta" in ours_options else {}
    if strength == 1:
        x = torch.from_numpy(start) * theirs.init_noise_sigma
        ours = rows.start_noise * start
    else:
        x = theirs.add_noise(torch.from_numpy(clean), torch.from_numpy(start), times[:1])
        ours = rows.start[0] * clean + rows.start[1] * start

    registers = samplers.initial_registers(ours)
    for step, t in enumerate(times):
        x = theirs.step(denoiser(theirs.scale_model_input(x, t), t.double()), t, x, **eta).prev_sample
        with jax.numpy_dtype_promotion("strict"):
            registers, _ = samplers.step(
                lambda x, t: (denoiser(x, t),) * 2, registers, rows[step], jnp.asarray(noises[step], jnp.float32)
            )
        error = np.abs(np.asarray(registers[0]) - x.numpy()).max() / x.abs().max().item()
        assert error < TOLERANCE, f"step {step}: {error:.1e}"


@pytest.mark.parametrize("pair", PAIRS)
def test_inpainting_puts_the_known_part_back_as_diffusers(pair):
    """After each step diffusers noises the clean latents to the next timestep; after the last it does not."""
    sampler = samplers.create(PAIRS[pair][0], spacing="leading", **PAIRS[pair][1])
    rows = sampler.rows(20)
    theirs = scheduler_of(pair, "leading", "epsilon", 1)
    theirs.set_timesteps(20)
    clean, noise = np.random.default_rng(0).normal(size=(2, *SHAPE))
    for k, following in enumerate(theirs.timesteps[1:]):
        known = theirs.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), following[None])
        np.testing.assert_allclose(rows.blend[k, 0] * clean + rows.blend[k, 1] * noise, known, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows.blend[-1], [1, 0])


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_schedule(kind):
    ours = Schedule(kind=kind)
    theirs = diffusers.DDPMScheduler(**COMMON | {"beta_schedule": kind})
    np.testing.assert_allclose(ours.betas, theirs.betas, rtol=1e-6)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4)  # theirs is a float32 product


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 333, 999, 1000])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps(spacing, steps, offset):
    theirs = diffusers.DDPMScheduler(**COMMON, timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(steps)
    expected = theirs.timesteps.numpy()
    if expected[0] > 999:
        expected = expected - offset  # theirs begin beyond the schedule: an IndexError at the first step
    ours = samplers.create("ddpm", spacing=spacing, steps_offset=offset).rows(steps).time
    np.testing.assert_array_equal(ours, expected)


def test_add_noise():
    clean, noise = np.random.default_rng(0).normal(size=(2, 4, 3, 3, 2)).astype(np.float32)
    timesteps = np.array([0, 1, 500, 999])
    theirs = diffusers.DDPMScheduler(**COMMON).add_noise(*(torch.from_numpy(x) for x in (clean, noise, timesteps)))
    np.testing.assert_allclose(add_noise(Schedule(), clean, noise, timesteps), theirs, rtol=1e-4, atol=1e-5)
