"""The samplers that come from k-diffusion against k-diffusion 0.1.1.post1, in float64.

Its requirements do not fit beside ours (numpy < 2), so it is installed alone, `pip install --no-deps
k-diffusion==0.1.1.post1`, as `.ci/run` does, and of it only the file of its samplers is loaded.
"""

import importlib.util
import inspect
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sdjax import samplers
from sdjax.schedule import Schedule

from . import oracle

if importlib.util.find_spec("k_diffusion") is None:
    pytest.skip("k-diffusion is not installed", allow_module_level=True)

START, (FREQUENCY, PHASE) = oracle.draws(2)


@pytest.fixture(scope="module")
def k_diffusion():
    """Its sampling.py, without what only its other functions need."""
    folder = Path(importlib.util.find_spec("k_diffusion").submodule_search_locations[0])
    stubs = {name: ModuleType(name) for name in ("k_alone", "k_alone.utils", "torchdiffeq")}
    stubs["torchdiffeq"].odeint = None
    stubs["k_alone.utils"].append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    stubs["k_alone"].utils = stubs["k_alone.utils"]
    spec = importlib.util.spec_from_file_location("k_alone.sampling", folder / "sampling.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        spec.loader.exec_module(module)
    return module


def brownian(before, after):
    """A standard normal's stand-in for a stretch of sigma: the scaled increment of one path, whose shape is free."""
    path = [np.sqrt(sigma) * np.sin(FREQUENCY * np.log(sigma) + 6 * PHASE) for sigma in (before, after)]
    return (path[0] - path[1]) / np.sqrt(before - after)


class Machine(oracle.Numbers):
    def normal(self, row, span):
        return brownian(*span)


CASES = [
    ("euler", "euler", {}),
    ("euler_ancestral", "euler_ancestral", {}),
    ("euler_ancestral", "euler_ancestral", {"eta": 0.5, "s_noise": 0.9}),
    ("heun", "heun", {}),
    ("dpm2", "dpm_2", {}),
    ("lms", "lms", {}),
    ("dpmpp_2m", "dpmpp_2m", {}),
    ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {"eta": 0.6, "s_noise": 1.1}),
    ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpmpp_sde", "dpmpp_sde", {}),
    ("dpmpp_sde", "dpmpp_sde", {"r": 0.4, "eta": 0.7, "s_noise": 0.9}),
    ("dpmpp_2m_sde", "dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", "dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.5}),
    ("dpmpp_3m_sde", "dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", "dpmpp_3m_sde", {"eta": 0.5}),
    ("dpmpp_3m_sde", "dpmpp_3m_sde", {"eta": 0.0}),
]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [2, 3, 7, 20])
@pytest.mark.parametrize(("name", "theirs", "options"), CASES)
def test_every_step(k_diffusion, name, theirs, options, steps, prediction):
    schedule = Schedule()
    machine = Machine(None)
    sampler = samplers.create(name, schedule, spacing="karras", prediction=prediction, **options)
    run, end = sampler.run(machine, START, steps)

    def denoised(x, sigma):
        sigma = float(sigma[0])
        # diffusers' tables, which are ours, round the timesteps of some spacings.
        nearest = min(run.levels, key=lambda level: abs(level.sigma - sigma))
        level = nearest if math.isclose(nearest.sigma, sigma) else run.level(sigma)
        x_in = level.alpha * x.numpy()
        m = oracle.model(np, x_in, level.time)
        x0 = (x_in - level.std * m) / level.alpha if prediction == "epsilon" else level.alpha * x_in - level.std * m
        return torch.from_numpy(x0)

    seen = []
    sigmas = torch.tensor([level.sigma for level in run.levels], dtype=torch.float64)
    function, arguments = getattr(k_diffusion, f"sample_{theirs}"), dict(options)
    if "noise_sampler" in inspect.signature(function).parameters:
        arguments["noise_sampler"] = lambda before, after: torch.from_numpy(brownian(float(before), float(after)))
    x = torch.from_numpy(START) / run.levels[0].alpha

    def callback(info):
        seen.append(info["x"].numpy())

    x = function(denoised, x, sigmas, callback=callback, disable=True, **arguments)
    oracle.assert_close(end, x.numpy(), 1e-9)
    # Ours are variance-preserving where the sampler is; theirs never are. The last level is clean, and theirs unseen.
    shrink = {"vp": lambda level: level.alpha, "ve": lambda level: 1.0}[sampler.algorithm.scale]
    for ours, expected, level in zip(machine.latents[:-1], seen[1:], run.levels[1:-1], strict=True):
        oracle.assert_close(ours, shrink(level) * expected, 1e-9)
