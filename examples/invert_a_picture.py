"""From a picture to the noise it comes from, and back: `python examples/invert_a_picture.py out.png`

DDIM adds no noise, so its steps can be solved backwards. The noise found gives the picture again, and with other words
one that keeps its shapes.
"""

import sys

import jax
import numpy as np
from PIL import Image

import sdjax

STEPS = 50
WORDS = "a 3d emoji of a fox on a blue background"
OTHER_WORDS = "a 3d emoji of a fox on a pink background"


def noise_of(model: sdjax.StableDiffusion, picture: Image.Image, prompt: str) -> np.ndarray:
    """(1, h, w, z): what `ddim`, guidance off, makes the picture of."""
    mean, _ = model.encode_image(np.asarray(picture, np.float32)[None] / 127.5 - 1)
    context = model.encode_text(model.tokenizer([prompt]))
    # A step asks for the model's output at the noise that is looked for: a second iteration comes nearer to it.
    rows = model.sampler("ddim_inverse", iterations=2).rows(STEPS)
    invert = jax.jit(lambda x: sdjax.samplers.sample(lambda x, t: model.unet(x, t, context), x, rows))
    return np.asarray(invert(mean * model.config.vae.scaling_factor))


def main(path: str) -> float:
    model = sdjax.load()
    picture = sdjax.generate(WORDS, model=model, seed=3, sampler="dpmpp_2m", num_inference_steps=20)[0]
    again, other = sdjax.generate(
        [WORDS, OTHER_WORDS],
        model=model,
        latents=np.repeat(noise_of(model, picture, WORDS), 2, 0),
        sampler="ddim",
        num_inference_steps=STEPS,
        guidance_scale=1.0,
    )
    sheet = Image.new("RGB", (3 * picture.width, picture.height))
    for i, each in enumerate((picture, again, other)):
        sheet.paste(each, (i * picture.width, 0))
    sheet.save(path)

    # The autoencoder's part of the difference is not the inversion's.
    mean, _ = model.encode_image(np.asarray(picture, np.float32)[None] / 127.5 - 1)
    expected = np.clip(np.asarray(model.decode_latents(mean))[0] * 127.5 + 127.5, 0, 255)
    return float(np.abs(np.asarray(again, np.float32) - expected).mean())


if __name__ == "__main__":
    print(f"mean difference, of 255: {main(sys.argv[1]):.2f}")
