"""Make sdjax/tokenizer/merges.txt.gz and NOTICE from the wheel that carries OpenAI's published vocabulary.

    pip download --no-deps clip-anytorch==2.6.0
    python scripts/make_vocabulary.py clip_anytorch-2.6.0-py3-none-any.whl

The published file holds 262,144 merges, of which CLIP uses the first 48,894. What is kept of it, with the header line
that OpenAI's own model repositories have, is their `merges.txt` byte for byte: MERGES_SHA256 is the hash that the
manifests of openai/clip-vit-large-patch14 and of the Stable Diffusion repositories list.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "sdjax" / "tokenizer"
SOURCE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES_SHA256 = "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"
NUM_MERGES = 48_894  # 49,408 entries, less 2 × 256 bytes, less the start and end tokens

NOTICE = """\
merges.txt.gz is the byte-pair vocabulary of CLIP, published by OpenAI in https://github.com/openai/CLIP
(clip/bpe_simple_vocab_16e6.txt.gz), cut to the merges that the model uses. Its licence:

"""


def verify(data: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SystemExit(f"{what}: sha256 is {found}, expected {sha256}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="clip_anytorch-2.6.0-py3-none-any.whl")
    with zipfile.ZipFile(parser.parse_args().wheel) as wheel:
        published = wheel.read("clip/bpe_simple_vocab_16e6.txt.gz")
        licence = wheel.read("clip_anytorch-2.6.0.dist-info/LICENSE").decode()
    verify(published, SOURCE_SHA256, "clip/bpe_simple_vocab_16e6.txt.gz")

    lines = gzip.decompress(published).decode().split("\n")[1 : 1 + NUM_MERGES]
    merges = "\n".join(["#version: 0.2", *lines, ""]).encode()
    verify(merges, MERGES_SHA256, "merges.txt")

    PACKAGE.joinpath("merges.txt.gz").write_bytes(gzip.compress(merges, compresslevel=9, mtime=0))
    PACKAGE.joinpath("NOTICE").write_text(NOTICE + licence)


if __name__ == "__main__":
    main()
