"""The cache of compiled programs: what it keeps, what it leaves alone, and what it does not trust."""

import json
import os
import subprocess
import sys
import threading

import jax
import pytest

from sdjax import compilation_cache

# Each process compiles one program inside the context and one outside, and tells what JAX says of its cache.
PROGRAM = """
import json, os, sys, warnings
import jax, jax.numpy as jnp
import numpy as np
from sdjax import compilation_cache

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
x = np.ones((8, 8), np.float32)
count = lambda: {name: events.count("cache_" + name) for name in ("hits", "misses")}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with compilation_cache.enabled():
        with compilation_cache.enabled():
            result = jax.jit(lambda x: jnp.tanh(x @ x).sum())(x)
    inside = count()
    jax.jit(lambda x: jnp.sin(x @ x).sum())(x)
print(json.dumps({
    "inside": inside, "after": count(), "result": float(result), "warnings": [str(w.message) for w in caught],
    "dir": jax.config.jax_compilation_cache_dir, "secs": jax.config.jax_persistent_cache_min_compile_time_secs,
}))
"""


def run(**environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SDJAX_", "JAX_COMPILATION", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**clean, "JAX_PLATFORMS": "cpu", **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"log": done.stderr}


def entries(folder):
    return sorted(folder.glob("*-cache"))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for name in ("SDJAX_CACHE", "SDJAX_CACHE_GIB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    compilation_cache.is_usable.cache_clear()
    compilation_cache._warn_once.cache_clear()


def test_a_second_process_finds_the_program(tmp_path):
    first = run(XDG_CACHE_HOME=tmp_path)
    kept = entries(tmp_path / "sdjax")
    second = run(XDG_CACHE_HOME=tmp_path)
    assert first["inside"]["hits"] == 0
    assert first["inside"]["misses"] == len(kept) > 0
    assert second["inside"] == {"hits": len(kept), "misses": 0}
    # What is compiled after the context is neither looked up nor kept, and JAX's settings are as they were.
    assert second["after"] == second["inside"]
    assert first["after"] == first["inside"]
    assert entries(tmp_path / "sdjax") == kept
    assert (first["dir"], first["secs"]) == (None, 1.0)
    assert second["result"] == first["result"]
    assert (tmp_path / "sdjax").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_the_user_has_set_wins(tmp_path):
    told = run(XDG_CACHE_HOME=tmp_path, JAX_COMPILATION_CACHE_DIR=tmp_path / "mine")
    assert told["dir"] == str(tmp_path / "mine")
    assert not (tmp_path / "sdjax").exists()
    assert told["inside"] == {"hits": 0, "misses": 0}  # under JAX's own limit of one second


def test_a_damaged_entry_is_compiled_again_with_a_warning(tmp_path):
    first = run(XDG_CACHE_HOME=tmp_path)
    for path in entries(tmp_path / "sdjax"):
        path.write_bytes(path.read_bytes()[:-100])
    second = run(XDG_CACHE_HOME=tmp_path)
    assert second["result"] == first["result"]
    assert second["inside"]["hits"] == 0
    assert any("persistent compilation cache" in text for text in second["warnings"])


def test_an_entry_that_a_killed_process_left_is_replaced(tmp_path):
    run(XDG_CACHE_HOME=tmp_path)
    kept = entries(tmp_path / "sdjax")
    for path in kept:  # killed between the entry and its time of last use
        path.write_bytes(b"half")
        path.with_name(path.name.removesuffix("-cache") + "-atime").unlink()
    second = run(XDG_CACHE_HOME=tmp_path)
    assert second["warnings"] == []
    assert second["inside"]["misses"] == len(kept)
    assert run(XDG_CACHE_HOME=tmp_path)["inside"]["hits"] == len(kept)


@pytest.mark.parametrize("value", ["off", "OFF", "0"])
def test_it_can_be_switched_off(tmp_path, value):
    told = run(XDG_CACHE_HOME=tmp_path, SDJAX_CACHE=value)
    assert told["inside"] == {"hits": 0, "misses": 0}
    assert list(tmp_path.iterdir()) == []


def test_it_can_be_moved(tmp_path):
    run(SDJAX_CACHE=tmp_path / "a" / "b")
    assert entries(tmp_path / "a" / "b")


def test_old_programs_make_room_for_new_ones(tmp_path):
    run(SDJAX_CACHE=tmp_path)
    size = sum(path.stat().st_size for path in entries(tmp_path))
    gib = (size + 100) / 2**30
    (tmp_path / "old-cache").write_bytes(bytes(size))
    (tmp_path / "old-atime").write_bytes(bytes(8))
    for path in entries(tmp_path):
        if path.name != "old-cache":
            path.unlink()
            path.with_name(path.name.removesuffix("-cache") + "-atime").unlink()
    run(SDJAX_CACHE=tmp_path, SDJAX_CACHE_GIB=gib)
    assert not (tmp_path / "old-cache").exists()
    assert entries(tmp_path)


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_said_and_not_taken(monkeypatch, caplog, text):
    monkeypatch.setenv("SDJAX_CACHE_GIB", text)
    assert compilation_cache.limit() == 4 * 2**30
    assert "SDJAX_CACHE_GIB" in caplog.text


def test_a_folder_that_is_a_file_breaks_nothing(tmp_path):
    (tmp_path / "sdjax").write_text("")
    told = run(XDG_CACHE_HOME=tmp_path)
    assert told["inside"] == {"hits": 0, "misses": 0}
    assert "not kept" in told["log"]
    assert told["log"].count("not kept") == 1


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX owners and modes")
@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_folder_that_others_may_write_is_refused(tmp_path, monkeypatch, caplog, mode):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    tmp_path.chmod(mode)
    with compilation_cache.enabled():
        assert jax.config.jax_compilation_cache_dir is None
    assert "chmod go-w" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX owners and modes")
def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with compilation_cache.enabled():
        assert jax.config.jax_compilation_cache_dir is None
    assert "another user" in caplog.text


def test_a_folder_that_cannot_be_written_breaks_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with compilation_cache.enabled():
        assert jax.config.jax_compilation_cache_dir is None
    assert "cannot be written" in caplog.text


def test_threads_share_it_and_the_last_one_restores(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    entered, leave = threading.Event(), threading.Event()

    def other():
        with compilation_cache.enabled():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with compilation_cache.enabled():
        thread.start()
        entered.wait()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    leave.set()
    thread.join()
    assert jax.config.jax_compilation_cache_dir is None


def test_settings_come_back_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    before = jax.config.jax_persistent_cache_min_entry_size_bytes
    with pytest.raises(ZeroDivisionError), compilation_cache.enabled():
        raise ZeroDivisionError
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == before


def test_size_and_clear_touch_only_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    assert compilation_cache.size() == 0
    for name, count in {"jit_run-1-cache": 1000, "jit_run-1-atime": 8, "holiday.jpg": 5, ".lockfile": 0}.items():
        (tmp_path / name).write_bytes(bytes(count))
    tuning = tmp_path / "xla_gpu_per_fusion_autotune_cache_dir"
    tuning.mkdir()
    (tuning / "x.textproto").write_bytes(bytes(20))
    assert compilation_cache.location() == tmp_path
    assert compilation_cache.size() == 1028
    assert compilation_cache.clear() == 1028
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    assert compilation_cache.size() == compilation_cache.clear() == 0


def test_the_users_own_cache_folder_on_each_system(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert compilation_cache.location() == tmp_path / ".cache" / "sdjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert compilation_cache.location() == tmp_path / ".cache" / "sdjax"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compilation_cache.location() == tmp_path / "Library" / "Caches" / "sdjax"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "Local"))
    assert compilation_cache.location() == tmp_path / "Local" / "sdjax"


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compilation_cache.Path, "home", home)
    assert compilation_cache.location() is None
    with compilation_cache.enabled():
        assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_the_user_sets_within_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("SDJAX_CACHE", str(tmp_path))
    try:
        with compilation_cache.enabled():
            jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
