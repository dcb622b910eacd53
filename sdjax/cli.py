"""The `sdjax` command: thin, over `generate`, the checkpoints' functions, recipes and the cache.

JAX takes seconds to import. So `--help` and whatever can be refused without it come first, and each command imports
what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdjax import options

if TYPE_CHECKING:
    from PIL import Image

    from sdjax.pipeline import StableDiffusion
    from sdjax.recipe import Recipe
    from sdjax.samplers import Sampler

# Options that go to `generate` as they are.
PASSED = (
    "negative_prompt", "strength", "num_inference_steps", "guidance_scale", "clip_skip", "height", "width",
    "mask_blur", "padding_mask_crop", "exact_steps", "brownian", "vae_tile",
)  # fmt: skip


def script() -> int:
    """`main` as a process of its own."""
    # Looking for garbage among JAX's objects took half a second of every command, most of it at the very end.
    gc.set_threshold(100_000)
    status = main()
    gc.freeze()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 (failed), 2 (wrong arguments or input), 130 (Ctrl-C)."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("sdjax: %(message)s"))
    logging.getLogger("sdjax").addHandler(handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt's letters, in a terminal without them
    try:
        arguments = options.parser().parse_args(argv)
        commands = {"generate": _generate, "compile": _compile, "convert": _convert, "info": _info, "cache": _cache}
        commands[arguments.command](arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        status = _status(error)
        if status is None or os.environ.get("SDJAX_DEBUG"):
            raise
        _say(f"error: {_told(error)}")
        return status
    finally:
        logging.getLogger("sdjax").removeHandler(handler)


def _status(error: Exception) -> int | None:
    """The exit status for what a user can do something about; None for our own mistakes, which show where they are."""
    if isinstance(error, ValueError):
        return 2
    return 1 if isinstance(error, (OSError, FloatingPointError)) or _out_of_memory(error) else None


def _out_of_memory(error: Exception) -> bool:
    # A full device is an error of JAX's that has no class of its own.
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _told(error: Exception) -> str:
    if not _out_of_memory(error):
        return str(error) or type(error).__name__
    first = (str(error) or type(error).__name__).splitlines()[0]
    return f"out of memory; make fewer pictures at once (--batch-size) or smaller ones (--height, --width)\n{first}"


def _generate(arguments: argparse.Namespace) -> None:
    from sdjax import images, outputs, recipe

    old = None if arguments.source is None else recipe.read(arguments.source)
    prompts = _prompts(arguments, old)
    first = arguments.seed if arguments.seed is not None else secrets.randbits(32) if old is None else old.seed
    seeds = [first + i for i in range(len(prompts))]
    if seeds[-1] > options.LARGEST_SEED:
        raise ValueError(f"--seed: the last of {len(seeds)} pictures would get a seed above 2^64 - 1")
    targets = outputs.targets(arguments.output, prompts, seeds)
    settings = _loaded(arguments, old)
    if old is not None and len(prompts) == 1 and arguments.batch_size is None:
        pictures: Iterator[Image.Image] = iter([_again(old, prompts[0], first, settings)])
    else:
        pictures = _in_chunks(prompts, seeds, _batch(arguments, old, prompts), settings)
    for picture, target in zip(pictures, targets, strict=True):
        if arguments.output is None or os.path.isdir(arguments.output):
            target = outputs.free(target)  # another run may have taken the name meanwhile
        text = {key: picture.info[key] for key in (recipe.PARAMETERS, recipe.KEY)}
        images.save_image(target, picture, text)
        print(target, flush=True)
        if target.suffix.lower() != ".png":
            _say(f"note: {target} carries no recipe; a .png does")
        if old is not None and len(targets) == 1:
            _compare(arguments, old, picture)


def _compile(arguments: argparse.Namespace) -> None:
    from sdjax import compilation_cache

    if compilation_cache.location() is None:
        raise ValueError("SDJAX_CACHE: the cache is switched off, so the programs would be kept nowhere")
    if compilation_cache.limit() == 0:
        raise ValueError("SDJAX_CACHE_GIB: it is 0, so no program would be kept")
    arguments.prompts = arguments.prompts or ([""] if arguments.prompts_file is None else [])
    prompts = _prompts(arguments, None)
    settings = _loaded(arguments, None)

    from sdjax import generation

    size = _batch(arguments, None, prompts)
    settings |= {"seed": arguments.seed, "batch_size": size, "weights": arguments.weights}
    for progress in (False, True):
        generation.compile(prompts[:size], **{**settings, "progress": progress})
    if arguments.weights:
        kept = settings["model"].keep_prepared()
        _say("note: this model has no weights to transform" if kept is None else f"weights kept in {kept}")


def _batch(arguments: argparse.Namespace, old: Recipe | None, prompts: list[str]) -> int:
    """How many pictures are made at once."""
    from sdjax import plan

    return arguments.batch_size or (old.batch if old else min(len(prompts), plan.DEFAULT_BATCH))


def _loaded(arguments: argparse.Namespace, old: Recipe | None) -> dict[str, Any]:
    """The arguments of `generate`, the model among them: those given, on top of an old recipe's."""
    from sdjax import recipe
    from sdjax.checkpoints import hub

    settings = _settings(arguments, old)
    if old is not None and arguments.model is None and old.model.split(" + ")[0] != "default":
        raise ValueError(f"--model: the picture was made with {old.model!r}; say where that file is")
    if old is not None and " + " in old.model and not (arguments.lora or arguments.vae or arguments.embedding):
        raise ValueError(
            f"--lora, --vae, --embedding: the picture was made with {old.model!r}; say where those files are"
        )
    if old is not None and old.fast.get("tiny_vae") and arguments.tiny_vae is None:
        raise ValueError("--tiny-vae: the picture was decoded by TAESD; say where its file is")
    if arguments.model is not None and not os.path.exists(arguments.model) and not hub.is_name(arguments.model):
        raise ValueError(f"--model: there is no {arguments.model}")

    # From here on it takes seconds.
    from sdjax import control, fast, guidance, loading, plan

    model = loading.load(arguments.model, dtype=arguments.dtype or (old.dtype if old else None))
    if arguments.vae is not None:
        model = model.with_part(arguments.vae, "vae")
    for path, weight in arguments.lora:
        model = model.with_lora(path, weight)
    for path in arguments.embedding:
        model = model.with_embedding(path)
    if arguments.tiny_vae is not None:
        model = model.with_tiny_decoder(arguments.tiny_vae)
    controls = {}
    scales = arguments.control_scale or [1.0] * len(arguments.controlnet)
    for i, (path, hint, scale) in enumerate(zip(arguments.controlnet, arguments.control_image, scales, strict=True)):
        name = f"{Path(path).stem} {i + 1}" if Path(path).stem in controls else Path(path).stem
        model = model.with_controlnet(path, name)
        controls[name] = control.Control(hint, scale)
    if controls:
        settings["controls"] = controls
    if old is not None:
        for difference in recipe.differences(old, model, plan.versions()):
            _say(difference)
    wanted = {} if old is None else {"rescale": old.rescale, **old.guidance}
    for name in ("rescale", "interval", "threshold", "quantile", "perpendicular", "perturbed", "image_scale"):
        if (given := getattr(arguments, f"guidance_{name}")) is not None:
            wanted[name] = given
    quick = {} if old is None else dict(old.fast)
    for name in ("deep_cache", "gate", "merge"):
        if (given := getattr(arguments, name)) is not None:
            quick[name] = given
    if arguments.tiny_vae is not None:
        quick["tiny_vae"] = True
    if quick:
        settings["fast"] = fast.Fast(**quick)
    settings |= {
        "model": model,
        "sampler": _sampler(arguments, old, model),
        "guidance": guidance.Options(**wanted),
    }
    return settings


