"""The table that every sampler is, and the one program that runs all of them.

Between two calls of the model a sampler is linear in what it holds. It holds R registers; register 0 is the latents.
A row is one call of the model:

    n    = a standard normal
    x_in = input · [S, n]
    m, u = model(x_in, time)         guided and unguided raw output
    S    = update · [S, n, m, u]

The rows are arguments of the compiled program, so that another sampler, number of steps, spacing, prediction type or
strength compiles nothing. They are differentiable: samplers can be learnt.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import noise as noise_source

REGISTERS = 8
BUCKETS = (64, 256, 1024, 4096)

Array = jax.Array | np.ndarray
Denoise = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """T rows, a pytree of NumPy arrays (float32 where not said otherwise).

    `rows[i]` is one row, as `step` takes it; `rows[:]` is what `jax.lax.scan` runs over. Neither has the start.

    Attributes:
      input: (T, R + 1), what the model is shown, of [S, n].
      update: (T, R, R + 3), the registers afterwards, of [S, n, m, u].
      time: (T,), in training timesteps; fractional for some spacings.
      to_x0: (T, 2), the predicted clean latents, of [x_in, m].
      blend: (T, 2), of [clean latents, start noise]: where inpainting knows the picture, register 0 becomes this sum
        after the row. In the sampler's own scale, as register 0 is. The last row's is (1, 0); zero in the middle of a
        step of several rows.
      span: (T, 2), the sigmas between which the row's noise acts (Brownian motion); zeros where it draws none.
      step: (T,) int32, the user's step that the row belongs to, counted over the whole run: with strength < 1 the
        first is not 0.
      active: (T,) bool, false for padding.
      start: (2,), of [clean latents, noise]: the first latents of image-to-image, at the first row's noise level and
        in the model's variance-preserving scale.
      start_noise: (), factor of the noise when a run of strength 1 starts from noise alone: text-to-image, and
        inpainting as diffusers does it. 1, but for samplers that start at sigma·noise: sigma / sqrt(1 + sigma²).
    """

    input: Array
    update: Array
    time: Array
    to_x0: Array
    blend: Array
    span: Array
    step: Array
    active: Array
    start: Any = None
    start_noise: Any = None

    def __len__(self) -> int:
        return self.time.shape[0]

    def __getitem__(self, index: Any) -> Rows:
        per_row = dataclasses.replace(self, start=None, start_noise=None)
        return jax.tree.map(lambda array: array[index], per_row)

    @property
    def is_path(self) -> bool:
        """Whether the spans of its noises do not overlap, so that they can be one Brownian motion."""
        spans = np.asarray(self.span)
        spans = spans[spans[:, 0] > spans[:, 1]]
        return bool(np.all(spans[1:, 0] <= spans[:-1, 1]))

    @property
    def reads_unguided(self) -> bool:
        """Whether they need the unguided output even where guidance is off."""
        return bool(np.any(np.asarray(self.update)[..., REGISTERS + 2]))

    def from_noise(self) -> Rows:
        """The same rows with `start` = (0, start_noise): `start · [clean, noise]` is then right without an image."""
        return dataclasses.replace(self, start=np.stack([np.zeros_like(self.start_noise), self.start_noise]))

    def padded(self, length: int) -> Rows:
        """The same rows followed by inactive ones. Raises ValueError if length is less than there are."""
        if length < len(self):
            raise ValueError(f"length: {len(self)} rows do not fit into {length}; take bucket({len(self)})")
        padded = jax.tree.map(lambda a: np.pad(a, [(0, length - len(a))] + [(0, 0)] * (np.ndim(a) - 1)), self[:])
        return dataclasses.replace(padded, start=self.start, start_noise=self.start_noise)


# Of a table that `stack` made, which axes `jax.vmap` maps over.
_AXES: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Rows)), 0)
STACKED = Rows(**{**_AXES, "active": None})


def stack(tables: Sequence[Rows]) -> Rows:
    """Several tables as one, for `jax.vmap(..., in_axes=STACKED)`: one call, a picture by each sampler.

    All leaves get a new first axis but `active`, which stays one for all, so that the condition on it stays one:
    shorter tables are filled up with rows that change nothing.
    """
    length = max(len(table) for table in tables)
    filled = []
    for table in tables:
        rows = table.padded(length)
        update = np.array(rows.update)
        update[len(table) :, :, :REGISTERS] = np.eye(REGISTERS, dtype=update.dtype)
        filled.append(dataclasses.replace(rows, update=update))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
    return dataclasses.replace(stacked, active=np.ones(length, bool))


def bucket(count: int) -> int:
    """The length of program that this many rows are padded to. Raises ValueError above the longest, 4096."""
    for length in BUCKETS:
        if count <= length:
            return length
    raise ValueError(f"num_inference_steps: {count} calls of the model; at most {BUCKETS[-1]} fit into one run")


def initial_registers(x: jax.Array) -> jax.Array:
    """(R, *x.shape) float32: the state before the first row, for latents x in the model's scale."""
    x = jnp.asarray(x, jnp.float32)
    return jnp.concatenate([x[None], jnp.zeros((REGISTERS - 1, *x.shape), jnp.float32)])


