"""sdjax on a GPU: `python benchmarks/gpu.py`, eight minutes on an H100; prints JSON.

Self-contained: random weights, nothing is downloaded. It needs sdjax and JAX for the GPU, and for `training` the extra
`train`; with PyTorch beside them, the same UNet is timed there too (benchmarks/torch_unet.py). A section that fails
says so in its place, and what no longer fits into `--budget` is left out. There is always a report: `--output` has it
after each section, and whatever still runs half a minute after the budget is cut off. `--tiny` does everything at a
size for tests.

Sections, in this order:
  machine      what it is, and the rate of its fastest product of bfloat16 matrices
  end_to_end   a picture of 512 x 512 in 20 and in 50 steps, and 50 steps against 50 x step + decode; cold compilation
  warm         the same program in a second process, which finds it kept: until it has made a picture of one step
  torch        a step with guidance under PyTorch, eager and compiled
  batches      steps with guidance a second at batches of 1 to 32, and their share of the product's rate; peak memory
  parity       every part in bfloat16 here against float32 on the host's CPU, and float32 here against it
  training     pictures a second of the UNet's training step, AdamW on float32 parameters
  attention    each layer's attention by cuDNN, by XLA and in blocks of queries
  loops        ways to write the sampling loop, see `loops`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# PyTorch and a second process share the GPU with this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import sdjax
from sdjax import checkpoints
from sdjax.models.config import SD1, TINY, Config
from sdjax.models.shapes import shapes
from sdjax.models.unet import UNet
from sdjax.ops import attention as attention_ops

sys.path.insert(0, str(Path(__file__).parent))
from random_weights import random_weights

PROMPT = "a castle at dawn"
# What jaxlib 0.10.2 puts into CUDA graphs by itself (`debug_options` of its CompileOptions).
DEFAULT_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL"


SECTIONS = ("machine", "end_to_end", "warm", "torch", "batches", "parity", "training", "attention", "loops")


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is."""

    config: Config
    pixels: int
    gmac: float | None  # of the UNet, one sample, attention's products included; counted by hand for SD 1.5
    product: int  # side of the matrices of the machine's peak
    steps: tuple[int, int, int, int]  # few and many, which a step's time is taken from; and those of whole pictures
    batches: tuple[int, ...]
    training: tuple[int, ...]  # batches
    repeats: int
    torch_backend: str


FULL = Size(SD1, 512, 401.6, 8192, (2, 12, 20, 50), (1, 2, 4, 8, 16, 32), (8, 32), 5, "inductor")
# As little to compile as may be: the tests of the models have every kind of block.
SMALLEST = dataclasses.replace(
    TINY,
    text_encoder=dataclasses.replace(TINY.text_encoder, num_layers=1),
    unet=dataclasses.replace(TINY.unet, channels=(32,), blocks_per_level=1, attention_levels=(True,), num_heads=(4,)),
)
SMALL = Size(SMALLEST, 32, None, 256, (1, 2, 2, 3), (1, 2), (2,), 1, "aot_eager")


