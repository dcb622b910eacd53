"""The benchmarks run: what is to meet a GPU once and for minutes must work the first time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import cpu  # noqa: E402
from torch_unet import UNet  # noqa: E402


def python(script, *words, **options):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections", [("machine", "end_to_end", "warm", "parity"), ("torch", "batches", "attention"), ("training", "loops")]
)
def test_gpu_at_a_small_size(tmp_path, sections):
    """Every section; on a CPU only cuDNN's attention has reason to fail."""
    output = tmp_path / "gpu.json"
    words = ("--tiny", "--budget", "3000", "--output", output, "--sections", *sections)
    quick = {**os.environ, "XLA_FLAGS": "--xla_llvm_disable_expensive_passes --xla_backend_optimization_level=0"}
    report = json.loads(python("gpu.py", *words, env=quick))
    assert report == json.loads(output.read_text(encoding="utf-8"))
    assert tuple(report) == sections
    failed = {path for path, node in walk(report) if isinstance(node, dict) and {"error", "skipped"} & node.keys()}
    if jax.default_backend() == "cpu":
        failed = {path for path in failed if path[-1] != "cudnn"}
    assert failed == set()
    if "parity" in sections:
        assert 0 < report["parity"]["unet bfloat16"]["rms"] < 0.05
        assert report["warm"]["first picture"] < report["end_to_end"]["compilation cold, s"]["first picture"]
    if "training" in sections:
        assert report["training"]["2"]["loss"] > 0
        assert all(kind["ms per row"] > 0 for kind in report["loops"].values())


def test_gpu_within_its_budget():
    """A section that does not fit is said to be left out."""
    report = json.loads(python("gpu.py", "--tiny", "--budget", "0"))
    assert len(report) == 9
    assert all(set(section) == {"skipped"} for section in report.values())


@pytest.mark.slow
def test_gpu_is_cut_off(tmp_path):
    """What hangs half a minute beyond the budget does not take the rest with it."""
    script = (
        f"import runpy, sys, threading, time; sys.path.insert(0, {str(BENCHMARKS)!r}); sys.argv = ['gpu.py', '--tiny',"
        "'--budget', '300', '--sections', 'machine', 'loops']; import gpu; timer = threading.Timer;"
        "gpu.threading.Timer = lambda _, call: timer(20, call); gpu.Benchmark.loops = lambda self: time.sleep(600);"
        "gpu.main()"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 3, run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert report["machine"]["device"]
    assert "cut off" in report


def walk(node, path=()):
    yield path, node
    for name, child in node.items() if isinstance(node, dict) else ():
        yield from walk(child, (*path, name))


@pytest.mark.parametrize("attention", [(True, False), (False, True)])
def test_the_unet_in_pytorch_is_diffusers(attention):
    kinds = ["CrossAttn" if attends else "" for attends in attention]
    reference = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        attention_head_dim=4,
        cross_attention_dim=24,
        norm_num_groups=8,
    ).eval()
    net = UNet((32, 64), 2, attention, 4, 24, 8).eval()
    net.load_state_dict(reference.state_dict())  # the names are the same, none is left over
    torch.manual_seed(0)
    x, context, times = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 24), torch.tensor([500.0, 3.0])
    with torch.inference_mode():
        torch.testing.assert_close(net(x, times, context), reference(x, times, context).sample, rtol=1e-4, atol=1e-5)


def test_its_size_is_stable_diffusions():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet().parameters()) == 859_520_964


def test_a_contestant(tmp_path):
    """Ready once, then a repetition for each line; what it prints itself does not come between."""
    command = [sys.executable, str(BENCHMARKS / "contestants.py"), "torch", "gemm", "float32", str(tmp_path), "1"]
    with cpu.Worker(command, 1) as worker:
        assert worker.ready["versions"]["torch"] == torch.__version__
        assert np.load(worker.ready["output"]).shape == (2048, 2048)
        assert worker.time() > 0
    with pytest.raises(RuntimeError, match="KeyError"):
        cpu.Worker([*command[:2], "nobody", *command[3:]], 1)


def test_the_table_explains_slow_peers():
    record = {"sdjax": [1, 2, 3], "peer": [90, 100, 110], "ratio": 0.02, "difference": 1e-6}
    found = {"gemm float32": {"jax": 200, "torch": 100}, "unet float32 torch": record}
    text = cpu.table({"cpu": "a CPU", "threads": 2, "found": found})
    assert "| unet | float32 | 2.00 (1.00 to 3.00) | torch | 100.00 (90.00 to 110.00) | **0.02** |" in text
    assert "once took 11.7 s: not explained" in text


@pytest.mark.slow
@pytest.mark.parametrize("command", [("memory", "float32", 32), ("compile", "bfloat16", 32)])
def test_whole(tiny_file, tmp_path, command, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    kind, dtype, size = command
    answer = json.loads(python("whole.py", kind, tiny_file, dtype, size))
    assert all(value > 0 for value in answer.values())
