"""How fast sdjax is on a CPU, beside its peers: `python benchmarks/cpu.py --folder /some/space`

Stable Diffusion 1.5 at full size with random weights, 512 x 512, classifier-free guidance (a batch of two). Every
figure is a ratio to a peer that was measured in the same run, on the same cores, in the same precision, with the same
weights and inputs, turn by turn: contestants are processes of their own that take a turn each when told to, and are
stopped while another does. The outputs are compared too. The environment this runs in has sdjax, PyTorch and diffusers
(`pip install -e ".[test]"`); the others have their own, and a peer whose Python is not given is left out:

    python3 -m venv /peers/openvino
    /peers/openvino/bin/pip install openvino==2026.4.1 torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate
    python3 -m venv /peers/flax
    /peers/flax/bin/pip install diffusers==0.35.2 "transformers<5" jax==0.10.2 flax==0.12.8
    python benchmarks/cpu.py --folder /some/space \\
        --openvino-python /peers/openvino/bin/python --flax-python /peers/flax/bin/python

Parts:
  gemm     the largest rate of a matrix product seen here, of 2048 x 2048 by PyTorch and by JAX; shares are of it
  unet     a step with guidance, of four in a row; decode, encode: the autoencoder; text: the encoder of two prompts
  picture  20 steps against 20 x step + decode + text, where a step is what ten more of them cost inside `generate`
  memory   peak resident memory of a picture of 512 x 512 and of 1024 x 1024
  start    import, first step of a second process, compilation of a first one, `sdjax generate` and the model that ships

The last two are measured again where the transformed weights are on the disk, as `sdjax compile --weights` leaves them.

Results are merged into benchmarks/results/cpu.json, by part, precision and peer; `--table` prints what is there. Full
runs take hours on two cores; choose with --parts, --peers and --dtypes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cpu.json"
COMPARED = ("unet", "decode", "encode", "text")
PARTS = ("gemm", *COMPARED, "picture", "memory", "start")
DTYPES = ("float32", "bfloat16")
# Those that a part is for; the Flax models are timed where they matter.
PEERS = {
    "torch": COMPARED,
    "torch.compile": COMPARED,
    "OpenVINO": COMPARED,
    "diffusers-Flax": ("unet", "decode"),
}
# Counted by hand, layer by layer, attention's products included: XLA cannot see into its own custom calls. 1e9
# multiplications and additions of one sample, or of one product of 2048 x 2048; two samples in a step and in the text.
GMAC = {"unet": 2 * 401.6, "decode": 1257.3, "encode": 558.3, "text": 2 * 6.65, "gemm": 2048**3 / 1e9}
# Seconds that these peers once took on two such cores. One that now takes a quarter more is said to.
ONCE = {
    ("unet", "float32", "torch"): 11.7,
    ("unet", "float32", "OpenVINO"): 8.6,
    ("unet", "float32", "diffusers-Flax"): 20.0,
    ("unet", "bfloat16", "torch"): 6.7,
    ("unet", "bfloat16", "OpenVINO"): 4.8,
    ("decode", "float32", "torch"): 17.0,
    ("decode", "float32", "OpenVINO"): 13.1,
    ("decode", "bfloat16", "torch"): 10.1,
    ("decode", "bfloat16", "OpenVINO"): 6.7,
}
# Why, where one is, by the same keys.
EXPLAINED: dict[tuple[str, str, str], str] = {}


def make(folder: Path) -> None:
    """The weights: native in both precisions, and diffusers'."""
    from random_weights import random_weights

    from sdjax import checkpoints
    from sdjax.models.config import SD1
    from sdjax.models.shapes import shapes

    if (folder / "made").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    params = random_weights(SD1)
    for dtype in DTYPES:
        checkpoints.save(folder / f"{dtype}.safetensors", params, SD1, dtype, targets=shapes(SD1))
    del params
    checkpoints.convert(folder / "float32.safetensors", folder / "diffusers", shapes, layout="diffusers")
    (folder / "made").touch()


class Worker:
    """A contestant's process."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - not a pipe, which would fill up
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, env=environment
        )
        try:
            self.ready = self.read()
        except RuntimeError:
            self.__exit__()
            raise
        self.process.send_signal(signal.SIGSTOP)  # between its turns, so that no thread of it waits in a loop

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            raise RuntimeError(f"a contestant ended: {self.said.read()[-600:]}")
        return json.loads(line)

    def time(self, what: str = "") -> float:
        """Seconds of a call, in a turn of it."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        seconds = self.read()["seconds"]
        self.process.send_signal(signal.SIGSTOP)
        return seconds

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.said.close()


