"""From token ids to pixels: the one pure program and its two drivers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sdjax import guidance, noise
from sdjax.executables import Kept
from sdjax.models import tiled
from sdjax.models.config import Config
from sdjax.models.controlnet import ControlNet, hint_channels
from sdjax.models.layers import apply
from sdjax.models.perturbed import identity_attention
from sdjax.models.text_encoder import TextEncoder
from sdjax.models.unet import ShallowUNet, UNet
from sdjax.models.vae import VAE
from sdjax.prompts import Conditioning, emphasize
from sdjax.samplers import rows as sampler_rows
from sdjax.samplers.rows import Rows

Params = Any
Array = jax.Array | np.ndarray
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a compiled program is made for. Everything else is an argument of it."""

    config: Config
    dtype: str
    height: int  # pixels, as the width a multiple of the VAE's factor
    width: int
    guided: bool  # False: the negative prompt is not evaluated at all
    clip_skip: int = 0
    decode: bool = True  # False: the result is latents
    brownian: bool = False  # True: the rows' noises are one Brownian motion
    loss: Callable[[jax.Array], jax.Array] | None = None  # `guidance.Options.loss`
    controls: int = 0  # how many ControlNets there are; params["controls"] has them by their places
    vae_tile: int | None = None  # pixels of the tiles that pictures are decoded in, one at a time

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, z) of one picture."""
        vae = self.config.vae
        return self.height // vae.factor, self.width // vae.factor, vae.latent_channels

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Of one picture of the result."""
        return (self.height, self.width, 3) if self.decode else self.latent_shape


class Picture(NamedTuple):
    """The picture that a job starts from."""

    image: Array  # (B, H, W, 3) uint8
    mask: Array | None  # (B, H, W, 1) float32, 1 = repaint; between 0 and 1 only where its edge is blurred


class Control(NamedTuple):
    """What a ControlNet is to follow, and how strongly."""

    hint: Array  # (B, H, W, 3) uint8
    scale: Array  # (T,) float32


class Guide(NamedTuple):
    """How outputs of the model become one; None is what a job does without. T rows."""

    scale: Array  # (T,) float32
    rescale: Array  # () float32, as the following of `guidance.Options`
    within: Array | None = None  # (T,) bool: rows in the interval
    threshold: Array | None = None  # () float32
    quantile: Array | None = None  # () float32
    perpendicular: Array | None = None  # () float32
    perturbed: Array | None = None  # () float32
    image_scale: Array | None = None  # () float32, of a model that edits
    loss_scale: Array | None = None  # () float32, with a loss


class Inputs(NamedTuple):
    """The arguments of the program that differ from picture to picture and run to run; B pictures, T rows.

    None stands for what a job has not got; its presence is part of the compiled shape. The three noises are drawn
    from the seeds where they are None; given, they make a run comparable with another program's.
    """

    prompt: Conditioning  # the user's steps in it are rows here: `variants` is (B, P, T)
    negative: Conditioning | None  # with guidance; P is 1
    empty: Conditioning | None  # with a perpendicular negative prompt: the one that says nothing
    seeds: Array  # (B, 2) uint32
    rows: Rows  # of T rows, padded
    guide: Guide
    picture: Picture | None = None
    controls: tuple[Control, ...] = ()  # one for each of the job's
    whole: Array | None = None  # (T,) bool: rows in which the whole UNet runs; None is all, see `Fast.deep_cache`
    start_noise: Array | None = None  # (B, h, w, z) standard normal
    step_noise: Array | None = None  # (T, B, h, w, z)
    encode_noise: Array | None = None  # (B, h, w, z)


class Context(NamedTuple):
    """A `Conditioning` behind the text encoder: all variants of all prompts."""

    states: jax.Array  # (B, P, V, 77 N, D)
    windows: Array  # (B, P, V, N) bool
    variants: Array  # (B, P, T) int32
    composition: Array  # (B, P) float32, or (B, P, h, w, 1) where prompts have regions


class Conditions(NamedTuple):
    """What stays the same through the loop."""

    prompt: Context
    away: list[Context]  # what guidance leads away from: the unguided one first, then a perpendicular one
    path: jax.Array | None  # (T, B, h, w, z), the rows' noises where they are one Brownian motion
    extra: jax.Array | None  # (B, h, w, z + 1): mask and masked picture; or (B, h, w, z), the picture to be edited
    clean: jax.Array | None  # (B, h, w, z): the picture's latents, scaled
    noise: Array  # (B, h, w, z): the noise the run started from
    repaint: jax.Array | None  # (B, h, w, 1): 1 where any pixel of a latent is to be repainted


