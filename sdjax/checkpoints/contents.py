"""What a path holds: its format by its first bytes, never by its name, and its tensors, mapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.checkpoints import configurations, msgpack, native, pytorch, safetensors
from sdjax.checkpoints.errors import CheckpointError

SAFETENSORS, PYTORCH, FOLDER, FLAX = "safetensors", "PyTorch (zip)", "diffusers folder", "diffusers-Flax folder"
PARTS = ("text_encoder", "unet", "vae")
# The weights of a folder's part, in the order of preference; "index" names the shards of a part in several files.
STEMS = {"text_encoder": ("model", "pytorch_model"), "unet": ("diffusion_pytorch_model",)}
STEMS["vae"] = STEMS["control"] = STEMS["unet"]
FLAX_STEMS = {"text_encoder": "flax_model", "unet": "diffusion_flax_model", "vae": "diffusion_flax_model"}
VARIANTS = ("", ".fp16", ".bf16", ".non_ema")
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


@dataclass(frozen=True)
class Contents:
    """A file or folder, opened.

    Attributes:
      format: SAFETENSORS, PYTORCH, FOLDER or FLAX.
      tensors: arrays by name, mapped read-only but for Flax's; those of a folder with the name of their part before it.
      metadata: strings that a safetensors file has of its own; a folder's `model_index.json`, where one is text.
      others: names of what is saved beside the tensors in a PyTorch file.
    """

    format: str
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def is_native(self) -> bool:
        """Whether it is one of our own files."""
        return self.format == SAFETENSORS and native.is_native(self.metadata)


def read(path: Path, variant: str | None = None) -> Contents:
    """Opens a file or a folder.

    Args:
      path: of either.
      variant: of a folder's weights, such as "fp16"; None prefers those without one.

    Raises:
      CheckpointError: it is missing, no checkpoint at all (it says what it is), or damaged.
    """
    if sentence := no_checkpoint(path):
        raise CheckpointError(f"{path}: {sentence}")
    if variant is not None and not path.is_dir():
        raise CheckpointError(f"{path}: one file, which has no variants; leave variant={variant!r:.40} out")
    try:
        return _read_folder(path, variant) if path.is_dir() else _read_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def no_checkpoint(path: Path) -> str | None:
    """What a path is, and what to do, if it cannot be a checkpoint by its first bytes; None if it may be one."""
    try:
        if path.is_dir():
            return _no_folder(path)
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(512)
            return next((sentence for test, sentence in NO_CHECKPOINTS if test(start)), None)
        exists = path.exists()
    except OSError as error:
        return f"cannot be read: {error}"
    if exists:
        return "neither a file nor a folder"
    return "there is no such file or folder"


def _no_folder(path: Path) -> str | None:
    if (path / "model_index.json").is_file():
        return None
    if (path / "config.json").is_file():
        return "one part of a diffusers folder; give the folder above it, which has the model_index.json"
    files = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".safetensors", ".ckpt"))
    hint = f"; did you mean one of the files in it, {', '.join(files[:3])}?" if files else ""
    return f"a folder without a model_index.json, so not a model in diffusers' layout{hint}"


def _is_markup(start: bytes) -> bool:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script"))


def _is_nothing_known(start: bytes) -> bool:
    # safetensors begins with the length of its header, a JSON object, in eight bytes.
    return not start.startswith(b"PK\x03\x04") and start[8:9] != b"{"


NO_CHECKPOINTS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda start: not start, "an empty file; download it again"),
    (
        lambda start: start.startswith(b"version https://git-lfs"),
        "a git-LFS pointer, not the file it stands for; run `git lfs pull` where it was cloned",
    ),
    (_is_markup, "a web page, not a checkpoint: the address it was downloaded from wants a login or has moved"),
    (
        # An integer of protocol 2 is how torch.save began before 1.6; plain pickles begin with the same opcode.
        lambda start: start[:1] == b"\x80" and start[8:9] != b"{",
        "a bare pickle, PyTorch's format before version 1.6, which sdjax does not read; if you trust it, write it anew"
        " with PyTorch: torch.save(torch.load(old, map_location='cpu', weights_only=False), new)",
    ),
    (lambda start: start.startswith(b"GGUF"), "a GGUF file of quantised weights, which sdjax does not read"),
    (lambda start: start.startswith(b"\x89HDF"), "an HDF5 file (Keras, TensorFlow), which sdjax does not read"),
    (lambda start: start.startswith((b"7z\xbc\xaf", b"Rar!", b"\x1f\x8b")), "a packed archive; unpack it first"),
    (lambda start: start.startswith((b"\x89PNG", b"\xff\xd8\xff")), "a picture, not a checkpoint"),
    (_is_nothing_known, "neither a safetensors nor a PyTorch file by its first bytes; is the download complete?"),
)


def _read_file(path: Path) -> Contents:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        tensors, others = pytorch.read(path)
        return Contents(PYTORCH, tensors, others=others)
    tensors, metadata = safetensors.read(path)
    return Contents(SAFETENSORS, tensors, metadata)


def _read_folder(path: Path, variant: str | None) -> Contents:
    index = configurations.read_json(path / "model_index.json")
    tensors: dict[str, np.ndarray] = {}
    files = {part: flax_file(path / part, part) for part in PARTS}
    flax = {part: file for part, file in files.items() if file is not None}
    if len(flax) == len(PARTS):
        if variant is not None:
            raise CheckpointError(f"{path}: Flax's folders have no variants; leave variant={variant!r:.40} out")
        for part, file in flax.items():
            tensors |= {f"{part}.{name}": array for name, array in msgpack.read(file).items()}
        return Contents(FLAX, tensors, index)
    for part in PARTS:
        tensors |= {f"{part}.{name}": array for name, array in read_part(path / part, part, variant).items()}
    return Contents(FOLDER, tensors, index)


def flax_file(folder: Path, part: str) -> Path | None:
    """The weights that Flax wrote in a part's folder, where there are no others."""
    file = folder / f"{FLAX_STEMS[part]}.msgpack"
    return file if file.is_file() and not any((folder / name).is_file() for name in candidates(part)) else None


