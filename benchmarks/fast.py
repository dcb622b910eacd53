"""What `docs/fast.md` says: how much faster, and how far from the exact pictures.

python benchmarks/fast.py                                the model that ships: speed ratios and distances, as a table
python benchmarks/fast.py --model sd15.safetensors       any other: speed ratios alone, which need no trained weights
python benchmarks/fast.py --steps 20 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import sdjax

PROMPTS = ["a fox", "an apple", "a rocket", "a guitar", "a turtle", "a castle", "a bicycle", "an owl"]
WAYS = {
    "exact": {},
    "guidance in the interval 0.1 to 0.8": {"guidance": sdjax.guidance.Options(interval=(0.1, 0.8))},
    "`deep_cache=2`": {"fast": sdjax.Fast(deep_cache=2)},
    "`deep_cache=3`": {"fast": sdjax.Fast(deep_cache=3)},
    "`deep_cache=5`": {"fast": sdjax.Fast(deep_cache=5)},
    "`gate=0.6`": {"fast": sdjax.Fast(gate=0.6)},
    "`gate=0.4`": {"fast": sdjax.Fast(gate=0.4)},
    "`merge=0.25`": {"fast": sdjax.Fast(merge=0.25)},
    "`merge=0.5`": {"fast": sdjax.Fast(merge=0.5)},
}


def timed(run: Callable[[], Any], repeats: int) -> float:
    """The least seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def shipped(ways: dict[str, Any], steps: int) -> Iterator[str]:
    prompts = [f"a 3d emoji of {what} on a blue background" for what in PROMPTS]
    exact, base = None, None
    yield "| | times as fast | mean difference, of 255 | PSNR |\n|---|---|---|---|"
    for name, options in ways.items():
        common = {"num_inference_steps": steps, "sampler": "dpmpp_2m", "output_type": "np", "batch_size": 4, **options}
        pictures = sdjax.generate(prompts, seed=0, **common).astype(np.float64)  # compiles
        seconds = timed(lambda common=common: sdjax.generate(prompts[:4], seed=0, **common), 3)
        if exact is None or base is None:
            exact, base = pictures, seconds
        difference = pictures - exact
        square = np.square(difference).mean((1, 2, 3))
        psnr = "" if name == "exact" else f"{np.mean(10 * np.log10(255**2 / np.maximum(square, 1e-9))):.1f} dB"
        yield f"| {name} | {base / seconds:.2f} ({seconds:.2f} s) | {np.abs(difference).mean():.1f} | {psnr} |"


def other(model: sdjax.StableDiffusion, ways: dict[str, Any], steps: int) -> Iterator[str]:
    """The loop and the decoder apart: few steps are enough, and their share is of a run as long as one likes."""
    yield "| | seconds of a step, or of decoding | times as fast |\n|---|---|---|"
    common = {"model": model, "num_inference_steps": steps, "sampler": "dpmpp_2m", "seed": 0, "output_type": "latent"}
    base = None
    for name, options in ways.items():

        def run(options: Any = options) -> Any:
            return sdjax.generate("a castle at dawn", **common, **options)

        run()  # compiles
        seconds = timed(run, 2) / steps
        base = seconds if base is None else base
        yield f"| {name} | {seconds:.2f} | {base / seconds:.2f} |"
    z = np.random.default_rng(0).standard_normal((1, 64, 64, 4)).astype(np.float32)
    decode = {"decoding 512 x 512": lambda: np.asarray(model.decode_latents(z))}
    decode["`vae_tile=256`"] = lambda: np.asarray(model.decode_latents(z, tile=256))
    if model.tiny_decoder is not None:
        decode["`tiny_vae=True`"] = lambda: model.preview(z)
    base = None
    for name, call in decode.items():
        call()
        seconds = timed(call, 2)
        base = seconds if base is None else base
        yield f"| {name} | {seconds:.2f} | {base / seconds:.2f} |"


def random_tiny_decoder(path: Path) -> None:
    """TAESD's file with random weights, for its speed."""
    from safetensors.numpy import save_file

    from sdjax import checkpoints
    from sdjax.models.shapes import tiny_decoder_shapes

    rng = np.random.default_rng(0)
    leaves = checkpoints.flatten(tiny_decoder_shapes())
    state = {}
    for name, leaf in leaves.items():
        place = name.replace("layers_", "decoder.layers.").replace("conv_", "conv.").replace("kernel", "weight")
        x = 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
        state[place] = np.ascontiguousarray(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x)
    save_file(state, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model")
    parser.add_argument("--tiny-vae", type=Path, help="TAESD for the model; a file with random weights where it is not")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--ways", nargs="+", default=[""], help="only those that begin so; the exact one is always there"
    )
    arguments = parser.parse_args()
    ways = {
        name: options
        for name, options in WAYS.items()
        if name == "exact" or any(name.strip("`").startswith(way) for way in arguments.ways)
    }
    if arguments.model is None:
        lines = shipped(ways, arguments.steps)
    else:
        model = sdjax.load(arguments.model, dtype=arguments.dtype)
        if arguments.tiny_vae is not None:
            if not arguments.tiny_vae.exists():
                random_tiny_decoder(arguments.tiny_vae)
            model = model.with_tiny_decoder(arguments.tiny_vae)
        lines = other(model, ways, arguments.steps)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
