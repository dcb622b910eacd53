"""Checkpoints: files that others wrote, read as (config, params) and written as files of our own.

Nothing in a file is ever executed, and whatever is wrong with one is a `CheckpointError` that says what it is. Arrays
are mapped from the file: they are read where and when they are used, and copied where a caller changes them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints import (
    configurations,
    contents,
    controlnet,
    folders,
    hub,
    identity,
    lora,
    names,
    native,
    parts,
    safetensors,
    textual_inversion,
    tiny_decoder,
    weights,
)
from sdjax.checkpoints import prediction as predictions
from sdjax.checkpoints.arrays import contiguous, is_finite
from sdjax.checkpoints.contents import Contents
from sdjax.checkpoints.errors import CheckpointError, shorten
from sdjax.checkpoints.names import Kind, Source
from sdjax.checkpoints.native import flatten, save, unflatten
from sdjax.checkpoints.weights import View
from sdjax.models.config import Config

__all__ = [
    "CheckpointError",
    "contiguous",
    "controlnet",
    "convert",
    "describe",
    "export",
    "flatten",
    "hub",
    "is_finite",
    "load",
    "lora",
    "parts",
    "save",
    "shorten",
    "textual_inversion",
    "tiny_decoder",
    "unflatten",
]

Path_ = str | os.PathLike[str]
Params = dict[str, Any]
# Of a configuration: its tree of whatever has the `shape` of each leaf, such as `jax.ShapeDtypeStruct`s.
Shapes = Callable[[Config], Mapping[str, Any]]
LAYOUTS = {"diffusers": names.folder, "ldm": names.ldm}
DTYPES = ("float32", "bfloat16")


def load(
    path: Path_,
    shapes: Shapes,
    *,
    ema: bool | None = None,
    prediction: str | None = None,
    variant: str | None = None,
) -> tuple[Config, Params]:
    """Reads a model: a native file, a `.safetensors` or `.ckpt` of Stable Diffusion 1 or 2, or a diffusers folder.

    The format is told by the file's first bytes, whatever its name.

    Args:
      path: of a file, or of a folder with a `model_index.json`.
      shapes: gives the parameter tree of a configuration.
      ema: which weights of the UNet to take from a file that holds two sets: True the moving averages, False the last
        ones of training. None takes the averages if they are there: its authors sample with them, and training
        goes on from the others.
      prediction: what the UNet returns, "epsilon", "v" or "sample", in place of what the checkpoint says of itself.
      variant: of a folder's weights, such as "fp16"; None prefers those without one.

    Returns:
      The configuration, and nested dicts of read-only NumPy arrays mapped from the file, in its dtype.

    Raises:
      CheckpointError: the path is missing, or no such model (it says what it is); tensors are missing, unexpected or
        of a wrong shape (all are listed), or hold NaN or infinity; `ema=True` where there are no averages.
    """
    read = _read(Path(path), shapes, ema, prediction, variant)
    # What we wrote ourselves was looked through then. It is mapped, and not a page of it read before it is used.
    arrays = read.arrays if read.is_sealed else weights.finite(path, read.views)
    return read.config, native.unflatten(arrays)


def convert(
    source: Path_,
    target: Path_,
    shapes: Shapes,
    *,
    ema: bool | None = None,
    prediction: str | None = None,
    dtype: str | None = None,
    layout: str = "native",
    hash_source: bool = True,
) -> None:
    """Writes any checkpoint that `load` reads as one native file, or in another program's layout, tensor by tensor.

    A file's metadata say where it came from: `source`, its name; `source_sha256`, of a file; `weights`, "averaged"
    or "last" where there was a choice; `modelspec.prediction_type`, what the UNet returns.

    Args:
      source: what to read.
      target: the file to write, which is replaced if there is one; or the folder, which must not be there.
      shapes: gives the parameter tree of a configuration.
      ema, prediction: as for `load`.
      dtype: to round the weights to, "float32" or "bfloat16"; None keeps theirs.
      layout: "native", one file that loads at once; "ldm", the original's single file; "diffusers", a folder.
      hash_source: whether to read a source file once more for its SHA-256.

    Raises:
      ValueError: the dtype or the layout is another.
      FileExistsError: the folder is there.
      CheckpointError: as `load`; or the rounded weights hold infinity.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: expected {' or '.join(DTYPES)}, got {dtype!r}")
    if layout not in ("native", *LAYOUTS):
        raise ValueError(f"layout: expected native, {' or '.join(LAYOUTS)}, got {layout!r}")
    source = Path(source)
    shapes = functools.cache(shapes)  # tracing takes seconds
    read = _read(source, shapes, ema, prediction, None)
    config, params = read.config, native.unflatten(read.arrays)
    metadata = {"source": source.absolute().name, **read.chosen}
    if hash_source and source.is_file():
        with source.open("rb") as file:
            metadata["source_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if layout == "native":
        save(target, params, config, dtype, metadata, shapes(config))
    elif layout == "ldm":
        metadata |= {
            "format": "pt",
            "modelspec.prediction_type": config.prediction,
            identity.CONFIG: json.dumps(config.to_dict()),
        }
        safetensors.write(target, export(params, config, layout), metadata, dtype)
    else:
        folders.write(Path(target), export(params, config, layout), config, dtype, metadata["source"])


def export(params: Mapping[str, Any], config: Config, layout: str) -> dict[str, np.ndarray]:
    """Our parameters as views under another program's names, with its axes: the inverse of `load`.

    Args:
      params: nested dicts of arrays.
      config: of the model.
      layout: "diffusers" (with `unet.`, `vae.` and `text_encoder.` before the names in those subfolders), or "ldm",
        the original single file's.

    Raises:
      ValueError: the layout is another.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected {' or '.join(LAYOUTS)}, got {layout!r}")
    leaves = native.flatten(params)
    return weights.export(leaves, LAYOUTS[layout](config, leaves))


def describe(path: Path_) -> dict[str, Any]:
    """What a file or folder is, from its headers alone, without reading numbers.

    Returns:
      Always `file` and `kind`; of a checkpoint also `format`, `readable` (whether `load` takes this kind), `tensors`
      and `parameters` (their counts), `dtypes` (tensors of each), `averages` (whether the UNet is there twice, see
      `load`) and `metadata`.

    Raises:
      CheckpointError: a checkpoint that is truncated or damaged.
    """
    path = Path(path)
    if sentence := contents.no_checkpoint(path):
        return {"file": str(path), "kind": sentence}
    opened = contents.read(path)
    tensors = opened.tensors.values()
    return {
        "file": str(path),
        "kind": identity.identify(opened).kind,
        "format": opened.format,
        "readable": _is_readable(path, opened),
        "tensors": len(tensors),
        "parameters": sum(x.size for x in tensors),
        "dtypes": dict(collections.Counter(x.dtype.name for x in tensors)),
        "averages": identity.has_averages(opened.tensors),
        "metadata": dict(opened.metadata),
    }


class _Read(NamedTuple):
    """A model as it lies in a file or folder.

    Attributes:
      config: its configuration.
      views: its tensors under our dotted names.
      chosen: which of two sets of weights was taken, as metadata.
      is_sealed: whether it is a native file that was found sound when it was written.
    """

    config: Config
    views: dict[str, View]
    chosen: dict[str, str]
    is_sealed: bool = False

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {target: view.array for target, view in self.views.items()}


def _read(path: Path, shapes: Shapes, ema: bool | None, prediction: str | None, variant: str | None) -> _Read:
    opened = contents.read(path, variant)
    config = _config(path, opened, prediction)
    averages = opened.format not in (contents.FOLDER, contents.FLAX) and identity.has_averages(opened.tensors)
    if ema and not averages:
        raise CheckpointError(
            f"{path}: it has one set of weights, so there are no averaged ones to choose; leave ema out"
        )
    if opened.is_native and native.is_sealed(opened.metadata, opened.tensors):
        return _Read(config, {name: View(x, name) for name, x in opened.tensors.items()}, {}, is_sealed=True)
    targets = native.flatten(shapes(config))
    if opened.is_native:
        same = {target: Source(target, Kind.SAME) for target in targets}
        return _Read(config, weights.match(path, opened.tensors, same, targets, spelling=str), {})
    tables = {contents.FOLDER: names.folder, contents.FLAX: names.flax}
    sources = tables.get(opened.format, names.ldm)(config, targets)
    if not averages:
        spelling = str if opened.format == contents.FLAX else names.spelling
        return _Read(config, weights.match(path, opened.tensors, sources, targets, (), spelling), {})
    averaged = names.averaged(sources)
    both = {source.name for source in (*sources.values(), *averaged.values())}
    found = weights.match(path, opened.tensors, sources if ema is False else averaged, targets, both)
    return _Read(config, found, {"weights": "last" if ema is False else "averaged"})


def _config(path: Path, opened: Contents, prediction: str | None = None) -> Config:
    """The configuration, with the prediction type that the caller says."""
    kind, original = identity.identify(opened)
    if (said := identity.configuration(opened, path)) is not None:
        config = said
    elif opened.format in (contents.FOLDER, contents.FLAX) and opened.metadata.get("_class_name") in identity.PIPELINES:
        config = configurations.read_folder(path)
    elif original is not None:
        return predictions.configured(path, opened, original, prediction)
    else:
        raise CheckpointError(f"{path}: this is {kind}; sdjax reads whole checkpoints of Stable Diffusion 1 and 2")
    if prediction is not None:
        config = dataclasses.replace(config, prediction=prediction)
        configurations.check(config, path)
    return config


def _is_readable(path: Path, opened: Contents) -> bool:
    try:
        _config(path, opened, prediction="v")  # which it is may be in the numbers, and of this nothing is refused
    except CheckpointError:
        return False
    return True
