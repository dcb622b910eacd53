"""A sampler that sdjax does not have, in the same program as all others: `python examples/own_sampler.py out.png`"""

import sys

from PIL import Image

import sdjax
from sdjax.samplers import Algorithm, Run


def midpoint(run: Run, x, *, where: float = 0.5):
    """Second order: the slope in the middle of a step, in the logarithm of sigma."""
    for now, after in run.steps():
        d = (x - run.model(x, now).x0) / now.sigma
        if after.sigma > 0:
            middle = run.level(now.sigma ** (1 - where) * after.sigma**where)
            half = x + (middle.sigma - now.sigma) * d
            d = (half - run.model(half, middle).x0) / middle.sigma
        x = run.end_step(x + (after.sigma - now.sigma) * d)
    return x


def main(path: str) -> None:
    model = sdjax.load()
    algorithm = Algorithm(midpoint, ("midpoint",), "ve", sdjax.spacings.FRACTIONAL, "karras")
    samplers = [model.sampler("dpm2", spacing="karras"), model.sampler(algorithm, where=0.4)]
    pictures = [
        sdjax.generate(
            "a flat emoji of an owl on a pink background", model=model, sampler=s, seed=1, num_inference_steps=15
        )[0]
        for s in samplers
    ]
    sheet = Image.new("RGB", (2 * pictures[0].width, pictures[0].height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * picture.width, 0))
    sheet.save(path)


if __name__ == "__main__":
    main(sys.argv[1])
