"""Token merging (Bolya & Hoffman 2023): self-attention at the UNet's largest maps, over fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


@contextmanager
def merged_attention(share: float, size: tuple[int, int], key: jax.Array) -> Iterator[None]:
    """While this lasts, self-attention over a map of this size sees each token that is most like another as that one.

    Args:
      share: of the tokens that are merged into others, above 0 and up to 0.75: one of each cell of 2 x 2 stays.
      size: (H, W) of the map, at least 2 x 2.
      key: of the draw of those that others may be merged into; theirs is another for every call of the model.
    """
    height, width = size
    order = _order(size, key)
    found: dict[tuple[str, ...], Matching] = {}

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        path = context.module.path
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if path[-1:] == ("transformer_blocks_0",) and args[0].shape[1] == height * width:
            # By what the block is given, before its norm.
            found[path] = match(args[0], order, (height // 2) * (width // 2), int(share * height * width))
        if path[-1:] != ("attn1",) or path[:-1] not in found:
            return call(*args, **kwargs)
        matching = found.pop(path[:-1])
        return split(call(merge(args[0], matching)), matching)

    with nn.intercept_methods(intercept):
        yield


def _order(size: tuple[int, int], key: jax.Array) -> jax.Array:
    """(T,) int32: the tokens' numbers, at the end one from each cell of 2 x 2, drawn (section 4.1)."""
    height, width = size
    rows, columns = jnp.meshgrid(jnp.arange(height // 2), jnp.arange(width // 2), indexing="ij")
    drawn = jax.random.randint(key, rows.shape, 0, 4)
    kept = (2 * rows + drawn // 2) * width + 2 * columns + drawn % 2
    return jnp.argsort(jnp.zeros(height * width, jnp.int32).at[kept.reshape(-1)].set(1), stable=True)


class Matching(NamedTuple):
    """Which tokens become one; T of them, M merged into some of D targets, and the S = T - D - M others left alone."""

    order: jax.Array  # (T,): the tokens' numbers, the D targets last
    merged: jax.Array  # (B, M): places in `order`
    alone: jax.Array  # (B, S): likewise
    target: jax.Array  # (B, M): which of the D each is merged into
    where: jax.Array  # (B, T): the place of each token's own among the S + D that remain


def match(x: jax.Array, order: jax.Array, targets: int, count: int) -> Matching:
    """Bipartite soft matching (Bolya et al. 2023, section 3): the `count` most alike, by the cosine of their features.

    Args:
      x: (B, T, C).
      order: (T,) a permutation; its last `targets` are what others may be merged into.
    """
    others = x.shape[1] - targets
    count = min(count, others)
    x = x[:, order].astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
    likeness = jnp.einsum("BTC,BDC->BTD", x[:, :others], x[:, others:])
    nearest = jnp.argmax(likeness, -1)
    ranked = jnp.argsort(-likeness.max(-1), axis=-1)
    merged, alone = ranked[:, :count], ranked[:, count:]
    target = jnp.take_along_axis(nearest, merged, 1)
    left = others - count
    places = jnp.concatenate([left + target, jnp.broadcast_to(jnp.arange(left), alone.shape)], 1)
    places = jnp.take_along_axis(places, jnp.argsort(ranked, -1), 1)
    places = jnp.concatenate([places, jnp.broadcast_to(left + jnp.arange(targets), (len(x), targets))], 1)
    return Matching(order, merged, alone, target, places[:, jnp.argsort(order)])


def merge(x: jax.Array, matching: Matching) -> jax.Array:
    """(B, T, C) -> (B, S + D, C): each target is the mean of itself and of what is merged into it."""
    order, merged, alone, target, _ = matching
    x = x[:, order]
    others = merged.shape[1] + alone.shape[1]
    # As a product of matrices: adding up by indices is slow, and on a GPU its order is not always the same.
    belongs = jax.nn.one_hot(target, x.shape[1] - others, dtype=x.dtype)  # (B, M, D)
    gone = jnp.take_along_axis(x, merged[..., None], 1)
    sums = jnp.einsum("BMD,BMC->BDC", belongs, gone, preferred_element_type=jnp.float32) + x[:, others:]
    counts = 1.0 + belongs.astype(jnp.float32).sum(1)
    means = (sums / counts[..., None]).astype(x.dtype)
    return jnp.concatenate([jnp.take_along_axis(x, alone[..., None], 1), means], 1)


def split(x: jax.Array, matching: Matching) -> jax.Array:
    """(B, S + D, C) -> (B, T, C): every token gets what its own became."""
    return jnp.take_along_axis(x, matching.where[..., None], 1)
