"""Puts the tensors of a file into our tree: each of ours found once, nothing left over, every number finite."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from sdjax.checkpoints import names
from sdjax.checkpoints.errors import CheckpointError
from sdjax.checkpoints.names import Source

FLOATS = ("float16", "bfloat16", "float32", "float64")
CHUNK = 1 << 18  # numbers at a time: they stay in the processor's cache
SHOWN = 5  # names in a message before the rest is counted


def assemble(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    sources: Mapping[str, Source],
    targets: Mapping[str, Any],
    passed_over: Collection[str] = (),
    spelling: Callable[[str], str] = names.spelling,
) -> dict[str, np.ndarray]:
    """Views of a file's tensors under our names and with our axes.

    Args:
      path: for messages.
      tensors: of the file.
      sources: where each of ours is in it.
      targets: what has the `shape` of each of ours.
      passed_over: names, in the tables' spelling, that may be there and are not needed.
      spelling: brings a name of the file to the tables' spelling.

    Raises:
      CheckpointError: tensors are missing, unexpected, of a wrong shape or dtype, all listed at once; or, where these
        are right, some hold NaN or infinity.
    """
    spelt = {spelling(name): name for name in tensors}
    wanted = {source.name for source in sources.values()}
    missing = [name for name in wanted if name not in spelt]
    known = wanted.union(passed_over)
    unexpected = [name for tables, name in spelt.items() if tables not in known and not names.is_buffer(tables)]
    shapes, dtypes, found = set(), set(), {}
    for target, source in sources.items():
        if source.name not in spelt:
            continue
        name = spelt[source.name]
        tensor, expected = tensors[name], source.their_shape(targets[target].shape)
        if tensor.shape != expected:
            shapes.add(f"{name} {list(tensor.shape)} instead of {list(expected)}")
        elif tensor.dtype.name not in FLOATS:
            dtypes.add(f"{name} {tensor.dtype}")
        else:
            rows = len(tensor) // source.parts
            found[target] = tensor[source.part * rows : (source.part + 1) * rows]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "wrong shape": shapes,
        "not floating point": dtypes,
        "twice, under two names": [name for name in tensors if spelt[spelling(name)] != name],
    }
    if any(problems.values()):
        lists = "; ".join(f"{what} ({len(items)}): {shorten(items)}" for what, items in problems.items() if items)
        raise CheckpointError(f"{path}: its tensors are not those of the model: {lists}")
    if nonfinite := {spelt[sources[target].name] for target, tensor in found.items() if not is_finite(tensor)}:
        raise CheckpointError(
            f"{path}: NaN or infinity in {len(nonfinite)} of its tensors: {shorten(nonfinite)}; the file is damaged,"
            " or its training had failed"
        )
    return {target: sources[target].kind.to_ours(tensor) for target, tensor in found.items()}


def export(params: Mapping[str, Any], sources: Mapping[str, Source]) -> dict[str, np.ndarray]:
    """The inverse of `assemble`: our arrays (dotted names) under a layout's names and with its axes.

    They are views, but where several of ours make one of theirs.
    """
    theirs: dict[str, list[np.ndarray]] = {}
    for target, source in sorted(sources.items(), key=lambda item: item[1].part):
        theirs.setdefault(source.name, []).append(source.kind.to_theirs(np.asarray(params[target])))
    return {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in theirs.items()}


def is_finite(x: np.ndarray) -> bool:
    """Whether a floating-point array has neither NaN nor infinity; reads it once, in pieces."""
    # Exponents of all ones are infinities and NaNs. As integers, because NumPy has no fast isfinite for 16 bits.
    integer = np.dtype(f"u{x.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(integer)
    flat = x.reshape(-1).view(integer)
    return not any(((flat[start : start + CHUNK] & infinity) == infinity).any() for start in range(0, flat.size, CHUNK))


def shorten(items: Collection[str]) -> str:
    """Names for a message: the first few, and how many more there are."""
    shown = ", ".join(f"{item:.160}" for item in sorted(items)[:SHOWN])
    return f"{shown} and {len(items) - SHOWN} more" if len(items) > SHOWN else shown