def _prompts(arguments: argparse.Namespace, old: Recipe | None) -> list[str]:
    """One prompt for each picture."""
    prompts = list(arguments.prompts)
    if arguments.prompts_file is not None:
        try:
            path = arguments.prompts_file
            text = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts-file: {error}") from error
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    elif len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        _say(f"note: these are {len(prompts)} prompts; one prompt of several words needs quotes around it")
    if not prompts and old is None:
        raise ValueError('no prompt; try: sdjax generate "a 3d emoji of a fox"')
    for prompt in (*prompts, arguments.negative_prompt or ""):
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ValueError(f"prompt: {prompt!r} is not valid text in the terminal's encoding")
    return [prompt for prompt in prompts or [old.prompt if old else ""] for _ in range(arguments.images_per_prompt)]


def _settings(arguments: argparse.Namespace, old: Recipe | None) -> dict[str, Any]:
    """The arguments of `generate` that can be told without JAX: those given, on top of an old recipe's."""
    from sdjax import images

    settings: dict[str, Any] = {}
    for name in PASSED:
        given = getattr(arguments, name)
        value = getattr(old, name) if given is None and old is not None else given
        if value is not None:
            settings[name] = value
    for name, task in (("image", ("image", "inpaint")), ("mask_image", ("inpaint",))):
        path, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if path is not None:
            load = images.load_image if name == "image" else images.load_mask
            settings[name] = load(path, name=option)
        elif old is not None and old.task in task:
            raise ValueError(
                f"{option}: the picture was made from another one, which its recipe has not; give it again"
            )
    if old is not None and old.latents_sha256 is not None:
        raise ValueError("--from: the picture was made from start noise that its recipe has not; use sdjax.generate")
    if arguments.regions:
        settings["regions"] = [images.load_mask(path, name="--regions") for path in arguments.regions]
    elif old is not None and old.regions_sha256 is not None:
        raise ValueError("--regions: the picture was made with masks that its recipe has not; give them again")
    if old is not None and "loss" in old.guidance:
        raise ValueError("--from: the picture was made with a loss, which its recipe has not; use sdjax.generate")
    if old is not None and old.controls:
        raise ValueError("--from: the picture followed a ControlNet's, which its recipe has not; use sdjax.generate")
    if arguments.mask_image is not None and arguments.image is None:
        raise ValueError("--mask-image: it concerns an --image, and there is none")
    nets, hints, scales = arguments.controlnet, arguments.control_image, arguments.control_scale
    if len(nets) != len(hints) or len(scales) not in (0, len(nets)):
        raise ValueError(
            f"--controlnet: there are {len(nets)}, {len(hints)} --control-image, {len(scales)} --control-scale"
        )
    arguments.control_image = [images.load_image(path, name="--control-image") for path in hints]
    interactive = sys.stderr.isatty() and not arguments.no_progress
    stepwise = interactive if old is None else old.driver == "stepwise"
    settings["progress"] = stepwise and interactive
    if stepwise and not interactive:
        settings["callback"] = lambda *_: None  # the same program, without a bar
    return settings


