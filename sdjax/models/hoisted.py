"""What the UNet or a ControlNet computes of the prompts and the times alone, ahead of the loop that calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax

from sdjax.models.config import UNetConfig
from sdjax.models.layers import Dense, Dtype, apply, timestep_embedding
from sdjax.models.unet import TimeEmbedding

Params = Any


def context_projections(params: Params, states: jax.Array, dtype: Dtype) -> dict[str, jax.Array]:
    """The keys and values of every cross-attention, (..., S, D) -> (..., S, C), by the path of what makes them.

    Args:
      params: the UNet's or a ControlNet's.
      states: contexts, as the model takes them.
      dtype: of computation.
    """
    found = [each for each in _projections(params) if each[0].endswith(("attn2/to_k", "attn2/to_v"))]
    return {path: _projected(own, states.astype(dtype), dtype) for path, own in found}


def time_projections(config: UNetConfig, params: Params, times: jax.Array, dtype: Dtype) -> dict[str, jax.Array]:
    """What every residual block adds for the time, (T,) float32 -> (T, C), by the path of what makes it."""
    width = config.channels[0]
    embedding = TimeEmbedding(4 * width, dtype)
    time = nn.silu(apply(embedding, params["time_embedding"], timestep_embedding(times, width)))
    found = [each for each in _projections(params) if each[0].endswith("time_emb_proj")]
    return {path: _projected(own, time, dtype) for path, own in found}


@contextmanager
def known_projections(known: Mapping[str, jax.Array]) -> Iterator[None]:
    """While this lasts, what is known by its path is returned there, and computed nowhere.

    Args:
      known: of the context (B, S, C), of the time (1, C).
    """

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        return known[path] if path in known and context.method_name == "__call__" else call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def _projections(params: Params, path: str = "") -> Iterator[tuple[str, Params]]:
    """The modules that are a matrix, by their paths."""
    for name, child in params.items():
        if isinstance(child, Mapping):
            if "kernel" in child and child["kernel"].ndim == 2:
                yield path + name, child
            yield from _projections(child, f"{path}{name}/")


def _projected(own: Params, x: jax.Array, dtype: Dtype) -> jax.Array:
    result: jax.Array = apply(Dense(own["kernel"].shape[-1], dtype, "bias" in own), own, x)
    return result
