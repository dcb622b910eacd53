"""What an original file's UNet was trained to return: who says it, and who is believed first."""

import numpy as np
import pytest

from sdjax.checkpoints import contents, names, prediction
from sdjax.checkpoints.contents import Contents
from sdjax.models.config import SD1, SD2_BASE, SD2_INPAINTING, SD2_V

YAML = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    linear_start: 0.00085\n"


@pytest.fixture
def configured(tmp_path):
    """(config, prediction, what lies beside and in the file) -> the configuration."""

    def call(config, said=None, *, yaml=None, metadata=None, spread=0.05, averaged=False):
        name = names.ema_name(prediction.TELLING) if averaged else prediction.TELLING
        values = spread * np.array([-1, 1] * 160, np.float16)
        if yaml is not None:
            (tmp_path / "a.yaml").write_text(yaml)
        opened = Contents(contents.SAFETENSORS, {name: values}, metadata or {})
        return prediction.configured(tmp_path / "a.ckpt", opened, config, said)

    return call


def test_stable_diffusion_1_predicts_the_noise_unless_it_says_otherwise(configured):
    assert configured(SD1) == SD1
    assert configured(SD1, spread=0.5) == SD1
    assert configured(SD1, yaml=YAML + '    parameterization: "v"\n').prediction == "v"
    assert configured(SD1, "sample").prediction == "sample"


def test_stable_diffusion_2_by_its_numbers(configured, caplog):
    assert configured(SD2_V) == SD2_BASE
    assert 'prediction="v"' in caplog.text
    assert configured(SD2_V, spread=0.1) == SD2_V
    assert configured(SD2_V, spread=0.1, averaged=True) == SD2_V
    caplog.clear()
    assert configured(SD2_INPAINTING, spread=0.1) == SD2_INPAINTING  # only the model for text comes in two kinds
    assert not caplog.text


def test_what_is_said_goes_before_the_numbers(configured, caplog):
    assert configured(SD2_V, "epsilon", spread=0.1) == SD2_BASE
    assert configured(SD2_V, metadata={"modelspec.prediction_type": "V"}) == SD2_V
    assert configured(SD2_V, yaml=YAML + "    parameterization: v # as trained\n") == SD2_V
    assert configured(SD2_V, yaml=YAML, spread=0.1) == SD2_BASE  # the code's default
    assert configured(SD2_V, "v", metadata={"modelspec.prediction_type": "epsilon"}) == SD2_V
    assert not caplog.text


def test_other_files_beside_it_say_nothing(configured):
    assert configured(SD2_V, yaml="a: 1", spread=0.1) == SD2_V
    assert configured(SD2_V, yaml="\0" * 100, spread=0.1) == SD2_V