def _sampler(arguments: argparse.Namespace, old: Recipe | None, model: StableDiffusion) -> Sampler:
    from sdjax.schedule import Schedule

    options: dict[str, Any] = {}
    if old is not None and arguments.sampler is None:
        options |= old.sampler_options
        if old.schedule:
            options["schedule"] = Schedule(**old.schedule)
    if arguments.spacing is not None:
        options["spacing"] = arguments.spacing
    options |= dict(arguments.sampler_option)
    name = arguments.sampler or (old.sampler if old else "ddpm")
    return model.sampler(name, **options)


def _in_chunks(prompts: list[str], seeds: list[int], size: int, settings: dict[str, Any]) -> Iterator[Image.Image]:
    """Picture by picture; what is finished can be written before the next ones are begun."""
    from sdjax import generation

    for start in range(0, len(prompts), size):
        chunk = slice(start, start + size)
        with _at_once():
            made = generation.generate(prompts[chunk], seed=seeds[chunk], batch_size=size, **settings)
        yield from made
        if len(made) < len(prompts[chunk]):  # it returns what it has after Ctrl-C
            raise KeyboardInterrupt


def _again(old: Recipe, prompt: str, seed: int, settings: dict[str, Any]) -> Image.Image:
    """The picture in the same compiled program and at the same place as then: to the bit it depends on those too."""
    from sdjax import generation
    from sdjax.prompts import encode

    prompts, negative = [prompt] * old.batch, [settings.get("negative_prompt", "")]
    conditioning, _ = encode(settings["model"].tokenizer, [prompt], negative, old.num_inference_steps)
    if conditioning.windows.shape[-1] < old.windows:
        # A longer text beside it had the program compiled for more windows: so it needs one again.
        long = " ".join(["a"] * (75 * (old.windows - 1) + 1))
        long = " AND ".join([*["a"] * (conditioning.token_ids.shape[1] - 1), long])
        prompts = [*prompts, long] if old.batch == 1 else [long if i != old.index else prompt for i in range(old.batch)]
    with _at_once():
        made = generation.generate(prompts, seed=[seed] * len(prompts), batch_size=old.batch, **settings)
    if len(made) <= old.index:
        raise KeyboardInterrupt
    return made[old.index]


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """Ctrl-C ends the process at once, as the shell expects (status 130).

    Python looks at signals between its own instructions only: it would wait for a compiler or a scanned loop, for
    minutes. Nothing is lost: what is computed within is one batch, and all before it is written.
    """
    main = threading.current_thread() is threading.main_thread()
    ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _compare(arguments: argparse.Namespace, old: Recipe, picture: Image.Image) -> None:
    """Says what became of a picture that was made again."""
    import numpy as np

    from sdjax import images, recipe

    new = recipe.from_json(picture.info[recipe.KEY])
    if (new.height, new.width, new.mask_blur, new.padding_mask_crop) == (
        old.height,
        old.width,
        old.mask_blur,
        old.padding_mask_crop,
    ):
        for name in ("image", "mask"):
            then, now = (getattr(one, f"{name}_sha256") for one in (old, new))
            if None not in (then, now) and then != now:
                _say(f"warning: the {name} is not the one that the picture was made from")
    if dataclasses.replace(new, versions={}, model=old.model) != dataclasses.replace(old, versions={}):
        return  # it was not meant to be the same
    before, after = (np.asarray(one, np.int16) for one in (images.load_image(arguments.source), picture))
    same = before.shape == after.shape and np.array_equal(before, after)
    _say(f"{'the same' if same else 'not the same'}, pixel by pixel, as {arguments.source}")


