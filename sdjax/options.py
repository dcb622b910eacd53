"""The options of the `sdjax` command: names, ranges, help. Nothing here needs JAX, so that `--help` is quick."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import sdjax

DTYPES = ("float32", "bfloat16")
LAYOUTS = ("native", "diffusers", "ldm")
PREDICTIONS = ("epsilon", "v", "sample")
LARGEST_SEED = 2**64 - 1

EXAMPLES = """\
examples:
  sdjax generate "a 3d emoji of a fox on a blue background"
  sdjax generate "a castle at dawn" --model v1-5-pruned-emaonly.safetensors --steps 30 --cfg 7 --seed 1 -o castle.png
  sdjax generate "a castle in winter" --model v1-5-pruned-emaonly.safetensors --image castle.png --strength 0.6
  sdjax generate --from castle.png --model v1-5-pruned-emaonly.safetensors
  sdjax info castle.png

sdjax COMMAND --help tells more.
"""
CONVERT_EXAMPLES = """\
examples:
  sdjax convert v1-5-pruned.ckpt v1-5.safetensors --dtype bfloat16
  sdjax convert v1-5-pruned.ckpt v1-5 --layout diffusers
"""

GENERATE_EXAMPLES = """\
examples:
  sdjax generate "a red fox" "a blue whale" --seed 1      two pictures, named after prompt and seed
  sdjax generate "a red fox" --images-per-prompt 8 -o "fox-{i:02}.png"
  sdjax generate --prompts-file prompts.txt -o pictures/
  sdjax generate "a dog" --image street.jpg --mask-image mask.png
  sdjax generate --from fox.png                           the same picture again
  sdjax generate --from fox.png --cfg 4                   the same but for one thing

Every PNG carries its recipe; `sdjax info fox.png` shows it. What is written is named on standard output.
"""


COMPILE_NOTES = """\
A program is made for the kind of model, the size, the batch, prompts up to 75 tokens or of more, a sampler's table of
up to 64, 256, 1024 or 4096 rows, and for what is switched on: guidance and its kinds, pictures, masks, ControlNets,
LoRAs. Texts, seeds, weights and numbers are nothing to it. Two are made: with a bar, and for where there is no
terminal.
"""


class Parser(argparse.ArgumentParser):
    """One style for all; no abbreviations, which a new option would make ambiguous."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)


class _Version(argparse.Action):
    """JAX's version without importing it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version  # slow

        print(f"sdjax {sdjax.__version__} (jax {version('jax')}, jaxlib {version('jaxlib')})")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The whole command line. What it returns has `command`, and for "generate" the names of its arguments."""
    main = Parser(prog="sdjax", description="Stable Diffusion in JAX: pictures from text.", epilog=EXAMPLES)
    main.add_argument("--version", action=_Version, nargs=0, help="show the versions of sdjax and JAX")
    commands = main.add_subparsers(title="commands", required=True, metavar="COMMAND")
    generate = commands.add_parser(
        "generate",
        usage="%(prog)s PROMPT ... [options]",
        description="Makes pictures of what the prompts say.",
        epilog=GENERATE_EXAMPLES,
        help="make pictures",
    )
    generate.set_defaults(command="generate")
    what = _add_what(generate)
    what.add_argument("--seed", type=_number(int, 0, LARGEST_SEED), help="picture i gets SEED + i (default: random)")
    again = "make this picture again; other options change its recipe"
    what.add_argument("--from", dest="source", metavar="PNG", help=again)
    _add_how(generate)
    _add_output(generate)

    ahead = commands.add_parser(
        "compile",
        usage="%(prog)s [PROMPT ...] [options]",
        description="Compiles what `sdjax generate` would run with these options, so that it starts at once.",
        epilog=COMPILE_NOTES,
        help="compile programs ahead of time",
    )
    ahead.set_defaults(command="compile", source=None, seed=0, no_progress=True)
    _add_what(ahead)
    _add_how(ahead)
    weights = (
        "also keep the transformed weights, for a quick start on a CPU (of SD 1.5: 2 GB in bfloat16, 5 in float32)"
    )
    ahead.add_argument("--weights", action="store_true", help=weights)

    convert = commands.add_parser(
        "convert",
        description="Writes any checkpoint that sdjax reads as one native file, which loads at once, or for others.",
        epilog=CONVERT_EXAMPLES,
        help="write a checkpoint in another format",
    )
    convert.set_defaults(command="convert")
    add = convert.add_argument
    add("source", metavar="SOURCE", help="a .ckpt or .safetensors file, or a diffusers folder")
    add("target", metavar="TARGET", help="the .safetensors file to write, or diffusers' folder")
    layout = "native: ours; diffusers: a folder; ldm: the original's single file (default: native)"
    add("--layout", choices=LAYOUTS, default="native", help=layout)
    ema = "take the averaged weights, or not, where there are both (default: the averaged ones)"
    add("--ema", action=argparse.BooleanOptionalAction, help=ema)
    prediction = "what the UNet returns, where the checkpoint does not say it or is wrong"
    add("--prediction", choices=PREDICTIONS, help=prediction)
    add("--dtype", choices=DTYPES, help="round the weights to it (default: keep theirs)")
    digest = "write the source's SHA-256 into the metadata (default: yes)"
    add("--hash-source", action=argparse.BooleanOptionalAction, default=True, help=digest)
    add("--overwrite", action="store_true", help="replace TARGET if it exists")

    says = "Says what a file is: a PNG's recipe, or the model in a checkpoint."
    info = commands.add_parser("info", description=says, help="say what a file is")
    info.set_defaults(command="info")
    info.add_argument("file", metavar="FILE", help="a picture or a checkpoint")
    info.add_argument("--json", action="store_true", help="as JSON")

    cache = commands.add_parser(
        "cache",
        description="Compiled programs are kept on disk and used again, and beside them what `sdjax compile --weights`"
        "\nkeeps. This shows where, and how big they are.",
        epilog="environment:\n  SDJAX_CACHE       another folder, or: off\n"
        "  SDJAX_CACHE_GIB   the largest size of the programs (4)\n",
        help="show or empty the cache of compiled programs",
    )
    cache.set_defaults(command="cache")
    cache.add_argument("--clear", action="store_true", help="delete them")
    return main


