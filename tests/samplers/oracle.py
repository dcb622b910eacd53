"""The other way to run a sampler, its own function on float64 numbers; and the model and the noise that tests share."""

import jax.numpy as jnp
import numpy as np

from sdjax import samplers
from sdjax.schedule import PREDICTIONS

SHAPE = (2, 4, 6, 4)
NAMES = [algorithm.name for algorithm in samplers.ALGORITHMS]
# Each algorithm with each of its spacings and each prediction type, in turn.
KINDS = [
    (algorithm.name, spacing, PREDICTIONS[i % len(PREDICTIONS)])
    for algorithm in samplers.ALGORITHMS
    for i, (spacing, _) in enumerate(algorithm.spacings)
]
# The options under which each algorithm is tested, besides none.
OPTIONS = {
    "ddpm": ({"variance_type": "fixed_large"},),
    "ddim": ({"eta": 0.5}, {"eta": 1.0, "set_alpha_to_one": True}, {"set_alpha_to_one": True}),
    "ddim_inverse": ({"iterations": 3}, {"set_alpha_to_one": True}),
    "ddim_cfg_pp": ({"set_alpha_to_one": True},),
    "plms": ({"set_alpha_to_one": True},),
    "pndm": ({"set_alpha_to_one": True},),
    "lms": ({"order": 1}, {"order": 3}),
    "ipndm": ({"order": 2},),
    "euler_ancestral": ({"eta": 0.5, "s_noise": 0.9}, {"eta": 0.0}),
    "euler_ancestral_cfg_pp": ({"eta": 0.5},),
    "heun": ({"s_churn": 10.0, "s_tmin": 0.05, "s_tmax": 5.0, "s_noise": 1.01},),
    "restart": ({"restarts": (0.5, 1.5, 1, 1, 0.1, 0.4, 2, 2)}, {"restarts": ()}),
    "dpm2_ancestral": ({"eta": 0.5},),
    "dpm_multistep": ({"order": 3}, {"solver_type": "heun", "final_sigma": "zero"}),
    "dpm_singlestep": ({"order": 3, "solver_type": "heun"}, {"final_sigma": "zero"}),
    "deis": ({"order": 3}, {"final_sigma": "zero", "lower_order_final": False}),
    "dpmpp_2m": ({"order": 1}, {"solver_type": "heun", "final_sigma": "min", "lower_order_final": False}),
    "dpmpp_2s": ({"solver_type": "heun", "final_sigma": "min", "lower_order_final": True},),
    "dpmpp_3s": ({"solver_type": "heun", "final_sigma": "min"},),
    "dpmpp_2s_ancestral": ({"eta": 0.0}, {"s_noise": 0.5}),
    "dpmpp_sde": ({"r": 0.4, "eta": 0.5},),
    "dpmpp_2m_sde": ({"order": 3, "final_sigma": "min"}, {"solver_type": "heun", "eta": 0.5}),
    "dpmpp_3m_sde": ({"eta": 0.0},),
    "unipc": ({"order": 3}, {"order": 1}, {"solver_type": "bh1", "final_sigma": "min", "lower_order_final": False}),
    "sa_solver": ({"predictor_order": 3, "corrector_order": 4}, {"tau": 0.0}, {"final_sigma": "zero", "tau_end": 999}),
    "res_multistep": ({"eta": 1.0},),
    "er_sde": ({"order": 1}, {"order": 2, "s_noise": 0.0}),
    "lcm": ({"timestep_scaling": 1.0},),
    "tcd": ({"eta": 0.0}, {"eta": 1.0}),
}
# Those that call the model once in a step.
ONE_CALL = [name for name in NAMES if len(samplers.create(name).rows(7)) == 7 and name != "ddim_inverse"]


def options_of(name):
    """Every set of options that an algorithm is tested under."""
    return ({}, *OPTIONS.get(name, ()))


def draws(count, shape=SHAPE, seed=0):
    """Latents to start from and a noise for each of so many rows, in float64."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=(count, *shape))


def model(np, x, t):
    """A raw output that mixes neighbours, is not linear and depends on the time; in the arithmetic of `np`."""
    return (0.3 + 0.0006 * t) * x + 0.3 * np.sin(3.0 * np.roll(x, 1, 2) + t / 150.0)


def jax_model(x, t):
    return model(jnp, x, t.reshape(-1, 1, 1, 1))


class Numbers:
    """A machine that computes at once, with NumPy, and keeps what it saw: x0 of each call, latents of each step."""

    def __init__(self, noise, denoise=lambda x, t: (model(np, x, t),) * 2):
        self.noise = noise
        self.denoise = denoise
        self.x0 = []
        self.latents = []

    def evaluate(self, x_in, call):
        m, u = self.denoise(x_in, call.time)
        self.x0.append(call.to_x0[0] * x_in + call.to_x0[1] * m)
        return m, u

    def normal(self, row, span):
        return self.noise[row]

    def end_step(self, x, row, blend):
        self.latents.append(x)
        return x


def run(sampler, x, noise, steps, strength=1.0, **machine):
    """The algorithm itself, in float64: the clean latents, and the machine that ran it."""
    numbers = Numbers(noise, **machine)
    return sampler.run(numbers, x, steps, strength)[1], numbers


def assert_close(found, expected, tolerance):
    """Relative to the largest number expected, or to 1 where all are smaller."""
    found = np.asarray(found, np.float64)
    error = np.abs(found - expected).max() / max(1.0, np.abs(expected).max())
    assert error <= tolerance, f"off by {error:.2e}"
