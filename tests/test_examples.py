"""Every example runs, with the model that ships."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = ("pictures_from_text", "repaint_a_part", "own_sampler")
OTHERS = ("gradient_through_sampling", "invert_a_picture", "learn_a_sampler")
pytestmark = pytest.mark.slow


def test_all_are_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PICTURES, *OTHERS}


@pytest.mark.parametrize("name", PICTURES)
def test_makes_a_picture(name, tmp_path):
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](str(tmp_path / "out.png"))
    assert Image.open(tmp_path / "out.png").size[0] >= 128


def test_gradient_through_sampling():
    values = runpy.run_path(str(EXAMPLES / "gradient_through_sampling.py"))["main"]()
    assert values[-1] < values[0] - 0.01


def test_invert_a_picture(tmp_path):
    """To noise and back: within 2 of 255 of what the autoencoder makes of the picture."""
    main = runpy.run_path(str(EXAMPLES / "invert_a_picture.py"))["main"]
    assert main(str(tmp_path / "out.png")) < 2.0
    assert Image.open(tmp_path / "out.png").size == (192, 64)


def test_learn_a_sampler():
    """In small: the loss falls, the table has changed, and everything is measured."""
    main = runpy.run_path(str(EXAMPLES / "learn_a_sampler.py"))["main"]
    rows, report = main(train=8, held_out=2, updates=5, solution_steps=8)
    assert report["loss"][1] < report["loss"][0]
    assert len(rows) == 5
    assert all(np.isfinite(x).all() for x in (rows.input, rows.update, rows.time))
    assert set(report["DPM++ 2M"]) >= {"leading", "trailing", "karras"}
    assert report["best spacing"] in report["DPM++ 2M"]
    assert np.isfinite(report["learnt"]["mean"])
