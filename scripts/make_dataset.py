"""Make the emoji data set of the default model: `python scripts/make_dataset.py emoji64.npz --fluent PACKAGE.tgz`.

Three openly licensed sources, none of them in this repository:

* Noto Color Emoji (flat): Debian package `fonts-noto-color-emoji`; Google, images Apache-2.0, font OFL-1.1.
* Fluent Emoji 3D: `npm pack @lobehub/fluent-emoji-3d@1.1.0`; Microsoft and LobeHub, MIT.
* names and groups: `emoji-test.txt` of Debian's `unicode-data`; Unicode, permissive.

Every concept of six groups (no people, no flags) in both styles, resized to 64x64 RGBA and centred. The same sources
and library versions give the same bytes.
"""

import argparse
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from sdjax import files
from sdjax.training import data

GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
# Microsoft held these back from its release under MIT, so the copies in the package have no clear licence.
WITHHELD_IN_3D = ("paperclip", "linked paperclips", "video game")
NOTO_STRIKE = 109  # the font's only bitmap size: 136x128 pixels, no other size loads
NOTO_CANVAS = (136, 128)
MARGIN = 3  # pixels left free around the longer side, so that no sprite touches the picture's edge
SPLIT_SEED = 0  # what is held out of training, and so the prompts
VISIBLE = 16  # alpha from which a pixel counts for the bounding box: faint glows may reach into the margin


class Emoji(NamedTuple):
    """One line of emoji-test.txt."""

    text: str
    name: str
    group: str
    subgroup: str


def read_emoji_test(path: Path) -> list[Emoji]:
    """The fully-qualified emojis of GROUPS, without skin tones, in the file's order."""
    emojis, group, subgroup = [], "", ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif "; fully-qualified" in line and group in GROUPS and "skin tone" not in line:
            code_points, _, rest = line.partition(";")
            text = "".join(chr(int(code, 16)) for code in code_points.split())
            # "... # <emoji> E<version> <name>"
            name = rest.partition("#")[2].split(maxsplit=2)[2]
            emojis.append(Emoji(text, name, group, subgroup))
    return emojis


