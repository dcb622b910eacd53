"""How long a model of the size of Stable Diffusion 1.5 takes to load: `python benchmarks/load.py --folder /some/space`

It makes the same random float32 weights as a native file, a diffusers folder and a `.ckpt` (13 GB together), and then,
each in a process of its own, several times in turn:

  sdjax       `sdjax.load` of the native file, until every array is there
  ldm         `sdjax.load` of the `.ckpt`, which is looked through for NaN and infinity
  diffusers   `StableDiffusionPipeline.from_pretrained` of the folder
  copy        of the `.ckpt` to another file, written through to the disk
  convert     `checkpoints.convert` of the `.ckpt` to a native file, without the hash of the source

Imports are not counted. Each reads its files once before its time begins, so that they are in the page cache. Native
files and diffusers' are mapped into memory, and nothing is read before it is used; so "touched" is the time until,
beyond that, a byte of every page of every weight has been read. "all" is what the process gained in resident memory
while it loaded (files that are mapped count as they are used); "own" is what of it is not a file's; "peak" is the most
of "all" at any time, "own peak" of "own".
Needs `pip install -e ".[test]"`. Writes benchmarks/results/load.json.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "load.json"
CONTESTANTS = ("sdjax", "diffusers", "ldm", "copy", "convert")


def make(folder: Path) -> None:
    import torch

    from sdjax import checkpoints
    from sdjax.checkpoints import native
    from sdjax.models.config import SD1
    from sdjax.models.shapes import shapes

    if (folder / "made").exists():
        return
    rng = np.random.default_rng(0)
    leaves = {name: rng.standard_normal(x.shape, np.float32) for name, x in native.flatten(shapes(SD1)).items()}
    params = native.unflatten(leaves)
    checkpoints.save(folder / "native.safetensors", params, SD1, targets=shapes(SD1))
    checkpoints.convert(folder / "native.safetensors", folder / "diffusers", shapes, layout="diffusers")
    original = checkpoints.export(params, SD1, "ldm")
    state = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in original.items()}
    torch.save({"state_dict": state, "epoch": 0}, folder / "original.ckpt")
    (folder / "made").touch()


def warm(path: Path) -> None:
    """Reads a file, or all of a folder, so that the system has it in memory."""
    buffer = bytearray(1 << 24)
    for each in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with each.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def memory() -> dict[str, int]:
    """Of this process, resident, in bytes: all of it, and what is not mapped from files."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: 1024 * int(fields[key].split()[0]) for name, key in (("all", "VmRSS"), ("own", "RssAnon"))}


def touch(arrays: Iterable[np.ndarray]) -> None:
    """Reads a byte of every page."""
    for array in arrays:
        array.ravel("K").view(np.uint8)[:: mmap.PAGESIZE].max()


def contest(name: str, folder: Path) -> dict[str, float]:
    """One measurement, in a process that does nothing else."""
    if name in ("sdjax", "ldm"):
        import jax

        import sdjax.pipeline  # `import sdjax` alone imports nothing

        jax.devices()
    elif name == "diffusers":
        import diffusers
        import transformers  # noqa: F401
        from diffusers import StableDiffusionPipeline  # noqa: F401 - these are imported when first used
    elif name == "convert":
        from sdjax import checkpoints
        from sdjax.models.shapes import shapes
    warm(folder / {"sdjax": "native.safetensors", "diffusers": "diffusers"}.get(name, "original.ckpt"))
    before, anonymous, over = memory(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            anonymous.append(memory()["own"])

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    if name in ("sdjax", "ldm"):
        file = "native.safetensors" if name == "sdjax" else "original.ckpt"
        loaded = sdjax.load(folder / file, dtype="float32")
        jax.block_until_ready(loaded.params)
    elif name == "diffusers":
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder / "diffusers", local_files_only=True)
    elif name == "copy":
        with open(folder / "original.ckpt", "rb") as source, open(folder / "copy", "wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
            target.flush()
            os.fsync(target.fileno())
    else:
        checkpoints.convert(folder / "original.ckpt", folder / "converted", shapes, hash_source=False)
    seconds, after = time.perf_counter() - start, memory()
    if name in ("sdjax", "ldm"):
        touch(np.asarray(leaf) for leaf in jax.tree.leaves(loaded.params))
    elif name == "diffusers":
        parts = (loaded.text_encoder, loaded.unet, loaded.vae)
        touch(tensor.detach().numpy() for part in parts for tensor in part.parameters())
    touched = time.perf_counter() - start
    over.set()
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return {
        "seconds": seconds,
        "touched": touched,
        **{k: after[k] - before[k] for k in after},
        "own peak": max(*anonymous, after["own"]) - before["own"],
        "peak": peak - before["all"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="with 26 GB of space, kept for another run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.contestant:
        print(json.dumps(contest(arguments.contestant, folder)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    make(folder)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(arguments.repeats):
        for name in CONTESTANTS:
            command = [sys.executable, __file__, "--folder", str(folder), "--contestant", name]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(run.stdout.splitlines()[-1]))
            for made in ("copy", "converted"):  # they would push the others out of memory
                (folder / made).unlink(missing_ok=True)
    report: dict[str, object] = {package: version(package) for package in ("jax", "torch", "diffusers")}
    report["native file, GB"] = round((folder / "native.safetensors").stat().st_size / 1e9, 2)
    medians = {}
    for name, runs in found.items():
        times = {key: [run[key] for run in runs] for key in ("seconds", "touched")}
        medians[name] = {key: statistics.median(values) for key, values in times.items()}
        report[name] = {
            **{key: [round(f(v), 2) for f in (min, statistics.median, max)] for key, v in times.items()},
            **{key: round(max(run[key] for run in runs) / 1e9, 2) for key in ("all", "own", "peak", "own peak")},
        }
    for key in ("seconds", "touched"):
        report[f"diffusers / sdjax, {key}"] = round(medians["diffusers"][key] / medians["sdjax"][key], 1)
    report["convert / copy"] = round(medians["convert"]["seconds"] / medians["copy"]["seconds"], 2)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
