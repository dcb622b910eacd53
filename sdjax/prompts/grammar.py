"""The grammar of prompts: texts in, texts out. No tokens, no arrays but one of step numbers.

The functions and the grammar's source are introduced in `sdjax.prompts`. Prompts come from strangers, so all passes are
loops, never recursions, over texts of any depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

MAX_VARIANTS = 64  # of a scheduled prompt; each is a text to encode

_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_OPENERS = {")": "(", "]": "["}

_DECIMAL = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_WEIGHT = re.compile(rf"\s*{_DECIMAL}\s*")
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\bBREAK\b")
# A bracket or separator; an escape; text.
_SCHEDULE = re.compile(r"[()\[\]:|]|\\.?|[^\\()\[\]:|]+", re.DOTALL)
# An escape, or a backslash before anything else, which vanishes; the weight that closes a bracket; a bracket; text.
_ATTENTION = re.compile(rf"\\[()\[\]\\]?|:\s*({_DECIMAL})\s*\)|[()\[\]]|[^\\()\[\]:]+|:")


class Weighted(NamedTuple):
    """A text and its weight: of attention, or under AND."""

    text: str
    weight: float


def split_and(text: str) -> tuple[Weighted, ...]:
    """The prompts that AND joins, each with the number after a colon at its end, or 1 (Liu et al. 2022).

    Unlike in the web UI, the number is read only where there is an AND: "a photo, 16:9" alone is a text.

    >>> split_and("a cat :1.2 AND a dog")
    (Weighted(text='a cat', weight=1.2), Weighted(text=' a dog', weight=1.0))
    """
    texts = _AND.split(text)
    if len(texts) == 1:
        return (Weighted(text, 1.0),)
    result = []
    for part in texts:
        head, colon, number = part.rpartition(":")
        weighted = colon and _WEIGHT.fullmatch(number)
        result.append(Weighted(head.rstrip(), float(number)) if weighted else Weighted(part.rstrip(), 1.0))
    return tuple(result)


def schedule(text: str, num_inference_steps: int) -> tuple[tuple[str, ...], np.ndarray]:
    r"""The different texts that a prompt is in the course of a run, and which of them each step uses.

    `[a:b:when]` is a for the first `when` steps, then b; `[b:when]` is nothing, then b; `[a::when]` is a, then nothing.
    A number with a point is a fraction of all steps, rounded down; another one counts steps. `[a|b|c]` takes turns at
    every step. They may be nested, also in brackets of attention, which like escapes are left for `parse_attention`;
    brackets inside must match. Anything else stays text, and so does a bracket around it.

    This is the web UI's table of steps, as its documentation describes it. Its sampling loop then looks up step i as
    i - 1 and so changes everything one step late (its issue 7279); we do not. There a `|` outside of an alternation, or
    a backslash at the end, turns off the whole prompt's schedule, and a stray `:` or bracket right behind a construct
    sometimes makes it text; here nothing but what is around a construct does.

    Returns:
      V texts in the order of their first use, and int32 (T,), T = num_inference_steps.

    Raises:
      ValueError: more than 64 variants.

    >>> schedule("a [cat:dog:1]", 3)
    (('a cat', 'a dog'), array([0, 1, 1], dtype=int32))
    """
    items = _parse_schedule(text, num_inference_steps)
    steps = np.zeros(num_inference_steps, np.int32)
    if all(isinstance(item, str) for item in items):
        return (text,), steps
    found: dict[str, int] = {}
    for i in range(num_inference_steps):
        steps[i] = found.setdefault(_text_at(items, i + 1), len(found))
        if len(found) > MAX_VARIANTS:
            raise ValueError(f"{text!r:.60} is more than {MAX_VARIANTS} different texts in {num_inference_steps} steps")
    return tuple(found), steps


@dataclass(frozen=True)
class _Edit:
    """`[before:after:last]`: `before` up to and with that step, counted from 1."""

    before: list[_Item]
    after: list[_Item]
    last: int

    def at(self, step: int) -> list[_Item]:
        return self.before if step <= self.last else self.after


@dataclass(frozen=True)
class _Alternation:
    """`[a|b|c]`."""

    options: list[list[_Item]]

    def at(self, step: int) -> list[_Item]:
        return self.options[(step - 1) % len(self.options)]


_Item = str | _Edit | _Alternation


@dataclass(frozen=True)
class _Bracket:
    """One that is open: which, and the places of it and of its separators among the items."""

    opener: str
    start: int
    colons: list[int]
    bars: list[int]


def _parse_schedule(text: str, steps: int) -> list[_Item]:
    """Texts and constructs, one after the other."""
    items: list[_Item] = []
    opened: list[_Bracket] = []
    for token in _SCHEDULE.findall(text):
        place = len(items)
        items.append(token)
        if token in _FACTORS:
            opened.append(_Bracket(token, place, [], []))
        elif not opened:
            continue
        elif token == ":":
            opened[-1].colons.append(place)
        elif token == "|":
            opened[-1].bars.append(place)
        elif token in _OPENERS:
            bracket = opened.pop()
            construct = _construct(items, bracket, steps) if bracket.opener == "[" else None
            most_colons = 1 if bracket.opener == "(" else 0  # of attention: `(a:1.3)`, `[a]`
            if bracket.opener != _OPENERS[token]:
                opened.clear()  # it closes nothing, so it is text, and what is around it has no meaning either
            elif construct is not None:
                items[bracket.start :] = [construct]
            elif len(bracket.colons) > most_colons:
                opened.clear()
    return items


def _construct(items: list[_Item], bracket: _Bracket, steps: int) -> _Item | None:
    """What a square bracket that ends with the items is; None if attention or text."""
    if not bracket.colons:
        if not bracket.bars:  # before anything is copied: brackets may lie in brackets, thousands deep
            return None
        return _Alternation(_between(items, [bracket.start, *bracket.bars, len(items) - 1]))
    *texts, when = _between(items, [bracket.start, *bracket.colons, len(items) - 1])
    number = _WHEN.fullmatch(when[0]) if len(when) == 1 and isinstance(when[0], str) else None
    if number is None or len(texts) > 2:
        return None
    last = float(number[1]) * (steps if "." in number[1] else 1)
    return _Edit(texts[0] if len(texts) == 2 else [], texts[-1], int(min(max(last, 0.0), steps)))


def _between(items: list[_Item], places: list[int]) -> list[list[_Item]]:
    return [items[left + 1 : right] for left, right in pairwise(places)]


def _text_at(items: list[_Item], step: int) -> str:
    """What they are at a step, counted from 1."""
    words: list[str] = []
    rest = items[::-1]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            words.append(item)
        else:
            rest.extend(reversed(item.at(step)))
    return "".join(words)


def parse_attention(text: str) -> tuple[tuple[Weighted, ...], ...]:
    r"""The parts of a text with their weights, in sections: BREAK begins a new one.

    `(a)` has weight 1.1, `(a:1.3)` 1.3 and `[a]` 1 / 1.1; nested ones multiply. A bracket that nobody closes reaches to
    the end, one that nobody opened is text. A backslash before one of `()[]\` makes it text, before anything else it
    vanishes. Neighbours of one weight are one part, so that words are not cut.

    Unlike in the web UI, BREAK works inside brackets too; and what is no number, `(a:1.2.3)`, is text, not an error.

    >>> parse_attention("a (cat:1.3) BREAK [[b]]")[0]
    (Weighted(text='a ', weight=1.0), Weighted(text='cat', weight=1.3), Weighted(text=' ', weight=1.0))
    """
    sections: list[list[tuple[list[str], float]]] = [[]]
    for piece, weight in _pieces(text):
        for i, part in enumerate([piece[1:]] if piece[0] == "\\" else _BREAK.split(piece)):
            if i > 0:
                sections.append([])
            parts = sections[-1]
            if parts and parts[-1][1] == weight:
                parts[-1][0].append(part)
            elif part:
                parts.append(([part], weight))
    return tuple(tuple(Weighted("".join(words), weight) for words, weight in parts) for parts in sections)


def _pieces(text: str) -> Iterator[tuple[str, float]]:
    """What is no bracket, escapes with their backslash, and the product of all brackets around it."""
    tokens = list(_ATTENTION.finditer(text))
    # Round and square brackets are matched independently: in `([a)b]` only the square one is around b.
    opened: dict[str, list[int]] = {"(": [], "[": []}
    factors: dict[int, float] = {}  # by the place of the opening bracket
    closing: set[int] = set()
    for i, token in enumerate(tokens):
        piece, number = token[0], token[1]
        opener = None if piece[0] == "\\" else _OPENERS.get(piece[-1])
        if piece in _FACTORS:
            opened[piece].append(i)
            factors[i] = _FACTORS[piece]
        elif opener and opened[opener]:
            start = opened[opener].pop()
            closing.add(i)
            if number:
                factors[start] = float(number)
    products = {"(": [1.0], "[": [1.0]}
    for i, token in enumerate(tokens):
        piece = token[0]
        if i in factors:
            products[piece].append(products[piece][-1] * factors[i])
        elif i in closing:
            products[_OPENERS[piece[-1]]].pop()
        else:
            yield piece, products["("][-1] * products["["][-1]