class State(NamedTuple):
    """What goes from row to row."""

    registers: jax.Array  # (R, B, h, w, z)
    # (B, K, h, w, C): what came up to the UNet's last level in its last whole call, where rows go without.
    deep: jax.Array | None


class Result(NamedTuple):
    """What a program returns."""

    pictures: (
        jax.Array
    )  # (B, H, W, 3) uint8; or the latents (B, h, w, z) float32, scaled, where the job does not decode
    finite_latents: jax.Array  # (B,) bool
    finite_pixels: jax.Array  # (B,) bool


def encode_prompts(job: Job, params: Params, conditionings: Sequence[Conditioning]) -> list[Context]:
    """Every window of all of them through one text encoder, its words weighted; then side by side.

    A picture's windows are neighbours in the encoder's batch, so that over several devices it stays on its own.
    """
    b, *_, length = conditionings[0].token_ids.shape
    token_ids, weights = (
        jnp.concatenate([part.reshape(b, -1, length) for part in parts], 1).reshape(-1, length)
        for parts in zip(*[(each.token_ids, each.weights) for each in conditionings], strict=True)
    )
    encoder = TextEncoder(job.config.text_encoder, jnp.dtype(job.dtype))
    states = emphasize(apply(encoder, params["text_encoder"], token_ids, job.clip_skip), weights)
    states = states.reshape(b, -1, *states.shape[1:])
    contexts, first = [], 0
    for each in conditionings:
        _, p, v, n, _ = each.token_ids.shape
        own, first = states[:, first : first + p * v * n], first + p * v * n
        contexts.append(Context(own.reshape(b, p, v, n * length, -1), each.windows, each.variants, each.composition))
    return contexts


def at_row(context: Context, number: Array) -> tuple[jax.Array, jax.Array]:
    """The variants of a row: states (B, P, 77 N, D) and windows (B, P, N)."""
    if context.states.shape[2] == 1:
        return context.states[:, :, 0], jnp.asarray(context.windows)[:, :, 0]
    chosen = lax.dynamic_index_in_dim(jnp.asarray(context.variants), number, 2)[..., None]  # (B, P, 1, 1)
    states = jnp.take_along_axis(context.states, chosen[..., None], 2)[:, :, 0]
    return states, jnp.take_along_axis(jnp.asarray(context.windows), chosen, 2)[:, :, 0]


def encode_picture(job: Job, params: Params, pixels: Array, normal: Array) -> jax.Array:
    """(B, H, W, 3) in [-1, 1] -> a sample of its latents, scaled."""
    vae = VAE(job.config.vae, jnp.dtype(job.dtype))
    mean, logvar = apply(vae, params["vae"], pixels, method="encode")
    return (mean + jnp.exp(0.5 * logvar) * normal) * job.config.vae.scaling_factor


def start(job: Job, params: Params, inputs: Inputs) -> tuple[State, Conditions]:
    """Everything before the loop: contexts, the picture's latents, the start."""
    config = job.config
    shape = job.latent_shape

    others = [each for each in (inputs.empty, inputs.negative) if each is not None]
    prompt, *away = encode_prompts(job, params, [inputs.prompt, *others])
    if config.edits:
        away = away * 2  # without the picture, and with it
    path = noise.brownian(inputs.seeds, inputs.rows.span, shape) if job.brownian else None

    start_noise = inputs.start_noise
    if start_noise is None:
        start_noise = noise.normal(inputs.seeds, noise.START, 0, shape)
    clean = repaint = extra = None
    if inputs.picture is not None:
        pixels, mask = to_unit(inputs.picture.image), inputs.picture.mask
        encode_noise = inputs.encode_noise
        if encode_noise is None:
            encode_noise = noise.normal(inputs.seeds, noise.ENCODE, 0, shape)
        if config.edits:
            # As it was trained: the mean, without the scale.
            extra = apply(VAE(config.vae, jnp.dtype(job.dtype)), params["vae"], pixels, method="encode")[0]
        else:
            clean = encode_picture(job, params, pixels, encode_noise)
        if mask is not None:
            hard = (mask >= 0.5).astype(jnp.float32)
            repaint = max_pool(mask, config.vae.factor)
            if config.inpaints:
                # The inpainting model was trained on masks resized by picking pixels, and never blends.
                picked = hard[:, :: config.vae.factor, :: config.vae.factor]
                masked = encode_picture(job, params, pixels * (1.0 - hard), encode_noise)
                extra, repaint = jnp.concatenate([picked, masked], -1), None
    x = inputs.rows.start[1] * start_noise
    if clean is not None:
        x = x + inputs.rows.start[0] * clean
    conditions = Conditions(prompt, away, path, extra, clean, start_noise, repaint)
    deep = None
    if inputs.whole is not None:
        evaluations = sum(each.states.shape[1] for each in [prompt, *away]) + (inputs.guide.perturbed is not None)
        channels = config.unet.channels[:2][-1]
        deep = jnp.zeros((len(inputs.seeds), evaluations, *shape[:2], channels), jnp.dtype(job.dtype))
    return State(sampler_rows.initial_registers(x), deep), conditions


