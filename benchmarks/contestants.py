"""One contestant of `benchmarks/cpu.py` in a process of its own; its environment need not have sdjax.

    python benchmarks/contestants.py NAME PART DTYPE FOLDER THREADS

It loads the weights that `benchmarks/cpu.py` left in FOLDER, makes its inputs from a fixed seed, runs once, writes that
output to FOLDER for comparison, and says so in a line of JSON. Then every line on its standard input is one turn,
answered by a line of JSON with the seconds of a call: of the UNet it makes several calls, as a picture does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], Any]  # finished when it returns
SIZE = 2048  # of the matrices whose product is the machine's peak
CALLS = {"unet": 4}  # in a turn: after a pause the first one also pays for memory that the system took back


def inputs(part: str) -> list[np.ndarray]:
    """What every contestant is given, channels last: CFG's batch of two, or one picture of 512 x 512."""
    rng = np.random.default_rng(0)
    if part == "unet":
        latents, context = rng.standard_normal((2, 64, 64, 4)), rng.standard_normal((2, 77, 768))
        return [latents.astype(np.float32), np.full(2, 500, np.float32), context.astype(np.float32)]
    if part == "decode":
        return [rng.standard_normal((1, 64, 64, 4)).astype(np.float32)]
    if part == "encode":
        return [rng.uniform(-1, 1, (1, 512, 512, 3)).astype(np.float32)]
    if part == "text":
        return [rng.integers(0, 49405, (2, 77)).astype(np.int32)]
    return [rng.standard_normal((SIZE, SIZE)).astype(np.float32) for _ in range(2)]  # gemm


def channels_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x


def sdjax(part: str, dtype: str, folder: Path, threads: int) -> tuple[Call, dict[str, str]]:
    """As its users call it: the public functions of a loaded model."""
    import jax
    import jax.numpy as jnp

    versions = {"sdjax": version("sdjax"), "jax": version("jax")}
    given = [jnp.asarray(x) for x in inputs(part)]
    if part == "gemm":
        a, b = (x.astype(dtype) for x in given)
        product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
        return lambda: jax.block_until_ready(product(a, b)), versions
    import sdjax

    model = sdjax.load(folder / f"{dtype}.safetensors", dtype=dtype)
    call = {
        "unet": model.unet,
        "decode": model.decode_latents,
        "encode": lambda x: jnp.concatenate(model.encode_image(x), -1),
        "text": model.encode_text,
    }[part]
    return lambda: jax.block_until_ready(call(*given)), versions


def torch_module(part: str, dtype: Any, folder: Path) -> tuple[Any, tuple[Any, ...]]:
    """The diffusers or transformers module of a part, and its inputs."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    class Unet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = UNet2DConditionModel.from_pretrained(folder / "diffusers", subfolder="unet")

        def forward(self, x: Any, t: Any, context: Any) -> Any:
            return self.net(x, t, context, return_dict=False)[0]

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vae = AutoencoderKL.from_pretrained(folder / "diffusers", subfolder="vae")
            self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

        def forward(self, z: Any) -> Any:
            return self.decoder(self.post_quant_conv(z))

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vae = AutoencoderKL.from_pretrained(folder / "diffusers", subfolder="vae")
            self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

        def forward(self, x: Any) -> Any:
            mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
            return torch.cat([mean, logvar.clamp(-30.0, 20.0)], 1)

    class Text(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = CLIPTextModel.from_pretrained(folder / "diffusers", subfolder="text_encoder")

        def forward(self, ids: Any) -> Any:
            return self.net(ids, return_dict=False)[0]

    module = {"unet": Unet, "decode": Decoder, "encode": Encoder, "text": Text}[part]().eval().to(dtype)
    given = [torch.from_numpy(channels_first(x)) for x in inputs(part)]
    return module, tuple(x.long() if x.dtype == torch.int32 else x.to(dtype) for x in given)


def torch(part: str, dtype: str, folder: Path, threads: int, compiled: bool = False) -> tuple[Call, dict[str, str]]:
    """diffusers' modules under PyTorch, eager."""
    import torch

    torch.set_num_threads(threads)
    kind, versions = getattr(torch, dtype), {"torch": version("torch")}
    if part == "gemm":
        a, b = (torch.from_numpy(x).to(kind) for x in inputs(part))
        return lambda: a @ b, versions
    versions["diffusers"] = version("diffusers")
    module, given = torch_module(part, kind, folder)
    module, given = channels_last(module, given)
    if compiled:
        import torch._inductor.config

        torch._inductor.config.freezing = True  # weights packed once, as for inference they may be
        module = torch.compile(module)

    def call() -> Any:
        with torch.inference_mode() if not compiled else torch.no_grad():  # freezing wants the latter
            return module(*given)

    return call, versions