def clock(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds, after one call that is not counted."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def ten_times(call: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Ten in a row, each one's result the next one's queries, so that launching is not what is measured."""
    return jax.jit(lambda q, k, v: lax.fori_loop(0, 10, lambda _, x: call(x, k, v), q))


class Benchmark:
    """One run of all sections; each is a method that returns what is reported."""

    def __init__(self, size: Size, folder: Path, budget: float) -> None:
        self.size = size
        self.folder = folder
        self.end = time.perf_counter() + budget
        self.peak: float | None = None  # GFLOP/s
        self.step: float | None = None  # seconds at batch 1
        self.report: dict[str, Any] = {}
        self.file = folder / "weights.safetensors"
        checkpoints.save(self.file, random_weights(size.config), size.config, targets=shapes(size.config))
        self.model = sdjax.load(self.file, dtype="bfloat16")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.size.pixels // self.size.config.vae.factor
        return side, side, self.size.config.vae.latent_channels

    def run(self, chosen: Sequence[str], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """The report, which is given to `keep` after each section."""
        # Seconds that each takes on an H100, at a guess; on one that is slower a section may overrun.
        sections: dict[str, tuple[Callable[[], Any], float]] = {
            "machine": (self.machine, 10),
            "end_to_end": (self.end_to_end, 60),
            "warm": (self.warm, 25),
            "torch": (self.torch, 20),
            "batches": (self.batches, 30),
            "parity": (self.parity, 90),
            "training": (self.training, 45),
            "attention": (self.attention, 25),
            "loops": (self.loops, 40),
        }
        for name in chosen:
            section, needed = sections[name]
            start = time.perf_counter()
            self.report[name] = self.guarded(section, needed)
            keep(self.report)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return self.report

    def guarded(self, call: Callable[[], Any], needed: float) -> Any:
        """What it returns, or why there is nothing."""
        left = self.end - time.perf_counter()
        if left < needed:
            return {"skipped": f"{left:.0f} s are left and about {needed:.0f} needed"}
        try:
            return call()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:500], "at": traceback.format_exc().splitlines()[-3:]}

    def machine(self) -> dict[str, Any]:
        device = jax.devices()[0]
        side = self.size.product
        a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
        product = jax.jit(lambda a: lax.fori_loop(0, 10, lambda _, x: (x @ a) / side, a))
        seconds = clock(lambda: product(a), self.size.repeats) / 10
        self.peak = 2 * side**3 / seconds / 1e9
        return {
            "device": device.device_kind,
            "platform": device.client.platform_version,
            "compute capability": getattr(device, "compute_capability", None),
            "jax": jax.__version__,
            "bfloat16 product, TFLOP/s": round(self.peak / 1e3, 2),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        }

    def parity(self) -> dict[str, Any]:
        """Largest and root mean square difference, over the reference's root mean square."""
        rng = np.random.default_rng(0)
        config = self.size.config
        latents = rng.standard_normal((2, *self.latent_shape)).astype(np.float32)
        context = rng.standard_normal((2, 77, config.unet.context_width)).astype(np.float32)
        # Half the side for the autoencoder: of the host's CPU it wants most.
        side = self.size.pixels // 2
        pixels = rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
        z = latents[:1, : side // config.vae.factor, : side // config.vae.factor]

        def parts(model: sdjax.StableDiffusion) -> dict[str, np.ndarray]:
            tokens = model.tokenizer(["", PROMPT])
            with jax.default_matmul_precision("highest"):  # or float32 products are TF32's on a GPU
                return {
                    "text": np.asarray(model.encode_text(tokens)),
                    "unet": np.asarray(model.unet(jnp.asarray(latents), 500.0, jnp.asarray(context))),
                    "decode": np.asarray(model.decode_latents(jnp.asarray(z))),
                    "encode": np.asarray(model.encode_image(jnp.asarray(pixels))[0]),
                }

        with jax.default_device(jax.devices("cpu")[0]):
            reference = parts(sdjax.load(self.file, dtype="float32"))
        found: dict[str, Any] = {}
        # On a CPU float32 is the reference itself.
        here = ("bfloat16",) if jax.default_backend() == "cpu" else ("bfloat16", "float32")
        for dtype in here:
            outputs = parts(self.model if dtype == "bfloat16" else sdjax.load(self.file, dtype=dtype))
            for name, expected in reference.items():
                scale = np.sqrt(np.square(expected).mean())
                error = np.abs(outputs[name] - expected) / scale
                figures = {"largest": error.max(), "rms": np.sqrt(np.square(error).mean())}
                found[f"{name} {dtype}"] = {key: float(f"{value:.2g}") for key, value in figures.items()}
        return found

    def generate(self, steps: int, batch: int = 1, output_type: str = "np") -> np.ndarray:
        return sdjax.generate(
            [PROMPT] * batch,
            model=self.model,
            num_inference_steps=steps,
            seed=0,
            height=self.size.pixels,
            width=self.size.pixels,
            batch_size=batch,
            output_type=output_type,
        )

    def seconds_per_step(self, batch: int, output_type: str) -> float:
        """Of guided steps inside the one program; text and pixels cancel out."""
        few, many, *_ = self.size.steps
        times = [clock(lambda n=n: self.generate(n, batch, output_type), self.size.repeats) for n in (few, many)]
        return (times[1] - times[0]) / (many - few)

    def rates(self, step: float, batch: int) -> dict[str, Any]:
        share = None
        if self.size.gmac is not None and self.peak is not None:
            share = round(2 * 2 * batch * self.size.gmac / step / self.peak, 3)
        return {
            "it/s": round(1 / step, 2),
            "pictures x it/s": round(batch / step, 2),
            "ms per step": round(1e3 * step, 3),
            "share of the product's rate": share,
        }

    def end_to_end(self) -> dict[str, Any]:
        _, _, short, long = self.size.steps
        spent: dict[str, float] = {}

        def listen(event: str, duration: float, **_: Any) -> None:
            if event.startswith("/jax/core/compile/"):
                name = event.rsplit("/", 1)[1].removesuffix("_duration")
                spent[name] = spent.get(name, 0.0) + duration

        start = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(listen)
        self.generate(short)
        jax.monitoring.unregister_event_duration_listener(listen)
        first = time.perf_counter() - start
        seconds = {n: clock(lambda n=n: self.generate(n), self.size.repeats) for n in (short, long)}
        self.step = self.seconds_per_step(1, "np")
        z = jnp.zeros((1, *self.latent_shape))
        decode = clock(lambda: self.model.decode_latents(z), self.size.repeats)
        return {
            f"{short} steps, s": round(seconds[short], 4),
            f"{long} steps, s": round(seconds[long], 4),
            "decode, s": round(decode, 4),
            f"{long} steps / ({long} x step + decode)": round(seconds[long] / (long * self.step + decode), 4),
            **self.rates(self.step, 1),
            "compilation cold, s": {key: round(s, 2) for key, s in {"first picture": first, **spent}.items()},
            "peak memory so far, GB": self.peak_memory(),
            "weights, GB": round(sum(x.nbytes for x in jax.tree.leaves(self.model.params)) / 1e9, 2),
        }

    def peak_memory(self) -> float | None:
        """The most so far in this process, of which only ascending figures say something."""
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return None if peak is None else round(peak / 1e9, 2)

    def warm(self) -> dict[str, float]:
        script = Path(__file__).with_name("whole.py")
        words = [sys.executable, str(script), "compile", str(self.file), "bfloat16", str(self.size.pixels)]
        left = max(self.end - time.perf_counter(), 1)
        run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=left)
        if run.returncode:
            raise RuntimeError(run.stderr[-400:])
        return {name: round(value, 2) for name, value in json.loads(run.stdout.splitlines()[-1]).items()}

    def attention(self) -> dict[str, Any]:
        """Milliseconds of one layer's, guided; `difference` is to float32 by XLA."""
        config, (side, _, _) = self.size.config, self.latent_shape
        kinds: dict[str, Callable[..., jax.Array]] = {
            "cudnn": lambda q, k, v: attention_ops.with_cudnn(q, k, v, None, causal=False),
            "xla": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="xla"),
            "blocks": lambda q, k, v: attention_ops.plain(q, k, v, None, causal=False),
        }
        shapes = {}
        for i, (width, heads) in enumerate(zip(config.unet.channels, config.unet.num_heads, strict=True)):
            tokens = (side // 2**i) ** 2
            shapes[f"self {tokens}"] = (2, tokens, tokens, heads, width // heads)
            shapes[f"cross {tokens}"] = (2, tokens, 77, heads, width // heads)
        shapes["autoencoder"] = (1, side**2, side**2, 1, config.vae.channels[-1])
        found: dict[str, Any] = {}
        for name, (b, t, s, n, d) in shapes.items():
            lengths = ((0, t), (1, s), (2, s))
            q, k, v = (jax.random.normal(jax.random.key(i), (b, x, n, d), jnp.bfloat16) for i, x in lengths)
            wide = [x.astype(jnp.float32) for x in (q, k, v)]
            with jax.default_matmul_precision("highest"):
                expected = jax.nn.dot_product_attention(*wide)
            found[name] = {"shape": (b, t, s, n, d)}
            for kind, call in kinds.items():

                def measure(call: Any = call, given: Any = (q, k, v), right: Any = expected) -> dict[str, float]:
                    error = float(jnp.abs(jax.jit(call)(*given).astype(jnp.float32) - right).max())
                    many = ten_times(call)
                    seconds = clock(lambda: many(*given), self.size.repeats) / 10
                    return {"ms": round(1e3 * seconds, 4), "difference": float(f"{error:.1g}")}

                found[name][kind] = self.guarded(measure, 0)
        return found

    def torch(self) -> dict[str, Any]:
        """The same UNet on the same batch of two."""
        import torch
        from torch_unet import UNet as TorchUNet

        config = self.size.config.unet
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if jax.default_backend() == "gpu" and device == "cpu":
            raise RuntimeError("this PyTorch has no CUDA")
        net = TorchUNet(
            config.channels,
            config.blocks_per_level,
            config.attention_levels,
            config.num_heads[0],
            config.context_width,
            config.norm_groups,
        )
        torch.backends.cudnn.benchmark = True  # its convolutions chosen by measuring, as XLA's are
        net = net.to(device, torch.bfloat16, memory_format=torch.channels_last).eval().requires_grad_(False)
        h, w, c = self.latent_shape
        x = torch.randn(2, c, h, w, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        times = torch.full((2,), 500.0, device=device)
        context = torch.randn(2, 77, config.context_width, device=device, dtype=torch.bfloat16)
        finish = torch.cuda.synchronize if device == "cuda" else lambda: None
        few, many, *_ = self.size.steps
        found: dict[str, Any] = {"torch": torch.__version__}

        def measure(call: Callable[..., Any]) -> dict[str, Any]:
            with torch.inference_mode():
                start = time.perf_counter()
                for _ in range(3):  # compiles, then records the CUDA graph, then replays it
                    call(x, times, context)
                finish()
                first, seconds = time.perf_counter() - start, []
                for _ in range(self.size.repeats):
                    start = time.perf_counter()
                    for _ in range(many - few):
                        call(x, times, context)
                    finish()
                    seconds.append((time.perf_counter() - start) / (many - few))
            step = statistics.median(seconds)
            ours = None if self.step is None else round(step / self.step, 3)
            return {**self.rates(step, 1), "times sdjax's": ours, "first calls, s": round(first, 1)}

        options = {"mode": "reduce-overhead"} if self.size.torch_backend == "inductor" else {}
        compiled = torch.compile(net, backend=self.size.torch_backend, **options)
        found["eager"] = self.guarded(lambda: measure(net), 5)
        found["compiled"] = self.guarded(lambda: measure(compiled), 50)
        return found

    def batches(self) -> dict[str, Any]:
        found = {}
        for batch in self.size.batches:

            def measure(batch: int = batch) -> dict[str, Any]:
                start = time.perf_counter()
                self.generate(1, batch, "latent")
                first = time.perf_counter() - start
                step = self.seconds_per_step(batch, "latent")
                memory = {"peak memory so far, GB": self.peak_memory(), "first call, s": round(first, 1)}
                return {**self.rates(step, batch), **memory}

            found[str(batch)] = self.guarded(measure, 30 if self.size.gmac else 0)
        return found

    def training(self) -> dict[str, Any]:
        """The package's own step: loss, gradients, AdamW, the running mean."""
        from sdjax.training import loop, losses

        config = self.size.config
        net = UNet(config.unet, jnp.bfloat16)
        schedule = self.model.schedule()
        signal = jnp.asarray(np.sqrt(schedule.alphas_cumprod), jnp.float32)

        def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            clean, context = batch
            for_noise, for_time = jax.random.split(key)
            noise = jax.random.normal(for_noise, clean.shape)
            times = jax.random.randint(for_time, clean.shape[:1], 0, len(signal))
            alpha = signal[times][:, None, None, None]
            noisy = alpha * clean + jnp.sqrt(1 - alpha**2) * noise
            output = net.apply({"params": params}, noisy, times.astype(jnp.float32), context)
            return losses.denoising_loss(output, noise, jnp.ones(len(clean))), {}

        optimizer = optax.adamw(1e-5)
        step = jax.jit(loop.make_step(loss, optimizer, loop.Settings(1)), donate_argnums=0)
        params = jax.tree.map(lambda x: x.astype(jnp.float32), self.model.params["unet"])
        found = {}
        for count in self.size.training:

            def measure(count: int = count) -> dict[str, Any]:
                keys = jax.random.split(jax.random.key(1))
                latents = jax.random.normal(keys[0], (count, *self.latent_shape))
                context = jax.random.normal(keys[1], (count, 77, config.unet.context_width))
                state = loop.create_state(params, optimizer)
                start = time.perf_counter()
                state, metrics = jax.block_until_ready(step(state, (latents, context)))
                first, repeats = time.perf_counter() - start, 2 * self.size.repeats
                start = time.perf_counter()
                for _ in range(repeats):
                    state, metrics = step(state, (latents, context))
                jax.block_until_ready(state)
                seconds = (time.perf_counter() - start) / repeats
                share = None
                if self.size.gmac is not None and self.peak is not None:
                    share = round(3 * 2 * count * self.size.gmac / seconds / self.peak, 3)  # back is twice forth
                return {
                    "pictures/s": round(count / seconds, 2),
                    "share of the product's rate": share,
                    "loss": round(float(metrics["loss"]), 3),
                    "first call, s": round(first, 1),
                    "peak memory so far, GB": self.peak_memory(),
                }

            found[str(count)] = self.guarded(measure, 45 if self.size.gmac else 0)
        return found

    def loops(self) -> dict[str, Any]:
        """What a row costs in loops of several kinds; `conditional` is the product's.

        XLA's runtime for GPUs copies the predicate of a conditional to the host and waits for it (ConditionalThunk),
        and the condition of a while loop likewise unless its trip count is known (WhileThunk), as a scan's is. Nothing
        is queued then while the next step is launched. A conditional all of whose branches can be is part of a CUDA
        graph instead, with its predicate on the device (CUDA 12.3 and later). By default the UNet's is not, because of
        its convolutions: `convolutions` puts those into graphs too, `everything` the loop itself.
        """
        rows, (_, many, *_) = 64, self.size.steps
        config, params = self.size.config.unet, self.model.params["unet"]
        net = UNet(config, jnp.bfloat16)
        context = jnp.zeros((2, 77, config.context_width))

        def live(params: Any, x: jax.Array) -> jax.Array:
            return x - 0.01 * net.apply({"params": params}, x, jnp.full(2, 500.0), context)

        def exact(params: Any, x: jax.Array, steps: jax.Array) -> jax.Array:
            return lax.scan(lambda x, _: (live(params, x), None), x, None, length=many)[0]

        def conditional(params: Any, x: jax.Array, steps: jax.Array) -> jax.Array:
            def body(x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
                return lax.cond(number < steps, lambda x: live(params, x), lambda x: x, x), None

            return lax.scan(body, x, jnp.arange(rows))[0]

        def counted(params: Any, x: jax.Array, steps: jax.Array) -> jax.Array:
            return lax.fori_loop(0, steps, lambda _, x: live(params, x), x)

        kinds: dict[str, tuple[Callable[..., jax.Array], str]] = {
            "conditional": (conditional, ""),
            "exact": (exact, ""),
            "conditional, convolutions": (conditional, ",CONVOLUTION"),
            "conditional, everything": (conditional, ",CONVOLUTION,WHILE"),
            "counted": (counted, ""),
            "exact, convolutions": (exact, ",CONVOLUTION"),
        }
        x, steps = jnp.zeros((2, *self.latent_shape)), jnp.int32(many)
        found = {}
        for name, (function, more) in kinds.items():

            def measure(function: Any = function, more: str = more) -> dict[str, float]:
                start = time.perf_counter()
                options = {"xla_gpu_enable_command_buffer": DEFAULT_COMMANDS + more} if more else {}
                call = jax.jit(function, compiler_options=options).lower(params, x, steps).compile()
                compiled = time.perf_counter() - start
                # Twice more, for a command buffer is recorded in the second call.
                seconds = clock(lambda: (call(params, x, steps), call(params, x, steps)), self.size.repeats) / 2
                return {"ms per row": round(1e3 * seconds / many, 3), "compilation, s": round(compiled, 1)}

            found[name] = self.guarded(measure, 40 if self.size.gmac else 0)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a size for tests, on any device")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds (default: 480)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--output", type=Path, help="a file for the JSON, beside standard output")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SDJAX_CACHE"] = str(Path(folder) / "cache")  # or compilation may not be cold
        size = SMALL if arguments.tiny else FULL

        def keep(report: dict[str, Any]) -> None:
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

        def cut_off() -> None:
            print(
                json.dumps({**benchmark.report, "cut off": "it ran half a minute over its budget"}, indent=1),
                flush=True,
            )
            os._exit(3)

        watchdog = threading.Timer(arguments.budget + 30, cut_off)
        watchdog.daemon = True
        benchmark = Benchmark(size, Path(folder), arguments.budget)
        watchdog.start()
        report = benchmark.run(arguments.sections, keep)
        watchdog.cancel()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
