"""Products over channels, the form that XLA's CPU backend has fast kernels for in every dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def matmul(x: jax.Array, kernel: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """(..., I), (I, O) -> (..., O) float32, of factors in `dtype`.

    Only a result in float32 keeps XLA's CPU backend from widening bfloat16 factors first.
    """
    contract_last = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x.astype(dtype), kernel.astype(dtype), contract_last, preferred_element_type=jnp.float32)
