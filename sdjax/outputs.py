"""The files that pictures are written to: named before anything is computed, so that nothing is computed in vain."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Sequence
from pathlib import Path

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def targets(output: str | None, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """One path for each picture, all different; none exists yet but for a single file that was named in full.

    Args:
      output: a folder, for names made of prompt and seed; a name with {i} (counted from 0) or {seed} in it, also as
        {i:03}; for one picture a file; None is the working folder.
      prompts, seeds: of the pictures.

    Raises:
      ValueError: no such folder, an ending that cannot be written, names that are not different or are taken.
    """
    if output is None or output.endswith(("/", os.sep)) or os.path.isdir(output):
        folder = Path(output or ".")
        _check_folder(folder)
        return _derived(folder, prompts, seeds)
    if Path(output).suffix.lower() not in ENDINGS:
        raise ValueError(
            f"-o {output}: it is no folder that exists, and for a file its ending must be one of {', '.join(ENDINGS)}"
        )
    paths = [Path(_filled(output, i, seed)) for i, seed in enumerate(seeds)]
    for folder in {path.parent for path in paths}:
        _check_folder(folder)
    if len(set(paths)) < len(paths):
        raise ValueError(
            f"-o {output}: {len(paths)} pictures would get the same name; give a folder, or put {{i}} or {{seed}} in it"
        )
    for path in paths:
        if path.is_dir() or (path.exists() and "{" in output):
            raise ValueError(f"-o {output}: {path} exists; choose another name or remove it")
    return paths


def free(path: Path, taken: Sequence[Path] = ()) -> Path:
    """The path, or where it is taken the first one that is not of those with -2, -3, ... before the ending."""
    number, candidate = 1, path
    while candidate in taken or os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _derived(folder: Path, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    paths: list[Path] = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        words = re.sub(r"\W+", "-", prompt.lower())[:40].strip("-_") or "picture"
        paths.append(free(folder / f"{words}-{seed}.png", paths))
    return paths


def _filled(output: str, i: int, seed: int) -> str:
    if "{" not in output and "}" not in output:
        return output
    try:
        parts = list(string.Formatter().parse(output))
    except ValueError as error:
        raise ValueError(f"-o {output}: {error}") from error
    for _, field, form, conversion in parts:
        known = field is None or (field in ("i", "seed") and re.fullmatch(r"0?\d{0,2}", form or "") and not conversion)
        if not known:
            raise ValueError(f"-o {output}: {{{field}}} is not known; there are {{i}} and {{seed}}, also as {{i:03}}")
    return output.format(i=i, seed=seed)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"-o: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"-o: you may not write in {folder}")
