"""The models' parity once more without YNN, XLA's library of kernels for CPUs: jax 0.10.2's has known wrong results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OFF = "--xla_cpu_experimental_ynn_fusion_type="
PRODUCT = """
import jax, jax.numpy as jnp
x = jnp.ones((64, 64))
print("ynn" in jax.jit(lambda x: x @ x).lower(x).compile().as_text())
"""


def process(*words, flags=OFF):
    environment = {**os.environ, "XLA_FLAGS": flags, "SDJAX_CACHE": "off"}
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_models_are_right_without_it():
    assert process("-c", PRODUCT, flags="").stdout == "True\n"
    assert process("-c", PRODUCT).stdout == "False\n"
    chosen = ["tests/parity/test_models.py", "-p", "no:cacheprovider", "-m", "not slow and not full_size"]
    done = process("-m", "pytest", *chosen)
    assert done.returncode == 0, done.stdout[-3000:]
