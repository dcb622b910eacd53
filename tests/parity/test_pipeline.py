"""Whole runs against diffusers' own pipelines on a tiny model: every step's latents, with all noise injected."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from sdjax import loading, noise, program, samplers
from sdjax.job import Guide, Inputs, Job, Picture
from sdjax.models.config import TINY
from sdjax.prompts import Conditioning

HEIGHT, WIDTH = 32, 24
BATCH = 2
GUIDANCE = 5.0
# Float32 against float32 over 50 steps, each amplifying what the last one rounded: 1.7e-6 was seen.
TOLERANCE = 1e-4

DDPM = diffusers.DDPMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    steps_offset=1,
    timestep_spacing="leading",
)


def enliven(module, seed):
    """Random weights in which everything matters; norms are not at their start, no convolution is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(normal / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * normal + ("norm" in name and name.endswith("weight")))
    return module.eval()


def components(in_channels):
    """A tiny diffusers model of the shapes of `TINY`."""
    text, unet, vae = TINY.text_encoder, TINY.unet, TINY.vae
    return {
        "text_encoder": enliven(
            CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=text.vocab_size,
                    hidden_size=text.width,
                    intermediate_size=text.mlp_width,
                    num_hidden_layers=text.num_layers,
                    num_attention_heads=text.num_heads,
                    max_position_embeddings=text.max_positions,
                )
            ),
            1,
        ),
        "unet": enliven(
            diffusers.UNet2DConditionModel(
                sample_size=16,
                in_channels=in_channels,
                block_out_channels=unet.channels,
                layers_per_block=unet.blocks_per_level,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=unet.context_width,
                attention_head_dim=unet.num_heads[0],
                norm_num_groups=unet.norm_groups,
            ),
            2,
        ),
        "vae": enliven(
            diffusers.AutoencoderKL(
                block_out_channels=vae.channels,
                layers_per_block=vae.blocks_per_level,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=vae.norm_groups,
                latent_channels=vae.latent_channels,
                sample_size=64,
            ),
            3,
        ),
        "scheduler": DDPM,
    }