def noto_picture(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """Draw one emoji from the font's colour bitmaps, (128, 136) RGBa (premultiplied)."""
    if font.getlength(text) > NOTO_CANVAS[0]:
        raise ValueError(f"{text!r} is not one glyph of the font: it draws {font.getlength(text)} pixels wide")
    canvas = Image.new("RGBA", NOTO_CANVAS)
    ImageDraw.Draw(canvas).text((0, 0), text, font=font, embedded_color=True)
    # Pasting on a transparent canvas multiplies the colours by alpha: what is there now is premultiplied.
    return Image.frombytes("RGBa", canvas.size, canvas.tobytes())


def read_fluent(path: Path) -> dict[str, bytes]:
    """File name without extension -> webp bytes, from the package's tarball or its unpacked folder."""
    if path.is_dir():
        return {file.stem: file.read_bytes() for file in sorted(path.rglob("*.webp"))}
    with tarfile.open(path) as tar:
        files = {
            Path(member.name).stem: tar.extractfile(member)
            for member in tar.getmembers()
            if member.isfile() and member.name.endswith(".webp")
        }
        return {stem: file.read() for stem, file in files.items() if file is not None}


def fluent_picture(files: dict[str, bytes], text: str) -> Image.Image | None:
    """One emoji of the package, RGBa, or None where the package lacks it."""
    stem = "-".join(f"{ord(character):04x}" for character in text)
    if stem not in files:
        return None
    return Image.open(io.BytesIO(files[stem])).convert("RGBA").convert("RGBa")


def fit(picture: Image.Image, size: int, margin: int) -> Image.Image:
    """Scale what is visible so that its longer side is size - 2 * margin, centred: (size, size) RGBA.

    The resize is Pillow's, on premultiplied colours (transparent pixels have none) and in fixed point, so that its
    result does not depend on the machine. Its kernel has no negative lobes: Lanczos' would push alpha and colours past
    1 at edges, where clipping alpha leaves a light rim.
    """
    box = picture.getchannel("a").point(lambda alpha: 255 * (alpha >= VISIBLE)).getbbox()
    if box is None:
        raise ValueError("the picture is empty: every pixel is transparent")
    left, top, right, bottom = box
    side = max(right - left, bottom - top) * size / (size - 2 * margin)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    # resize() wants its box inside the picture; the frame is transparent.
    border = int(side) + 1
    framed = Image.new("RGBa", (picture.width + 2 * border, picture.height + 2 * border))
    framed.paste(picture, (border, border))
    frame = (x + border, y + border, x + border + side, y + border + side)
    return framed.resize((size, size), Image.Resampling.HAMMING, box=frame).convert("RGBA")


def sprites(emojis: list[Emoji], noto: Path, fluent: Path) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (concept, style, sprite) in the order of the emojis, flat before 3d.

    A sprite equal to an earlier one is left out (Fluent draws "grinning cat" and "cat face" alike): with both in the
    set nothing could tell which of the two a picture shows.
    """
    font = ImageFont.truetype(str(noto), NOTO_STRIKE, layout_engine=ImageFont.Layout.RAQM)
    files = read_fluent(fluent)
    seen = set()
    for concept, emoji in enumerate(emojis):
        pictures = {"flat": noto_picture(font, emoji.text)}
        in_3d = None if emoji.name in WITHHELD_IN_3D else fluent_picture(files, emoji.text)
        if in_3d is not None:
            pictures["3d"] = in_3d
        for style, picture in pictures.items():
            sprite = np.asarray(fit(picture, data.SIZE, MARGIN))
            if sprite.tobytes() not in seen:
                seen.add(sprite.tobytes())
                yield concept, data.STYLES.index(style), sprite


def sha256(path: Path) -> str:
    """Hash of a file, or of a folder's files and their names."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        if file != path:
            digest.update(str(file.relative_to(path)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def contact_sheet(pictures: np.ndarray, columns: int) -> Image.Image:
    """All pictures (N, H, W, 3) on one, row by row."""
    n, height, width, channels = pictures.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:n] = pictures
    sheet = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return Image.fromarray(sheet.reshape(rows * height, columns * width, channels))


def prompts_json(dataset: data.Dataset) -> str:
    """The benchmark's held-out prompts, one a line, with the split's seed and the sprites they belong to."""
    rows = [
        {"prompt": data.canonical(*words), "concept": words[0], "style": words[1], "colour": words[2]}
        for words in data.benchmark_prompts(dataset, SPLIT_SEED)
    ]
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    digest = hashlib.sha256(dataset.sprites.tobytes()).hexdigest()
    return f'{{\n  "split_seed": {SPLIT_SEED},\n  "sprites_sha256": "{digest}",\n  "prompts": [\n{lines}\n  ]\n}}\n'


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the emoji data set of the default model.")
    parser.add_argument("out", type=Path, metavar="OUT.npz")
    parser.add_argument(
        "--noto", type=Path, default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"), help="the font"
    )
    parser.add_argument(
        "--fluent",
        type=Path,
        default=Path("lobehub-fluent-emoji-3d-1.1.0.tgz"),
        help="what `npm pack @lobehub/fluent-emoji-3d@1.1.0` saved, or the folder it unpacks to",
    )
    parser.add_argument(
        "--emoji-test", type=Path, default=Path("/usr/share/unicode/emoji/emoji-test.txt"), help="the names"
    )
    parser.add_argument("--sheet", type=Path, help="also draw all sprites on one PNG")
    parser.add_argument("--concepts", type=Path, help="also write the names of those the model draws, one a line")
    parser.add_argument("--prompts", type=Path, help="also write the held-out prompts the model is measured by, JSON")
    args = parser.parse_args()
    for source in (args.noto, args.fluent, args.emoji_test):
        if not source.exists():
            parser.error(f"no such file: {source} (the head of this script says where to get it)")
    if args.out.suffix != ".npz":
        parser.error(f"the data set's file must end in .npz, got {args.out}")
    if not features.check("raqm"):
        parser.error("this Pillow lacks raqm, which joins the parts of emojis such as the polar bear")
    return args


def main() -> None:
    """Read the sources, write the data set, say what is in it."""
    args = arguments()
    emojis = read_emoji_test(args.emoji_test)
    concept, style, pictures = zip(*sprites(emojis, args.noto, args.fluent), strict=True)
    stacked = np.stack(pictures)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = {
        "sprites": stacked,
        "concept": np.array(concept, np.int32),
        "style": np.array(style, np.int32),
        "names": np.array([emoji.name for emoji in emojis]),
        "groups": np.array([emoji.group for emoji in emojis]),
        "subgroups": np.array([emoji.subgroup for emoji in emojis]),
        "characters": np.array([emoji.text for emoji in emojis]),
        "sources": np.array([path.name for path in (args.noto, args.fluent, args.emoji_test)]),
        "sources_sha256": np.array([sha256(path) for path in (args.noto, args.fluent, args.emoji_test)]),
    }
    with files.whole(args.out) as file:
        np.savez_compressed(file, **stored)
    print(f"{len(emojis)} concepts, {len(stacked)} sprites")
    for index, name in enumerate(data.STYLES):
        print(f"  {name}: {style.count(index)}")
    print(f"sprites sha256 {hashlib.sha256(stacked.tobytes()).hexdigest()}")
    print(f"file    sha256 {sha256(args.out)}  {args.out}")
    if args.sheet:
        contact_sheet(data.composite(stacked, data.COLOURS["white"]), columns=46).save(args.sheet)
    dataset = data.load_dataset(args.out)
    if args.concepts:
        names = np.array(data.concepts(dataset))[data.drawn(dataset)]
        args.concepts.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    if args.prompts:
        args.prompts.write_text(prompts_json(dataset), encoding="utf-8")


if __name__ == "__main__":
    main()
