"""The CLIP tokenizer's windows and its refusals. That the ids are right is tests/parity/test_tokenizer.py's matter."""

import gzip
import hashlib
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import numpy as np
import pytest

from sdjax.tokenizer import CONTEXT_LENGTH, END_ID, MAX_WINDOWS, START_ID, WINDOW_TOKENS, Tokenizer

tokenizer = Tokenizer()
A = 320  # the id of "a"


def test_vocabulary_is_the_published_file():
    # The hash that the manifests of openai/clip-vit-large-patch14 list for merges.txt.
    merges = gzip.decompress(resources.files("sdjax.tokenizer").joinpath("merges.txt.gz").read_bytes())
    assert hashlib.sha256(merges).hexdigest() == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"
    assert "Copyright (c) 2021 OpenAI" in resources.files("sdjax.tokenizer").joinpath("NOTICE").read_text()


@pytest.mark.parametrize(
    ("text", "ids"),
    [  # as OpenAI's CLIP and the model cards print them; the last two are transformers#19118 and the special tokens
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("a diagram", [320, 22697]),
        ("hello world!", [3306, 1002, 256]),
        ("", []),
        ("a<|endoftext|>a", [320, END_ID, 320]),
    ],
)
def test_known_ids(text, ids):
    assert tokenizer.encode(text) == ids
    assert tokenizer.count(text) == len(ids)
    row = tokenizer(text)
    assert row.dtype == np.int32
    np.testing.assert_array_equal(row, [[START_ID, *ids, *[END_ID] * (CONTEXT_LENGTH - 1 - len(ids))]])


def test_other_padding_comes_after_the_end():
    """OpenCLIP's zeros, which transformers' tokenizer of Stable Diffusion 2 fills up with too."""
    row = Tokenizer(padding_id=0)("a cat")[0]
    np.testing.assert_array_equal(row, [START_ID, 320, 2368, END_ID, *[0] * (CONTEXT_LENGTH - 4)])


def test_a_batch_is_its_texts():
    texts = ["a cat", "", "Ünïcode 日本語 🦊", "a " * WINDOW_TOKENS]
    batch = tokenizer(texts)
    assert batch.shape == (4, CONTEXT_LENGTH)
    assert batch.max() < 49408
    for text, row in zip(texts, batch, strict=True):
        np.testing.assert_array_equal(tokenizer(text)[0], row)
    np.testing.assert_array_equal(tokenizer(tuple(texts)), batch)
    np.testing.assert_array_equal(tokenizer([np.str_(text) for text in texts]), batch)
    assert batch[3, -1] == END_ID  # a full window still ends


def test_one_window_refuses_what_it_cannot_hold():
    with pytest.raises(
        ValueError, match=r"texts\[1\]: 'a a a .* has 76 tokens, one window holds 75; .*windows"
    ) as error:
        tokenizer(["a cat", "a " * 76])
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("tokens", [0, 1, 74, 75, 76, 149, 150, 151, 599, 600])
def test_windows_lose_nothing(tokens):
    text = " ".join(["a", "fox"] * 300)[: 2 * tokens + 2 * (tokens // 2)]
    ids, real = tokenizer.windows([text, ""])
    needed = max(1, int(np.ceil(tokens / 75)))
    assert tokenizer.count(text) == tokens
    assert ids.shape == (2, needed, CONTEXT_LENGTH)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(real, [[True] * needed, [True] + [False] * (needed - 1)])
    np.testing.assert_array_equal(ids[..., 0], START_ID)
    np.testing.assert_array_equal(ids[..., -1], END_ID)
    np.testing.assert_array_equal(ids[0, :, 1:-1].ravel()[:tokens], tokenizer.encode(text))
    np.testing.assert_array_equal(ids[0, :, 1:-1].ravel()[tokens:], END_ID)
    np.testing.assert_array_equal(ids[1], np.broadcast_to(tokenizer(""), (needed, CONTEXT_LENGTH)))


def test_windows_up_to_a_given_count():
    ids, real = tokenizer.windows("a " * 76, count=4)
    np.testing.assert_array_equal(real, [[True, True, False, False]])
    np.testing.assert_array_equal(ids[0, 1], tokenizer("a")[0])
    np.testing.assert_array_equal(ids[0, 2:], np.repeat(tokenizer(""), 2, axis=0))
    single, _ = tokenizer.windows("a cat", count=1)
    np.testing.assert_array_equal(single[:, 0], tokenizer("a cat"))


def test_too_many_windows_are_refused():
    with pytest.raises(
        ValueError, match=r"text: .* has 601 tokens and needs 9 windows of 75; at most 8 \(600 tokens\)"
    ):
        tokenizer.windows("a " * 601)
    with pytest.raises(ValueError, match=r"texts\[1\]: .* has 76 tokens and needs 2 windows of 75; at most 1 \(75"):
        tokenizer.windows(["a", "a " * 76], count=1)
    for count in (0, -1, MAX_WINDOWS + 1, 2.5, "2"):
        with pytest.raises(ValueError, match="count: expected 1 to 8 windows, got"):
            tokenizer.windows("a", count=count)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts: expected a str or a sequence of str, got NoneType: None"),
        (7, "texts: expected a str or a sequence of str, got int: 7"),
        (b"a cat", "texts: expected a str or a sequence of str, got bytes: b'a cat'"),
        ([], "texts: expected at least one text"),
        (["a", None], r"texts\[1\]: expected a str, got NoneType: None"),
        (["a", ["b"]], r"texts\[1\]: expected a str, got list: \['b'\]"),
        ("a \ud800", r"text: 'a \\ud800' is not valid Unicode"),
        (["a", "\udfff"], r"texts\[1\]: '\\udfff' is not valid Unicode"),
    ],
)
def test_what_is_no_text_is_named(texts, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(texts)
    with pytest.raises(ValueError, match=message):
        tokenizer.windows(texts)


def test_encode_refuses_what_is_no_text():
    with pytest.raises(ValueError, match="text: expected a str, got int: 3"):
        tokenizer.encode(3)


def test_instances_are_values():
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer == Tokenizer()
    with pytest.raises(AttributeError):
        tokenizer.vocabulary = {}


def test_threads_share_it():
    texts = [f"{word} number {i}" for i in range(200) for word in ("zebra", "naïve café", "🦊🦊", "日本")]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(Tokenizer().encode, texts, chunksize=1)) == expected


def test_import_reads_no_vocabulary_and_needs_no_transformers():
    code = (
        "import sys, sdjax.tokenizer as t\n"
        "assert t._bpe.cache_info().currsize == 0\n"
        "t.Tokenizer()\n"
        "assert t._bpe.cache_info().currsize == 0\n"
        "t.Tokenizer()('a cat')\n"
        "assert t._bpe.cache_info().currsize == 1\n"
        "assert not {'transformers', 'torch', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
