"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file to write, which takes the path's place once all of it is on the disk.

    Raises:
      OSError: it cannot be written. After any error, Ctrl-C too, nothing is left of it, and an older file stays.
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"  # the same folder, so that the rename is atomic
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
