"""From token ids to pixels: the one pure program and its two drivers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sdjax import guidance, noise
from sdjax.contexts import at_row, encode_prompts, project, side_by_side
from sdjax.executables import Kept
from sdjax.job import Array, Conditions, Context, Inputs, Job, Memory, Result, State
from sdjax.models import tiled
from sdjax.models.controlnet import ControlNet, hint_channels
from sdjax.models.gated import watched_cross_attention
from sdjax.models.hoisted import known_results
from sdjax.models.layers import apply
from sdjax.models.merged import merged_attention
from sdjax.models.perturbed import identity_attention
from sdjax.models.tiny_decoder import TinyDecoder
from sdjax.models.unet import ShallowUNet, UNet, largest_map_with_attention
from sdjax.models.vae import VAE
from sdjax.samplers import rows as sampler_rows

Params = Any
logger = logging.getLogger(__name__)


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
    context = side_by_side([*away, prompt] if inputs.guide.perturbed is None else [*away, prompt, prompt])
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
    ahead = project(job, params, context, inputs.rows.time)
    conditions = Conditions(context, ahead, path, extra, clean, start_noise, repaint)
    memory = empty_memory(job, params, inputs, context)
    return State(sampler_rows.initial_registers(x), memory), conditions


def empty_memory(job: Job, params: Params, inputs: Inputs, context: Context) -> Memory:
    """Of the right shapes; the first row fills it."""
    batch, (h, w, _), dtype = len(inputs.seeds), job.latent_shape, jnp.dtype(job.dtype)
    deep = crossed = None
    if inputs.whole is not None:
        deep = jnp.zeros((batch, context.states.shape[1], h, w, job.config.unet.channels[:2][-1]), dtype)
    if inputs.settled is not None:

        def watch(params: Params, states: jax.Array) -> dict[str, jax.Array]:
            found: dict[str, jax.Array] = {}
            with watched_cross_attention(found):
                apply(
                    UNet(job.config.unet, dtype),
                    params,
                    jnp.zeros((1, h, w, job.config.unet.in_channels)),
                    jnp.zeros(1),
                    states,
                )
            return found

        shapes = jax.eval_shape(watch, params["unet"], context.states[:1, 0, 0])
        crossed = {path: jnp.zeros((batch, *each.shape[1:]), each.dtype) for path, each in shapes.items()}
    return Memory(deep, crossed)


def step(
    job: Job, params: Params, inputs: Inputs, conditions: Conditions, state: State, number: jax.Array
) -> tuple[State, jax.Array]:
    """Row `number` of the sampler: one evaluation of the UNet, one linear update. Returns the state and its x0."""
    row = inputs.rows[number]
    guide = jax.tree.map(lambda value: value[number] if np.ndim(value) else value, inputs.guide)

    unet, shallow = (kind(job.config.unet, jnp.dtype(job.dtype)) for kind in (UNet, ShallowUNet))
    memory, context = state.memory, conditions.context
    b, every, _, n = context.windows.shape
    prompts = inputs.prompt.token_ids.shape[1]  # the evaluations that are of the prompt, but a perturbed one
    away = every - prompts - (guide.perturbed is not None)

    def evaluate(
        x: jax.Array, time: jax.Array, k: int, blind: int = 0, settled: bool = False
    ) -> tuple[jax.Array, Memory]:
        """(B, h, w, z) -> (B, K, h, w, z): the outputs for the context's last K evaluations; and what to remember.

        A picture's evaluations are neighbours in the batch, so that over several devices it stays on its own. With
        perturbed attention the last one is that. The first `blind` of them do not see the picture that is to be edited.
        Settled ones take what cross-attention gave from the memory.
        """

        def shown_at(x: Array) -> jax.Array:
            now = at_row(context, x, number)[:, -k:]
            return now.reshape(b * k, *now.shape[2:])

        states, windows = shown_at(context.states), shown_at(context.windows)
        key_mask = None if n == 1 else jnp.repeat(windows, states.shape[1] // n, 1)
        known = {
            name: jax.tree.map(shown_at, ahead.contexts)
            | jax.tree.map(lambda each: lax.dynamic_index_in_dim(each, number), ahead.times)
            for name, ahead in conditions.ahead.items()
        }
        if memory.crossed is not None and settled:
            known["unet"] |= {path: jnp.repeat(each, k, 0) for path, each in memory.crossed.items()}
        x, times = jnp.repeat(x, k, 0), jnp.broadcast_to(time, (b * k,))
        shown = x
        if conditions.extra is not None:
            seen = (jnp.arange(b * k) % k >= blind).astype(jnp.float32)[:, None, None, None]
            shown = jnp.concatenate([x, seen * jnp.repeat(conditions.extra, k, 0)], -1)
        # The last evaluation is without the middle's attention, where there is perturbed attention.
        last = jnp.arange(b * k) % k == k - 1

        def added() -> Any:
            return control(job, params, inputs, number, x, times, states, known, key_mask) if job.controls else None

        @contextlib.contextmanager
        def changed() -> Iterator[dict[str, jax.Array]]:
            """The UNet, and not a ControlNet beside it, as this job and row want it; what is watched of it."""
            watched: dict[str, jax.Array] = {}
            with contextlib.ExitStack() as changes:
                changes.enter_context(known_results(known["unet"]))
                if guide.perturbed is not None:
                    changes.enter_context(identity_attention(last))
                if job.merge is not None:
                    size = largest_map_with_attention(job.config.unet, shown.shape[1:3])
                    key = jax.random.fold_in(jax.random.key(0), number)
                    changes.enter_context(merged_attention(job.merge, size, key))
                if memory.crossed is not None and not settled:
                    changes.enter_context(watched_cross_attention(watched))
                yield watched

        def crossed(watched: dict[str, jax.Array]) -> dict[str, jax.Array] | None:
            if memory.crossed is None:
                return None
            means = {path: each.reshape(b, k, *each.shape[1:]).mean(1) for path, each in watched.items()}
            return {**memory.crossed, **means}

        def whole() -> tuple[jax.Array, jax.Array, dict[str, jax.Array] | None]:
            more = added()
            with changed() as watched:
                output, found = apply(unet, params["unet"], shown, times, states, key_mask, more, mutable=["deep"])
            return output, found["deep"]["entering"][0], crossed(watched)

        def level() -> tuple[jax.Array, jax.Array, dict[str, jax.Array] | None]:
            assert memory.deep is not None
            deep = memory.deep[:, -k:].reshape(b * k, *memory.deep.shape[2:])
            skips = None if (more := added()) is None else more[0][: job.config.unet.blocks_per_level + 1]
            with changed() as watched:
                output = apply(shallow, params["unet"], shown, times, states, deep, key_mask, skips)
            return output, deep, crossed(watched)

        if memory.deep is None:
            output, _, now = whole()
            left = Memory(None, now)
        else:
            assert inputs.whole is not None
            output, deep, now = lax.cond(jnp.asarray(inputs.whole)[number], whole, level)
            left = Memory(jnp.concatenate([memory.deep[:, :-k], deep.reshape(b, k, *deep.shape[1:])], 1), now)
        return output.astype(jnp.float32).reshape(b, k, *output.shape[1:]), left

    def unguided(x: jax.Array, time: jax.Array, settled: bool = False) -> tuple[jax.Array, jax.Array, Memory]:
        outputs, left = evaluate(x, time, every - away, settled=settled)
        return away_from_perturbed(outputs, outputs[:, 0]), outputs[:, 0], left

    def guided(x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array, Memory]:
        edits = guide.image_scale is not None
        outputs, left = evaluate(x, time, every, blind=int(edits))
        first, base, each = outputs[:, 0], outputs[:, int(edits)], outputs[:, away : away + prompts]
        conditional = each[:, 0] if prompts == 1 else guidance.compose(each, base, inputs.prompt.composition)
        if guide.perpendicular is not None:
            conditional = guidance.across(conditional, base, outputs[:, 1], guide.perpendicular)
        guided = guidance.guide(conditional, base, guide.scale, guide.rescale)
        if edits:
            guided = guided + (guide.image_scale - 1.0) * (base - first)
        return away_from_perturbed(outputs, guided), base, left

    def away_from_perturbed(outputs: jax.Array, guided: jax.Array) -> jax.Array:
        if guide.perturbed is None:
            return guided
        return guided + guide.perturbed * (outputs[:, -2] - outputs[:, -1])

    def combined(x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array, Memory]:
        before = guided if job.guided else unguided
        if inputs.settled is not None:
            after = functools.partial(unguided, settled=True)
            return lax.cond(jnp.asarray(inputs.settled)[number], after, before, x, time)
        if not job.guided or guide.within is None:
            return before(x, time)
        return lax.cond(guide.within, guided, unguided, x, time)

    left: list[Memory] = []  # a sampler's row calls `denoise` once, and hands on only what is its own

    def denoise(x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        to_x0 = jnp.asarray(row.to_x0)

        def lost(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Memory]]:
            m, u, kept = combined(x, time)
            pictures = decode(job, params, to_x0[0] * x + to_x0[1] * m)
            assert job.loss is not None
            return job.loss(pictures).sum(), (m, u, kept)

        if job.loss is None:
            m, u, kept = combined(x, time)
        else:
            gradient, (m, u, kept) = jax.grad(lost, has_aux=True)(x)
            m = m - guide.loss_scale * gradient / to_x0[1]
        if guide.threshold is not None:
            x0 = guidance.limit(to_x0[0] * x + to_x0[1] * m, guide.threshold, guide.quantile)
            m = (x0 - to_x0[0] * x) / to_x0[1]
        left.append(kept)
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
    known: dict[str, dict[str, jax.Array]],
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
        with known_results(known[str(i)]):
            added = apply(net, own, x, times, states, hint, key_mask)
        added = jax.tree.map(lambda more, scale=scale: scale * more, added)
        total = added if total is None else jax.tree.map(jnp.add, total, added)
    return total


def decode(job: Job, params: Params, latents: jax.Array) -> jax.Array:
    """Scaled latents (B, h, w, z) -> (B, H, W, 3), about [-1, 1]."""
    if job.tiny_vae:
        return apply(TinyDecoder(jnp.dtype(job.dtype)), params["tiny_decoder"], latents)
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
    if job.blend and picture is not None and picture.mask is not None:
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


def fetch_stepwise(job: Job, params: Params, inputs: Inputs) -> None:
    """Reads the programs of `run_stepwise` where they are kept; the parameters may be shapes."""
    if (started := _start.fetch(job, params, inputs)) is not None:
        state, conditions = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), started.out_info)
        _step.fetch(job, params, inputs, conditions, state, np.int32(0))
        _finish.fetch(job, params, inputs, state)


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
