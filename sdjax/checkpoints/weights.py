"""Puts the tensors of a file into our tree: each of ours found once, nothing left over, every number finite."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.checkpoints import names
from sdjax.checkpoints.arrays import FLOATS, is_finite
from sdjax.checkpoints.errors import CheckpointError, shorten
from sdjax.checkpoints.names import Source


class View(NamedTuple):
    """A tensor of ours, or a part of it, as it lies in a file."""

    array: np.ndarray  # with our axes
    name: str  # of the file's tensor


def assemble(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    sources: Mapping[str, Source],
    targets: Mapping[str, Any],
    passed_over: Collection[str] = (),
    spelling: Callable[[str], str] = names.spelling,
) -> dict[str, np.ndarray]:
    """`match`, and every number read once.

    Raises:
      CheckpointError: as `match`; or some tensors hold NaN or infinity, which are listed.
    """
    return finite(path, match(path, tensors, sources, targets, passed_over, spelling))


def match(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    sources: Mapping[str, Source],
    targets: Mapping[str, Any],
    passed_over: Collection[str] = (),
    spelling: Callable[[str], str] = names.spelling,
) -> dict[str, View]:
    """Views of a file's tensors under our names and with our axes, by the file's header alone.

    Args:
      path: for messages.
      tensors: of the file.
      sources: where each of ours is in it.
      targets: what has the `shape` of each of ours.
      passed_over: names, in the tables' spelling, that may be there and are not needed.
      spelling: brings a name of the file to the tables' spelling.

    Raises:
      CheckpointError: tensors are missing, unexpected, of a wrong shape or dtype, all listed at once.
    """
    spelt = {spelling(name): name for name in tensors}
    wanted = {source.name for source in sources.values()}
    missing = [name for name in wanted if name not in spelt]
    known = wanted.union(passed_over)
    unexpected = [name for tables, name in spelt.items() if tables not in known and not names.is_buffer(tables)]
    shapes, dtypes = set(), set()
    found: dict[str, View] = {}
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
            part = tensor[source.part * rows : (source.part + 1) * rows]
            found[target] = View(source.kind.to_ours(part), name)
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
    return found


def finite(path: str | os.PathLike[str], views: Mapping[str, View]) -> dict[str, np.ndarray]:
    """The arrays, all of whose numbers are finite.

    Raises:
      CheckpointError: some tensors hold NaN or infinity, which are listed.
    """
    if broken := {view.name for view in views.values() if not is_finite(view.array)}:
        raise CheckpointError(
            f"{path}: NaN or infinity in {len(broken)} of its tensors: {shorten(broken)}; the file is damaged,"
            " or its training had failed"
        )
    return {target: view.array for target, view in views.items()}


def export(params: Mapping[str, Any], sources: Mapping[str, Source]) -> dict[str, np.ndarray]:
    """The inverse of `assemble`: our arrays (dotted names) under a layout's names and with its axes.

    They are views, but where several of ours make one of theirs.
    """
    theirs: dict[str, list[np.ndarray]] = {}
    for target, source in sorted(sources.items(), key=lambda item: item[1].part):
        theirs.setdefault(source.name, []).append(source.kind.to_theirs(np.asarray(params[target])))
    return {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in theirs.items()}
