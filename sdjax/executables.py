"""Compiled programs that are found again before they are traced, so that a second process starts at once.

JAX's cache knows a program by its HLO, which takes seconds of Python to make. Here it is known by what the HLO is made
from: the static argument, the shapes of the others, this package's source, and the settings, versions and device.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import platform
import threading
from collections.abc import Callable, Hashable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
from jax.experimental import serialize_executable

from sdjax import compilation_cache

logger = logging.getLogger(__name__)

Returned = TypeVar("Returned")
Compiled = jax.stages.Compiled
_compiling = threading.Lock()  # what two threads want is compiled once


class Kept(Generic[Returned]):
    """`jax.jit(function, static_argnums=0)` whose programs are kept on disk, whole, where our cache is switched on.

    Elsewhere it is that jit: also in a trace, on devices that somebody chose, and for static arguments without an
    identity.
    """

    def __init__(
        self,
        function: Callable[..., Returned],
        identity: Callable[[Any], str | None],
        donate_argnums: tuple[int, ...] = (),
    ) -> None:
        """`identity` gives a text that only equal static arguments have, in any process; None where there is none."""
        self.jitted = jax.jit(function, static_argnums=0, donate_argnums=donate_argnums)
        self._name = function.__name__
        self._identity = identity
        self._donated = donate_argnums
        self._known: dict[Hashable, Compiled] = {}

    def __call__(self, static: Any, *arguments: Any) -> Returned:
        return self.bound(static, *arguments)(*arguments)

    def bound(self, static: Any, *arguments: Any) -> Callable[..., Returned]:
        """The program of such arguments, a function of all but the static one: looked up once for many calls."""
        return self._program(static, arguments) or functools.partial(self.jitted, static)

    def prepare(self, static: Any, *arguments: Any) -> None:
        """Compiles the program of such arguments where it is not kept yet, and does not run it."""
        if self._program(static, arguments) is None:
            self.jitted.lower(static, *arguments).compile()

    def fetch(self, static: Any, *arguments: Any) -> Compiled | None:
        """Reads the program of such arguments, which may be shapes, where it is kept; compiles nothing."""
        known = self._place(static, arguments)
        if known is None:
            return None
        with _compiling:
            if known not in self._known and (found := _read(self._file(known), arguments)) is not None:
                self._known[known] = found
            return self._known.get(known)

    def _program(self, static: Any, arguments: tuple[Any, ...]) -> Compiled | None:
        known = self._place(static, arguments)
        if known is None:
            return None
        if known not in self._known:
            with _compiling:
                if known not in self._known:
                    name = self._file(known)
                    self._known[known] = _read(name, arguments) or self._compile(name, static, arguments)
        return self._known[known]

    def _place(self, static: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What tells programs of this function apart; None where they are not kept."""
        asked = any(getattr(jax.config, name, None) for name in ("jax_disable_jit", "jax_default_device"))
        if self._identity(static) is None or asked or not compilation_cache.is_ours():
            return None
        leaves, tree = jax.tree.flatten(arguments)
        here = {jax.devices()[0]}
        if any(isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and x.devices() != here) for x in leaves):
            return None
        kinds = tuple(jax.api_util.shaped_abstractify(leaf) for leaf in leaves)
        return static, tree, kinds, _settings()

    def _file(self, known: tuple[Any, ...]) -> str:
        """The name that a program has on disk."""
        static, tree, kinds, settings = known
        parts = [str(self._identity(static)), str(tree), *map(repr, kinds), repr(self._donated), settings, _here()]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return f"sdjax-{self._name.strip('_')}-{digest}"

    def _compile(self, name: str, static: Any, arguments: tuple[Any, ...]) -> Compiled:
        # A program out of JAX's own cache cannot be written again (on a CPU it lacks functions then).
        with compilation_cache.without_jax():
            compiled = self.jitted.lower(static, *arguments).compile()
        data, _, tree = serialize_executable.serialize(compiled)
        # Trees of named tuples cannot be pickled, but what has such a tree can.
        text = pickle.dumps((jax.tree.unflatten(tree, range(tree.num_leaves)), data))
        compilation_cache.keep(name, hashlib.sha256(text).digest() + text)
        return compiled


def _read(name: str, arguments: tuple[Any, ...]) -> Compiled | None:
    """The program of this name; None where there is none, or none that can be used."""
    text = compilation_cache.find(name)
    if text is None:
        return None
    try:
        if hashlib.sha256(text[32:]).digest() != text[:32]:
            raise ValueError("it is damaged")
        template, data = pickle.loads(text[32:])
        trees = jax.tree.structure((arguments, {})), jax.tree.structure(template)
        compiled: Compiled = serialize_executable.deserialize_and_load(
            data, *trees, execution_devices=jax.devices()[:1]
        )
        return compiled
    except Exception as error:  # whatever it is, the program can be compiled again
        logger.warning("a compiled program could not be used and is made again: %s", error)
        compilation_cache.forget(name)
        return None


def _settings() -> str:
    """JAX's and XLA's; those of threads and contexts, too."""
    names = [name for name in sorted(jax.config.values) if "cache" not in name]
    options = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return repr([*((name, getattr(jax.config, name, None)) for name in names), *options])


@functools.cache
def _here() -> str:
    """What else a program depends on: source, versions, machine."""
    source = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        source.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return repr([
        source.hexdigest(),
        [version(package) for package in ("jax", "jaxlib", "flax", "numpy")],
        platform.python_version(),
        (device.platform, device.device_kind, device.client.platform_version, jax.device_count(), cores),
        _instructions(),
    ])  # fmt: skip


def _instructions() -> str:
    """What this machine's processor can do: a home folder may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(line for line in lines if line.startswith(("flags", "Features")))[:10_000]