def read_part(folder: Path, part: str, variant: str | None = None) -> dict[str, np.ndarray]:
    """The tensors in a diffusers folder's subfolder: "text_encoder", "unet" or "vae", or "control" in a
    ControlNet's own.

    Raises:
      CheckpointError: there are none, or they cannot be read.
    """
    tensors: dict[str, np.ndarray] = {}
    try:
        for file in _weights(folder, part, variant):
            found = _read_file(file).tensors
            if twins := tensors.keys() & found.keys():
                raise CheckpointError(f"{file}: {min(twins)!r:.120} is in another shard too")
            tensors |= found
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error
    return tensors


def candidates(part: str, variant: str | None = None) -> list[str]:
    """The names of files that a part's weights may have, in the order of preference."""
    variants = VARIANTS if variant is None else (f".{variant}",)
    # Of shards' index diffusers has the variant before the last ending.
    return [
        f"{stem}{ending.removesuffix('.json')}{middle}.json" if ending.endswith(".json") else f"{stem}{middle}{ending}"
        for middle in variants
        for ending in ENDINGS
        for stem in STEMS[part]
    ]


def _weights(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The files of a part's weights: the first of its candidates that is there, or the shards it names."""
    names = candidates(part, variant)
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder}: no weights in it; one of {', '.join(names[:2])} is expected")
    if found.suffix != ".json":
        if sentence := no_checkpoint(found):
            raise CheckpointError(f"{found}: {sentence}")
        return [found]
    shards = configurations.read_json(found).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{found}: it has no weight_map from tensors to files")
    files = sorted(set(shards.values()))
    # A shard lies beside its index: a name with a folder in it would lead anywhere.
    if outside := next(
        (name for name in files if os.path.basename(name) != name or not (folder / name).is_file()), None
    ):
        raise CheckpointError(f"{found}: it names {outside!r:.80}, which is no file beside it")
    for name in files:
        if sentence := no_checkpoint(folder / name):
            raise CheckpointError(f"{folder / name}: {sentence}")
    return [folder / name for name in files]
