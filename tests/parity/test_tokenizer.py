# ruff: noqa: RUF001 - look-alike characters are what is tested
"""Token ids against `transformers.CLIPTokenizer`, on what people and machines put into prompts."""

import gzip
import html
import itertools
import random
import unicodedata
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.tokenizer import CONTEXT_LENGTH, Tokenizer

tokenizer = Tokenizer()

# fmt: off
PIECES = [
    "a cat", "A CAT", "resume", "résumé", "re\u0301sume\u0301", "A\u030angstro\u0308m",
    "İstanbul", "ıI", "straße STRASSE", "ǅ ǆ", "ﬁne ﬂuﬀ",
    "You should've", "we'll've", "I'M", "it's 'S", "d'you",
    "O'Neil’s", "'ll 11p223RF☆ho!!to?", "rock'n'roll", "'''t",
    "&amp;", "&amp;amp;", "&#128512;", "&lt;|endoftext|&gt;", "<b>bold</b>",
    "&nbsp;", "“curly” ‘quotes’", "ＦＵＬＬ",
    "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<| endoftext |>",
    "a<|endoftext|>b", "<|endoftext|", "<|pad|>",
    "😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇯🇵", "❤️❤",
    "1️⃣", "☃︎☃️", "🧑🏿‍🚀x", "\U0001fae8", "🏴\U000e0067\U000e0062\U000e007f",
    "日本語のテキスト", "中文，测试。", "한국어 텍스트", "\u1112\u1161\u11ab", "ｶﾀｶﾅ",
    "か\u3099", "𠮷野家", "〱々〆",
    "مرحبا بالعالم", "שָׁלוֹם", "שלום\u200f abc", "\u202eevil\u202c", "नमस्ते", "ไทยไม่เว้นวรรค",
    "ქართული", "ᏣᎳᎩ", "Ꮳꭳ", "ΣΊΣΥΦΟΣ ς",
    "a\x00b", "\x00", "\x01\x02\x1f", "\x7f\x80\x9f", "\ufeffa", "\ufffd",
    "\uffff", "\U0010ffff", "\ue000", "\u00ad-\u00ad",
    "a\tb\nc\r\nd", "\v\f", "\x1c\x1d\x1e\x1f", "\u0085", "\u00a0\u2003\u3000",
    "\u200b\u2060", "\u2028\u2029", "\u180e", "   a",
    "3.14159", "1,000,000", "½ ² ⅷ ٣ ௩ ১২", "1e-5", "0x1F",
    "2girls, 1boy", "(masterpiece:1.2), [bad]", "a_b-c/d\\e", "#x@y",
    "e" + "\u0301" * 40, "z̷̢̛a̸͝l̶g̴o̵", "q\u0323\u0307", "q\u0307\u0323", "\u0344",
    "\u212b", "\u1e9b\u0323", "\U0001d54f𝕏", "ſ K",
    "https://example.com/?q=a+b&c=%20", "user@example.com", "C:\\Users\\x", "f(x) = ∑ᵢ xᵢ²", "…—–‐",
    "¿¡«»", "™®©℠", "$€£¥₿",
]  # NFC and NFD, joined and plain emoji, five scripts without spaces, controls, every kind of white space
# fmt: on


def composed(rng: random.Random, n: int) -> list[str]:
    """Pieces glued in all the ways that change where words end."""
    forms = [str, str.upper, str.title, str.swapcase, html.escape]
    forms += [lambda text, form=form: unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    glue = ["", " ", "  ", ", ", "\n", "\u3000", "\u200d", "'", "'s ", "1", "a", "\u0301", "<|endoftext|>", "\x00"]
    return [
        rng.choice(glue).join(rng.choice(forms)(rng.choice(PIECES)) for _ in range(rng.randint(1, 6))) for _ in range(n)
    ]


def random_unicode(rng: random.Random, n: int) -> list[str]:
    """Strings over one or two neighbourhoods of Unicode each, surrogates left out, as no valid text has them."""
    texts = []
    for _ in range(n):
        starts = [rng.choice([rng.randrange(0x250), rng.randrange(0x3000), rng.randrange(0x110000)]) for _ in range(2)]
        points = [min(rng.choice(starts) + rng.randrange(64), 0x10FFFF) for _ in range(rng.randint(1, 30))]
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    return texts


def long_prompts(rng: random.Random) -> list[str]:
    words = ["a", "cat", "naïve", "日本", "🦊", "'s", "12", "photorealistic", "<|endoftext|>", "…"]
    texts = [character * 10_000 for character in ("a", "é", "字", "😀", " ", "\x00", "'", "7", "\u0301")]
    return texts + [" ".join(rng.choices(words, k=3000))[:10_000] for _ in range(5)]


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    packed = resources.files("sdjax.tokenizer").joinpath("merges.txt.gz").read_bytes()
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().split("\n")[1:-1]]
    alphabet = list(bytes_to_unicode().values())
    tokens = itertools.chain(alphabet, (c + "</w>" for c in alphabet), map("".join, merges))
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    # Under its old names (vocab_file=, merges_file=) it takes no vocabulary, and says nothing.
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def encode(reference, text: str) -> list[int]:
    return reference(text, add_special_tokens=False, verbose=False).input_ids


def test_ids_of_hard_strings(reference):
    rng = random.Random(0)
    texts = [*PIECES, *composed(rng, 2500), *random_unicode(rng, 2500), *long_prompts(rng)]
    assert len(set(texts)) > 4000
    different = [text for text in texts if tokenizer.encode(text) != encode(reference, text)]
    assert different == []


def test_every_entry_of_the_vocabulary_is_the_same(reference):
    from sdjax.tokenizer import _bpe

    assert _bpe().get_vocab() == reference.get_vocab()


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_ids_of_generated_text(reference, text):
    assert tokenizer.encode(text) == encode(reference, text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_windows_of_generated_batches(reference, texts):
    fitting = [text for text in texts if tokenizer.count(text) <= 75] or [""]
    expected = reference(fitting, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="np").input_ids
    assert (tokenizer(fitting) == expected).all()
