"""generate(): a person's arguments, checked, turned into arrays; the program run; pictures back."""

from __future__ import annotations

import functools
import logging
import math
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from PIL import Image
from tqdm import tqdm

from sdjax import compilation_cache, images, memory, noise, pipeline, recipe, samplers
from sdjax import guidance as guidance_functions
from sdjax.pipeline import Inputs, Job, Picture, Progress, Result, StableDiffusion

logger = logging.getLogger(__name__)

WINDOWS = (1, 2, 4, 8)  # the numbers of 75-token windows that programs are compiled for
DEFAULT_BATCH = 8

PictureSource = Any  # a path, a PIL picture or an array


class Task(NamedTuple):
    """All pictures of one call, N of them, as arrays; chunks of it go through the program."""

    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    token_ids: np.ndarray  # (N, windows, 77)
    windows: np.ndarray  # (N, windows) bool
    negative_ids: np.ndarray | None
    negative_windows: np.ndarray | None
    image: np.ndarray | None  # (N, H, W, 3) uint8
    mask: np.ndarray | None  # (N, H, W, 1) float32
    latents: np.ndarray | None  # (N, h, w, z)


def generate(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] = "",
    *,
    model: StableDiffusion | str | Path | None = None,
    image: PictureSource | Sequence[PictureSource] | None = None,
    mask_image: PictureSource | Sequence[PictureSource] | None = None,
    strength: float | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float | Sequence[float] = 7.5,
    guidance: guidance_functions.Options | None = None,
    sampler: str | samplers.Sampler = "ddpm",
    clip_skip: int = 0,
    seed: int | Sequence[int] | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    latents: np.ndarray | None = None,
    output_type: str = "pil",
    progress: bool = False,
    callback: Callable[[int, int, jax.Array], bool | None] | None = None,
    mesh: Mesh | None = None,
    mask_blur: float = 0,
    padding_mask_crop: int | None = None,
) -> list[Image.Image] | np.ndarray:
    """Pictures of what the prompts say.

    All arguments are checked before anything is compiled. The first call of a shape compiles and says so; other
    prompts, seeds, steps, strengths, guidance and samplers then run the same program.

    Args:
      prompt: one text or several. Texts over 75 tokens are encoded in windows of 75; none is cut.
      negative_prompt: what to keep away from, one for all or one per prompt; unused where guidance is off.
      model: what `sdjax.load` returns, or what it takes; None is the model that ships.
      image: a picture to start from (a path, PIL picture or array; one for all or one per prompt).
      mask_image: with `image`: white is repainted, black is kept to the bit. One for all or one per prompt.
      strength: how much of the noise schedule a given picture goes through, in (0, 1]; int(steps * strength) steps
        run. None is 0.8, and 1.0 with a mask.
      num_inference_steps: 1 to the schedule's 1000.
      guidance_scale: of classifier-free guidance (Ho & Salimans 2022), one number or one per step. Where all are
        at most 1 the negative prompt is not evaluated and a step costs half.
      guidance: further options, see `sdjax.guidance.Options`.
      sampler: a name, or what `sdjax.samplers.create` returns.
      clip_skip: layers of the text encoder to leave out at the end.
      seed: picture i is drawn from seed + i; or one seed per picture. None draws one and logs it.
      num_images_per_prompt: pictures of each prompt, one after the other.
      height, width: pixels, multiples of the VAE's factor (8 for Stable Diffusion). None is the model's own size, or
        the given picture's, scaled down where it has more than four times as many pixels as the model's.
      batch_size: pictures made at once; longer lists run in chunks of this one shape, the last one padded.
        None is the number of pictures, at most 8.
      latents: (B, h, w, z) standard normal start noise in place of the seeds'.
      output_type: "pil", "np" (B, H, W, 3) uint8, or "latent" (B, h, w, z) float32, scaled as the UNet sees them.
      progress: show a bar; runs step by step, with the same pictures.
      callback: called as callback(step, total, latents) after each step with the guess of the clean latents;
        returning False stops, and the pictures finished so far are returned.
      mesh: devices to share the batch out over; the weights are on each of them.
      mask_blur: radius in pixels by which the mask's edge is softened when the pictures are put together.
      padding_mask_crop: work on the masked part only, with so many pixels around it, at the full size.

    Returns:
      A list of PIL pictures, each with its recipe in `.info`; or an array, see `output_type`. After Ctrl-C, what
      was finished.

    Raises:
      ValueError: an argument is not of these, naming it.
      CheckpointError: the model could not be read.
      FloatingPointError: a picture came out with numbers that are not finite; it names the stage.
    """
    if not isinstance(model, StableDiffusion):
        model = _default_model() if model is None else pipeline.load(model)
    config = model.config
    if output_type not in ("pil", "np", "latent"):
        raise ValueError(f'output_type: expected "pil", "np" or "latent", got {output_type!r}')
    if not 0 <= _whole("clip_skip", clip_skip, 0) < config.text_encoder.num_layers:
        raise ValueError(f"clip_skip: the text encoder has {config.text_encoder.num_layers} layers, got {clip_skip}")

    prompts, negatives, sources, mask_sources = _listed(prompt, negative_prompt, image, mask_image)
    repeats = _whole("num_images_per_prompt", num_images_per_prompt, 1)
    seeds = _seeds(seed, len(prompts) * repeats)

    if isinstance(sampler, str):
        sampler = samplers.create(
            sampler, schedule=model.schedule(), prediction=config.prediction, steps_offset=config.steps_offset
        )
    if strength is not None and sources is None:
        raise ValueError("strength: it says how much of a given picture is kept, and there is no image")
    if strength is None:
        strength = 1.0 if sources is None or mask_sources is not None else 0.8
    rows = sampler.rows(num_inference_steps, strength)
    scales = guidance_functions.per_row(guidance_scale, num_inference_steps, rows.step)
    guided = bool(sampler.reads_unguided or (scales > 1.0).any())
    options = guidance or guidance_functions.Options()

    pictures = masks = crops = None
    if sources is not None:
        pictures = [images.load_image(s, name=f"image[{i}]") for i, s in enumerate(sources)]
    height, width = _size(config, height, width, None if pictures is None else pictures[0])
    if mask_sources is not None:
        masks = [images.load_mask(s, name=f"mask_image[{i}]") for i, s in enumerate(mask_sources)]
    if padding_mask_crop is not None:
        _whole("padding_mask_crop", padding_mask_crop, 0)
    if not (isinstance(mask_blur, (int, float)) and 0 <= mask_blur < math.inf):
        raise ValueError(f"mask_blur: expected a radius in pixels, 0 or more, got {mask_blur!r}")
    if masks is None and (mask_blur or padding_mask_crop is not None):
        raise ValueError("mask_blur, padding_mask_crop: they concern a mask_image, and there is none")
    if masks is not None and padding_mask_crop is not None:
        pictures, masks, crops = _cropped(pictures, masks, padding_mask_crop, mask_blur, height, width)

    token_ids, windows, negative_ids, negative_windows = _tokens(model, prompts, negatives if guided else None)
    latent_shape = (height // config.vae.factor, width // config.vae.factor, config.vae.latent_channels)
    task = Task(
        prompts=_repeated(prompts, repeats),
        negatives=_repeated(negatives, repeats),
        seeds=seeds,
        token_ids=np.repeat(token_ids, repeats, 0),
        windows=np.repeat(windows, repeats, 0),
        negative_ids=None if negative_ids is None else np.repeat(negative_ids, repeats, 0),
        negative_windows=None if negative_windows is None else np.repeat(negative_windows, repeats, 0),
        image=None if pictures is None else np.repeat(_pixels(pictures, height, width), repeats, 0),
        mask=None if masks is None else np.repeat(_mask_pixels(masks, mask_blur, height, width), repeats, 0),
        latents=_start_noise(latents, (len(seeds), *latent_shape)),
    )
