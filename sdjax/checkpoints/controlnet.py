"""ControlNets: a file with the original names or diffusers', alone or beside a whole model, or a diffusers folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints import configurations, contents, names, native, weights
from sdjax.checkpoints.errors import CheckpointError
from sdjax.models.config import Config

Shapes = Callable[[Config, tuple[int, ...]], Mapping[str, Any]]
# The convolutions that the control picture goes through, numbered in order: all have a bias, as many as they put out.
HINTS = (
    (r"(?:control_model\.)?input_hint_block\.(\d{1,3})\.bias", lambda i: i // 2),
    (r"controlnet_cond_embedding\.conv_in\.bias()", lambda _: 0),
    (r"controlnet_cond_embedding\.blocks\.(\d{1,3})\.bias", lambda i: i + 1),
    (r"controlnet_cond_embedding\.conv_out\.bias()", lambda _: 1000),
)


def read(path: Path, config: Config, shapes: Shapes) -> dict[str, Any]:
    """The parameters of a ControlNet.

    Args:
      path: of the file or folder.
      config: of the model that it is for.
      shapes: gives the parameter tree for a configuration and the widths of what the control picture goes through.

    Raises:
      CheckpointError: it is no ControlNet, or not for this model; not whole, or its numbers are not finite.
    """
    if path.is_dir():
        configurations.check_controlnet(path / "config.json", config)
        tensors: Mapping[str, np.ndarray] = contents.read_part(path, "control")
    else:
        tensors = contents.read(path).tensors
    if "difference" in tensors:
        raise CheckpointError(
            f"{path}: it holds the differences of a ControlNet from the UNet it was trained on; take the whole one"
        )
    channels = _hint_channels(tensors)
    if 2 ** (len(channels) - 1) != config.vae.factor or not all(0 < width < 1 << 16 for width in channels):
        raise CheckpointError(f"{path}: no ControlNet 1.x for this model: its tensors of the control picture are not")
    leaves = native.flatten({"control": shapes(config, channels)})
    if any(name.startswith(names.LDM_ROOTS["control"]) for name in tensors):
        root, table, prefix = names.LDM_ROOTS["control"], names.ldm, ""
    elif any(name.startswith("input_hint_block.") for name in tensors):
        root, table, prefix = "", names.ldm, names.LDM_ROOTS["control"]
    else:
        root, table, prefix = "", names.folder, names.FOLDER_ROOTS["control"]
    own = {prefix + name: x for name, x in tensors.items() if name.startswith(root)}
    return native.unflatten(weights.assemble(path, own, table(config, leaves), leaves))["control"]


def _hint_channels(tensors: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The widths at each size, from the picture's to the latents'; the last convolution's is the UNet's."""
    widths: dict[int, int] = {}
    for name, tensor in tensors.items():
        for pattern, place in HINTS:
            if (found := re.fullmatch(pattern, name)) and tensor.ndim == 1:
                widths[place(int(found[1] or 0))] = len(tensor)
    in_order = [widths[place] for place in sorted(widths)]
    return tuple(in_order[:-1:2])
