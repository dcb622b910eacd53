"""Every example runs, with the model that ships."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = ("pictures_from_text", "repaint_a_part", "own_sampler")


def test_all_are_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PICTURES, "gradient_through_sampling"}


@pytest.mark.parametrize("name", PICTURES)
def test_makes_a_picture(name, tmp_path):
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](str(tmp_path / "out.png"))
    assert Image.open(tmp_path / "out.png").size[0] >= 128


def test_gradient_through_sampling():
    values = runpy.run_path(str(EXAMPLES / "gradient_through_sampling.py"))["main"]()
    assert values[-1] < values[0] - 0.01