def step(denoise: Denoise, registers: jax.Array, row: Rows, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One row.

    Args:
      denoise: (x_in, t) -> (m, u), with x_in (B, h, w, C) float32 and t () float32: the model's raw outputs, guided
        and unguided.
      registers: (R, B, h, w, C) float32. Latents are register 0, before the first row in the model's scale, then in
        the sampler's; after the last row they are x0 in both.
      row: `rows[i]`.
      noise: (B, h, w, C) float32, the row's standard normal.

    Returns:
      The registers after the row, and (B, h, w, C) its prediction of the clean latents.
    """
    known = [*registers, noise]
    x_in = _combine(row.input, known)
    m, u = (output.astype(jnp.float32) for output in denoise(x_in, jnp.asarray(row.time)))
    return _combine(row.update, [*known, m, u]), _combine(row.to_x0, [x_in, m])


def restore(registers: jax.Array, row: Rows, mask: jax.Array, clean: jax.Array, noise: Array) -> jax.Array:
    """Inpainting: puts the known part of the picture back after a row (the rule of diffusers' 4-channel inpainting).

    Args:
      registers: (R, B, h, w, C) as `step` returns them.
      mask: (B, h, w, 1) float32, 1 where the picture is to be made.
      clean: (B, h, w, C), the latents of the known picture.
      noise: (B, h, w, C), the noise that the run started with.
    """
    blend = jnp.asarray(row.blend)
    restored = mask * registers[0] + (1.0 - mask) * _combine(blend, [clean, jnp.asarray(noise)])
    return registers.at[0].set(jnp.where(jnp.any(blend != 0.0), restored, registers[0]))


def sample(
    model: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    rows: Rows,
    *,
    key: jax.Array | None = None,
    noise: jax.Array | None = None,
    brownian: bool = False,
) -> jax.Array:
    """Runs a whole table: the plain driver, unguided. Put it under `jax.jit` with the rows as an argument.

    Args:
      model: (x, t) -> raw output (epsilon, v or sample), with x (B, h, w, C) and t (B,) float32.
      x: (B, h, w, C), latents in the model's own, variance-preserving scale at the first row's noise level, whatever
        scale the sampler works in: `rows.start_noise * noise`, or `rows.start · [clean, noise]`.
      rows: from `Sampler.rows`, padded or not.
      key: a key of the threefry kind, for the whole batch () or one per image (B,); or their words, (2,) or (B, 2)
        uint32. The noises are those of `sdjax.noise`.
      noise: (T, B, h, w, C), one standard normal per row, in place of every draw.
      brownian: with a key, the noises are one Brownian motion in sigma, the same at any number of steps.

    Returns:
      (B, h, w, C) float32, the clean latents.

    Raises:
      ValueError: both or neither of key and noise; neither will do where the rows are known to draw none. A key of
        another kind, a noise of another shape.
    """
    x = jnp.asarray(x, jnp.float32)
    if noise is not None and noise.shape != (len(rows), *x.shape):
        raise ValueError(f"noise: expected one per row, {(len(rows), *x.shape)}, got {noise.shape}")
    words = None if key is None else _image_words(key, x.shape[0])
    if words is not None and noise is not None:
        raise ValueError("key, noise: give one of them, not both")
    if words is None and noise is None and _may_draw(rows):
        raise ValueError("key, noise: this sampler draws noise; give one of them")

    if brownian and words is not None:
        if not isinstance(rows.span, jax.core.Tracer) and not rows.is_path:
            raise ValueError("brownian: this sampler goes back up in noise, so its noises are no single path")
        noise = noise_source.brownian(words, rows.span, x.shape[1:])

    def denoise(x_in: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = model(x_in, jnp.broadcast_to(time, x.shape[:1]))
        return output, output

    def run(state: jax.Array, row: Rows, index: jax.Array, given: jax.Array | None) -> jax.Array:
        if given is None:
            given = (
                jnp.zeros_like(x)
                if words is None
                else noise_source.normal(words, noise_source.STEP, index, x.shape[1:])
            )
        return step(denoise, state, row, given)[0]

    def body(state: jax.Array, each: tuple[Rows, jax.Array, jax.Array | None]) -> tuple[jax.Array, None]:
        # cond, not where: padding costs nothing.
        return jax.lax.cond(each[0].active, lambda: run(state, *each), lambda: state), None

    # Under a gradient only the registers of each row are kept, and the model is computed again on the way back.
    body = jax.checkpoint(body, prevent_cse=False)
    state, _ = jax.lax.scan(body, initial_registers(x), (rows[:], jnp.arange(len(rows)), noise))
    return state[0]


def _combine(coefficients: Array, values: Sequence[jax.Array]) -> jax.Array:
    """(..., K) and K arrays of one shape -> (..., *shape), sums of products.

    Not a matrix product: some devices round the operands of those, or sum in an order that depends on the batch.
    """
    coefficients = jnp.asarray(coefficients, jnp.float32)
    shape = coefficients.shape[:-1] + (1,) * values[0].ndim
    lead = (1,) * (coefficients.ndim - 1)
    products = [coefficients[..., k].reshape(shape) * v.reshape(lead + v.shape) for k, v in enumerate(values)]
    return functools.reduce(jnp.add, products)


def _image_words(key: jax.Array, batch: int) -> jax.Array:
    """One threefry key per image, as words (B, 2)."""
    key = jnp.asarray(key)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    if key.dtype != jnp.uint32 or key.shape not in ((2,), (batch, 2)):
        raise ValueError(f"key: expected one threefry key or {batch}, got words {key.dtype}{list(key.shape)}")
    if key.ndim == 2:
        return key
    image = jax.vmap(lambda i: jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), i))
    return jax.random.key_data(image(jnp.arange(batch)))


def _may_draw(rows: Rows) -> bool:
    if isinstance(rows.update, jax.core.Tracer) or isinstance(rows.input, jax.core.Tracer):
        return True
    return bool(np.any(rows.input[:, REGISTERS]) or np.any(rows.update[:, :, REGISTERS]))
