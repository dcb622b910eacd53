"""Compiled programs, kept on disk between processes: JAX's persistent cache, around our own compiles only.

Somebody else's `jax.jit` in the same process is left as it is, and so is everything where the user has set a cache
folder. What lies in the folder is code that will be run, so it must be the user's own: nobody else may write there.

Environment:
  SDJAX_CACHE: a folder in place of the user's cache folder; "off" for no cache.
  SDJAX_CACHE_GIB: how big it may get, 4 by default; the programs that have not been used for longest go first.

Transformed weights, which are kept only where somebody asks for it (`sdjax.transformed`), lie there too; the limit does
not concern them.

This module imports JAX only when a cache is switched on: `sdjax cache` answers without it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import math
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

DEFAULT_GIB = 4.0
_OFF = ("off", "0", "no", "false")
_ENTRY, _LAST_USE, _LOCK = "-cache", "-atime", ".lockfile"  # what JAX calls its files
_FOLDER, _SWITCH = "jax_compilation_cache_dir", "jax_enable_compilation_cache"  # and two of its settings
KERNELS = "kernels"  # the subfolder of `sdjax.transformed`
_SUBFOLDERS = ("xla_gpu_per_fusion_autotune_cache_dir", "xla_gpu_kernel_cache_file", KERNELS)

# JAX's configuration belongs to the whole process, and threads may generate at the same time: the first one in sets
# it, the last one out restores it.
_lock = threading.Lock()
_inside = 0
_before: dict[str, Any] = {}


def location() -> Path | None:
    """The folder of the compiled programs, whether it exists yet or not; None where the cache is switched off.

    None also for a user without a home, as containers have them.
    """
    chosen = os.environ.get("SDJAX_CACHE", "")
    if chosen.strip().lower() in _OFF:
        return None
    try:
        return Path(chosen).expanduser().absolute() if chosen else _user_cache_folder() / "sdjax"
    except RuntimeError:  # from Path.home
        return None


def size() -> int:
    """Bytes on disk."""
    return sum(path.lstat().st_size for path in _files())


def clear() -> int:
    """Deletes what is kept there, and nothing else that may lie in the folder. Returns the bytes that were freed.

    Raises:
      OSError: one could not be deleted.
    """
    freed = size()
    folder = location()
    if folder is None or not folder.is_dir():
        return 0
    for path in _files():
        path.unlink(missing_ok=True)
    for name in _SUBFOLDERS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    return freed


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """What is compiled within is kept on disk, and looked up there first.

    Cheap, may be nested and entered from several threads. It changes nothing where the user has set JAX's own
    `jax_compilation_cache_dir`. A folder that cannot be used is said once in the log; everything then works without.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _switch_on()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore()


def is_ours() -> bool:
    """Whether programs are kept in our folder now: within `enabled`, where it can be used."""
    return bool(_before)


@contextlib.contextmanager
def without_jax() -> Iterator[None]:
    """Within `enabled`, what is compiled within this is neither looked up nor kept by JAX itself."""
    with _lock:
        _update({_SWITCH: False})
    try:
        yield
    finally:
        with _lock:
            _update({_SWITCH: True})


def find(name: str) -> bytes | None:
    """What `keep` put there under this name."""
    return _ask(lambda store: store.get(name))


def keep(name: str, value: bytes) -> None:
    """Puts it into the cache, and of what has not been used for longest as much out as it takes."""
    _ask(lambda store: store.put(name, value))


def forget(name: str) -> None:
    """Takes it out of the cache."""
    for ending in (_ENTRY, _LAST_USE):
        with contextlib.suppress(OSError):
            (Path(_before["ours"]) / (name + ending)).unlink(missing_ok=True)


def _ask(question: Callable[[Any], bytes | None]) -> bytes | None:
    """What JAX's own store says to this, or nothing where the disk or another process is in the way."""
    from jax._src.lru_cache import LRUCache  # it has no public name, and counts what JAX keeps beside ours

    try:
        return question(LRUCache(_before["ours"], max_size=limit()))
    except (OSError, ValueError) as error:  # a time of last use that is none is a ValueError
        _warn_once(f"compiled programs are not kept in {_before['ours']}: {error}")
        return None


