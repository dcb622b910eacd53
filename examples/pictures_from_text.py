"""Prompts times seeds, as one sheet: `python examples/pictures_from_text.py sheet.png`

All of them go through one compiled program; so does whatever is changed here but the size and the batch.
"""

import sys

import numpy as np
from PIL import Image

import sdjax

PROMPTS = [
    "a 3d emoji of a red apple on a white background",
    "flat owl, purple background",
    "rocket, 3d, yellow background",
]
SEEDS = 4


def main(path: str) -> None:
    pictures = sdjax.generate(PROMPTS, num_images_per_prompt=SEEDS, seed=1, num_inference_steps=30, output_type="np")
    rows = pictures.reshape(len(PROMPTS), SEEDS, *pictures.shape[1:])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    Image.fromarray(sheet).save(path)


if __name__ == "__main__":
    main(sys.argv[1])
