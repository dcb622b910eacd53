"""The prompt language of the Stable Diffusion web UI: from texts to windows of token ids, weights, switching points.

A prompt is read in three passes, each a function of `sdjax.prompts.grammar`, in this order:

    a cat :1.2 AND a dog                    `split_and`        prompts that the picture is guided towards together
    a [cat:dog:0.5] in a [red|blue] hat     `schedule`         words that change from step to step
    a (cat:1.3) in [a hat] BREAK \\(b\\)      `parse_attention`  weights of words, new windows, escapes

The meaning is AUTOMATIC1111's (modules/prompt_parser.py, sd_hijack_clip.py; Forge's is the same), since prompts of
published pictures are written for it. What is no markup is text. Where we differ, the function says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdjax.prompts.grammar import MAX_VARIANTS, Weighted, parse_attention, schedule, split_and
from sdjax.tokenizer import CONTEXT_LENGTH, END_ID, MAX_WINDOWS, START_ID, WINDOW_TOKENS, Tokenizer

__all__ = [
    "LARGEST_WEIGHT", "MAX_PROMPTS", "MAX_VARIANTS", "Conditioning", "Weighted",
    "emphasize", "encode", "parse_attention", "schedule", "split_and", "windows",
]  # fmt: skip

MAX_PROMPTS = 16  # joined by AND; each is one more evaluation of the UNet per step
LARGEST_WEIGHT = 1e6  # far beyond use, and float32 is far from overflowing

_COMMA = 267  # the token of "," as a word of its own
_COMMA_REACH = 20  # how many tokens from a window's end its last comma may be for the window to end there


class Conditioning(NamedTuple):
    """A batch of prompts as arrays: B prompts, each of P under AND, of V variants, of N windows; T steps.

    Without AND and schedules, P and V are 1. They and N are shapes; all else is values. A program encodes all variants
    and weights them (`emphasize`); at step t it guides with

        unguided + scale * sum over P of composition * (output for variant variants[:, :, t] - unguided).
    """

    token_ids: np.ndarray  # (B, P, V, N, 77) int32
    weights: np.ndarray  # (B, P, V, N, 77) float32
    windows: np.ndarray  # (B, P, V, N) bool: which of them hold text; the first always counts
    variants: np.ndarray  # (B, P, T) int32: which variant each of the user's steps uses
    composition: np.ndarray  # (B, P) float32: the weights under AND, 0 where a prompt has fewer than P


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], negative_prompts: Sequence[str] | None, num_inference_steps: int
) -> tuple[Conditioning, Conditioning | None]:
    """Prompts and, where guidance wants them, negative prompts as arrays with one number of windows.

    A negative prompt may be scheduled; AND is a word in it, as in the web UI. The numbers of variants and windows are
    rounded up to powers of two, so that few programs are compiled.

    Args:
      prompts, negative_prompts: B texts each.
      num_inference_steps: T, the steps of the whole run: image-to-image begins in the middle of it.

    Raises:
      ValueError: a prompt needs more than 8 windows, 64 variants or 16 prompts under AND, has a weight beyond 1e6, or
        is not valid Unicode; naming it.
    """
    positive = [
        _read(f"prompt[{i}]", tokenizer, split_and(text), num_inference_steps) for i, text in enumerate(prompts)
    ]
    negative = [
        _read(f"negative_prompt[{i}]", tokenizer, (Weighted(text, 1.0),), num_inference_steps)
        for i, text in enumerate(negative_prompts or ())
    ]
    count = _bucket(max(len(ids) for read in positive + negative for one in read for ids, _ in one.variants))
    return _stack(tokenizer, positive, count), _stack(tokenizer, negative, count) if negative else None


def windows(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """A text without AND and schedules in windows of start, at most 75 tokens, end; and the weight of each token.

    A window that overflows ends after its last comma, if that is at most 20 tokens back, so that fewer phrases are cut.
    BREAK ends it anywhere. What fits one window and has no markup has the ids of `Tokenizer.windows`.

    Returns:
      ids (N, 77) int32, and weights (N, 77) float32, which are 1 for start, end and padding.

    Raises:
      ValueError: more than 8 windows, a weight beyond 1e6, or text that is not valid Unicode.
    """
    filled: list[list[tuple[int, float]]] = []
    for section in parse_attention(text):
        window: list[tuple[int, float]] = []
        comma = -math.inf  # the place of the window's last one
        for token, weight in _tokens(tokenizer, section):
            if len(window) == WINDOW_TOKENS:
                near = token != _COMMA and WINDOW_TOKENS - comma <= _COMMA_REACH
                end = int(comma) + 1 if near else WINDOW_TOKENS
                filled.append(window[:end])
                window, comma = window[end:], -math.inf
            if token == _COMMA:
                comma = len(window)
            window.append((token, weight))
        filled.append(window)
    if len(filled) > 1 and not filled[-1]:
        filled.pop()  # a BREAK at the very end begins nothing
    if len(filled) > MAX_WINDOWS:
        raise ValueError(
            f"{text!r:.60} has {sum(map(len, filled))} tokens and needs {len(filled)} windows of {WINDOW_TOKENS}; "
            f"at most {MAX_WINDOWS} are taken, so shorten it"
        )
    ids, weights = _empty(tokenizer, len(filled))
    for i, window in enumerate(filled):
        ids[i, 1 : len(window) + 2] = [*(token for token, _ in window), END_ID]
        weights[i, 1 : len(window) + 1] = [weight for _, weight in window]
    return ids, weights


def emphasize(states: Any, weights: Any) -> Any:
    """The text encoder's states of windows times their tokens' weights, brought back to the mean that they had.

    The web UI takes the mean over all prompts of its batch. Here it is each window's own, which is the same for one
    prompt, and a picture does not depend on its neighbours. Weights of 1 change nothing.

    Args:
      states: (..., 77, D), NumPy's or JAX's; computed with in float32.
      weights: (..., 77) float32.

    Returns:
      (..., 77, D) in the states' dtype.
    """
    z = states.astype(np.float32)
    weighted = z * weights[..., None]
    before, after = (x.mean((-2, -1), keepdims=True) for x in (z, weighted))
    none = (after == 0).astype(np.float32)  # no mean to bring back: the factor is 1
    factor = (before * (1 - none) + none) / (after + none)
    # A compiler may sum the two means in different orders: where no word has a weight, the factor is exactly 1.
    plain = (weights == 1).all(-1)[..., None, None].astype(np.float32)
    return (weighted * (factor * (1 - plain) + plain)).astype(states.dtype)


def _tokens(tokenizer: Tokenizer, section: Sequence[Weighted]) -> Iterator[tuple[int, float]]:
    for text, weight in section:
        _check_weight(text, weight)
        for token in tokenizer.encode(text):
            yield token, weight


def _check_weight(text: str, weight: float) -> None:
    if not abs(weight) <= LARGEST_WEIGHT:  # so that nan is refused too
        raise ValueError(f"{text!r:.60} has the weight {weight:g}; at most {LARGEST_WEIGHT:g} is taken")


class _Read(NamedTuple):
    """One of the prompts under AND."""

    weight: float
    variants: list[tuple[np.ndarray, np.ndarray]]  # ids and weights, (N, 77) each
    steps: np.ndarray  # (T,): which variant


def _read(name: str, tokenizer: Tokenizer, composed: Sequence[Weighted], num_inference_steps: int) -> list[_Read]:
    try:
        if len(composed) > MAX_PROMPTS:
            raise ValueError(f"AND joins {len(composed)} prompts; at most {MAX_PROMPTS} are taken")
        result = []
        for text, weight in composed:
            _check_weight(text, weight)
            variants, steps = schedule(text, num_inference_steps)
            result.append(_Read(weight, [windows(tokenizer, variant) for variant in variants], steps))
        return result
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _stack(tokenizer: Tokenizer, batch: list[list[_Read]], n: int) -> Conditioning:
    """Prompts as `n` windows each, filled up with empty windows, empty variants, and prompts of weight 0."""
    b, p = len(batch), max(map(len, batch))
    v = _bucket(max(len(one.variants) for read in batch for one in read))
    ids, weights = (np.broadcast_to(empty, (b, p, v, n, CONTEXT_LENGTH)).copy() for empty in _empty(tokenizer, 1))
    held = np.zeros((b, p, v, n), bool)
    held[..., 0] = True
    variants = np.zeros((b, p, len(batch[0][0].steps)), np.int32)
    composition = np.zeros((b, p), np.float32)
    for i, read in enumerate(batch):
        for j, one in enumerate(read):
            variants[i, j], composition[i, j] = one.steps, one.weight
            for k, (its_ids, its_weights) in enumerate(one.variants):
                count = len(its_ids)
                ids[i, j, k, :count], weights[i, j, k, :count], held[i, j, k, :count] = its_ids, its_weights, True
    return Conditioning(ids, weights, held, variants, composition)


def _empty(tokenizer: Tokenizer, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights of `n` windows without text."""
    ids = np.full((n, CONTEXT_LENGTH), tokenizer.padding_id, np.int32)
    ids[:, :2] = START_ID, END_ID
    return ids, np.ones((n, CONTEXT_LENGTH), np.float32)


def _bucket(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
