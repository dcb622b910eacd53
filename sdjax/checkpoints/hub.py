"""Models by their names on the Hugging Face hub, downloaded into its own cache, by its own library (an extra)."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from sdjax.checkpoints import contents
from sdjax.checkpoints.errors import CheckpointError

NAME = r"[A-Za-z0-9][\w.-]*"
# owner/name, or a file of it: owner/name/file.safetensors.
REPOSITORY = re.compile(rf"(?P<repo>{NAME}/{NAME})(?:/(?P<file>[^/].*))?", re.ASCII)
FILES = (".safetensors", ".ckpt", ".pt", ".bin")
CONFIGURATIONS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
)


def is_name(path: str) -> bool:
    """Whether this may be the name of a repository or of a file in one, and is no path that is there."""
    found = REPOSITORY.fullmatch(path)
    if found is None or (found["file"] is None and path.endswith(FILES)):
        return False
    return not Path(path).exists() and not Path(path).parent.is_dir()


def fetch(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """The file or folder of this name, downloaded where the cache has it not; nothing but what `load` reads.

    Without a network, or with HF_HUB_OFFLINE=1, what the cache has is taken.

    Args:
      name: "owner/name" of a diffusers folder, or "owner/name/file" of a single file.
      revision: a branch, a tag or a commit; None is the main branch, as it is now.
      variant: of the weights, such as "fp16"; None prefers those without one.

    Raises:
      CheckpointError: the library is missing, the hub or the repository cannot be reached, or it holds no model.
    """
    found = REPOSITORY.fullmatch(name)
    if found is None:
        raise CheckpointError(f"{name}: a name on the hub is owner/name, or owner/name/file")
    hub = _library(name)
    try:
        if found["file"]:
            return Path(hub.hf_hub_download(found["repo"], found["file"], revision=revision))
        try:
            files = hub.HfApi().list_repo_files(found["repo"], revision=revision)
        except Exception as error:
            if isinstance(error, hub.errors.HfHubHTTPError) and error.response is not None:
                raise  # the hub has answered
            local = hub.snapshot_download(
                found["repo"], revision=revision, local_files_only=True, allow_patterns=["model_index.json"]
            )
            return Path(local)
        return Path(
            hub.snapshot_download(found["repo"], revision=revision, allow_patterns=wanted(name, files, variant))
        )
    except CheckpointError:
        raise
    except Exception as error:  # of the library, of the network, of the disk: all are its story
        told = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name}: there is no such file or folder, and on the hub: {told:.300}") from error


def wanted(name: str, files: list[str], variant: str | None) -> list[str]:
    """Of a repository's files those that make up the model, each once though it be there in several formats."""
    there = set(files)
    if "model_index.json" not in there:
        single = sorted(file for file in there if file.endswith(FILES[:2]))
        hint = f"; did you mean {name}/{single[0]}?" if single else ""
        raise CheckpointError(
            f"{name}: a repository without a model_index.json, so no model in diffusers' layout{hint}"
        )
    chosen = [file for file in CONFIGURATIONS if file in there]
    for part in contents.PARTS:
        weights = next(
            (f"{part}/{file}" for file in contents.candidates(part, variant) if f"{part}/{file}" in there), None
        )
        flax = f"{part}/{contents.FLAX_STEMS[part]}.msgpack"
        weights = flax if weights is None and flax in there and variant is None else weights
        if weights is None:
            of = f" of the variant {variant!r}" if variant else ""
            raise CheckpointError(f"{name}: no weights{of} in its {part}")
        chosen += [f"{part}/config.json", weights]
        if weights.endswith(".index.json"):
            stem, ending = weights.removesuffix(".index.json").rsplit(".", 1)
            chosen += sorted(file for file in there if re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.{ending}", file))
    return chosen


def _library(name: str) -> ModuleType:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{name}: there is no such file or folder; to download it from the hub: pip install 'sdjax[hub]'"
        )
    import huggingface_hub
    import huggingface_hub.errors

    return huggingface_hub
