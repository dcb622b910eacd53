"""generate(): a plan of a person's arguments, its program run chunk by chunk, pictures back."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from sdjax import compilation_cache, control, program, samplers
from sdjax import fast as fast_ways
from sdjax import guidance as guidance_functions
from sdjax import plan as plans
from sdjax.images import ImageSource
from sdjax.job import Inputs, Job, Result
from sdjax.pipeline import StableDiffusion

logger = logging.getLogger(__name__)

Callback = Callable[[int, int, jax.Array], "bool | None"]


def generate(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] = "",
    *,
    model: StableDiffusion | str | Path | None = None,
    image: ImageSource | Sequence[ImageSource] | None = None,
    mask_image: ImageSource | Sequence[ImageSource] | None = None,
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
    regions: Sequence[ImageSource] | None = None,
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
      regions: a mask for each of the prompts that AND joins, white where it counts; every prompt joins as many.
      controls: what the model's ControlNets are to follow, by the names they have there; those that are not named are
        not run.
      vae_tile: pixels, a multiple of the VAE's factor: pictures are decoded one at a time and in tiles of this side, in
        the memory that one tile takes. The picture is nearly the same (docs/fast.md). None decodes all at once.
      fast: ways to be faster that change the picture, see `sdjax.Fast` and docs/fast.md.

    Returns:
      A list of PIL pictures, each with its recipe in `.info`; or an array, see `output_type`. After Ctrl-C, what
      was finished.

    Raises:
      ValueError: an argument is not of these, naming it.
      CheckpointError: the model could not be read.
      FloatingPointError: a picture came out with numbers that are not finite; it names the stage.
      KeyboardInterrupt: Ctrl-C before any picture was finished.
    """
    plan = plans.plan(**locals())  # of the arguments, all there is yet
    done: list[np.ndarray] = []
    try:
        with compilation_cache.enabled(), _fetching(plan):
            for first in range(0, plan.count, plan.size):
                inputs = plan.inputs(first)
                if plan.stepwise:
                    result = _run_stepwise(plan.job, plan.params, inputs, progress, callback)
                else:
                    result = program.run_scanned(plan.job, plan.params, inputs)
                if result is None:
                    break
                done += _sound(result, first)[: plan.count - first]
    except KeyboardInterrupt:
        if not done:
            raise
        logger.warning("interrupted: %d of %d pictures are finished", len(done), plan.count)
    if output_type == "pil":
        return [plan.picture(pixels, i) for i, pixels in enumerate(done)]
    if not done:
        return np.zeros((0, *plan.job.output_shape), np.uint8 if plan.job.decode else np.float32)
    return np.stack(done)


def compile(
    prompt: str | Sequence[str] = "",
    negative_prompt: str | Sequence[str] = "",
    *,
    weights: bool = False,
    **options: Any,
) -> None:
    """Compiles the program that `generate` would run with these arguments, and runs nothing.

    It is kept on disk (`sdjax.compilation_cache`), where other processes find it. What a program depends on: the kind
    of model and its dtype, the size, the batch, the number of windows of 75 tokens, the length of the sampler's table
    (64, 256, 1024 or 4096 rows), whether there is guidance, and which of its options; a picture, a mask, start noise,
    ControlNets, LoRAs; and `progress` or a callback.

    Args:
      prompt, negative_prompt, **options: as `generate` takes them.
      weights: True or False; whether to keep the model's transformed weights there as well, see
        `StableDiffusion.keep_prepared`: gigabytes of a large model, which spare later processes the seconds of making
        them.

    Raises:
      As `generate`, and as `StableDiffusion.keep_prepared`.
    """
    bound = inspect.signature(generate).bind(prompt, negative_prompt, **options)
    bound.apply_defaults()
    plan = plans.plan(**bound.arguments)
    if weights:
        plan.model.keep_prepared()
    prepare = program.prepare_stepwise if plan.stepwise else program.run_scanned.prepare
    with compilation_cache.enabled():
        prepare(plan.job, plan.shapes if plan.mesh is None else plan.params, plan.inputs(0))


@contextlib.contextmanager
def _fetching(plan: plans.Plan) -> Iterator[None]:
    """Reads the program from the disk while the parameters are made ready: of a large model each takes seconds."""
    if plan.mesh is not None or plan.model.is_prepared:
        yield
        return
    fetch = program.fetch_stepwise if plan.stepwise else program.run_scanned.fetch
    thread = threading.Thread(target=fetch, args=(plan.job, plan.shapes, plan.inputs(0)))
    thread.start()
    try:
        yield
    finally:
        thread.join()


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
