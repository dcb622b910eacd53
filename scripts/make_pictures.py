"""Makes the README's pictures with the model that ships: `python scripts/make_pictures.py docs/pictures`

Every picture is the first seed's; they are enlarged three times without smoothing, as 64 x 64 pixels are small.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import sdjax

SCALE = 3
SAMPLES = (
    ("fox", "3d", "blue"), ("red apple", "flat", "white"), ("octopus", "3d", "yellow"), ("rocket", "flat", "purple"),
    ("cactus", "3d", "pink"), ("owl", "flat", "green"), ("hamburger", "3d", "red"), ("guitar", "flat", "orange"),
    ("penguin", "3d", "orange"), ("strawberry", "flat", "blue"), ("locomotive", "3d", "white"),
    ("crab", "flat", "yellow"), ("violin", "3d", "green"), ("teapot", "flat", "pink"), ("unicorn", "3d", "purple"),
    ("snowman", "flat", "red"),
)  # fmt: skip
COLUMNS = 8


def enlarged(picture: Image.Image) -> Image.Image:
    return picture.resize((SCALE * picture.width, SCALE * picture.height), Image.Resampling.NEAREST)


def grid(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Row by row, with a little white between."""
    large = [enlarged(picture) for picture in pictures]
    width, height, gap = large[0].width, large[0].height, 6
    rows = -(-len(large) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(large):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def samples() -> Image.Image:
    """Sixteen prompts."""
    prompts = [f"a {style} emoji of a {concept} on a {colour} background" for concept, style, colour in SAMPLES]
    return grid(sdjax.generate(prompts, seed=[0] * len(prompts)), COLUMNS)


def tasks() -> Image.Image:
    """Text to image, image to image, a mask, inpainting, a negative prompt."""
    apple = sdjax.generate("a 3d emoji of a red apple on a white background", seed=0)[0]
    other = sdjax.generate("a flat emoji of a tomato on a white background", image=apple, strength=0.75, seed=0)[0]
    shown = Image.new("L", apple.size)
    ImageDraw.Draw(shown).rectangle((0, 0, apple.width // 2, apple.height), fill=255)
    filled = sdjax.generate("a 3d emoji of a green apple on a white background", image=apple, mask_image=shown, seed=0)[
        0
    ]
    loose = sdjax.generate("tomato, 3d", "white background, flat", seed=0)[0]
    masked = Image.composite(Image.new("RGB", apple.size, (128, 128, 128)), apple, shown)
    return grid([apple, other, masked, filled, loose], 5)


def sliders() -> Image.Image:
    """One prompt and seed at rising guidance; one compiled program."""
    prompt, scales = "a 3d emoji of a fox on a blue background", np.array([1.01, 1.5, 2, 3, 5, 7.5, 10, 15])
    return grid([sdjax.generate(prompt, seed=0, guidance_scale=float(scale))[0] for scale in scales], len(scales))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for make in (samples, tasks, sliders):
        make().save(folder / f"{make.__name__}.png", optimize=True)


if __name__ == "__main__":
    main()