def channels_last(module: Any, given: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """PyTorch's better layout on this machine."""
    import torch

    layout = torch.channels_last
    return module.to(memory_format=layout), tuple(
        x.contiguous(memory_format=layout) if x.ndim == 4 else x for x in given
    )


def torch_compile(part: str, dtype: str, folder: Path, threads: int) -> tuple[Call, dict[str, str]]:
    """The same under torch.compile, weights frozen."""
    return torch(part, dtype, folder, threads, compiled=True)


def openvino(part: str, dtype: str, folder: Path, threads: int) -> tuple[Call, dict[str, str]]:
    """The same modules converted, shapes static, weights in float32 and arithmetic as hinted."""
    import openvino
    import torch

    path = folder / "openvino" / f"{part}.xml"
    if not path.exists():
        module, given = torch_module(part, torch.float32, folder)
        with torch.no_grad():
            model = openvino.convert_model(module, example_input=given)
        model.reshape({i: list(x.shape) for i, x in enumerate(given)})
        path.parent.mkdir(exist_ok=True)
        openvino.save_model(model, path, compress_to_fp16=False)
        del model, module
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    given = [channels_first(x) for x in inputs(part)]
    given = [x.astype(np.int64) if x.dtype == np.int32 else x for x in given]
    return lambda: request.infer(given, share_inputs=True)[0], {"openvino": version("openvino")}


def flax(part: str, dtype: str, folder: Path, threads: int) -> tuple[Call, dict[str, str]]:
    """diffusers' Flax models, the last that were; their parameters have the names of sdjax's."""
    import jax
    import jax.numpy as jnp
    from diffusers import FlaxAutoencoderKL, FlaxUNet2DConditionModel
    from flax.traverse_util import unflatten_dict
    from safetensors import safe_open

    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"} if part == "decode" else {}
    prefix = {"unet": "unet", "decode": "vae"}[part]
    leaves = {}
    with safe_open(folder / "float32.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            first, *path = name.split(".")
            if first == prefix:
                leaves[tuple(renamed.get(word, word) for word in path)] = jnp.asarray(file.get_tensor(name), dtype)
    params = unflatten_dict(leaves)
    kind = {"unet": FlaxUNet2DConditionModel, "decode": FlaxAutoencoderKL}[part]
    config = kind.load_config(folder / "diffusers" / prefix)
    model = kind.from_config(config, dtype=jnp.dtype(dtype))
    given = [jnp.asarray(channels_first(x)) for x in inputs(part)]
    if part == "unet":
        run = jax.jit(lambda params, *given: model.apply({"params": params}, *given).sample)
    else:
        run = jax.jit(lambda params, z: model.apply({"params": params}, z, method=model.decode).sample)
    versions = {"diffusers": version("diffusers"), "flax": version("flax"), "jax": version("jax")}
    return lambda: jax.block_until_ready(run(params, *given)), versions


CONTESTANTS = {
    "sdjax": sdjax,
    "torch": torch,
    "torch.compile": torch_compile,
    "OpenVINO": openvino,
    "diffusers-Flax": flax,
}


def as_array(name: str, output: Any) -> np.ndarray:
    """Channels last, float32."""
    if name.startswith("torch"):
        output = output.float().numpy()
    array = np.asarray(output, np.float32)
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 and name != "sdjax" else array


def main() -> None:
    name, part, dtype, folder, threads = *sys.argv[1:4], Path(sys.argv[4]), int(sys.argv[5])
    answers = os.fdopen(os.dup(1), "w")  # libraries may print what they like
    os.dup2(2, 1)

    def answer(record: dict[str, Any]) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    start = time.perf_counter()
    call, versions = CONTESTANTS[name](part, dtype, folder, threads)
    output = folder / "outputs" / f"{part}-{dtype}-{name}.npy"
    output.parent.mkdir(exist_ok=True)
    np.save(output, as_array(name, call()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    answer({"setup": time.perf_counter() - start, "output": str(output), "versions": versions, "cores": cores})
    calls = CALLS.get(part, 1)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        answer({"seconds": (time.perf_counter() - start) / calls})


if __name__ == "__main__":
    main()
