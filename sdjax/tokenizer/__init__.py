"""CLIP's byte-pair encoding (Sennrich et al. 2016; Radford et al. 2021): text to windows of token ids.

Ids are those of `transformers.CLIPTokenizer`, which users of published checkpoints get today: Unicode NFC, white space
folded, lower case, and the texts "<|startoftext|>" and "<|endoftext|>" read as the tokens they name. OpenAI's original
code also repaired broken Unicode (ftfy) and unescaped HTML; that is left out here as it is there.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

START_ID = 49406  # "<|startoftext|>"
END_ID = 49407  # "<|endoftext|>"
CONTEXT_LENGTH = 77
WINDOW_TOKENS = CONTEXT_LENGTH - 2  # tokens of text between a window's start and end
MAX_WINDOWS = 8

# What a word is: contractions, runs of letters, single digits, runs of anything else that is no space.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Tokenizer:
    """Texts to int32 token ids, in windows of 77: start, at most 75 tokens of text, end, and padding.

    It does not hold the vocabulary, which is read once per process, at the first text, and is never changed; so
    instances are free to make, compare, pickle and share between threads.

    Attributes:
        padding_id: the end token again in OpenAI's CLIP and Stable Diffusion 1, 0 in OpenCLIP and Stable Diffusion 2.
        words: of textual inversions, in any case, each with the ids it stands for. They are found before all else,
            where no letter, digit or underscore goes on before or after them.
    """

    padding_id: int = END_ID
    words: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """One window per text: int32 (B, 77). Raises ValueError for a text of more than 75 tokens."""
        rows = []
        for name, text in _named(texts):
            ids = self.encode(text)
            if len(ids) > WINDOW_TOKENS:
                raise ValueError(
                    f"{name}: {_shown(text)} has {len(ids)} tokens, one window holds {WINDOW_TOKENS}; "
                    f"shorten it, or encode it in several windows with Tokenizer.windows"
                )
            rows.append(self._window(ids))
        return np.array(rows, np.int32)

    def windows(self, texts: str | Sequence[str], count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As many windows per text as its tokens need, and empty windows up to a common number; nothing is cut off.

        Args:
            texts: one text or several (B).
            count: the number of windows N, 1 to 8; None takes what the longest text needs.

        Returns:
            ids, int32 (B, N, 77), and whether each window holds text (the first one always counts), bool (B, N).

        Raises:
            ValueError: a text needs more than `count` windows, or more than 8 (600 tokens).
        """
        if count is not None and count not in range(1, MAX_WINDOWS + 1):
            raise ValueError(f"count: expected 1 to {MAX_WINDOWS} windows, got {count}")
        named = _named(texts)
        encoded = [self.encode(text) for _, text in named]
        needed = [_windows_for(len(ids)) for ids in encoded]
        limit = MAX_WINDOWS if count is None else count
        for (name, text), ids, n in zip(named, encoded, needed, strict=True):
            if n > limit:
                raise ValueError(
                    f"{name}: {_shown(text)} has {len(ids)} tokens and needs {n} windows of {WINDOW_TOKENS}; "
                    f"at most {limit} ({limit * WINDOW_TOKENS} tokens) are taken, so shorten it"
                )
        total = count or max(needed)
        starts = range(0, total * WINDOW_TOKENS, WINDOW_TOKENS)
        windows = [[self._window(ids[start : start + WINDOW_TOKENS]) for start in starts] for ids in encoded]
        return np.array(windows, np.int32), np.arange(total) < np.array(needed)[:, None]

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone, however many, without start, end or padding."""
        _check("text", text)
        parts = _words_in(self.words).split(str(text)) if self.words else [str(text)]
        ids: list[int] = []
        known = {word.casefold(): word_ids for word, word_ids in self.words}
        for i, part in enumerate(parts):  # every second one is a word
            own = known.get(part.casefold()) if i % 2 else None  # two letters may differ in case for one alone
            ids += _bpe().encode(part, add_special_tokens=False).ids if own is None else own
        return ids

    def count(self, text: str) -> int:
        """The number of tokens of the text, without start and end."""
        return len(self.encode(text))

    def _window(self, ids: list[int]) -> list[int]:
        return [START_ID, *ids, END_ID, *[self.padding_id] * (WINDOW_TOKENS - len(ids))]


def _windows_for(tokens: int) -> int:
    return max(1, -(-tokens // WINDOW_TOKENS))


def _named(texts: str | Sequence[str]) -> list[tuple[str, str]]:
    """Every text with what to call it in an error."""
    if isinstance(texts, str):
        return [("text", texts)]
    if isinstance(texts, bytes) or not isinstance(texts, Sequence):
        raise ValueError(f"texts: expected a str or a sequence of str, got {type(texts).__name__}: {_shown(texts)}")
    if not texts:
        raise ValueError("texts: expected at least one text, got an empty sequence")
    named = [(f"texts[{i}]", text) for i, text in enumerate(texts)]
    for name, text in named:
        _check(name, text)
    return named


def _check(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected a str, got {type(text).__name__}: {_shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {_shown(text)} is not valid Unicode: {error}") from error


def _shown(value: object) -> str:
    """The value's repr, short enough for an error message."""
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 70 else text[:66] + " ..."


@functools.cache
def _words_in(words: tuple[tuple[str, tuple[int, ...]], ...]) -> re.Pattern[str]:
    longest_first = sorted((word for word, _ in words), key=len, reverse=True)
    return re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def vocabulary_files() -> dict[str, str]:
    """What `transformers.CLIPTokenizer` reads, by the names of its files."""
    packed = resources.files(__package__).joinpath("merges.txt.gz").read_bytes()
    vocabulary = sorted(_bpe().get_vocab().items(), key=lambda item: item[1])
    return {"vocab.json": json.dumps(dict(vocabulary)), "merges.txt": gzip.decompress(packed).decode()}


@functools.cache
def _bpe() -> tokenizers.Tokenizer:
    packed = resources.files(__package__).joinpath("merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()[1:]  # the first is a version
    merges = [(left, right) for left, right in map(str.split, lines)]
    # Ids follow from the merges: the 256 bytes, the same at a word's end, the merges in order, start, end. A byte is
    # written as a printable character: itself in the ranges below, else the next one from U+0100 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [*map(chr, printable), *map(chr, range(256, 512 - len(printable)))]
    entries = [*characters, *(c + "</w>" for c in characters), *(left + right for left, right in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}

    model = models.BPE(vocabulary, merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>")
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return bpe