def both(channels, folder):
    """The same weights as diffusers' components and as our model, by way of a folder that diffusers wrote."""
    parts = components(channels)
    pipe = diffusers.StableDiffusionPipeline(
        **parts, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    return parts, loading.load(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return both(4, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def inpainting_models(tmp_path_factory):
    return both(9, tmp_path_factory.mktemp("inpainting"))


@pytest.fixture
def draws():
    """All the noise of a run, channels-last."""
    rng = np.random.default_rng(0)
    shape = (BATCH, HEIGHT // TINY.vae.factor, WIDTH // TINY.vae.factor, TINY.vae.latent_channels)
    return {
        "start": rng.normal(size=shape).astype(np.float32),
        "encode": rng.normal(size=shape).astype(np.float32),
        "steps": rng.normal(size=(64, *shape)).astype(np.float32),
    }


@pytest.fixture
def pictures():
    rng = np.random.default_rng(1)
    mask = np.zeros((BATCH, HEIGHT, WIDTH, 1), np.float32)
    mask[0, 8:20, 6:18] = 1  # on the grid of latents: there our mask for blending is diffusers' too
    mask[1, 2:30, 0:10] = 1
    return rng.integers(0, 256, (BATCH, HEIGHT, WIDTH, 3), np.uint8), mask


TOKENS = np.stack(
    [np.r_[49406, 320, 2368, np.full(74, 49407)], np.r_[49406, 736, 3240, 525, np.full(73, 49407)]]
).astype(np.int32)
EMPTY = np.stack([np.r_[49406, np.full(76, 49407)]] * BATCH).astype(np.int32)


def torch_of(array):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def theirs(kind, parts, draws, monkeypatch, steps, **arguments):
    """diffusers' pipeline: the latents after every step, and the pictures (B, H, W, 3) in [0, 1]."""
    kwargs = {"tokenizer": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = kind(**parts, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    numbers = iter(draws["steps"])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: torch_of(next(numbers)))
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.randn_tensor",
        # diffusers encodes picture by picture where there are several generators, at once where there is none.
        lambda shape, **_: torch_of(draws["encode"])[: shape[0]],
    )
    monkeypatch.setattr(f"{kind.__module__}.randn_tensor", lambda *_, **__: torch_of(draws["start"]))
    seen = []

    def keep(pipe, step, timestep, values):
        seen.append(np.moveaxis(values["latents"].numpy(), 1, -1).copy())
        return {}

    with torch.no_grad():
        context, negative = (
            parts["text_encoder"](torch.from_numpy(ids.astype(np.int64)))[0] for ids in (TOKENS, EMPTY)
        )
        images = pipe(
            prompt_embeds=context,
            negative_prompt_embeds=negative,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            output_type="np",
            callback_on_step_end=keep,
            **arguments,
        ).images
    return seen, images


def conditioning(token_ids, count):
    """One window, one variant, one prompt each."""
    lead = (BATCH, 1, 1, 1)
    return Conditioning(
        token_ids.reshape(*lead, 77),
        np.ones((*lead, 77), np.float32),
        np.ones(lead, bool),
        np.zeros((BATCH, 1, count), np.int32),
        np.ones((BATCH, 1), np.float32),
    )


def ours(model, draws, steps, strength, picture, from_noise):
    """The program, row by row: the latents after every step, and the pictures."""
    rows = samplers.create("ddpm", schedule=model.schedule(), steps_offset=1).rows(steps, strength)
    rows = rows.from_noise() if from_noise else rows
    count = len(rows)
    inputs = Inputs(
        prompt=conditioning(TOKENS, count),
        negative=conditioning(EMPTY, count),
        empty=None,
        seeds=noise.seed_words([0, 1]),
        rows=rows,
        guide=Guide(np.full(count, GUIDANCE, np.float32), np.float32(0)),
        picture=picture,
        start_noise=draws["start"],
        step_noise=draws["steps"][:count],
        encode_noise=draws["encode"],
    )
    job = Job(model.config, "float32", HEIGHT, WIDTH, guided=True)
    state, conditions = jax.jit(program.start, static_argnums=0)(job, model.params, inputs)
    step = jax.jit(program.step, static_argnums=0)
    seen = []
    for number in range(count):
        state, _ = step(job, model.params, inputs, conditions, state, np.int32(number))
        seen.append(np.asarray(state.registers[0]))
    result = jax.jit(program.finish, static_argnums=0)(job, model.params, inputs, state)
    return seen, np.asarray(result.pictures)


def assert_equal(us, them, repaint=None):
    (latents, pictures), (reference, images) = us, them
    assert len(latents) == len(reference)
    for number, (a, b) in enumerate(zip(latents, reference, strict=True)):
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error < TOLERANCE, f"step {number}: {error:.2e}"
    expected = np.rint(images * 255)
    where = np.ones_like(pictures, bool) if repaint is None else np.broadcast_to(repaint > 0, pictures.shape)
    assert np.abs(pictures.astype(float) - expected)[where].max() <= 1


@pytest.mark.slow
def test_text_to_image(models, draws, monkeypatch):
    parts, model = models
    them = theirs(diffusers.StableDiffusionPipeline, parts, draws, monkeypatch, 50, height=HEIGHT, width=WIDTH)
    assert_equal(ours(model, draws, 50, 1.0, None, from_noise=True), them)


@pytest.mark.slow
def test_image_to_image(models, draws, pictures, monkeypatch):
    strength = 0.63
    parts, model = models
    images, _ = pictures
    them = theirs(
        diffusers.StableDiffusionImg2ImgPipeline,
        parts,
        draws,
        monkeypatch,
        50,
        strength=strength,
        image=[Image.fromarray(image) for image in images],
    )
    assert_equal(ours(model, draws, 50, strength, Picture(images, None), from_noise=False), them)


def check_inpainting(models, draws, pictures, monkeypatch, strength):
    parts, model = models
    images, mask = pictures
    them = theirs(
        diffusers.StableDiffusionInpaintPipeline,
        parts,
        draws,
        monkeypatch,
        50,
        strength=strength,
        height=HEIGHT,
        width=WIDTH,
        image=[Image.fromarray(image) for image in images],
        mask_image=[Image.fromarray((m[..., 0] * 255).astype(np.uint8)) for m in mask],
    )
    us = ours(model, draws, 50, strength, Picture(images, mask), from_noise=strength == 1.0)
    assert_equal(us, them, mask)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.63, 1.0])
def test_inpainting(models, draws, pictures, monkeypatch, strength):
    check_inpainting(models, draws, pictures, monkeypatch, strength)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.63, 1.0])
def test_inpainting_with_nine_channels(inpainting_models, draws, pictures, monkeypatch, strength):
    check_inpainting(inpainting_models, draws, pictures, monkeypatch, strength)
