"""Programs that a second process runs without tracing them: which are found, which must not be."""

import json
import logging
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import sdjax
from sdjax import compilation_cache, executables, program
from sdjax.executables import Kept
from sdjax.job import Job

OPTIONS = {"seed": 1, "num_inference_steps": 2, "height": 16, "width": 24, "output_type": "np"}

PROCESS = """
import json, logging, sys
import numpy as np
import jax, sdjax

traced = []
class Listen(logging.Handler):
    def emit(self, record):
        traced.append(record.getMessage())
logging.getLogger("sdjax").addHandler(Listen())
events = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name.rpartition("/")[2]))
model, options, callback = sdjax.load(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "stepwise"
if sys.argv[3] == "compile":
    sdjax.compile("a cat", model=model, **options)
    pictures = np.zeros(0)
else:
    pictures = sdjax.generate("a cat", model=model, callback=(lambda *_: None) if callback else None, **options)
print(json.dumps({"pictures": pictures.tolist(), "said": traced, "compiled": events.count("backend_compile_duration")}))
"""


def process(path, cache, how="scan", **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(path), json.dumps(OPTIONS), how],
        env={**os.environ, "SDJAX_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def entries(folder, name="run"):
    return list(folder.glob(f"sdjax-{name}-*-cache"))


@pytest.mark.slow
def test_a_second_process_traces_and_compiles_nothing(tiny_file, tmp_path):
    assert "compiling" in str(process(tiny_file, tmp_path, "compile")["said"])
    made = process(tiny_file, tmp_path)
    assert (made["said"], made["compiled"]) == ([], 0)
    expected = sdjax.generate("a cat", model=tiny_file, **OPTIONS)
    np.testing.assert_array_equal(made["pictures"], expected)
    # Step by step there are three other programs; one gives its argument's memory away.
    first = process(tiny_file, tmp_path, "stepwise")
    assert first["compiled"] == 3
    second = process(tiny_file, tmp_path, "stepwise")
    assert second["compiled"] == 0
    np.testing.assert_array_equal(first["pictures"], second["pictures"])
    np.testing.assert_array_equal(first["pictures"], expected)
    # Another program of JAX's settings.
    assert process(tiny_file, tmp_path, JAX_DEFAULT_MATMUL_PRECISION="highest")["compiled"]
    assert len(entries(tmp_path)) == 2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    compilation_cache.is_usable.cache_clear()
    return tmp_path


@pytest.fixture
def traces():
    return []


@pytest.fixture
def kept(traces):
    """Makes a new process's idea of one function."""

    def make():
        def double(factor, x):
            traces.append(x.shape)
            return {"out": factor * x}

        return Kept(double, lambda factor: None if factor == 7 else repr(factor))

    return make


def test_what_makes_another_program(cache, kept, traces):
    def call(factor, x):
        before = len(traces)
        with compilation_cache.enabled():
            np.testing.assert_array_equal(kept()(factor, x)["out"], factor * x)
        return len(traces) > before

    x = np.ones((2, 3), np.float32)
    assert call(3, x)
    assert not call(3, x + 1)
    assert not call(3, jax.numpy.asarray(x))
    assert call(4, x)
    assert call(3, x[:1])
    assert call(3, x.astype(np.int32))
    with jax.default_matmul_precision("highest"):
        assert call(3, x)
        assert not call(3, x)
    assert not call(3, x)
    assert call(7, x)  # it has no identity
    assert call(7, x)


def test_fetched_by_shapes_alone(cache, kept, traces):
    """Nothing is made where it is not kept; where it is, it is read before there are arrays, and once."""
    x = np.ones((2, 3), np.float32)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    with compilation_cache.enabled():
        assert kept().fetch(3, shape) is None
        assert traces == []
        kept()(3, x)
        found = kept()
        program = found.fetch(3, shape)
        assert program.out_info["out"].shape == (2, 3)
        assert found.bound(3, x) is program
        assert found.fetch(3, shape) is program
        assert found.fetch(7, shape) is None  # it has no identity
    assert len(traces) == 1


@pytest.mark.slow
def test_a_run_fetches_while_it_makes_ready(cache, tiny_file, monkeypatch):
    """The stepwise driver's programs, too, are there before they are called."""
    fetched = []
    fetch = Kept.fetch
    monkeypatch.setattr(Kept, "fetch", lambda self, *given: fetched.append(fetch(self, *given)) or fetched[-1])
    for options, count in (({}, 1), ({"callback": lambda *_: None}, 3)):
        model = sdjax.load(tiny_file)
        sdjax.compile("a cat", model=model, **OPTIONS, **options)
        fetched.clear()
        sdjax.generate("a cat", model=model, **OPTIONS, **options)
        assert len(fetched) == count
        assert None not in fetched


def test_another_source_is_another_program(cache, kept, traces, monkeypatch):
    x = np.ones(3, np.float32)
    with compilation_cache.enabled():
        kept()(3, x)
        monkeypatch.setattr(executables, "_here", lambda: "a newer version")
        kept()(3, x)
        assert len(traces) == 2


@pytest.mark.parametrize("spoil", [lambda text: text[:-9], lambda text: b"", lambda text: text[:40] + b"x" + text[41:]])
def test_a_damaged_program_is_made_again(cache, kept, traces, caplog, spoil):
    x = np.ones(3, np.float32)
    with compilation_cache.enabled():
        kept()(3, x)
        (path,) = entries(cache, "double")
        whole = path.read_bytes()
        path.write_bytes(spoil(whole))
        np.testing.assert_array_equal(kept()(3, x)["out"], 3 * x)
        assert "made again" in caplog.text
        assert len(traces) == 2
        kept()(3, x)
        assert len(traces) == 2


def test_it_is_a_jit_elsewhere(cache, kept, traces):
    x = np.ones(3, np.float32)
    kept()(3, x)  # not within `enabled`
    with compilation_cache.enabled():
        gradient = jax.grad(lambda x: kept()(3, x)["out"].sum())(x)
        with jax.default_device(jax.devices()[0]):  # somebody's own choice
            kept()(3, x)
    np.testing.assert_array_equal(gradient, 3 * x)
    assert entries(cache, "double") == []


def test_old_programs_make_room(cache, kept, monkeypatch):
    x = np.ones(3, np.float32)
    with compilation_cache.enabled():
        kept()(2, x)
        size = entries(cache, "double")[0].stat().st_size
    monkeypatch.setenv("SDJAX_CACHE_GIB", str(2.5 * size / 2**30))
    with compilation_cache.enabled():
        for factor in range(3, 7):
            kept()(factor, x)
    assert len(entries(cache, "double")) == 2
    compilation_cache.clear()
    assert entries(cache, "double") == []


def test_a_loss_has_no_identity(tiny):
    job = Job(tiny.config, "float32", 16, 16, guided=True)
    assert program._identity(job) == repr(job)
    assert program._identity(job.__class__(**{**vars(job), "loss": logging.info})) is None
