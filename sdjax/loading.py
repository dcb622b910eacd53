"""From what people have on their disks, or the hub has, to a model."""

from __future__ import annotations

from pathlib import Path

import jax

from sdjax import checkpoints, transformed
from sdjax.models.shapes import shapes
from sdjax.pipeline import StableDiffusion
from sdjax.placement import placed
from sdjax.schedule import PREDICTIONS
from sdjax.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16")  # float16 overflows in the VAE


def load(
    path: str | Path | None = None,
    *,
    dtype: str | None = None,
    prediction: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> StableDiffusion:
    """Reads a model: the one that ships, a native file, a `.ckpt` or `.safetensors` of SD 1 or 2, a diffusers folder.

    Args:
      path: a file or a folder; the name of one on the Hugging Face hub, "owner/name" or "owner/name/file" (the extra
        `hub`); None for the model that ships.
      dtype: of computation: "float32" or "bfloat16". None takes float32 on a CPU and bfloat16 elsewhere.
      prediction: "epsilon", "v" or "sample", in place of what the checkpoint says of itself.
      ema: which weights of the UNet to take from a file that holds two sets: True the moving averages, False the last
        ones of training, None the averages where there are any.
      variant: of a diffusers folder's weights, such as "fp16"; None prefers those without one.
      revision: of a name on the hub: a branch, a tag or, to have the same model for ever, a commit.

    Raises:
      ValueError: for arguments that are none of these.
      CheckpointError: for a file that is not such a model, not whole, or not safe; it says what it is.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if prediction not in (None, *PREDICTIONS):
        raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    source = Path(__file__).with_name("default_model") / "model.safetensors" if path is None else Path(path)
    on_hub = path is not None and checkpoints.hub.is_name(str(path))
    if on_hub:
        source = checkpoints.hub.fetch(str(path), revision, variant)
    elif revision is not None:
        raise ValueError(f"revision: {path} is no name on the hub")
    config, params = checkpoints.load(source, shapes, ema=ema, prediction=prediction, variant=variant)
    own, params = placed(source, params, dtype)
    name = "default" if path is None else str(path) if on_hub else source.name
    kept = transformed.place(source, own, dtype)
    known = transformed.read(kept, params, dtype) if kept is not None and jax.default_backend() == "cpu" else {}
    return StableDiffusion(
        config, params, Tokenizer(config.text_encoder.padding_id), dtype, name, own, _transformed=known, _kept=kept
    )
