"""What a call of `generate` amounts to: its arguments, checked, as arrays for one compiled program."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

import sdjax
from sdjax import arguments, control, images, loading, samplers, tasks
from sdjax import fast as fast_ways
from sdjax import guidance as guidance_functions
from sdjax.canvas import read_canvases
from sdjax.images import ImageSource
from sdjax.job import Followed, Guide, Inputs, Job
from sdjax.models.unet import largest_map_with_attention
from sdjax.pipeline import StableDiffusion
from sdjax.placement import everywhere
from sdjax.prompts import encode, split_and
from sdjax.recipe import Recipe, texts

logger = logging.getLogger(__name__)

DEFAULT_BATCH = 8  # pictures at once, where nobody says


@dataclasses.dataclass(frozen=True)
class Plan:
    """What arguments of `generate` amount to."""

    job: Job
    model: StableDiffusion
    followed: tuple[str, ...]  # the model's ControlNets that have a picture
    task: tasks.Task
    rows: samplers.Rows
    guide: Guide
    whole: np.ndarray | None  # see `Inputs`, as the next
    settled: np.ndarray | None
    mesh: Mesh | None
    count: int  # of pictures
    size: int  # of a chunk
    stepwise: bool
    common: Recipe  # of all its pictures

    @functools.cached_property
    def params(self) -> Any:
        """Of the program, on the devices that run it. Of a large model they take seconds to make ready."""
        nets = self.model.prepared_controls if self.followed else {}
        return everywhere(self._chosen(self.model.prepared, nets), self.mesh)

    @property
    def shapes(self) -> Any:
        """The same tree before it is made ready: arrays, or `jax.ShapeDtypeStruct`s."""
        return self._chosen(self.model.prepared_shapes, self.model.prepared_control_shapes)

    def _chosen(self, params: Any, nets: Any) -> Any:
        if self.job.tiny_vae and self.model.tiny_decoder is not None:
            params = {**params, "tiny_decoder": self.model.tiny_decoder.params}
        if self.followed:
            params = {**params, "controls": {str(i): nets[name] for i, name in enumerate(self.followed)}}
        return params

    def inputs(self, first: int) -> Inputs:
        """Of the chunk that begins with this picture; the last picture fills up the last chunk."""
        chosen = np.arange(first, first + self.size).clip(max=self.count - 1)
        return tasks.place(tasks.inputs(self.task, chosen, self.rows, self.guide, self.whole, self.settled), self.mesh)

    def picture(self, pixels: np.ndarray, i: int) -> Image.Image:
        """Picture i with its recipe; of a cropped job, put back into its original."""
        image = Image.fromarray(pixels)
        canvas = None if self.task.canvases is None else self.task.canvases[i]
        if canvas is not None and canvas.original is not None and canvas.whole_mask is not None:
            image = images.paste(canvas.original, image, canvas.whole_mask, canvas.region)
            image.info.clear()
        if canvas is not None and canvas.profile is not None:
            image.info["icc_profile"] = canvas.profile
        recipe = dataclasses.replace(
            self.common,
            prompt=self.task.prompts[i],
            negative_prompt=self.task.negatives[i],
            seed=self.task.seeds[i],
            index=i % self.common.batch,
            image_sha256=None if canvas is None else _digest(canvas.pixels),
            latents_sha256=None if self.task.latents is None else _digest(self.task.latents[i]),
            mask_sha256=None if canvas is None or canvas.mask is None else _digest(canvas.mask),
        )
        image.info.update(texts(recipe))
        return image


def plan(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    *,
    model: StableDiffusion | str | Path | None,
    image: ImageSource | Sequence[ImageSource] | None,
    mask_image: ImageSource | Sequence[ImageSource] | None,
    strength: float | None,
    num_inference_steps: int,
    guidance_scale: float | Sequence[float],
    guidance: guidance_functions.Options | None,
    sampler: str | samplers.Sampler,
    clip_skip: int,
    seed: int | Sequence[int] | None,
    num_images_per_prompt: int,
    height: int | None,
    width: int | None,
    batch_size: int | None,
    latents: np.ndarray | None,
    output_type: str,
    progress: bool,
    callback: Callable[[int, int, jax.Array], bool | None] | None,
    mesh: Mesh | None,
    mask_blur: float,
    padding_mask_crop: int | None,
    exact_steps: bool,
    brownian: bool,
    regions: Sequence[ImageSource] | None,
    controls: Mapping[str, control.Control] | None,
    vae_tile: int | None,
    fast: fast_ways.Fast | None,
) -> Plan:
    """Of the arguments of `generate`, all of them. Raises as it does."""
    if model is None:
        model = _default_model()
    elif not isinstance(model, StableDiffusion):
        model = loading.load(model)
    config = model.config
    if output_type not in ("pil", "np", "latent"):
        raise ValueError(f'output_type: expected "pil", "np" or "latent", got {output_type!r}')
    if arguments.whole("clip_skip", clip_skip, 0) >= config.text_encoder.num_layers:
        raise ValueError(f"clip_skip: the text encoder has {config.text_encoder.num_layers} layers, got {clip_skip}")

    repeats = arguments.whole("num_images_per_prompt", num_images_per_prompt, 1)
    listed = arguments.in_step(
        {"prompt": prompt, "negative_prompt": negative_prompt, "image": image, "mask_image": mask_image}
    )
    prompts = arguments.texts("prompt", listed["prompt"] or [])
    negatives = arguments.texts("negative_prompt", listed["negative_prompt"] or [])
    count = len(prompts) * repeats
    seeds = arguments.seeds(seed, count)
    if seed is None:
        logger.info("seed %d", seeds[0])

    arguments.task(config, listed["image"] is not None, listed["mask_image"] is not None, strength)
    if isinstance(sampler, str):
        sampler = model.sampler(sampler)
    inpaint = listed["mask_image"] is not None
    if strength is None:
        strength = 1.0 if inpaint or config.edits or listed["image"] is None else 0.8
    rows = sampler.rows(num_inference_steps, strength, exact_steps=exact_steps)
    if sampler.algorithm.inverse:
        raise ValueError(f"sampler: {sampler.name} goes from a picture to noise; use it with sdjax.samplers.sample")
    if brownian and not rows.is_path:
        raise ValueError(f"brownian: {sampler.name} goes back up in noise, so its noises are no single path")
    if listed["image"] is None or config.edits or (inpaint and strength == 1):
        rows = rows.from_noise()
    # With exact_steps the run is the end of a longer one: its scales, too, are those of the steps that are made.
    steps = int(rows.step[-1]) + 1
    scales = guidance_functions.per_row(guidance_scale, steps, np.asarray(rows.step))
    composed = any(len(split_and(text)) > 1 for text in prompts)
    guided = bool(rows.reads_unguided or composed or (scales > 1.0).any())
    options = guidance or guidance_functions.Options()
    rows = rows.padded(samplers.bucket(len(rows)))
    if config.edits and options.perpendicular is not None:
        raise ValueError("guidance.perpendicular: this model's guidance is away from the picture; it has no such kind")
    guide = tasks.guide(options, rows, np.pad(scales, (0, len(rows) - len(scales))), steps, guided, config.edits)
    fast = fast or fast_ways.Fast()
    whole = settled = None
    if fast.gate is not None:
        settled = fast_ways.settled_calls(fast.gate, np.asarray(rows.step))
    if fast.deep_cache is not None:
        within = settled if guide.within is None else np.asarray(guide.within)
        whole = fast_ways.whole_calls(fast.deep_cache, within, len(rows))
    if composed and options.interval is not None:
        raise ValueError("guidance.interval: outside of it one prompt is evaluated, and AND joins several")
    if composed and options.perturbed is not None:
        raise ValueError("guidance.perturbed: it is away from one prompt's output, and AND joins several")

    canvases, height, width = read_canvases(
        config, listed["image"], listed["mask_image"], height, width, mask_blur, padding_mask_crop
    )
    if padding_mask_crop is not None and output_type != "pil":
        raise ValueError('padding_mask_crop: pictures keep their own sizes; take output_type "pil"')
    followed = control.read(controls, list(model.controls), len(prompts), (height, width), steps, int(rows.step[0]))
    if followed and padding_mask_crop is not None:
        raise ValueError(
            "controls, padding_mask_crop: a ControlNet's picture is not cropped with the mask; leave one out"
        )
    shown = prompts if guide.perpendicular is None else [*prompts, ""]  # for one number of windows in both
    conditioning, negative = encode(model.tokenizer, shown, negatives if guided else None, steps)
    empty = None
    if guide.perpendicular is not None:
        empty = jax.tree.map(lambda part: np.repeat(part[-1:, :1], len(prompts), 0), conditioning)
        conditioning = jax.tree.map(lambda part: part[:-1], conditioning)
    positive = tasks.per_picture(conditioning, repeats, rows)
    decoded = output_type != "latent"
    if vae_tile is not None:
        vae_tile = arguments.tile("vae_tile", vae_tile, config)
    job = Job(
        config,
        model.dtype,
        height,
        width,
        guided,
        clip_skip,
        decoded,
        brownian,
        options.loss,
        len(followed),
        vae_tile,
        fast.merge,
        fast.tiny_vae,
        padding_mask_crop is None,
    )
    _check_fast(fast, model, job, options.interval, composed)
    if regions is not None:
        positive = positive._replace(composition=tasks.regions(regions, positive.composition, job.latent_shape))
    each = functools.partial(arguments.one_per_picture, repeats=repeats)
    task = tasks.Task(
        prompts=each(prompts),
        negatives=each(negatives),
        seeds=seeds,
        prompt=positive,
        negative=None if negative is None else tasks.per_picture(negative, repeats, rows),
        empty=None if empty is None else tasks.per_picture(empty, repeats, rows),
        canvases=None if canvases is None else each(canvases),
        latents=arguments.start_noise(latents, (count, *job.latent_shape)),
        controls=[
            Followed(np.repeat(pixels, repeats, 0), tasks.by_row(scales, rows)) for pixels, scales in followed.values()
        ],
    )
    if mesh is not None:
        # Whatever kinds of axes a mesh has, the compiler here chooses the shardings (`jax.make_mesh` makes others).
        mesh = Mesh(mesh.devices, mesh.axis_names)
    size = min(count, DEFAULT_BATCH) if batch_size is None else arguments.whole("batch_size", batch_size, 1)
    devices = 1 if mesh is None else mesh.size
    size = -(-size // devices) * devices
    # Tiles are decoded one after the other: at their size the decoder's maps exist once.
    side = max(height, width) if vae_tile is None else vae_tile
    if canvases is None and (fast.tiny_vae or not decoded):
        side = 0  # the VAE does not run at all
    at_once = size // devices if vae_tile is None else 1

    stepwise = progress or callback is not None
    common = Recipe(
        prompt="",
        negative_prompt="",
        num_inference_steps=int(num_inference_steps),
        guidance_scale=_plain(guidance_scale),
        sampler=sampler.name,
        sampler_options=sampler.settings,
        strength=None if canvases is None else float(strength),
        clip_skip=clip_skip,
        seed=0,
        height=height,
        width=width,
        rescale=float(options.rescale),
        model=model.source[:300],
        model_sha256=model.fingerprint,
        dtype=model.dtype,
        driver="stepwise" if stepwise else "scan",
        batch=size,
        index=0,
        task="text" if canvases is None else "inpaint" if inpaint else "image",
        image_sha256=None,
        mask_sha256=None,
        mask_blur=float(mask_blur),
        padding_mask_crop=padding_mask_crop,
        windows=conditioning.windows.shape[-1],
        versions=versions(mesh),
        guidance={name: value for name, value in _recorded(options).items() if name != "rescale"},
        exact_steps=exact_steps,
        brownian=brownian,
        regions_sha256=None if regions is None else _digest(positive.composition),
        controls={name: _followed(controls[name], model.controls[name].digest) for name in followed}
        if controls
        else {},
        vae_tile=vae_tile,
        fast=_recorded(fast),
        schedule={} if sampler.schedule == model.schedule() else dataclasses.asdict(sampler.schedule),
        tiny_vae_sha256=model.tiny_decoder.digest if model.tiny_decoder is not None and fast.tiny_vae else None,
    )
    plan = Plan(job, model, tuple(followed), task, rows, guide, whole, settled, mesh, count, size, stepwise, common)
    arguments.fits_in_memory(config, min(height, side), min(width, side), at_once, plan.shapes)
    return plan


def _check_fast(fast: fast_ways.Fast, model: StableDiffusion, job: Job, interval: Any, composed: bool) -> None:
    """Raises ValueError where the model or other arguments are not for it."""
    if fast.gate is not None and interval is not None:
        raise ValueError("fast.gate: it says where guidance ends, and guidance.interval does too; leave one out")
    if fast.gate is not None and composed:
        raise ValueError("fast.gate: behind it one prompt is evaluated, and AND joins several")
    if fast.merge is not None and not any(job.config.unet.attention_levels):
        raise ValueError("fast.merge: this model's UNet has no level with attention")
    if fast.merge is not None and min(largest_map_with_attention(job.config.unet, job.latent_shape[:2])) < 2:
        raise ValueError(f"fast.merge: {job.width} x {job.height} pixels are too few for it")
    if fast.tiny_vae and model.tiny_decoder is None:
        raise ValueError("fast.tiny_vae: the model has no TAESD; add it by model.with_tiny_decoder(file)")
    if fast.tiny_vae and job.vae_tile is not None:
        raise ValueError("fast.tiny_vae, vae_tile: TAESD decodes no tiles; leave one out")


def versions(mesh: Mesh | None = None) -> dict[str, str]:
    """What a picture's bits depend on besides its recipe."""
    device = jax.devices()[0]
    shared = {} if mesh is None else {"devices": str(mesh.size)}
    return shared | {
        "sdjax": sdjax.__version__,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "platform": device.platform,
        "device": device.device_kind,
    }


@functools.cache
def _default_model() -> StableDiffusion:
    return loading.load()


def _recorded(options: guidance_functions.Options | fast_ways.Fast) -> dict[str, Any]:
    """What a recipe holds of options: those that are not as they are by default."""
    defaults, names = type(options)(), [field.name for field in dataclasses.fields(options)]
    changed = {name: getattr(options, name) for name in names if getattr(options, name) != getattr(defaults, name)}
    return {name: getattr(x, "__name__", repr(x)) if callable(x) else x for name, x in changed.items()}


def _followed(wish: control.Control, fingerprint: str) -> dict[str, Any]:
    """What a recipe says of a ControlNet; its picture is not in it."""
    return {
        "scale": _plain(wish.scale),
        "interval": wish.interval,
        "model_sha256": fingerprint,
    }


def _plain(scale: Any) -> float | tuple[float, ...]:
    return tuple(float(value) for value in scale) if np.ndim(scale) else float(scale)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
