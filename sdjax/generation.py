"""generate(): a person's arguments, checked, turned into arrays; the program run; pictures back."""

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
from tqdm import tqdm

from sdjax import arguments, compilation_cache, control, images, pipeline, program, samplers, tasks
from sdjax import fast as fast_ways
from sdjax import guidance as guidance_functions
from sdjax.canvas import PictureSource, read_canvases
from sdjax.pipeline import StableDiffusion
from sdjax.program import Inputs, Job, Result
from sdjax.prompts import encode, split_and
from sdjax.recipe import Recipe, texts

logger = logging.getLogger(__name__)

DEFAULT_BATCH = 8  # pictures at once, where nobody says

Callback = Callable[[int, int, jax.Array], "bool | None"]


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
    exact_steps: bool = False,
    brownian: bool = False,
    regions: Sequence[PictureSource] | None = None,
    controls: Mapping[str, control.Control] | None = None,
    vae_tile: int | None = None,
    fast: fast_ways.Fast | None = None,
) -> list[Image.Image] | np.ndarray:
    """Pictures of what the prompts say.

    All arguments are checked before anything is compiled. The first call of a shape compiles and says so; other
    prompts, seeds, steps, strengths, guidance and samplers then run the same program.

    Args:
      prompt: one text or several, in the language of A1111's web UI (`sdjax.prompts`): (word:1.3) and [word] weigh
        words, [from:to:when] and [a|b] change them from step to step, AND joins prompts, BREAK begins a new window;
        a bracket that is meant is \\( or \\[. Texts over 75 tokens are encoded in windows of 75; none is cut.
      negative_prompt: what to keep away from, one for all or one per prompt; unused where guidance is off.
      model: what `sdjax.load` returns, or what it takes; None is the model that ships.
      image: a picture to start from (a path, PIL picture or array; one for all or one per prompt).
      mask_image: with `image`: white is repainted, black is kept to the bit. One for all or one per prompt.
      strength: how much of the noise schedule a given picture goes through, in (0, 1]; int(steps * strength) steps
        run, see `exact_steps`. None is 0.8, and 1.0 with a mask.
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
      exact_steps: with a strength, num_inference_steps are run, the last of int(num_inference_steps / strength).
      brownian: the noises that the sampler adds are one Brownian motion per picture, so that a run of half as many
        steps follows the same path; else they are drawn independently, step by step.
      regions: a mask for each of the prompts that AND joins, white where it counts; all are of one number.
      controls: what the model's ControlNets are to follow, by the names they have there; those that are not named are
        not run.
      vae_tile: pixels, a multiple of the VAE's factor: pictures are decoded one at a time and in tiles of this side, in
        the memory that one tile takes. The picture is nearly the same (docs/fast.md). None decodes all at once.
      fast: ways to be faster that change the picture a little, see `sdjax.Fast`.

    Returns:
      A list of PIL pictures, each with its recipe in `.info`; or an array, see `output_type`. After Ctrl-C, what
      was finished.

    Raises:
      ValueError: an argument is not of these, naming it.
      CheckpointError: the model could not be read.
      FloatingPointError: a picture came out with numbers that are not finite; it names the stage.
    """
    if model is None:
        model = _default_model()
    elif not isinstance(model, StableDiffusion):
        model = pipeline.load(model)
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
    guided = bool(sampler.reads_unguided or composed or (scales > 1.0).any())
    options = guidance or guidance_functions.Options()
    rows = rows.padded(samplers.bucket(len(rows)))
    if config.edits and options.perpendicular is not None:
        raise ValueError("guidance.perpendicular: this model's guidance is away from the picture; it has no such kind")
    guide = tasks.guide(options, rows, np.pad(scales, (0, len(rows) - len(scales))), steps, guided, config.edits)
    fast, whole = fast or fast_ways.Fast(), None
    if fast.deep_cache is not None:
        within = None if guide.within is None else np.asarray(guide.within)
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
    followed = control.read(controls, list(model.controls), len(prompts), (height, width), steps)
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
        config, model.dtype, height, width, guided, clip_skip, decoded, brownian, options.loss, len(followed), vae_tile
    )
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
            program.Control(np.repeat(pixels, repeats, 0), tasks.by_row(scales, rows))
            for pixels, scales in followed.values()
        ],
    )
    if mesh is not None:
        # Whatever kinds of axes a mesh has, the compiler here chooses the shardings (`jax.make_mesh` makes others).
        mesh = Mesh(mesh.devices, mesh.axis_names)
    params = model.prepared
    if followed:
        params = {**params, "controls": {str(i): model.prepared_controls[name] for i, name in enumerate(followed)}}
    params = pipeline.everywhere(params, mesh)
    size = min(count, DEFAULT_BATCH) if batch_size is None else arguments.whole("batch_size", batch_size, 1)
    devices = 1 if mesh is None else mesh.size
    size = -(-size // devices) * devices
    # Tiles are decoded one after the other: at their size the decoder's maps exist once.
    side = max(height, width) if vae_tile is None else vae_tile
    at_once = size // devices if vae_tile is None else 1
    arguments.fits_in_memory(config, model.dtype, min(height, side), min(width, side), at_once, params)

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
        guidance=_recorded(options),
        exact_steps=exact_steps,
        brownian=brownian,
        regions_sha256=None if regions is None else _digest(positive.composition),
        controls={name: _followed(controls[name], model.controls[name].digest) for name in followed}
        if controls
        else {},
        vae_tile=vae_tile,
        fast={} if fast.deep_cache is None else {"deep_cache": fast.deep_cache},
    )

    done: list[np.ndarray] = []
    try:
        with compilation_cache.enabled():
            for first in range(0, count, size):
                chosen = np.arange(first, first + size).clip(max=count - 1)  # the last picture fills up the last chunk
                inputs = tasks.place(tasks.inputs(task, chosen, rows, guide, whole), mesh)
                if stepwise:
                    result = _run_stepwise(job, params, inputs, progress, callback)
                else:
                    result = program.run_scanned(job, params, inputs)
                if result is None:
                    break
                done += _sound(result, first)[: count - first]
    except KeyboardInterrupt:
        if not done:
            raise
        logger.warning("interrupted: %d of %d pictures are finished", len(done), count)
    if output_type == "pil":
        return [_picture(pixels, task, common, i) for i, pixels in enumerate(done)]
    return np.stack(done) if done else np.zeros((0, *job.output_shape))


