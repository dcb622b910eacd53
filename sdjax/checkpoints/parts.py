"""One part of a model from a file or folder of its own, or out of a whole checkpoint: a UNet, a VAE, a text encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints import configurations, contents, identity, msgpack, names, native, weights
from sdjax.checkpoints.contents import Contents
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.names import Kind, Source
from sdjax.models.config import Config

CALLED = {"unet": "a UNet", "vae": "an autoencoder (VAE)", "text_encoder": "a text encoder"}


class Reading(NamedTuple):
    """One way to read a file as a part: its tensors, and the table of their sources in that spelling."""

    part: str
    tensors: dict[str, np.ndarray]
    sources: Mapping[str, Source]
    spelling: Callable[[str], str]

    @property
    def share(self) -> float:
        """How many of the part's tensors are there so."""
        there = {self.spelling(name) for name in self.tensors}
        return sum(source.name in there for source in self.sources.values()) / len(self.sources)


def read(path: Path, part: str | None, config: Config, shapes: Any) -> tuple[str, Config, dict[str, Any]]:
    """A part for a model of this configuration. What its UNet predicts is not in a part's own file or folder.

    Args:
      path: of a file with original, diffusers' or our names, with or without the part's prefix, the rest of a model
        beside it or not; or of a diffusers folder, whole or the part's own, Flax's too.
      part: "unet", "vae" or "text_encoder"; None takes the one that the file has.
      config: of the model that it goes into.
      shapes: gives the parameter tree of a configuration.

    Returns:
      The part's name, the model's configuration with it, and its tree of parameters.

    Raises:
      CheckpointError: it is no such part, not for this model, not whole, or its numbers are not finite; or it has
        several parts and none is chosen.
    """
    if path.is_dir():
        path, part, config = _folder(path, part, config)
        flax = contents.flax_file(path, part)
        tensors: Mapping[str, np.ndarray] = msgpack.read(flax) if flax else contents.read_part(path, part)
    else:
        opened = contents.read(path)
        tensors, config = opened.tensors, _own(path, opened, part, config)
    leaves = native.flatten(shapes(config))
    readings = [
        reading for name in ([part] if part else CALLED) for reading in _readings(name, tensors, config, leaves)
    ]
    found = [reading for reading in readings if reading.share > 0.5]
    parts = {reading.part for reading in found}
    if len(parts) > 1:
        raise CheckpointError(f"{path}: it has several parts ({', '.join(sorted(parts))}); say which one to take")
    if not found:
        wanted = CALLED[part] if part else ", ".join(CALLED.values())
        raise CheckpointError(f"{path}: none of what this model could have is in it: {wanted}")
    best = max(found, key=lambda reading: reading.share)
    assembled = weights.assemble(path, best.tensors, best.sources, leaves, spelling=best.spelling)
    return best.part, config, native.unflatten(assembled)[best.part]


def _folder(path: Path, part: str | None, config: Config) -> tuple[Path, str, Config]:
    """The folder of the part's weights, which part it is, and the configuration with what its `config.json` says."""
    if (path / "model_index.json").is_file():
        if part is None:
            raise CheckpointError(f"{path}: it has several parts ({', '.join(sorted(CALLED))}); say which one to take")
        path = path / part
    name, fields = configurations.read_part(path / "config.json")
    if part not in (None, name):
        raise CheckpointError(f"{path}: this is {CALLED[name]}, not {CALLED[part]}")
    changed = dataclasses.replace(config, **{name: fields})
    configurations.check(changed, path)
    return path, name, changed


def _own(path: Path, opened: Contents, part: str | None, config: Config) -> Config:
    """The configuration with what a file that sdjax wrote says of the part it has, or that is asked for."""
    said = identity.configuration(opened, path)
    here = [name for name in CALLED if any(tensor.startswith(f"{name}.") for tensor in opened.tensors)]
    part = part or (here[0] if len(here) == 1 else None)
    if said is None or part is None:
        return config
    if part == "unet" and said.prediction != config.prediction:
        raise CheckpointError(f"{path}: its UNet predicts {said.prediction!r}, and the model {config.prediction!r}")
    changed = dataclasses.replace(config, **{part: getattr(said, part)})
    configurations.check(changed, path)
    return changed


def _readings(part: str, tensors: Mapping[str, np.ndarray], config: Config, leaves: Mapping[str, Any]) -> list[Reading]:
    own = [target for target in leaves if target.startswith(f"{part}.")]
    tables = {
        "diffusers": names.folder(config, own),
        "ldm": names.ldm(config, own),
        "native": {target: Source(target, Kind.SAME) for target in own},
        "flax": names.flax(config, own),
    }
    readings = []
    open_clip = part == "text_encoder" and config.text_encoder.activation == "gelu"
    roots = {
        "diffusers": names.FOLDER_ROOTS[part],
        "ldm": names.OPEN_CLIP_ROOT if open_clip else names.LDM_ROOTS[part],
        "native": f"{part}.",
        "flax": f"{part}.",
    }
    for layout, table in tables.items():
        root, spelling = roots[layout], str if layout in ("native", "flax") else names.spelling
        whole = {name: x for name, x in tensors.items() if spelling(name).startswith(root)}
        if layout == "ldm" and part == "unet" and any(name.startswith(names.EMA_ROOT) for name in tensors):
            table = names.averaged(table)  # as `load` prefers them
            whole = {name: x for name, x in tensors.items() if name in {source.name for source in table.values()}}
        bare = {root + name: x for name, x in tensors.items()}
        readings += [Reading(part, found, table, spelling) for found in (whole, bare)]
    return readings