def _add_what(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("what to make")
    add = group.add_argument
    whole = _number(int, 1)
    pixels: dict[str, Any] = {"type": _number(int, 1), "metavar": "PIXELS"}
    add("prompts", metavar="PROMPT", nargs="*", help="a text, in quotes; several make several pictures")
    add("--prompts-file", metavar="FILE", help="texts, one a line; - is standard input")
    add("--negative-prompt", metavar="TEXT", help="what to keep away from")
    add("--images-per-prompt", metavar="N", type=whole, default=1, help="pictures of each prompt (default: 1)")
    add(
        "--height",
        **pixels,
        help="a multiple of 8, with the model that ships of 4 (default: the model's, or the image's)",
    )
    add("--width", **pixels, help="likewise")

    add = parser.add_argument_group("from a picture").add_argument
    add("--image", metavar="FILE", help="the picture to start from")
    add("--mask-image", metavar="FILE", help="white is repainted, black is kept")
    strength = "how much is changed, up to 1 (default: 0.8, with a mask 1)"
    add("--strength", metavar="X", type=_number(float, 1e-9, 1), help=strength)
    exact = "run --steps steps whatever the strength, as the end of a longer run"
    add("--exact-steps", action=argparse.BooleanOptionalAction, help=exact)
    add("--mask-blur", type=_number(float, 0), metavar="PIXELS", help="soften the mask's edge (default: 0)")
    crop = "work at the full size on the masked part only, with so much around it"
    add("--padding-mask-crop", type=_number(int, 0), metavar="PIXELS", help=crop)
    return group


def _add_how(parser: argparse.ArgumentParser) -> None:
    whole = _number(int, 1)
    add = parser.add_argument_group("how").add_argument
    add("--model", metavar="PATH", help="a checkpoint: file, folder or name on the hub (default: the model that ships)")
    add("--vae", metavar="PATH", help="another autoencoder for the model: file or folder")
    lora = "a LoRA for this model, and how strong it is (default: 1); may be repeated"
    add("--lora", type=_file_and_weight, action="append", default=[], metavar="FILE[:X]", help=lora)
    embedding = "a textual inversion for this model, a word for prompts, called as the file is; may be repeated"
    add("--embedding", action="append", default=[], metavar="FILE", help=embedding)
    steps: dict[str, Any] = {"dest": "num_inference_steps", "type": whole, "metavar": "N"}
    add("--steps", "--num-inference-steps", **steps, help="of the sampler (default: 50)")
    scale = "how closely to follow the prompt; one, or one per step as X,X,X (default: 7.5)"
    add("--guidance-scale", "--cfg", type=_scales, metavar="X", help=scale)
    add("--guidance-rescale", type=_number(float, 0, 1), metavar="X", help="tame strong guidance, 0 to 1 (default: 0)")
    interval: dict[str, Any] = {"type": _interval, "metavar": "START,STOP"}
    add("--guidance-interval", **interval, help="guide only in this share of the steps, such as 0.1,0.8")
    threshold: dict[str, Any] = {"type": _number(float, 1e-3), "metavar": "X"}
    add("--guidance-threshold", **threshold, help="keep the predicted latents within X (default: no limit)")
    quantile = "with a threshold: scale down from this quantile instead of cutting, such as 0.995"
    add("--guidance-quantile", type=_number(float, 0, 1), metavar="X", help=quantile)
    across = "the negative prompt pushes only across the prompt's direction, with weight X (Perp-Neg)"
    add("--guidance-perpendicular", type=_number(float, 0), metavar="X", help=across)
    away = "push away from a picture made without the middle self-attention, by X (PAG; 3 is usual)"
    add("--guidance-perturbed", type=_number(float, 0), metavar="X", help=away)
    net = "a ControlNet for this model: file or folder; may be repeated, each with its --control-image"
    add("--controlnet", metavar="PATH", action="append", default=[], help=net)
    add("--control-image", metavar="FILE", action="append", default=[], help="what the ControlNet is to follow")
    scale = "how strongly (default: 1)"
    add("--control-scale", metavar="X", type=_number(float, -10, 10), action="append", default=[], help=scale)
    close = "with a model that edits pictures: how close to the picture it stays (default: 1.5)"
    add("--guidance-image-scale", type=_number(float, 0), metavar="X", help=close)
    part = "a mask for one of the prompts that AND joins, white where it counts; give one for each, in their order"
    add("--regions", metavar="FILE", action="append", help=part)
    add("--sampler", metavar="NAME", help="by our, diffusers' or A1111's name (default: ddpm)")
    add("--spacing", metavar="NAME", help="of the sampler's steps, such as karras (default: the sampler's)")
    option: dict[str, Any] = {"type": _option, "action": "append", "default": [], "metavar": "NAME=VALUE"}
    add("--sampler-option", **option, help="such as eta=0.5; may be repeated")
    path = "the sampler's noises are one Brownian motion, the same at any number of steps"
    add("--brownian", action=argparse.BooleanOptionalAction, help=path)
    add("--clip-skip", type=_number(int, 0), metavar="N", help="last text encoder layers to leave out (default: 0)")
    add("--dtype", choices=DTYPES, help="of computation (default: float32 on a CPU, else bfloat16)")
    deep = "run the whole UNet in every N-th call only: faster, a similar picture (DeepCache)"
    add("--deep-cache", type=_number(int, 2, 1000), metavar="N", help=deep)
    gate = "after this share of the steps no guidance, and cross-attention as it was: faster (T-GATE; 0.4 is usual)"
    add("--gate", type=_number(float, 1e-3, 1), metavar="SHARE", help=gate)
    merge = "self-attention sees this share of the tokens as one with others, to 0.75: faster (token merging)"
    add("--merge", type=_number(float, 1e-3, 0.75), metavar="SHARE", help=merge)
    add("--tiny-vae", metavar="FILE", help="decode by this TAESD: faster, less sharp")
    tile = "decode one picture at a time, in tiles of this side: less memory, nearly the same picture"
    add("--vae-tile", type=whole, metavar="PIXELS", help=tile)
    add("--batch-size", type=whole, metavar="N", help="pictures at once (default: their number, at most 8)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    path = (
        "a file, .png, .jpg or .webp; for several pictures a folder, or a name with {i} or {seed} in it"
        " (default: here, named after prompt and seed). A file is replaced only where -o names it in full."
    )
    add("-o", "--output", metavar="PATH", help=path)
    add("--no-progress", action="store_true", help="no bar; where there is no terminal there is none anyway")


def _number(kind: Callable[[str], Any], least: float, most: float = math.inf) -> Callable[[str], Any]:
    """The type of an option: a number in a range."""
    start = "above 0 and up" if 0 < least < 1e-6 else f"{least:g}"
    ending = f" to {most:g}" if most < LARGEST_SEED else " or more" if most == math.inf else " to 2^64 - 1"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what}, {start}{ending}, got {text!r}")
        return value

    return parse


def _file_and_weight(text: str) -> tuple[str, float]:
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0  # a colon of the file's name


def _scales(text: str) -> float | tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"expected a number, or one per step with commas between, got {text!r}")
    return values[0] if len(values) == 1 else values


def _interval(text: str) -> tuple[float, ...]:
    values = _scales(text)
    if not isinstance(values, tuple) or len(values) != 2 or not 0 <= values[0] < values[1] <= 1:
        raise argparse.ArgumentTypeError(f"expected START,STOP with 0 <= START < STOP <= 1, got {text!r}")
    return values


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