def spread(seconds: Sequence[float]) -> list[float]:
    """Least, median, most."""
    return [round(f(seconds), 4) for f in (min, statistics.median, max)]


class Benchmark:
    """One run: where things are, and what was found."""

    def __init__(self, arguments: argparse.Namespace, report: dict[str, Any]) -> None:
        self.arguments = arguments
        self.folder: Path = arguments.folder
        self.threads: int = arguments.threads
        self.report = report
        own = sys.executable
        self.pythons = {"torch": own, "torch.compile": own, "OpenVINO": arguments.openvino_python}
        self.pythons["diffusers-Flax"] = arguments.flax_python

    def contestant(self, name: str, part: str, dtype: str) -> Worker:
        python = self.pythons.get(name, sys.executable)
        script = str(HERE / "contestants.py")
        return Worker([python, script, name, part, dtype, str(self.folder), str(self.threads)], self.threads)

    def file(self, dtype: str) -> str:
        return str(self.folder / f"{dtype}.safetensors")

    def alone(self, *command: str, cache: Path | None = None) -> dict[str, Any]:
        """The answer of benchmarks/whole.py."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        environment["SDJAX_CACHE"] = str(cache or self.folder / "cache")
        words = [sys.executable, str(HERE / "whole.py"), *command]
        run = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}: {run.stderr[-600:]}")
        return json.loads(run.stdout.splitlines()[-1])

    def keep(self, key: str, record: dict[str, Any]) -> None:
        """Written at once: a run may be cut short."""
        commit = subprocess.run(
            ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        when = {"date": time.strftime("%Y-%m-%d %H:%M"), "commit": commit.stdout.strip()}
        self.report["found"][key] = {**record, **when}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        print(key, json.dumps(record), flush=True)

    def gemm(self, dtype: str) -> None:
        """Peaks: the fastest of many, as nothing else is to be measured by it."""
        rates = {}
        for name in ("sdjax", "torch"):
            with self.contestant(name, "gemm", dtype) as worker:
                rates[name] = 2 * GMAC["gemm"] / min(worker.time() for _ in range(30))
        self.keep(f"gemm {dtype}", {"jax": round(rates["sdjax"], 1), "torch": round(rates["torch"], 1)})

    def compare(self, part: str, dtype: str) -> None:
        """sdjax and each peer in pairs, turn by turn: all at once would not fit into memory."""
        import numpy as np

        wanted = [name for name, parts in PEERS.items() if part in parts and name in self.arguments.peers]
        for name in wanted:
            if self.pythons[name] is None:
                print(f"{part} {dtype}: no {name}, its Python is not given", flush=True)
        wanted = [name for name in wanted if self.pythons[name] is not None]
        if not wanted:
            return
        with self.contestant("sdjax", part, dtype) as own:
            for name in wanted:
                try:
                    with self.contestant(name, part, dtype) as peer:
                        times: dict[str, list[float]] = {"sdjax": [], name: []}
                        # The text encoder takes a fifth of a second: two or three of those say nothing.
                        for _ in range(self.arguments.rounds * (10 if part == "text" else 1)):
                            times["sdjax"].append(own.time())
                            times[name].append(peer.time())
                except RuntimeError as error:
                    self.keep(f"{part} {dtype} {name}", {"failed": str(error)})
                    continue
                ours, theirs = (np.load(worker.ready["output"]) for worker in (own, peer))
                record = {
                    "sdjax": spread(times["sdjax"]),
                    "peer": spread(times[name]),
                    "ratio": round(statistics.median(times["sdjax"]) / statistics.median(times[name]), 3),
                    "difference": float(f"{np.abs(ours - theirs).max() / np.abs(theirs).max():.1e}"),
                    "setup": [round(worker.ready["setup"], 1) for worker in (own, peer)],
                    "cores": [worker.ready["cores"] for worker in (own, peer)],
                    "versions": {**own.ready["versions"], **peer.ready["versions"]},
                }
                self.keep(f"{part} {dtype} {name}", record)

    def picture(self, dtype: str) -> None:
        """Rounds of everything, in turn; the sums are of medians."""
        few, many, steps = self.arguments.steps
        wanted = (f"latent {few}", f"latent {many}", f"whole {steps}", "decode", "text")
        found: dict[str, list[float]] = {what: [] for what in wanted}
        with Worker(
            [sys.executable, str(HERE / "whole.py"), "picture", self.file(dtype), dtype], self.threads
        ) as worker:
            for _ in range(self.arguments.rounds):
                for what in wanted:
                    found[what].append(worker.time(what))
        middle = {what: statistics.median(seconds) for what, seconds in found.items()}
        step = (middle[wanted[1]] - middle[wanted[0]]) / (many - few)
        parts = steps * step + middle["decode"] + middle["text"]
        record = {what: spread(seconds) for what, seconds in found.items()}
        ratio = round(middle[wanted[2]] / parts, 4)
        self.keep(f"picture {dtype}", {**record, "step": round(step, 4), "steps": steps, "ratio": ratio})

    def memory(self, dtype: str) -> None:
        weights = Path(self.file(dtype)).stat().st_size
        for size in self.arguments.sizes:
            command = ("memory", self.file(dtype), dtype, str(size))
            self.alone(*command)  # so that the one measured has nothing to compile
            found = self.alone(*command)
            with self.kept_weights(dtype):
                mapped = self.alone(*command)
            for name, peaks in (("", found), (" kept weights", mapped)):
                record = {name: round(peaks[name] / weights, 3) for name in ("all", "own", "file")}
                self.keep(f"memory {dtype} {size}{name}", {**record, "weights, GB": round(weights / 1e9, 2)})

    @contextlib.contextmanager
    def kept_weights(self, dtype: str) -> Iterator[None]:
        """Within, processes find the transformed weights on the disk, as after `sdjax compile --weights`."""
        kept = Path(self.alone("weights", self.file(dtype), dtype)["path"])
        try:
            yield
        finally:
            kept.unlink()

    def start(self, dtype: str) -> None:
        file, rounds = self.file(dtype), self.arguments.rounds
        with tempfile.TemporaryDirectory(dir=self.folder) as cache:
            spent = self.alone("compile", file, dtype, "512", cache=Path(cache))
            self.keep(f"start compile {dtype}", {name: round(value, 2) for name, value in spent.items()})
        self.alone("dispatch", file, dtype)  # fills the cache
        runs = [self.alone("dispatch", file, dtype) for _ in range(rounds)]
        with self.kept_weights(dtype):
            mapped = [self.alone("dispatch", file, dtype) for _ in range(rounds)]
        for name, each in (("", runs), (" kept weights", mapped)):
            record = {key: spread([run[key] for run in each]) for key in each[0]}
            self.keep(f"start second process {dtype}{name}", record)

    def start_small(self) -> None:
        """What does not depend on a precision: the import, and the model that ships from the command line."""

        def clock(*command: str) -> list[float]:
            environment = {**os.environ, "SDJAX_CACHE": str(self.folder / "cache")}
            seconds = []
            for _ in range(self.arguments.rounds + 2):
                begin = time.perf_counter()
                subprocess.run([sys.executable, *command], capture_output=True, env=environment, check=True)
                seconds.append(time.perf_counter() - begin)
            return seconds[1:]  # the first one compiles, or reads from the disk

        empty, whole = clock("-c", "pass"), clock("-c", "import sdjax")
        gain = round(statistics.median(whole) - statistics.median(empty), 4)
        self.keep("start import", {"python": spread(empty), "with sdjax": spread(whole), "seconds": gain})
        with tempfile.TemporaryDirectory() as place:
            command = "import sys; from sdjax.cli import main; sys.exit(main(sys.argv[1:]))"
            words = ("-c", command, "generate", "a red fox", "--seed", "1", "-o", f"{place}/fox.png")
            self.keep("start command line", {"seconds": spread(clock(*words))})

    def run(self) -> None:
        parts = self.arguments.parts
        for dtype in self.arguments.dtypes:
            for part in PARTS:
                if part not in parts:
                    continue
                try:
                    if part in COMPARED:
                        self.compare(part, dtype)
                    else:
                        getattr(self, part)(dtype)
                except RuntimeError as error:  # a process that ended; the others go on
                    self.keep(f"{part} {dtype}", {"failed": str(error)})
        if "start" in parts:
            try:
                self.start_small()
            except subprocess.CalledProcessError as error:
                self.keep("start", {"failed": error.stderr.decode()[-600:]})


def summary(report: dict[str, Any]) -> str:
    """A row for each part and precision in Markdown, for the README: our seconds over each peer's, and the peer's."""
    lines = [f"| | sdjax | {' | '.join(PEERS)} |", "|---" * (2 + len(PEERS)) + "|"]
    for part in COMPARED:
        for dtype in DTYPES:
            pairs = {name: report["found"].get(f"{part} {dtype} {name}", {}) for name in PEERS}
            medians = [pair["sdjax"][1] for pair in pairs.values() if "ratio" in pair]
            if medians:
                cells = [
                    f"**{p['ratio']:.2f}** of {p['peer'][1]:.2f} s" if "ratio" in p else "" for p in pairs.values()
                ]
                lines.append(f"| {part}, {dtype} | {statistics.median(medians):.2f} s | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(report: dict[str, Any]) -> str:
    """All of it in Markdown."""
    places = {name: i for i, name in enumerate((*PARTS, *DTYPES, *PEERS))}

    def place(item: tuple[str, Any]) -> list[int]:
        return [places.get(word, len(places)) for word in item[0].split(" ", 2)]

    found = dict(sorted(report["found"].items(), key=place))
    lines = [
        f"{report['cpu']}, {report['threads']} threads. Seconds: median (least to most).",
        "",
        "| part | precision | sdjax | peer | | sdjax / peer | share of peak, sdjax | peer | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, record in found.items():
        part, dtype, *rest = key.split(" ", 2)
        if part not in COMPARED:
            continue
        name = rest[0]
        if "failed" in record:
            lines.append(f"| {part} | {dtype} | | {name} | failed | | | | |")
            continue
        peak = max((found.get(f"gemm {dtype}", {}).get(each, 0) for each in ("jax", "torch")), default=0)
        ours, theirs = (2 * GMAC[part] / record[who][1] / peak if peak else float("nan") for who in ("sdjax", "peer"))
        once, note = ONCE.get((part, dtype, name)), ""
        if once is not None and record["peer"][1] > 1.25 * once:
            note = f"once took {once} s: " + EXPLAINED.get((part, dtype, name), "not explained")
        seconds = [f"{x[1]:.2f} ({x[0]:.2f} to {x[2]:.2f})" for x in (record["sdjax"], record["peer"])]
        lines.append(
            f"| {part} | {dtype} | {seconds[0]} | {name} | {seconds[1]} | **{record['ratio']:.2f}** "
            f"| {ours:.0%} | {theirs:.0%} | {note} |"
        )
    lines += ["", "| | |", "|---|---|"]
    for key, record in found.items():
        if key.split()[0] not in COMPARED:
            shown = {name: value for name, value in record.items() if name not in ("date", "commit")}
            lines.append(f"| {key} | {json.dumps(shown).strip('{}').replace('|', '/')} |")
    return "\n".join(lines)


def processor() -> str:
    """With the numbers that tell generations apart, as the name may not."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="with 20 GB of space, kept for another run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of each, in turn")
    parser.add_argument("--threads", type=int, default=len(cores))
    parser.add_argument("--steps", type=int, nargs=3, default=(2, 12, 20), help="of a picture: few, many, whole")
    parser.add_argument("--sizes", type=int, nargs="+", default=(512, 1024), help="of pictures, for memory")
    parser.add_argument("--openvino-python", help="of an environment that has OpenVINO, PyTorch and diffusers")
    parser.add_argument("--flax-python", help="of one that has diffusers 0.35.2 and Flax")
    parser.add_argument("--table", action="store_true", help="only print the results that are there")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"found": {}}
    if RESULTS.exists():
        report = json.loads(RESULTS.read_text(encoding="utf-8"))
    if not arguments.table:
        if arguments.folder is None:
            parser.error("--folder is missing")
        # Contestants inherit it: nobody has more cores than another.
        os.sched_setaffinity(0, cores[: arguments.threads])
        report["cpu"], report["threads"] = processor(), arguments.threads
        report["versions"] = {name: version(name) for name in ("jax", "jaxlib", "torch", "diffusers")}
        print(f"{report['cpu']}, cores {cores[: arguments.threads]}, OMP_NUM_THREADS={arguments.threads}", flush=True)
        make(arguments.folder)
        Benchmark(arguments, report).run()
    print(f"{summary(report)}\n\n{table(report)}")


if __name__ == "__main__":
    main()
