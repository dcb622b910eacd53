"""InstructPix2Pix, a model that sees a picture beside its latents, against diffusers' pipeline."""

import dataclasses

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import sdjax
from sdjax import checkpoints, guidance, pipeline
from sdjax.models.config import TINY

from .test_models import TOLERANCE, enliven, relative_error, text_encoder, unet, vae, write_folder

EDITING = dataclasses.replace(TINY, unet=dataclasses.replace(TINY.unet, in_channels=8))
PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 24, 3), np.uint8))
NOISE = np.random.default_rng(6).normal(size=(1, 16, 12, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editing")
    parts = {"text_encoder": text_encoder(EDITING), "unet": unet(EDITING), "vae": vae(EDITING)}
    for seed, model in enumerate(parts.values()):
        enliven(model, seed)
    write_folder(folder, EDITING, parts)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(
        **parts,
        tokenizer=None,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    model = sdjax.load(folder, dtype="float32")
    assert model.config == EDITING
    return pipe, model


OPTIONS = {"sampler": "ddim", "num_inference_steps": 8, "output_type": "latent"}


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "image_scale"), [(4.0, 1.5), (6.0, 2.2)])
def test_whole_runs(both, scale, image_scale):
    pipe, model = both
    texts = [torch.from_numpy(np.array(model.encode_text(model.tokenizer([text])))) for text in ("make it red", "blue")]
    expected = pipe(
        image=PICTURE,
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        num_inference_steps=8,
        guidance_scale=scale,
        image_guidance_scale=image_scale,
        latents=torch.from_numpy(np.moveaxis(NOISE, -1, 1)),
        output_type="latent",
    ).images
    options = guidance.Options(image_scale=image_scale)
    ours = sdjax.generate(
        "make it red",
        "blue",
        model=model,
        image=PICTURE,
        guidance_scale=scale,
        guidance=options,
        latents=NOISE,
        **OPTIONS,
    )
    assert relative_error(ours, np.moveaxis(expected.numpy(), 1, -1)) < TOLERANCE


@pytest.mark.slow
def test_without_guidance_it_is_one_evaluation(both):
    """By hand: the model on the latents and the picture's, unscaled."""
    _, model = both
    mean, _ = model.encode_image(np.asarray(PICTURE, np.float32)[None] / 127.5 - 1)
    context = model.encode_text(model.tokenizer(["make it red"]))
    rows = model.sampler("ddim").rows(8)
    expected = sdjax.samplers.sample(lambda x, t: model.unet(jnp.concatenate([x, mean], -1), t, context), NOISE, rows)
    ours = sdjax.generate("make it red", model=model, image=PICTURE, guidance_scale=1.0, latents=NOISE, **OPTIONS)
    assert relative_error(ours, np.asarray(expected)) < TOLERANCE


@pytest.mark.slow
def test_an_interval_and_numbers_compile_once(both, compilations):
    _, model = both
    options = {"model": model, "image": PICTURE, "seed": 0, "num_inference_steps": 4}
    sdjax.generate("a", guidance=guidance.Options(image_scale=1.2), **options)
    compilations.clear()
    sdjax.generate("b", "c", guidance=guidance.Options(image_scale=3.0), guidance_scale=2.0, **options)
    assert not compilations
    picture = sdjax.generate("a", guidance=guidance.Options(interval=(0.0, 0.5)), **options)[0]
    assert picture.size == PICTURE.size


def test_refusals(both):
    _, model = both
    for options, message in (
        ({}, "image: this model edits a picture, and there is none"),
        ({"image": PICTURE, "strength": 0.5}, "it takes neither"),
        ({"image": PICTURE, "mask_image": PICTURE}, "it takes neither"),
        ({"image": PICTURE, "guidance": guidance.Options(perpendicular=1.0)}, "it has no such kind"),
    ):
        with pytest.raises(ValueError, match=message):
            sdjax.generate("a", model=model, **options)
    with pytest.raises(ValueError, match=r"image_scale.*-1"):
        guidance.Options(image_scale=-1)


def test_its_folder_is_diffusers(both, tmp_path):
    _, model = both
    model.save(tmp_path / "a")
    checkpoints.convert(tmp_path / "a", tmp_path / "b", pipeline.shapes, layout="diffusers")
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "b", local_files_only=True)
    assert pipe.unet.config.in_channels == 8
    assert sdjax.load(tmp_path / "b").config == EDITING
