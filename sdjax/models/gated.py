"""T-GATE (Zhang et al. 2024): what the UNet's cross-attention gives, for later calls to do without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax


@contextmanager
def watched_cross_attention(found: dict[str, jax.Array]) -> Iterator[None]:
    """While this lasts, what every cross-attention returns, (B, T, C), is also put into `found`, by its path."""

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result, path = call(*args, **kwargs), context.module.path
        if context.method_name == "__call__" and path[-1:] == ("attn2",):
            found["/".join(path)] = result
        return result

    with nn.intercept_methods(intercept):
        yield
