"""Conditionings as contexts of the UNet, and what the models compute of contexts and times alone, ahead of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sdjax.job import Ahead, Array, Context, Job
from sdjax.models.hoisted import context_projections, time_projections
from sdjax.models.layers import apply
from sdjax.models.text_encoder import TextEncoder
from sdjax.prompts import Conditioning, emphasize

Params = Any


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
        contexts.append(Context(own.reshape(b, p, v, n * length, -1), each.windows, each.variants))
    return contexts


def side_by_side(contexts: Sequence[Context]) -> Context:
    """The evaluations of all of them as those of one, which has as many variants as the one of them that has most."""
    most = max(each.states.shape[2] for each in contexts)

    def filled(part: Array) -> jax.Array:
        return jnp.pad(part, [(0, most - part.shape[2] if axis == 2 else 0) for axis in range(part.ndim)])

    def joined(*parts: Array) -> jax.Array:
        return jnp.concatenate([jnp.asarray(part) for part in parts], 1)

    return jax.tree.map(joined, *[Context(filled(c.states), filled(c.windows), c.variants) for c in contexts])


def project(job: Job, params: Params, context: Context, times: Array) -> dict[str, Ahead]:
    """What the UNet, and every ControlNet by its place, computes of these alone. times: (T,) of the rows."""
    config, dtype = job.config.unet, jnp.dtype(job.dtype)
    models, times = {"unet": params["unet"], **params.get("controls", {})}, jnp.asarray(times)
    return {
        name: Ahead(context_projections(own, context.states, dtype), time_projections(config, own, times, dtype))
        for name, own in models.items()
    }


def at_row(context: Context, x: Array, number: Array) -> jax.Array:
    """Of what there is for each variant of a context, (B, K, V, ...), that for the variants of a row, (B, K, ...)."""
    x = jnp.asarray(x)
    if x.shape[2] == 1:
        return x[:, :, 0]
    chosen = lax.dynamic_index_in_dim(jnp.asarray(context.variants), number, 2)  # (B, K, 1)
    return jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 3)), 2)[:, :, 0]
