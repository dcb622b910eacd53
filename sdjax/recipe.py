"""What a picture was made of, written into its PNG: enough to make it again.

It is written twice: as the text `parameters`, by the conventions of AUTOMATIC1111's web UI, which other programs read;
and in full as JSON under the name `sdjax`, which is what counts. PNGs come from strangers: whatever is in one, `read`
returns a checked recipe or raises ValueError.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from sdjax import images

KEY, PARAMETERS = "sdjax", "parameters"  # the names of the two texts
FORMAT = 1
_LONGEST = 2**18  # characters of either text

# Names in the web UI where they differ by more than case; others are written, and read, as they are.
_WEB_UI_SAMPLERS = {
    "dpm2": "DPM2", "dpm2_ancestral": "DPM2 a", "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s_ancestral": "DPM++ 2S a", "dpmpp_3m_sde": "DPM++ 3M SDE", "dpmpp_sde": "DPM++ SDE",
    "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "lcm": "LCM",
    "lms": "LMS", "plms": "PLMS", "unipc": "UniPC", "deis": "DEIS", "ipndm": "IPNDM", "restart": "Restart",
    "sa_solver": "SA-Solver", "res_multistep": "RES multistep", "er_sde": "ER SDE", "ddim_cfg_pp": "DDIM CFG++",
    "euler_cfg_pp": "Euler CFG++", "euler_ancestral_cfg_pp": "Euler a CFG++", "dpmpp_2m_cfg_pp": "DPM++ 2M CFG++",
}  # fmt: skip
_WEB_UI_SPACINGS = {
    "karras": "Karras", "exponential": "Exponential", "beta": "Beta", "align_your_steps": "Align Your Steps",
    "sgm_uniform": "SGM Uniform", "polyexponential": "Polyexponential", "simple": "Simple",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything that one picture's pixels depend on.

    Attributes:
      prompt, negative_prompt, num_inference_steps, guidance_scale, clip_skip, seed, height, width, mask_blur,
        padding_mask_crop: as `sdjax.generate` takes them; guidance_scale one number, or one per step.
      sampler: its name.
      sampler_options: its spacing, prediction, steps_offset and options of its own, as JSON holds them.
      strength: of image-to-image; None where there was no picture to start from.
      rescale: `guidance.Options.rescale`.
      model: the name of what it was loaded from, "default" for the model that ships.
      model_sha256: a fingerprint of its weights, in hexadecimal digits.
      dtype: of computation.
      driver: "scan" or "stepwise".
      batch, index: how many pictures the program was compiled for, and this one's place among them.
      task: "text", "image" or "inpaint".
      image_sha256, mask_sha256: of the arrays that the program was given.
      windows: of 75 tokens, that the program was compiled for.
      versions: of sdjax, jax, jaxlib; and the platform and the device.
      latents_sha256: of start noise that was given in place of the seed's; only who has it can make the picture again.
      guidance: `guidance.Options` besides the rescale, what of it is not as it is by default; of a loss its name.
      exact_steps, brownian, vae_tile: as `sdjax.generate` takes them.
      fast: likewise of `Fast`.
      tiny_vae_sha256: of the TAESD that decoded it.
      schedule: of noise, the sampler's, as `sdjax.schedule.Schedule` takes it; empty where it is the model's.
      regions_sha256: of the weights of prompts by region; only who has the masks can make the picture again.
      controls: of each ControlNet its scale, interval and fingerprint; its picture is not in the recipe.
    """

    prompt: str
    negative_prompt: str
    num_inference_steps: int
    guidance_scale: float | tuple[float, ...]
    sampler: str
    sampler_options: dict[str, Any]
    strength: float | None
    clip_skip: int
    seed: int
    height: int
    width: int
    rescale: float
    model: str
    model_sha256: str | None
    dtype: str
    driver: str
    batch: int
    index: int
    task: str
    image_sha256: str | None
    mask_sha256: str | None
    mask_blur: float
    padding_mask_crop: int | None
    windows: int
    versions: dict[str, str]
    latents_sha256: str | None = None
    guidance: dict[str, Any] = dataclasses.field(default_factory=dict)
    exact_steps: bool = False
    brownian: bool = False
    regions_sha256: str | None = None
    controls: dict[str, Any] = dataclasses.field(default_factory=dict)
    vae_tile: int | None = None
    fast: dict[str, Any] = dataclasses.field(default_factory=dict)
    tiny_vae_sha256: str | None = None
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict)


