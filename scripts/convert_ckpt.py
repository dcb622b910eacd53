"""Writes any checkpoint that sdjax reads as one native file, which loads at once.

python scripts/convert_ckpt.py v1-5-pruned.ckpt v1-5.safetensors --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdjax import checkpoints, pipeline


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .ckpt or .safetensors file, or a diffusers folder")
    parser.add_argument("target", type=Path, help="the .safetensors file to write; it is replaced if it exists")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="take the averaged weights, or not, where a checkpoint has both (default: the averaged ones)",
    )
    parser.add_argument("--dtype", choices=checkpoints.DTYPES, help="round the weights to this (default: keep theirs)")
    arguments = parser.parse_args()
    try:
        checkpoints.convert(
            arguments.source, arguments.target, pipeline.shapes, ema=arguments.ema, dtype=arguments.dtype
        )
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
