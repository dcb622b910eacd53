"""Samplers: each is one short function, run once on the host into a table that one compiled program runs."""

from __future__ import annotations

from sdjax.samplers.registry import ALGORITHMS, Algorithm
from sdjax.samplers.rows import (
    REGISTERS,
    STACKED,
    Rows,
    bucket,
    initial_registers,
    restore,
    sample,
    stack,
    step,
)
from sdjax.samplers.run import Level, Output, Run
from sdjax.samplers.sampler import Sampler, create, find

__all__ = [
    "ALGORITHMS", "REGISTERS", "STACKED", "Algorithm", "Level", "Output", "Rows", "Run", "Sampler",
    "bucket", "create", "find", "initial_registers", "restore", "sample", "stack", "step",
]  # fmt: skip