def texts(recipe: Recipe) -> dict[str, str]:
    """The texts that a PNG carries, by name, for `images.save_png`."""
    fields = {"format": FORMAT, **dataclasses.asdict(recipe)}
    # ASCII: a PNG then holds it in its oldest kind of text, which everything reads.
    return {PARAMETERS: _parameters(recipe), KEY: json.dumps(_finite(fields), default=_plain)}


def read(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a PNG: ours; or what can be made out of the web UI's `parameters`.

    Raises:
      ValueError: it is no PNG, is damaged, carries no recipe, or one with something wrong in it.
    """
    found = images.read_text(path)
    name = os.fspath(path)
    if KEY not in found and PARAMETERS not in found:
        raise ValueError(f"{name}: there is no recipe in this picture; was it edited or sent by a messenger?")
    try:
        if KEY in found:
            return from_json(found[KEY])
        return from_parameters(found[PARAMETERS])
    except ValueError as error:
        raise ValueError(f"{name}: its recipe cannot be used: {error}") from error


def differences(recipe: Recipe, model: Any, versions: Mapping[str, str]) -> list[str]:
    """What here is not as it was where the picture was made, each as a sentence; empty if nothing is.

    Args:
      recipe: the picture's.
      model: the `StableDiffusion` to make it again with.
      versions: as in the recipe, of what runs here.
    """
    told = []
    if KEY not in recipe.versions:
        told.append(f"It was made by {recipe.versions.get('program', 'another program')}; expect something similar.")
    for name, there in recipe.versions.items():
        here = versions.get(name)
        if name in versions and here != there:
            told.append(f"It was made with {name} {there}; here is {here}.")
    if recipe.dtype != model.dtype:
        told.append(f"It was made with dtype {recipe.dtype}; here is {model.dtype}.")
    # The dtype is part of a fingerprint: under another one it tells nothing.
    elif recipe.model_sha256 is not None and recipe.model_sha256 != model.fingerprint:
        told.append(f"It was made with other weights: {model.source} here is not the {recipe.model} of then.")
    elif recipe.tiny_vae_sha256 is not None and (
        model.tiny_decoder is None or recipe.tiny_vae_sha256 != model.tiny_decoder.digest
    ):
        told.append("It was decoded by another TAESD.")
    return told


def from_json(text: str) -> Recipe:
    """The inverse of what `texts` writes under "sdjax". Raises ValueError for anything else."""
    if len(text) > _LONGEST:
        raise ValueError(f"it has {len(text)} characters, more than {_LONGEST}")
    try:
        fields = json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object, got {type(fields).__name__}")
    if fields.pop("format", None) != FORMAT:
        raise ValueError("it was written by another version of sdjax; a newer one may read it")
    return _checked(fields)


def _checked(fields: dict[str, Any]) -> Recipe:
    """A recipe from what JSON holds; ValueError where a field is missing, unknown or out of its range."""
    known = {field.name: field for field in dataclasses.fields(Recipe)}
    without = dataclasses.MISSING
    required = {name for name, field in known.items() if field.default is field.default_factory is without}
    if unknown := sorted(fields.keys() - known.keys()):
        raise ValueError(f"unknown fields: {', '.join(map(repr, unknown[:5]))}"[:200])
    if missing := sorted(required - fields.keys()):
        raise ValueError(f"missing fields: {', '.join(missing)}")
    values = {name: _FIELDS[name](name, value) for name, value in fields.items()}
    scale = values["guidance_scale"]
    # With exact steps there is a scale for each of a longer run, whose end is made.
    if isinstance(scale, tuple) and len(scale) != values["num_inference_steps"] and not values.get("exact_steps"):
        raise _wrong("guidance_scale", "one number, or one per step", scale)
    if values["index"] >= values["batch"]:
        raise _wrong("index", f"less than the batch of {values['batch']}", values["index"])
    if (values["task"] == "text") != (values["strength"] is None):
        raise _wrong("strength", "a number where there was a picture, else null", values["strength"])
    return Recipe(**values)


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {value!r:.60}")


def _number(least: float, most: float, kind: type = float) -> Any:
    def check(name: str, value: Any) -> Any:
        kinds = (int,) if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            raise _wrong(name, f"a {'whole ' if kind is int else ''}number from {least} to {most}", value)
        return kind(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return value


def _whole(least: int, most: int) -> Any:
    return _number(least, most, int)


def _text(pattern: str, most: int, expected: str) -> Any:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or len(value) > most or not re.fullmatch(pattern, value):
            raise _wrong(name, expected, value)
        return value

    return check


def _or_none(check: Any) -> Any:
    return lambda name, value: None if value is None else check(name, value)


def _scales(name: str, value: Any) -> float | tuple[float, ...]:
    check = _number(-1e6, 1e6)
    return tuple(check(name, x) for x in value) if isinstance(value, list) else check(name, value)


def _options(name: str, value: Any) -> dict[str, Any]:
    """Named scalars, or lists of them as tuples, or a spacing: what a sampler can be made with."""
    if not isinstance(value, dict) or len(value) > 64:
        raise _wrong(name, "an object of at most 64 options", value)
    return {key: _option(f"{name}.{key:.60}", key, option) for key, option in value.items()}


def _option(name: str, key: str, option: Any) -> Any:
    if key in ("spacing", "ends") and isinstance(option, dict) and name.count(".") < 4:  # in a spacing is another one
        return _options(name, option)
    if not key.isidentifier() or key in ("name", "schedule"):
        raise _wrong(name, _VALUE, option)
    return _value(name, option)


_VALUE = "a text, a number, true, false, null or a list of them"


def _value(name: str, value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if not all(x is None or isinstance(x, (str, int)) or (isinstance(x, float) and math.isfinite(x)) for x in items):
        raise _wrong(name, _VALUE, value)
    return tuple(value) if isinstance(value, list) else value


def _only(**checks: Any) -> Any:
    def check(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not value.keys() <= checks.keys():
            raise _wrong(name, f"an object with no more than {', '.join(checks)}", value)
        return {field: checks[field](f"{name}.{field}", x) for field, x in value.items()}

    return check


def _versions(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > 64:
        raise _wrong(name, "an object of at most 64 texts", value)
    return {_NAME(name, key): _NAME(f"{name}.{key}", text) for key, text in value.items()}


def _controls(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > 64:
        raise _wrong(name, "an object of at most 64 ControlNets", value)
    checks = {"scale": _scales, "interval": _scales, "model_sha256": _DIGEST}
    for key, one in value.items():
        _NAME(name, key)
        if not isinstance(one, dict) or one.keys() != checks.keys():
            raise _wrong(f"{name}.{key:.60}", f"an object of {', '.join(checks)}", one)
    return {key: {field: checks[field](name, x) for field, x in one.items()} for key, one in value.items()}


# Half a surrogate pair is no character, and cannot be written anywhere.
_PROMPT = _text(r"[^\ud800-\udfff]*", 100_000, "a text of at most 100,000 characters")
_NAME = _text(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*", 300, "a text of at most 300 printable characters")
_DIGEST = _or_none(_text(r"[0-9a-f]{8,128}", 128, "8 to 128 hexadecimal digits or null"))
_PIXELS = _whole(1, 2**16)
_FIELDS: dict[str, Any] = {
    "prompt": _PROMPT,
    "negative_prompt": _PROMPT,
    "num_inference_steps": _whole(1, 100_000),
    "guidance_scale": _scales,
    "sampler": _NAME,
    "sampler_options": _options,
    "strength": _or_none(_number(1e-9, 1)),
    "clip_skip": _whole(0, 100),
    "seed": _whole(0, 2**64 - 1),
    "height": _PIXELS,
    "width": _PIXELS,
    "rescale": _number(0, 1),
    "model": _NAME,
    "model_sha256": _DIGEST,
    "dtype": _text("float32|bfloat16", 8, '"float32" or "bfloat16"'),
    "driver": _text("scan|stepwise", 8, '"scan" or "stepwise"'),
    "batch": _whole(1, 2**16),
    "index": _whole(0, 2**16),
    "task": _text("text|image|inpaint", 8, '"text", "image" or "inpaint"'),
    "image_sha256": _DIGEST,
    "mask_sha256": _DIGEST,
    "mask_blur": _number(0, 1e6),
    "padding_mask_crop": _or_none(_whole(0, 2**16)),
    "windows": _whole(1, 64),
    "versions": _versions,
    "latents_sha256": _DIGEST,
    # Their ranges are those of `guidance.Options`.
    "guidance": _only(
        **dict.fromkeys(
            ("interval", "threshold", "quantile", "perpendicular", "perturbed", "image_scale", "loss", "loss_scale"),
            _value,
        )
    ),
    "exact_steps": _flag,
    "brownian": _flag,
    "regions_sha256": _DIGEST,
    "controls": _controls,
    "vae_tile": _or_none(_PIXELS),
    "fast": _only(deep_cache=_whole(2, 1000), gate=_number(1e-3, 1), merge=_number(1e-3, 0.75), tiny_vae=_flag),
    "tiny_vae_sha256": _DIGEST,
    "schedule": _only(
        num_train_timesteps=_whole(1, 10**6),
        beta_start=_number(0, 1),
        beta_end=_number(0, 1),
        kind=_NAME,
        zero_terminal_snr=_flag,
    ),
}


def _finite(value: Any) -> Any:
    """The same with the looks of infinity and NaN, which JSON has not, in their place."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Of NumPy's numbers Python's; of what JSON cannot hold its looks."""
    return value.item() if hasattr(value, "item") else repr(value)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number here")


# The web UI's text: the prompt; "Negative prompt: ..." where there is one; a last line of "Name: value, Name: value".
# A value with a comma, a colon or a line break in it is quoted as a JSON string. Lines are told apart by their looks
# alone, so that some prompts cannot be read back: our own JSON is there for those.
_PAIR = re.compile(r'\s*(\w[\w \-/]{1,80}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def _parameters(recipe: Recipe) -> str:
    lines = [recipe.prompt]
    if recipe.negative_prompt:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    spacing = recipe.sampler_options.get("spacing")
    scale = recipe.guidance_scale
    pairs = {
        "Steps": recipe.num_inference_steps,
        "Sampler": _WEB_UI_SAMPLERS.get(recipe.sampler, recipe.sampler),
        "Schedule type": _WEB_UI_SPACINGS.get(spacing) if isinstance(spacing, str) else None,
        "CFG scale": None if isinstance(scale, tuple) else _decimal(scale),  # the web UI knows only one for all steps
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model": PurePath(recipe.model).stem,
        "Denoising strength": None if recipe.strength is None else _decimal(recipe.strength),
        "Mask blur": _decimal(recipe.mask_blur) if recipe.mask_blur else None,
        # There 1 is the last layer, ours counts the layers left out.
        "Clip skip": recipe.clip_skip + 1 if recipe.clip_skip else None,
        "Version": f"sdjax {recipe.versions[KEY]}" if KEY in recipe.versions else "sdjax",
    }
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _decimal(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value


def from_parameters(text: str) -> Recipe:
    """A recipe from the web UI's text, as far as it goes: the rest is what such a picture is most likely to need.

    Raises:
      ValueError: there is no last line of settings, it has no seed, or a value is none.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"it has {len(text)} characters, more than {_LONGEST}")
    *lines, last = text.strip().split("\n")
    pairs = _pairs(last)
    if len(pairs) < 3:
        raise ValueError("expected a last line like 'Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1'")
    lines = [line.strip() for line in lines]
    starts = [i for i, line in enumerate(lines) if line.startswith("Negative prompt:")] or [len(lines)]
    prompt, negative = lines[: starts[0]], lines[starts[0] :]
    if (size := re.fullmatch(r"(\d{1,6})x(\d{1,6})", pairs.get("Size", "512x512"))) is None:
        raise _wrong("Size", "width x height", pairs["Size"])
    sampler, spacing = _web_ui_sampler(pairs.get("Sampler", "Euler"), pairs.get("Schedule type", ""))
    # With these it tells of a second pass, at a larger size.
    enlarged = any(name.startswith("Hires") for name in pairs)
    strength = None if enlarged else _parsed(pairs, "Denoising strength", float, None)
    version = pairs.get("Version", "")
    return _checked(
        {
            "prompt": "\n".join(prompt),
            "negative_prompt": "\n".join(negative).removeprefix("Negative prompt:").strip(),
            "num_inference_steps": _parsed(pairs, "Steps", int, 20),
            "guidance_scale": _parsed(pairs, "CFG scale", float, 7.0),
            "sampler": sampler,
            "sampler_options": {} if spacing is None else {"spacing": spacing},
            "strength": strength,
            "clip_skip": max(_parsed(pairs, "Clip skip", int, 1) - 1, 0),
            "seed": _parsed(pairs, "Seed", int, -1),  # which is refused: without it nothing can be made again
            "height": int(size[2]),
            "width": int(size[1]),
            "rescale": 0.0,
            "model": pairs.get("Model", "another model"),
            "model_sha256": None,
            "dtype": "float32",
            "driver": "scan",
            "batch": 1,
            "index": 0,
            "task": "text" if strength is None else "inpaint" if "Mask blur" in pairs else "image",
            "image_sha256": None,
            "mask_sha256": None,
            "mask_blur": _parsed(pairs, "Mask blur", float, 0.0),
            "padding_mask_crop": None,
            "windows": 1,
            "versions": {"program": f"another program ({version})" if version else "another program"},
        }
    )


def _pairs(line: str) -> dict[str, str]:
    """The names and values of a line of settings; in one pass, whatever a stranger has put there."""
    pairs: dict[str, str] = {}
    position = 0
    while position < len(line):
        match = _PAIR.match(line, position)
        if match is None:
            position = line.find(",", position) + 1 or len(line)
            continue
        name, value = match[1], match[2].strip()
        if len(value) > 1 and value[0] == value[-1] == '"':
            with contextlib.suppress(ValueError):
                value = str(json.loads(value, strict=False))
        pairs[name] = value
        position = match.end()
    return pairs


def _parsed(pairs: Mapping[str, str], name: str, kind: type, default: Any) -> Any:
    if name not in pairs:
        return default
    try:
        return kind(pairs[name])
    except ValueError as error:
        raise _wrong(name, "a number", pairs[name]) from error


def _web_ui_sampler(sampler: str, schedule: str) -> tuple[str, str | None]:
    """Our names of a sampler and its spacing; older pictures have both in one, as "DPM++ 2M Karras"."""
    spacing = None
    for ours, theirs in _WEB_UI_SPACINGS.items():
        if schedule.casefold() == theirs.casefold():
            spacing = ours
        if sampler.casefold().endswith(f" {theirs.casefold()}"):
            sampler, spacing = sampler[: -len(theirs) - 1], ours
    names = {theirs.casefold(): ours for ours, theirs in _WEB_UI_SAMPLERS.items()}
    return names.get(sampler.casefold(), sampler), spacing
