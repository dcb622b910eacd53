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
    return _projected(params, ("attn2/to_k", "attn2/to_v"), states, dtype)


def time_projections(config: UNetConfig, params: Params, times: jax.Array, dtype: Dtype) -> dict[str, jax.Array]:
    """What every residual block adds for the time, (T,) float32 -> (T, C), by the path of what makes it."""
    width = config.channels[0]
    embedding = TimeEmbedding(4 * width, dtype)
    time = nn.silu(apply(embedding, params["time_embedding"], timestep_embedding(times, width)))
    return _projected(params, ("time_emb_proj",), time, dtype)


@contextmanager
def known_results(known: Mapping[str, jax.Array]) -> Iterator[None]:
    """While this lasts, modules whose path is among these compute nothing, and return what is known."""

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        return known[path] if path in known and context.method_name == "__call__" else call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def _projected(params: Params, names: tuple[str, ...], x: jax.Array, dtype: Dtype) -> dict[str, jax.Array]:
    """What the dense layers give whose paths end so."""
    return {
        path: apply(Dense(own["kernel"].shape[-1], dtype, "bias" in own), own, x)
        for path, own in _modules(params)
        if path.endswith(names)
    }


def _modules(params: Params, path: str = "") -> Iterator[tuple[str, Params]]:
    for name, child in params.items():
        if isinstance(child, Mapping):
            yield path + name, child
            yield from _modules(child, f"{path}{name}/")
