"""From token ids to pixels: the one pure program, its two drivers, and the model it runs."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sdjax import checkpoints, guidance, noise
from sdjax.models.config import Config
from sdjax.models.text_encoder import TextEncoder
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.samplers import rows as sampler_rows
from sdjax.samplers.rows import Rows
from sdjax.schedule import Schedule
from sdjax.tokenizer import Tokenizer

Params = Any
DTYPES = ("float32", "bfloat16")  # float16 overflows in the VAE
PREDICTIONS = ("epsilon", "v", "sample")
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


class Picture(NamedTuple):
    """The picture that a job starts from."""

    image: jax.Array  # (B, H, W, 3) uint8
    mask: jax.Array | None  # (B, H, W, 1) float32, 1 = repaint; between 0 and 1 only where its edge is blurred


class Inputs(NamedTuple):
    """The arguments of the program that differ from picture to picture and run to run; B pictures, N windows.

    None stands for what a job has not got; its presence is part of the compiled shape. The three noises are drawn
    from the seeds where they are None; given, they make a run comparable with another program's.
    """

    token_ids: jax.Array  # (B, N, 77) int32
    windows: jax.Array  # (B, N) bool: which of them hold text
    negative_ids: jax.Array | None  # (B, N, 77) int32, with guidance
    negative_windows: jax.Array | None
    seeds: jax.Array  # (B, 2) uint32
    rows: Rows  # of T rows, padded
    guidance: jax.Array  # (T,) float32, one value per row
    rescale: jax.Array  # () float32, `guidance.Options.rescale`
    picture: Picture | None = None
    start_noise: jax.Array | None = None  # (B, h, w, z) standard normal
    step_noise: jax.Array | None = None  # (T, B, h, w, z)
    encode_noise: jax.Array | None = None  # (B, h, w, z)


class Conditions(NamedTuple):
    """What stays the same through the loop. The unguided half of a batch comes first."""

    context: jax.Array  # (B or 2B, 77 N, D)
    key_mask: jax.Array | None  # (B or 2B, 77 N) bool; None for a single window
    extra: jax.Array | None  # (B, h, w, z + 1): mask and masked picture, for the 9-channel UNet
    clean: jax.Array | None  # (B, h, w, z): the picture's latents, scaled
    noise: jax.Array  # (B, h, w, z): the noise the run started from
    repaint: jax.Array | None  # (B, h, w, 1): 1 where any pixel of a latent is to be repainted


class Result(NamedTuple):
    """What a program returns."""

    pictures: (
        jax.Array
    )  # (B, H, W, 3) uint8; or the latents (B, h, w, z) float32, scaled, where the job does not decode
    finite_latents: jax.Array  # (B,) bool
    finite_pixels: jax.Array  # (B,) bool


def encode_prompts(job: Job, params: Params, token_ids: jax.Array) -> jax.Array:
    """(B, N, 77) -> contexts (B, 77 N, D): every window through the text encoder, then side by side."""
    b, n, length = token_ids.shape
    encoder = TextEncoder(job.config.text_encoder, jnp.dtype(job.dtype))
    states = encoder.apply({"params": params["text_encoder"]}, token_ids.reshape(b * n, length), job.clip_skip)
    return states.reshape(b, n * length, -1)


def encode_picture(job: Job, params: Params, pixels: jax.Array, normal: jax.Array) -> jax.Array:
    """(B, H, W, 3) in [-1, 1] -> a sample of its latents, scaled."""
    vae = VAE(job.config.vae, jnp.dtype(job.dtype))
    mean, logvar = vae.apply({"params": params["vae"]}, pixels, method="encode")
    return (mean + jnp.exp(0.5 * logvar) * normal) * job.config.vae.scaling_factor


def start(job: Job, params: Params, inputs: Inputs) -> tuple[jax.Array, Conditions]:
    """Everything before the loop: contexts, the picture's latents, the start. Returns the registers (R, B, h, w, z)."""
    config = job.config
    batch, windows = inputs.windows.shape
    shape = (job.height // config.vae.factor, job.width // config.vae.factor, config.vae.latent_channels)

    token_ids, valid = inputs.token_ids, inputs.windows
    if job.guided:
        token_ids = jnp.concatenate([inputs.negative_ids, token_ids])
        valid = jnp.concatenate([inputs.negative_windows, valid])
    context = encode_prompts(job, params, token_ids)
    key_mask = None if windows == 1 else jnp.repeat(valid, token_ids.shape[-1], 1)

    start_noise = inputs.start_noise
    if start_noise is None:
        start_noise = noise.normal(inputs.seeds, noise.START, 0, shape)
    clean = repaint = extra = None
    if inputs.picture is not None:
        pixels, mask = to_unit(inputs.picture.image), inputs.picture.mask
        encode_noise = inputs.encode_noise
        if encode_noise is None:
            encode_noise = noise.normal(inputs.seeds, noise.ENCODE, 0, shape)
        clean = encode_picture(job, params, pixels, encode_noise)
        if mask is not None:
            hard = (mask >= 0.5).astype(jnp.float32)
            repaint = max_pool(mask, config.vae.factor)
            if config.unet.in_channels > config.unet.out_channels:
                # The inpainting model was trained on masks resized by picking pixels, and never blends.
                picked = hard[:, :: config.vae.factor, :: config.vae.factor]
                masked = encode_picture(job, params, pixels * (1.0 - hard), encode_noise)
                extra, repaint = jnp.concatenate([picked, masked], -1), None
    x = inputs.rows.start[1] * start_noise
    if clean is not None:
        x = x + inputs.rows.start[0] * clean
    return sampler_rows.registers(x), Conditions(context, key_mask, extra, clean, start_noise, repaint)


def step(
    job: Job, params: Params, inputs: Inputs, conditions: Conditions, registers: jax.Array, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Row `number` of the sampler: one evaluation of the UNet, one linear update. Returns registers and the preview x0."""
    row = inputs.rows.at(number)
    scale = lax.dynamic_index_in_dim(inputs.guidance, number, keepdims=False)
    unet = UNet(job.config.unet, jnp.dtype(job.dtype))

    def denoise(x: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        if conditions.extra is not None:
            x = jnp.concatenate([x, conditions.extra], -1)
        if job.guided:
            x = jnp.concatenate([x, x])
        times = jnp.broadcast_to(time, x.shape[:1])
        output = unet.apply({"params": params["unet"]}, x, times, conditions.context, conditions.key_mask)
        if not job.guided:
            return output, output
        unguided, conditional = jnp.split(output, 2)
        return guidance.guide(conditional, unguided, scale, inputs.rescale), unguided

    if inputs.step_noise is None:
        normal = noise.normal(inputs.seeds, noise.STEP, number, registers.shape[2:])
    else:
        normal = lax.dynamic_index_in_dim(inputs.step_noise, number, keepdims=False)
    registers, x0 = sampler_rows.step(denoise, registers, row, normal)
    if conditions.repaint is not None:
        known = row.blend[0] * conditions.clean + row.blend[1] * conditions.noise
        blended = conditions.repaint * registers[0] + (1.0 - conditions.repaint) * known
        ends = jnp.any(row.blend != 0.0)  # a row in the middle of a step leaves everything as it is
        registers = registers.at[0].set(jnp.where(ends, blended, registers[0]))
    return registers, x0


def finish(job: Job, params: Params, inputs: Inputs, registers: jax.Array) -> Result:
    """From the last registers to pixels, outside of the mask the original's; or to the latents themselves."""
    latents = registers[0]
    sound = jnp.isfinite(latents).all((1, 2, 3))
    if not job.decode:
        return Result(latents, sound, sound)
    vae = VAE(job.config.vae, jnp.dtype(job.dtype))
    images = vae.apply({"params": params["vae"]}, latents / job.config.vae.scaling_factor, method="decode")
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


def to_unit(image: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def max_pool(mask: jax.Array, factor: int) -> jax.Array:
    """(B, H, W, 1) -> (B, h, w, 1): 1 where any pixel of the cell is above 0, so that none is left half known."""
    b, h, w, _ = mask.shape
    cells = mask.reshape(b, h // factor, factor, w // factor, factor)
    return (cells.max((2, 4)) > 0.0).astype(jnp.float32)[..., None]


def run(job: Job, params: Params, inputs: Inputs) -> Result:
    """The whole path from token ids to pixels as one pure function. `Job` is static, all else are arrays.

    The rows are scanned over; `lax.cond` skips those that only fill up the compiled length.
    """
    # Said while tracing, which happens once per program.
    logger.warning("compiling for %d x %d pixels, batch %d: once per shape", job.width, job.height, len(inputs.seeds))
    registers, conditions = start(job, params, inputs)

    def body(registers: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        def live(registers: jax.Array) -> jax.Array:
            return step(job, params, inputs, conditions, registers, number)[0]

        return lax.cond(inputs.rows.active[number], live, lambda registers: registers, registers), None

    registers, _ = lax.scan(body, registers, jnp.arange(inputs.rows.active.shape[0]))
    return finish(job, params, inputs, registers)


# One jit per function for the whole process: the cache of compiled programs is theirs.
run_scanned = jax.jit(run, static_argnums=0)
_start = jax.jit(start, static_argnums=0)
_step = jax.jit(step, static_argnums=0, donate_argnums=4)
_finish = jax.jit(finish, static_argnums=0)


class Progress(NamedTuple):
    """What the stepwise driver shows after each row."""

    row: int  # rows done
    step: int  # the user's steps done
    latents: jax.Array  # (B, h, w, z): the current guess of the clean latents, scaled


def run_stepwise(job: Job, params: Params, inputs: Inputs) -> Iterator[Progress | Result]:
    """The same step from a Python loop: yields a `Progress` after every row and the `Result` at the end.

    Closing the iterator stops the run. The pictures are `run_scanned`'s.
    """
    rows = inputs.rows
    registers, conditions = _start(job, params, inputs)
    for number in np.flatnonzero(np.asarray(rows.active)):
        registers, x0 = _step(job, params, inputs, conditions, registers, np.int32(number))
        yield Progress(int(number) + 1, int(rows.step[number]) + 1, x0)
    yield _finish(job, params, inputs, registers)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _encode_text(config: Config, dtype: str, params: Params, token_ids: jax.Array, clip_skip: int) -> jax.Array:
    encoder = TextEncoder(config.text_encoder, jnp.dtype(dtype))
    return encoder.apply({"params": params["text_encoder"]}, token_ids, clip_skip).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unet(config: Config, dtype: str, params: Params, *arguments: jax.Array | None) -> jax.Array:
    return UNet(config.unet, jnp.dtype(dtype)).apply({"params": params["unet"]}, *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _vae(config: Config, dtype: str, params: Params, method: str, x: jax.Array) -> Any:
    return VAE(config.vae, jnp.dtype(dtype)).apply({"params": params["vae"]}, x, method=method)


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
    """A model: its configuration, its weights, and its parts as functions. All arrays are channels-last.

    Attributes:
      config: the sizes, the noise schedule's numbers and the prediction type.
      params: a dict of `text_encoder`, `unet` and `vae`, each a nested dict of arrays.
      tokenizer: texts -> token ids.
      dtype: of computation, "float32" or "bfloat16".
      source: what the model was loaded from, for recipes.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer
    dtype: str
    source: str

    def encode_text(self, token_ids: jax.typing.ArrayLike, clip_skip: int = 0) -> jax.Array:
        """(B, 77) int32 -> (B, 77, D) float32, after the final layer norm."""
        return _encode_text(self.config, self.dtype, self.params, np.asarray(token_ids, np.int32), clip_skip)

    def unet(
        self,
        latents: jax.Array,
        timesteps: jax.typing.ArrayLike,
        context: jax.Array,
        key_mask: jax.Array | None = None,
    ) -> jax.Array:
        """(B, h, w, Cin), (B,) or (), (B, S, D) -> the raw model output (B, h, w, z), float32.

        key_mask: (B, S) bool, False for tokens of the context that do not count.
        """
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps, jnp.float32), latents.shape[:1])
        return _unet(self.config, self.dtype, self.params, latents, timesteps, context, key_mask)

    def encode_image(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, H, W, 3) in [-1, 1] -> mean and log-variance (B, h, w, z), before the scaling factor.

        The log-variance is clamped to [-30, 20].
        """
        return _vae(self.config, self.dtype, self.params, "encode", images)

    def decode_latents(self, z: jax.Array) -> jax.Array:
        """(B, h, w, z) latents before the scaling factor -> (B, H, W, 3), about [-1, 1], unclipped."""
        return _vae(self.config, self.dtype, self.params, "decode", z)

    def save(self, path: str | Path) -> None:
        """Writes config and weights as one native safetensors file, whole or not at all."""
        checkpoints.save(path, self.params, self.config)

    def schedule(self) -> Schedule:
        """The noise schedule that the model was trained with."""
        config = self.config
        return Schedule(config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule)


def shapes(config: Config) -> Params:
    """The parameter tree of a configuration as `jax.ShapeDtypeStruct`s, without making any array."""
    length = config.text_encoder.max_positions
    size = 2 ** (len(config.unet.channels) - 1)

    # All within eval_shape: not even a zero is computed.
    def text_encoder() -> Params:
        return TextEncoder(config.text_encoder).init(jax.random.key(0), jnp.zeros((1, length), jnp.int32))

    def unet() -> Params:
        latents = jnp.zeros((1, size, size, config.unet.in_channels))
        context = jnp.zeros((1, length, config.unet.context_width))
        return UNet(config.unet).init(jax.random.key(0), latents, jnp.zeros(1), context)

    def vae() -> Params:
        pixels = jnp.zeros((1, config.vae.factor, config.vae.factor, 3))
        return VAE(config.vae).init(jax.random.key(0), pixels, jnp.zeros((1, 1, 1, config.vae.latent_channels)))

    models = {"text_encoder": text_encoder, "unet": unet, "vae": vae}
    return {name: jax.eval_shape(init)["params"] for name, init in models.items()}


def load(path: str | Path | None = None, *, dtype: str | None = None, prediction: str | None = None) -> StableDiffusion:
    """Reads a model: the one that ships, a native file, a `.ckpt` or `.safetensors` of SD 1.x, or a diffusers folder.

    Args:
      path: a file or a folder; None for the model that ships.
      dtype: of computation: "float32" or "bfloat16". None takes float32 on a CPU and bfloat16 elsewhere.
      prediction: "epsilon", "v" or "sample", in place of what the checkpoint says of itself.

    Raises:
      ValueError: for arguments that are none of these.
      CheckpointError: for a file that is not such a model, not whole, or not safe; it says what it is.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    source = Path(__file__).with_name("default_model") / "model.safetensors" if path is None else Path(path)
    config, params = checkpoints.load(source, shapes)
    if prediction is not None:
        config = dataclasses.replace(config, prediction=prediction)
    # Already of this dtype, a file's memory-mapped arrays are used as they lie.
    params = jax.tree.map(lambda x: jax.device_put(np.asarray(x, jnp.dtype(dtype))), params)
    return StableDiffusion(config, params, Tokenizer(), dtype, "default" if path is None else source.name)
