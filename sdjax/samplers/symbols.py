"""Runs an algorithm once on symbols and writes down what it did: the table of rows.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sdjax.samplers.rows import REGISTERS, Rows
from sdjax.samplers.run import Call

# Where a row's own leaves stand among the columns of the table, after the registers.
_COLUMNS = {"noise": REGISTERS, "guided": REGISTERS + 1, "unguided": REGISTERS + 2}


class Symbol:
    """A linear combination, with float64 coefficients, of what a row knows.

    A leaf is what cannot be taken apart: a row's noise, the model's outputs, the latents at the end of a step. Leaves
    and sums of an earlier row are carried to a later one in a register; multiples of them need none of their own.

    Args:
      born: the row at whose end the value exists; -1 for what the run starts with.
      terms: other symbols, with their coefficients.
      leaf: "noise", "guided", "unguided" (a row's) or "latents".
    """

    __array_ufunc__ = None  # lets NumPy's scalars leave multiplication to us

    def __init__(self, born: int, terms: dict[Symbol, float], leaf: str | None = None) -> None:
        self.born = born
        self.terms = terms
        self.leaf = leaf

    @property
    def row(self) -> int:
        """The first row in which it can be used. Latents may be changed (inpainting) after the row that made them."""
        return self.born + 1 if self.leaf == "latents" else self.born

    def expand(self, row: int) -> dict[Symbol, float]:
        """Its coefficients of leaves of this row and of values carried into it."""
        return _total([(self, 1.0)], row)

    def __add__(self, other: Symbol) -> Symbol:
        if not isinstance(other, Symbol):
            return NotImplemented
        row = max(self.row, other.row)
        return Symbol(row, _total([(self, 1.0), (other, 1.0)], row))

    def __mul__(self, factor: float) -> Symbol:
        if isinstance(factor, (Symbol, np.ndarray)):
            return NotImplemented
        return Symbol(self.row, {self: float(factor)} if factor else {})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Symbol:
        return NotImplemented if isinstance(divisor, Symbol) else self * (1.0 / divisor)

    def __neg__(self) -> Symbol:
        return self * -1.0

    def __sub__(self, other: Symbol) -> Symbol:
        return self + -other if isinstance(other, Symbol) else NotImplemented


def _total(parts: Iterable[tuple[Symbol, float]], row: int) -> dict[Symbol, float]:
    """A sum's coefficients of leaves of this row and of values carried into it."""
    terms: dict[Symbol, float] = {}
    for symbol, factor in parts:
        if symbol.leaf or (symbol.born < row and len(symbol.terms) > 1):
            terms[symbol] = terms.get(symbol, 0.0) + factor
        else:
            for leaf, coefficient in _total(symbol.terms.items(), row).items():
                terms[leaf] = terms.get(leaf, 0.0) + factor * coefficient
    if 0.0 in terms.values():  # seldom, and rebuilding each would take a fifth of the whole time
        terms = {leaf: coefficient for leaf, coefficient in terms.items() if coefficient}
    return terms


@dataclass
class _Record:
    """What happened in one row."""

    call: Call
    x_in: Symbol
    latents: Symbol  # those of register 0 at its end
    blend: tuple[float, float] = (0.0, 0.0)


class Tracer:
    """The machine of run.py that computes nothing and remembers everything.

    Args:
      name: of the algorithm, for complaints.
    """

    def __init__(self, name: str) -> None:
        self.start = Symbol(-1, {}, "latents")
        self._name = name
        self._latents = self.start
        self._records: list[_Record] = []
        self._spans: dict[int, tuple[float, float]] = {}

    def evaluate(self, x_in: Symbol, call: Call) -> tuple[Symbol, Symbol]:
        self._records.append(_Record(call, x_in, self._latents))
        return Symbol(call.row, {}, "guided"), Symbol(call.row, {}, "unguided")

    def normal(self, row: int, span: tuple[float, float]) -> Symbol:
        self._spans[row] = span
        return Symbol(row, {}, "noise")

    def end_step(self, x: Symbol, row: int, blend: tuple[float, float]) -> Symbol:
        if x.row > row:
            raise ValueError(f"{self._name}: row {row} ends with the noise of the next; a row draws one noise")
        self._latents = Symbol(row, {x: 1.0}, "latents")
        self._records[row].latents = self._latents
        self._records[row].blend = blend
        return self._latents

    def rows(self, result: Symbol) -> Rows:
        """The table, in float64, of the algorithm that returned this result."""
        if result is not self._latents or result.born != len(self._records) - 1:
            raise ValueError(f"{self._name}: an algorithm must return the latents of its last end_step")
        count = len(self._records)
        inputs = np.zeros((count, REGISTERS + 1))
        update = np.zeros((count, REGISTERS, REGISTERS + 3))
        registers = {self.start: 0}
        for k, (record, live) in enumerate(zip(self._records, self._live(), strict=True)):
            for leaf, coefficient in record.x_in.expand(k).items():
                inputs[k, _column(leaf, k, registers)] = coefficient
            after = self._allot(k, live, registers)
            for value, register in after.items():
                for leaf, coefficient in _definition(value, k).items():
                    update[k, register, _column(leaf, k, registers)] = coefficient
            registers = after
        calls = [record.call for record in self._records]
        noisy = inputs[:, _COLUMNS["noise"]].astype(bool) | update[:, :, _COLUMNS["noise"]].any(1)
        return Rows(
            input=inputs,
            update=update,
            time=np.array([call.time for call in calls]),
            to_x0=np.array([call.to_x0 for call in calls]),
            blend=np.array([record.blend for record in self._records]),
            span=np.array([self._spans[k] if noisy[k] else (0.0, 0.0) for k in range(count)]),
            step=np.array([call.step for call in calls], np.int32),
            active=np.ones(count, bool),
        )

    def _live(self) -> list[list[Symbol]]:
        """The values that must outlive each row, the latents first: what later rows read, found from the end."""
        live: list[list[Symbol]] = []
        needed: dict[Symbol, None] = {}  # a set that keeps its order, so that equal runs give equal tables
        for k in reversed(range(len(self._records))):
            record = self._records[k]
            values = list({record.latents: None} | needed)
            live.append(values)
            read = [*record.x_in.expand(k), *(leaf for value in values for leaf in _definition(value, k))]
            needed = {leaf: None for leaf in read if leaf.born < k}
        return live[::-1]

    def _allot(self, k: int, live: list[Symbol], before: dict[Symbol, int]) -> dict[Symbol, int]:
        """A register for each value: 0 for the latents; the others stay where they are or take the lowest free one."""
        after = {live[0]: 0} | {value: before[value] for value in live[1:] if before.get(value)}
        free = [register for register in range(REGISTERS) if register not in after.values()]
        homeless = [value for value in live if value not in after]
        if len(homeless) > len(free):
            raise ValueError(
                f"{self._name}: row {k} must keep {len(live)} values for later, a table has {REGISTERS} registers"
            )
        return after | dict(zip(homeless, free, strict=False))


def _definition(value: Symbol, row: int) -> dict[Symbol, float]:
    """What a register must hold after this row, in terms of what the row knows."""
    if value.born < row or value.leaf in _COLUMNS:
        return {value: 1.0}
    return _total(value.terms.items(), row)


def _column(leaf: Symbol, row: int, registers: dict[Symbol, int]) -> int:
    return registers[leaf] if leaf.born < row else _COLUMNS[leaf.leaf or ""]