def step(
    job: Job, params: Params, inputs: Inputs, conditions: Conditions, state: State, number: jax.Array
) -> tuple[State, jax.Array]:
    """Row `number` of the sampler: one evaluation of the UNet, one linear update. Returns the state and its x0."""
    row = inputs.rows[number]
    guide = jax.tree.map(lambda value: value[number] if np.ndim(value) else value, inputs.guide)

    unet, shallow = (kind(job.config.unet, jnp.dtype(job.dtype)) for kind in (UNet, ShallowUNet))

    def evaluate(
        x: jax.Array, time: jax.Array, contexts: list[Context], blind: int = 0
    ) -> tuple[jax.Array, jax.Array | None]:
        """(B, h, w, z) -> (B, K, h, w, z): the outputs for all the prompts of these contexts; and the state's `deep`.

        A picture's K evaluations are neighbours in the batch, so that over several devices it stays on its own. With
        perturbed attention one more comes last, of the last prompt. The first `blind` of them do not see the picture
        that is to be edited. Fewer evaluations than the state has are its last ones.
        """
        contexts = contexts if guide.perturbed is None else [*contexts, conditions.prompt]
        states, windows = (
            jnp.concatenate(each, 1) for each in zip(*[at_row(c, number) for c in contexts], strict=True)
        )
        b, k, n = windows.shape
        key_mask = None if n == 1 else jnp.repeat(windows.reshape(b * k, n), states.shape[2] // n, 1)
        states = states.reshape(b * k, *states.shape[2:])
        x, times = jnp.repeat(x, k, 0), jnp.broadcast_to(time, (b * k,))
        shown = x
        if conditions.extra is not None:
            seen = (jnp.arange(b * k) % k >= blind).astype(jnp.float32)[:, None, None, None]
            shown = jnp.concatenate([x, seen * jnp.repeat(conditions.extra, k, 0)], -1)
        # The last evaluation is without the middle's attention, where there is perturbed attention.
        last = jnp.arange(b * k) % k == k - 1

        def added() -> Any:
            return control(job, params, inputs, number, x, times, states, key_mask) if job.controls else None

        def whole() -> tuple[jax.Array, jax.Array]:
            more = added()  # not perturbed, so outside
            with identity_attention(last) if guide.perturbed is not None else contextlib.nullcontext():
                output, found = apply(unet, params["unet"], shown, times, states, key_mask, more, mutable=["deep"])
            return output, found["deep"]["entering"][0]

        def level() -> tuple[jax.Array, jax.Array]:
            assert state.deep is not None
            deep = state.deep[:, -k:].reshape(b * k, *state.deep.shape[2:])
            skips = None if (more := added()) is None else more[0][: job.config.unet.blocks_per_level + 1]
            return apply(shallow, params["unet"], shown, times, states, deep, key_mask, skips), deep

        if state.deep is None:
            output, deep = whole()[0], None
        else:
            assert inputs.whole is not None
            output, deep = lax.cond(jnp.asarray(inputs.whole)[number], whole, level)
            deep = jnp.concatenate([state.deep[:, :-k], deep.reshape(b, k, *deep.shape[1:])], 1)
        return output.astype(jnp.float32).reshape(b, k, *output.shape[1:]), deep

    def unguided(x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        outputs, deep = evaluate(x, time, [conditions.prompt])
        return away_from_perturbed(outputs, outputs[:, 0]), outputs[:, 0], deep

    def guided(x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        edits = guide.image_scale is not None
        outputs, deep = evaluate(x, time, [*conditions.away, conditions.prompt], blind=int(edits))
        first, base = outputs[:, 0], outputs[:, int(edits)]
        each = outputs[:, len(conditions.away) :][:, : conditions.prompt.states.shape[1]]
        alone = each.shape[1] == 1
        conditional = each[:, 0] if alone else guidance.compose(each, base, conditions.prompt.composition)
        if guide.perpendicular is not None:
            conditional = guidance.across(conditional, base, outputs[:, 1], guide.perpendicular)
        guided = guidance.guide(conditional, base, guide.scale, guide.rescale)
        if edits:
            guided = guided + (guide.image_scale - 1.0) * (base - first)
        return away_from_perturbed(outputs, guided), base, deep

    def away_from_perturbed(outputs: jax.Array, guided: jax.Array) -> jax.Array:
        if guide.perturbed is None:
            return guided
        return guided + guide.perturbed * (outputs[:, -2] - outputs[:, -1])

    def combined(x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        if not job.guided:
            return unguided(x, time)
        if guide.within is None:
            return guided(x, time)
        return lax.cond(guide.within, guided, unguided, x, time)

    left: list[jax.Array | None] = []  # a sampler's row calls `denoise` once, and hands on only what is its own

    def denoise(x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        to_x0 = jnp.asarray(row.to_x0)

        def lost(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
            m, u, deep = combined(x, time)
            pictures = decode(job, params, to_x0[0] * x + to_x0[1] * m)
            assert job.loss is not None
            return job.loss(pictures).sum(), (m, u, deep)

        if job.loss is None:
            m, u, deep = combined(x, time)
        else:
            gradient, (m, u, deep) = jax.grad(lost, has_aux=True)(x)
            m = m - guide.loss_scale * gradient / to_x0[1]
        if guide.threshold is not None:
            x0 = guidance.limit(to_x0[0] * x + to_x0[1] * m, guide.threshold, guide.quantile)
            m = (x0 - to_x0[0] * x) / to_x0[1]
        left.append(deep)
        return m, u

    given = conditions.path if inputs.step_noise is None else inputs.step_noise
    if given is None:
        normal = noise.normal(inputs.seeds, noise.STEP, number, state.registers.shape[2:])
    else:
        normal = lax.dynamic_index_in_dim(given, number, keepdims=False)
    registers, x0 = sampler_rows.step(denoise, state.registers, row, normal)
    if conditions.repaint is not None:
        assert conditions.clean is not None
        registers = sampler_rows.restore(registers, row, conditions.repaint, conditions.clean, conditions.noise)
    return State(registers, left[0]), x0


def control(
    job: Job,
    params: Params,
    inputs: Inputs,
    number: jax.Array,
    x: jax.Array,
    times: jax.Array,
    states: jax.Array,
    key_mask: jax.Array | None,
) -> tuple[list[jax.Array], jax.Array]:
    """The sum of what the job's ControlNets add to the UNet's skips and middle for these (B K) evaluations."""
    config = dataclasses.replace(job.config.unet, in_channels=job.config.unet.out_channels)
    total: Any = None
    for i, each in enumerate(inputs.controls):
        own = params["controls"][str(i)]
        hint = jnp.repeat(jnp.asarray(each.hint, jnp.float32) / 255.0, len(x) // len(each.hint), 0)
        net = ControlNet(config, hint_channels(own), jnp.dtype(job.dtype))
        scale = jnp.asarray(each.scale)[number].astype(job.dtype)
        added = jax.tree.map(lambda more, scale=scale: scale * more, apply(net, own, x, times, states, hint, key_mask))
        total = added if total is None else jax.tree.map(jnp.add, total, added)
    return total


def decode(job: Job, params: Params, latents: jax.Array) -> jax.Array:
    """Scaled latents (B, h, w, z) -> (B, H, W, 3), about [-1, 1]."""
    config, dtype, z = job.config.vae, jnp.dtype(job.dtype), latents / job.config.vae.scaling_factor
    if job.vae_tile is not None:
        return tiled.decode(config, dtype, params["vae"], z, job.vae_tile)
    return apply(VAE(config, dtype), params["vae"], z, method="decode")


def finish(job: Job, params: Params, inputs: Inputs, state: State) -> Result:
    """From the last state to pixels, outside of the mask the original's; or to the latents themselves."""
    latents = state.registers[0]
    sound = jnp.isfinite(latents).all((1, 2, 3))
    if not job.decode:
        return Result(latents, sound, sound)
    images = decode(job, params, latents)
    pixels = to_pixels(images)
    picture = inputs.picture
    if picture is not None and picture.mask is not None:
        # In float32 the original's 8 bits times 1 plus anything times 0 are the original's, to the bit.
        mixed = picture.mask * pixels.astype(jnp.float32) + (1.0 - picture.mask) * picture.image.astype(jnp.float32)
        pixels = jnp.round(mixed).astype(jnp.uint8)
    return Result(pixels, sound, jnp.isfinite(images).all((1, 2, 3)))


def to_pixels(images: jax.Array) -> jax.Array:
    """float32 in about [-1, 1] -> uint8, clipped."""
    return jnp.clip(jnp.round(images * 127.5 + 127.5), 0.0, 255.0).astype(jnp.uint8)


def to_unit(image: Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return jnp.asarray(image, jnp.float32) / 127.5 - 1.0


def max_pool(mask: Array, factor: int) -> jax.Array:
    """(B, H, W, 1) -> (B, h, w, 1): 1 where any pixel of the cell is above 0, so that none is left half known."""
    b, h, w, _ = mask.shape
    cells = jnp.asarray(mask).reshape(b, h // factor, factor, w // factor, factor)
    return (cells.max((2, 4)) > 0.0).astype(jnp.float32)[..., None]


def run(job: Job, params: Params, inputs: Inputs) -> Result:
    """The whole path from token ids to pixels as one pure function. `Job` is static, all else are arrays.

    The rows are scanned over; `lax.cond` skips those that only fill up the compiled length.
    """
    # Said while tracing, which happens once per program.
    told = "compiling for %d x %d pixels, batch %d, or fetching it from the cache: once per shape"
    logger.warning(told, job.width, job.height, len(inputs.seeds))
    state, conditions = start(job, params, inputs)

    def body(state: State, number: jax.Array) -> tuple[State, None]:
        def live(state: State) -> State:
            return step(job, params, inputs, conditions, state, number)[0]

        return lax.cond(inputs.rows.active[number], live, lambda state: state, state), None

    # Under a gradient only the state of each row is kept, and the UNet is computed again on the way back.
    body = jax.checkpoint(body, prevent_cse=False)
    state, _ = lax.scan(body, state, jnp.arange(inputs.rows.active.shape[0]))
    return finish(job, params, inputs, state)


def _identity(job: Job) -> str | None:
    """A text that only this job has; of a function there is none."""
    return repr(job) if job.loss is None else None


# One of each for the whole process: the compiled programs are theirs.
run_scanned = Kept(run, _identity)
_start = Kept(start, _identity)
_step = Kept(step, _identity, donate_argnums=(4,))
_finish = Kept(finish, _identity)


def prepare_stepwise(job: Job, params: Params, inputs: Inputs) -> None:
    """Compiles what `run_stepwise` runs, and runs nothing."""
    state, conditions = jax.eval_shape(functools.partial(start, job), params, inputs)
    _start.prepare(job, params, inputs)
    _step.prepare(job, params, inputs, conditions, state, np.int32(0))
    _finish.prepare(job, params, inputs, state)


class Progress(NamedTuple):
    """What the stepwise driver shows after each of the user's steps."""

    step: int  # of this run, from 1
    total: int
    latents: jax.Array  # (B, h, w, z): the current guess of the clean latents, scaled


def run_stepwise(job: Job, params: Params, inputs: Inputs) -> Iterator[Progress | Result]:
    """The same step from a Python loop: yields a `Progress` after every step and the `Result` at the end.

    Closing the iterator stops the run. The pictures are `run_scanned`'s.
    """
    live = np.flatnonzero(np.asarray(inputs.rows.active))
    steps = np.asarray(inputs.rows.step)[live]
    done, total = 0, len(np.unique(steps))
    state, conditions = _start(job, params, inputs)
    advance = _step.bound(job, params, inputs, conditions, state, np.int32(0))
    for i, number in enumerate(live):
        state, x0 = advance(params, inputs, conditions, state, np.int32(number))
        if i + 1 == len(live) or steps[i + 1] != steps[i]:  # a step may be several rows
            done += 1
            yield Progress(done, total, x0)
    yield _finish(job, params, inputs, state)