def _convert(arguments: argparse.Namespace) -> None:
    source, target = arguments.source, Path(arguments.target)
    if not os.path.exists(source):
        raise ValueError(f"SOURCE: there is no {source}")
    if not target.parent.is_dir():
        raise ValueError(f"TARGET: there is no folder {target.parent}; make it first")
    if target.exists() and (target.is_dir() or os.path.samefile(source, target)):
        raise ValueError(f"TARGET: {target} is {'a folder' if target.is_dir() else 'the source itself'}")
    if target.exists() and arguments.layout == "diffusers":
        raise ValueError(f"TARGET: {target} is a file, and --layout diffusers writes a folder; choose another name")
    if target.exists() and not arguments.overwrite:
        raise ValueError(f"TARGET: {target} exists; choose another name, or give --overwrite")
    from sdjax import checkpoints, pipeline

    checkpoints.convert(
        source,
        target,
        pipeline.shapes,
        ema=arguments.ema,
        prediction=arguments.prediction,
        dtype=arguments.dtype,
        layout=arguments.layout,
        hash_source=arguments.hash_source,
    )
    print(target)


def _info(arguments: argparse.Namespace) -> None:
    path = Path(arguments.file)
    if not path.exists():
        raise ValueError(f"FILE: there is no {path}")
    if path.is_file():
        with path.open("rb") as file:
            picture = file.read(8) == b"\x89PNG\r\n\x1a\n"
    else:
        picture = False
    if picture:
        from sdjax import recipe

        found: Any = dataclasses.asdict(recipe.read(path))
    else:
        from sdjax import checkpoints

        found = checkpoints.describe(path)
    if arguments.json:
        print(json.dumps(found, indent=2, default=str))
    elif isinstance(found, dict):
        for name, value in found.items():
            if value not in (None, {}):
                print(f"{name}: {_printable(value if isinstance(value, str) else json.dumps(value, default=str))}")
    else:
        print(_printable(str(found)))


def _cache(arguments: argparse.Namespace) -> None:
    from sdjax import compilation_cache

    folder = compilation_cache.location()
    if folder is None:
        print("switched off by SDJAX_CACHE")
        return
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        _say("note: JAX_COMPILATION_CACHE_DIR is set; JAX's own cache there is used instead of this one")
    size = compilation_cache.clear() if arguments.clear else compilation_cache.size()
    print(f"{folder}: {size / 2**20:.1f} MiB{' deleted' if arguments.clear else ''}")


def _say(message: str) -> None:
    print(f"sdjax: {_printable(message)}", file=sys.stderr)


def _printable(text: str) -> str:
    """The text without what would command a terminal; it may come from a stranger's file."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    sys.exit(main())