def _switch_on() -> None:
    import jax

    if getattr(jax.config, _FOLDER) is not None or not getattr(jax.config, _SWITCH):
        return
    folder, most = location(), limit()
    if folder is None or most == 0 or not is_usable(folder):
        return
    settings = {
        _FOLDER: str(folder),
        # All of it is kept, however small: a start consists of many small programs besides the large one.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_compilation_cache_max_size": most,
        "jax_raise_persistent_cache_errors": False,
    }
    _before.update({name: getattr(jax.config, name) for name in settings}, ours=str(folder))
    _update(settings)


def _restore() -> None:
    import jax

    before = dict(_before)
    _before.clear()
    if not before:
        return
    if getattr(jax.config, _FOLDER) != before.pop("ours"):
        del before[_FOLDER]  # one that was set meanwhile is the user's
    _update(before)


def _update(values: dict[str, Any]) -> None:
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    for name, value in values.items():
        jax.config.update(name, value)
    # JAX opens its cache once per process and keeps it open, whatever its settings become.
    reset_cache()


def limit() -> int:
    """Bytes that the cache may hold; -1 for any number where JAX cannot keep count."""
    text = os.environ.get("SDJAX_CACHE_GIB", "")
    try:
        gib = float(text) if text else DEFAULT_GIB
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        _warn_once(f"SDJAX_CACHE_GIB: expected a number of GiB, got {text!r}; taking {DEFAULT_GIB:g}")
        gib = DEFAULT_GIB
    if gib and importlib.util.find_spec("filelock") is None:  # JAX needs it to share the count between processes
        return -1
    return int(gib * 2**30)


@functools.cache
def is_usable(folder: Path) -> bool:
    """Whether the folder is there, ours alone to write, and writable; asked once per process."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        wrong = _distrusted(folder)
        if wrong is None and not os.access(folder, os.W_OK | os.X_OK):
            wrong = "it cannot be written to"
        if wrong is None:
            _repair(folder)
    except OSError as error:
        wrong = str(error)
    if wrong is not None:
        _warn_once(f"compiled programs are not kept in {folder}: {wrong}")
    return wrong is None


def _distrusted(folder: Path) -> str | None:
    """What is wrong with a folder to run code from, with what to do; None if nothing is."""
    if not hasattr(os, "getuid"):  # Windows keeps users apart by the place of LOCALAPPDATA
        return None
    found = folder.stat()
    if found.st_uid != os.getuid():
        return "it belongs to another user; set SDJAX_CACHE to a folder of your own"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write there; run: chmod go-w '{folder}'"
    return None


def _repair(folder: Path) -> None:
    """Deletes programs that a killed process left half written.

    JAX writes an entry in place, and the time of its last use after it. One without the other is unreadable, is never
    written again, and keeps JAX from making room for new ones.
    """
    if importlib.util.find_spec("filelock") is None:
        return
    import filelock

    with contextlib.suppress(filelock.Timeout, NotImplementedError), filelock.FileLock(folder / _LOCK, timeout=0):
        names = {path.name for path in folder.iterdir()}
        for name in names:
            for ending, other in ((_ENTRY, _LAST_USE), (_LAST_USE, _ENTRY)):
                if name.endswith(ending) and name.removesuffix(ending) + other not in names:
                    (folder / name).unlink(missing_ok=True)


def _files() -> list[Path]:
    """Every file in the folder that is the cache's."""
    folder = location()
    if folder is None or not folder.is_dir():
        return []
    own = [path for path in folder.iterdir() if path.name.endswith((_ENTRY, _LAST_USE)) or path.name == _LOCK]
    below = [path for name in _SUBFOLDERS for path in (folder / name).rglob("*")]
    return [path for path in own + below if path.is_file() or path.is_symlink()]


def _user_cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):  # the standard says to ignore relative ones
        return Path(chosen)
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
