"""Perturbed attention (Ahn et al. 2024, PAG): the UNet with some pictures' middle self-attention switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@contextmanager
def identity_attention(perturbed: jax.Array) -> Iterator[None]:
    """While this lasts, tokens of these pictures attend to themselves alone in the middle block's self-attention.

    Its attention map is then the identity and what it hands on are its values, so nothing of the UNet has to change:
    the values are caught on their way in and put where the attention's result would leave.

    Args:
      perturbed: (B,) bool, of the UNet's batch.
    """
    caught: dict[str, Any] = {}

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        path = context.module.path
        if context.method_name != "__call__" or "mid_block" not in path or path[-2:-1] != ("attn1",):
            return call(*args, **kwargs)
        if path[-1] == "to_out_0":
            out = jnp.where(perturbed[:, None, None], caught["values"], args[0])
            return call(out, **kwargs)
        result = call(*args, **kwargs)
        if path[-1] == "to_v":
            caught["values"] = result
        return result

    with nn.intercept_methods(intercept):
        yield
