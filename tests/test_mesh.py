"""Eight simulated devices make the pictures that one makes."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import AxisType
import sdjax

assert jax.device_count() == 8
model = sdjax.load(sys.argv[1])
photo = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
mask = np.zeros((24, 32), bool)
mask[4:12, 8:20] = True
mesh = jax.make_mesh((4, 2), ("data", "more"), axis_types=(AxisType.Auto,) * 2)
placed = model.place(mesh)
assert len(jax.tree.leaves(placed.params)[0].sharding.device_set) == 8
for which, options in ((model, {"sampler": "euler_ancestral"}), (placed, {"image": photo, "mask_image": mask})):
    options = {"num_inference_steps": 4, "height": 24, "width": 32, "seed": 3, "output_type": "np", **options}
    prompts = ["a", "b", "c", "d", "e"]  # padded to 8
    one = sdjax.generate(prompts, model=model, **options)
    many = sdjax.generate(prompts, model=which, mesh=mesh, **options)
    assert many.shape == one.shape == (5, 24, 32, 3)
    assert np.abs(many.astype(int) - one.astype(int)).max() <= 1
print("equal")
"""


@pytest.mark.slow
def test_on_eight_devices(tiny_file):
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "SDJAX_CACHE": "off",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_file)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"
