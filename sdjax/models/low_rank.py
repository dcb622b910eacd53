"""Low-rank changes of weights (LoRA, Hu et al. 2021): W x + weight · B A x, beside the weights or folded into them.

They lie in the tree of parameters, in the module that they change, as `lora`: by name, {"down", "up", "weight"}. So a
weight is an argument of every compiled program, and other weights compile nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
Params = Any


def attach(params: Params, name: str, changes: Mapping[str, tuple[Array, Array]], weight: float) -> Params:
    """The same parameters with changes beside the kernels of modules, under a name.

    Args:
      params: nested dicts of arrays.
      name: to find them by.
      changes: by module (dotted names): down, (I, R) or for a convolution (kh, kw, I, R), and up, (R, O). What is added
        to the kernel is down @ up.
      weight: factor of all.
    """

    def visit(node: Params, path: str) -> Params:
        if not isinstance(node, Mapping):
            return node
        node = {key: visit(child, f"{path}.{key}" if path else key) for key, child in node.items()}
        if path in changes:
            down, up = changes[path]
            dtype = node["kernel"].dtype
            own = {"down": np.asarray(down, dtype), "up": np.asarray(up, dtype), "weight": np.float32(weight)}
            node["lora"] = {**node.get("lora", {}), name: jax.device_put(own)}
        return node

    return visit(params, "")


def weigh(params: Params, name: str, weight: float) -> Params:
    """The same with another weight for the changes of this name."""
    given = {"weight": jax.device_put(np.float32(weight))}

    def change(loras: Params) -> Params:
        return {key: {**own, **given} if key == name else own for key, own in loras.items()}

    return _map(params, lambda module: {**module, "lora": change(module["lora"])})


def fold(params: Params) -> Params:
    """Every change added to its kernel, in float32, and none left beside it."""

    def folded(module: Params) -> Params:
        kernel = jnp.asarray(module["kernel"], jnp.float32)
        for change in module["lora"].values():
            down, up = (jnp.asarray(change[key], jnp.float32) for key in ("down", "up"))
            kernel = kernel + change["weight"] * jnp.matmul(down, up, precision="highest")
        kernel = kernel.astype(module["kernel"].dtype)
        return {**{key: value for key, value in module.items() if key != "lora"}, "kernel": kernel}

    return _map(params, folded)


def changes_of(module: nn.Module) -> list[Mapping[str, jax.Array]]:
    """Of a module, while it is applied."""
    return list(module.get_variable("params", "lora").values()) if module.has_variable("params", "lora") else []


def _map(node: Params, function: Any) -> Params:
    """The tree with the function applied to every module that has changes."""
    if not isinstance(node, Mapping):
        return node
    if "lora" in node:
        return function(node)
    return {key: _map(child, function) for key, child in node.items()}
