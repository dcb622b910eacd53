"""What `docs/fast.md` says: how much faster, and how far from the exact pictures.

python benchmarks/fast.py                distances and speed ratios, as a table
python benchmarks/fast.py --steps 20
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import sdjax

PROMPTS = ["a fox", "an apple", "a rocket", "a guitar", "a turtle", "a castle", "a bicycle", "an owl"]
WAYS = {
    "exact": {},
    "interval 0.1 to 0.8": {"guidance": sdjax.guidance.Options(interval=(0.1, 0.8))},
    "deep_cache=2": {"fast": sdjax.Fast(deep_cache=2)},
    "deep_cache=3": {"fast": sdjax.Fast(deep_cache=3)},
    "deep_cache=5": {"fast": sdjax.Fast(deep_cache=5)},
    "vae_tile=32": {"vae_tile": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    prompts = [f"a 3d emoji of {what} on a blue background" for what in PROMPTS]
    exact, base = None, None
    print("| way | speed | mean difference | PSNR |\n|---|---|---|---|")
    for name, options in WAYS.items():
        common = {"num_inference_steps": steps, "sampler": "dpmpp_2m", "output_type": "np", "batch_size": 4, **options}
        pictures = sdjax.generate(prompts, seed=0, **common).astype(np.float64)  # compiles
        times = []
        for _ in range(3):
            start = time.perf_counter()
            sdjax.generate(prompts[:4], seed=0, **common)
            times.append(time.perf_counter() - start)
        if exact is None or base is None:
            exact, base = pictures, min(times)
        difference = pictures - exact
        square = np.square(difference).mean((1, 2, 3))
        psnr = "" if name == "exact" else f"{np.mean(10 * np.log10(255**2 / np.maximum(square, 1e-9))):.1f} dB"
        ratio, mean = base / min(times), np.abs(difference).mean()
        print(f"| {name} | {ratio:.2f} ({min(times):.2f} s) | {mean:.2f} | {psnr} |", flush=True)


if __name__ == "__main__":
    main()
