"""Image to image and inpainting, from a picture of its own: `python examples/repaint_a_part.py out.png`"""

import sys

import numpy as np
from PIL import Image

import sdjax


def main(path: str) -> None:
    apple = sdjax.generate("a 3d emoji of a red apple on a white background", seed=1, num_inference_steps=30)[0]

    # Another look of the same thing: keep its large shapes, make the rest anew.
    flat = sdjax.generate("a flat emoji of a green apple on a white background", image=apple, strength=0.7, seed=2)[0]

    # White is repainted; black comes back to the bit.
    mask = np.zeros((apple.height, apple.width), bool)
    mask[:, apple.width // 2 :] = True
    half = sdjax.generate("a 3d emoji of a tangerine on a white background", image=apple, mask_image=mask, seed=3)[0]
    assert np.array_equal(np.asarray(half)[~mask], np.asarray(apple)[~mask])

    sheet = Image.new("RGB", (3 * apple.width, apple.height))
    for i, picture in enumerate((apple, flat, half)):
        sheet.paste(picture, (i * apple.width, 0))
    sheet.save(path)


if __name__ == "__main__":
    main(sys.argv[1])
