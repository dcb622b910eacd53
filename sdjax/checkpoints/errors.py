"""What goes wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Collection

SHOWN = 5  # names in a message before the rest is counted


class CheckpointError(ValueError):
    """A file that cannot be used as a model; the message says what it is, what was expected and what to do."""


def shorten(items: Collection[str]) -> str:
    """Names for a message: the first few, and how many more there are."""
    shown = ", ".join(f"{item:.160}" for item in sorted(items)[:SHOWN])
    return f"{shown} and {len(items) - SHOWN} more" if len(items) > SHOWN else shown