def versions(mesh: Mesh | None = None) -> dict[str, str]:
    """What a picture's bits depend on besides its recipe."""
    device = jax.devices()[0]
    shared = {} if mesh is None else {"devices": str(mesh.size)}
    return shared | {
        "sdjax": version("sdjax"),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "platform": device.platform,
        "device": device.device_kind,
    }


@functools.cache
def _default_model() -> StableDiffusion:
    return pipeline.load()


def _recorded(options: guidance_functions.Options) -> dict[str, Any]:
    """What a recipe holds of the options besides the rescale: those that are not as they are by default."""
    defaults = guidance_functions.Options()
    fields = [field.name for field in dataclasses.fields(options) if field.name != "rescale"]
    return {name: getattr(options, name) for name in fields if getattr(options, name) != getattr(defaults, name)}


def _followed(wish: control.Control, fingerprint: str) -> dict[str, Any]:
    """What a recipe says of a ControlNet; its picture is not in it."""
    return {
        "scale": _plain(wish.scale),
        "interval": wish.interval,
        "model_sha256": fingerprint,
    }


def _run_stepwise(job: Job, params: Any, inputs: Inputs, progress: bool, callback: Callback | None) -> Result | None:
    """The stepwise driver with bar and callback; None where the callback stopped it."""
    with tqdm(disable=not progress, unit="step", leave=False, mininterval=0) as bar:
        for event in program.run_stepwise(job, params, inputs):
            if isinstance(event, Result):
                return event
            bar.total = event.total
            bar.update()
            if callback is not None and callback(event.step, event.total, event.latents) is False:
                return None
    raise AssertionError("the driver ends with a result")


def _sound(result: Result, first: int) -> list[np.ndarray]:
    """The pictures of a chunk, on the host; refused if they hold what is not finite."""
    for stage, finite in (("the UNet's latents", result.finite_latents), ("the VAE's pixels", result.finite_pixels)):
        if not np.asarray(finite).all():
            number = first + int(np.argmin(finite))
            raise FloatingPointError(
                f"picture {number}: {stage} are not finite numbers; look at the weights, or load with dtype='float32'"
            )
    return list(np.asarray(result.pictures))


def _picture(pixels: np.ndarray, task: tasks.Task, common: Recipe, i: int) -> Image.Image:
    """Picture i with its recipe; of a cropped job, put back into its original."""
    image = Image.fromarray(pixels)
    canvas = None if task.canvases is None else task.canvases[i]
    if canvas is not None and canvas.original is not None and canvas.whole_mask is not None:
        image = images.paste(canvas.original, image, canvas.whole_mask, canvas.region)
        image.info.clear()
    recipe = dataclasses.replace(
        common,
        prompt=task.prompts[i],
        negative_prompt=task.negatives[i],
        seed=task.seeds[i],
        index=i % common.batch,
        image_sha256=None if canvas is None else _digest(canvas.pixels),
        latents_sha256=None if task.latents is None else _digest(task.latents[i]),
        mask_sha256=None if canvas is None or canvas.mask is None else _digest(canvas.mask),
    )
    image.info.update(texts(recipe))
    return image


def _plain(scale: Any) -> float | tuple[float, ...]:
    return tuple(float(value) for value in scale) if np.ndim(scale) else float(scale)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
