"""The suite is stricter than its users: no silent broadcasting between ranks anywhere."""

import jax
import numpy as np
import pytest

from sdjax import loading, pipeline
from sdjax.checkpoints import native
from sdjax.models.config import TINY

jax.config.update("jax_numpy_rank_promotion", "raise")


def live_weights(config, seed=0):
    """A random tree in which everything matters: no zero convolutions, no norm at its start."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        normal = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.2 * normal
        if path[-1].key == "bias":
            return 0.1 * normal
        return normal / np.sqrt(np.prod(leaf.shape[:-1]), dtype=np.float32)

    return jax.tree_util.tree_map_with_path(draw, pipeline.shapes(config))


@pytest.fixture(scope="session")
def live():
    """`live_weights`."""
    return live_weights


@pytest.fixture
def compilations():
    """What was compiled since the test began, eager operations included; a list that grows."""
    events = []

    def listen(event, duration, **_):
        if "compile" in event and "backend" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """A native file of a tiny model with random live weights."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    native.save(path, live_weights(TINY), TINY)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_file):
    """The model of `tiny_file`."""
    return loading.load(tiny_file)


@pytest.fixture
def no_disk_cache(monkeypatch):
    """Programs are compiled, not fetched."""
    monkeypatch.setenv("SDJAX_CACHE", "off")
