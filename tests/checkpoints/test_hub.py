"""Names on the hub, against a stand-in for it on this machine: its listing, its files, its refusals; and its cache."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import huggingface_hub.constants
import numpy as np
import pytest

import sdjax
from sdjax import checkpoints
from sdjax.checkpoints import CheckpointError, hub, safetensors
from sdjax.models.config import TINY

from .conftest import assert_equal

COMMITS = {"main": "a" * 40, "old": "b" * 40}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Repositories as {name: {file: bytes}}, served as the hub does; and the requests that came for files."""
    repositories, fetched = {}, []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, code, body=b"", **headers):
            self.send_response(code)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            parts = urlsplit(self.path).path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            parts = parts[2:] if api else parts
            files = repositories.get("/".join(parts[:2]))
            if files is None:
                return self.reply(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            kind, revision, *rest = parts[2:] or ["revision", "main"]
            commit = COMMITS.get(revision, revision)
            if commit not in COMMITS.values():
                return self.reply(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            json_ = {"Content_Type": "application/json"}
            if api and kind == "revision":
                siblings = [{"rfilename": name} for name in files]
                return self.reply(200, json.dumps({"id": "x/y", "sha": commit, "siblings": siblings}).encode(), **json_)
            if api and kind == "tree":
                tree = [{"type": "file", "path": n, "size": len(x), "oid": "0" * 40} for n, x in files.items()]
                return self.reply(200, json.dumps(tree).encode(), **json_)
            data = files.get("/".join(rest))
            if data is None:
                return self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            if self.command == "GET":
                fetched.append("/".join(rest))
            etag = hashlib.sha256(data).hexdigest()
            return self.reply(200, data, ETag=f'"{etag}"', X_Repo_Commit=commit, Accept_Ranges="none")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield repositories, fetched
    running.shutdown()
    running.server_close()


def contents_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_a_repository(server, folder, params, monkeypatch):
    repositories, fetched = server
    files = contents_of(folder[0])
    unused = {
        "unet/diffusion_pytorch_model.bin": b"x",
        "v1-5.ckpt": b"x",
        "README.md": b"x",
        "unet/model.msgpack": b"x",
    }
    repositories["someone/model"] = files | unused
    model = sdjax.load("someone/model", dtype="float32")
    assert_equal(model.params, params)
    assert model.config == TINY
    assert model.source == "someone/model"
    assert sorted(fetched) == sorted(set(files) - {"vae/model.msgpack"})
    fetched.clear()
    sdjax.load("someone/model", revision="main", dtype="float32")
    assert fetched == []
    # Without a network the cache has it.
    repositories.clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_equal(sdjax.load("someone/model", dtype="float32").params, params)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_equal(sdjax.load("someone/model", dtype="float32").params, params)
    with pytest.raises(CheckpointError, match="someone/other: there is no such file or folder, and on the hub: "):
        sdjax.load("someone/other")


def test_variants_and_shards(server, folder, params):
    repositories, fetched = server
    files = contents_of(folder[0])
    halves = {}
    for part in ("text_encoder", "unet", "vae"):
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        file = folder[0] / part / f"{stem}.safetensors"
        arrays = {name: x.astype(np.float16) for name, x in safetensors.read(file)[0].items()}
        safetensors.write(file, arrays, {})
        halves[f"{part}/{stem}.fp16.safetensors"] = file.read_bytes()
    repositories["a/b"] = files | halves
    model = sdjax.load("a/b", variant="fp16", dtype="float32")
    assert_equal(model.params, {k: {**v} for k, v in to_half(params).items()})
    assert {name for name in fetched if name.endswith("safetensors")} == set(halves)
    with pytest.raises(CheckpointError, match="no weights of the variant 'bf16' in its text_encoder"):
        sdjax.load("a/b", variant="bf16")
    # The UNet in two shards.
    whole = "unet/diffusion_pytorch_model.safetensors"
    (folder[0] / "x").write_bytes(files.pop(whole))
    arrays = safetensors.read(folder[0] / "x")[0]
    index = {}
    for i, names in enumerate(np.array_split(sorted(arrays), 2)):
        shard = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
        safetensors.write(folder[0] / "x", {name: arrays[name] for name in names}, {})
        files[f"unet/{shard}"] = (folder[0] / "x").read_bytes()
        index |= dict.fromkeys(names.tolist(), shard)
    files[f"{whole}.index.json"] = json.dumps({"weight_map": index}).encode()
    repositories["a/shards"] = files
    assert_equal(sdjax.load("a/shards", dtype="float32").params, params)


def to_half(tree):
    if isinstance(tree, dict):
        return {name: to_half(child) for name, child in tree.items()}
    return tree.astype(np.float16).astype(np.float32)


def test_a_file_and_a_revision(server, tiny_file, folder, params):
    repositories, fetched = server
    repositories["a/files"] = {"sub/tiny.safetensors": tiny_file.read_bytes(), "other.ckpt": b"x"}
    model = sdjax.load("a/files/sub/tiny.safetensors", revision="old", dtype="float32")
    assert model.fingerprint == sdjax.load(tiny_file, dtype="float32").fingerprint
    assert fetched == ["sub/tiny.safetensors"]
    for name, message in (
        ("a/files", "without a model_index.json.*did you mean a/files/other.ckpt"),
        ("a/files/none.safetensors", "on the hub: "),
        ("a/nothing", "on the hub: "),
    ):
        with pytest.raises(CheckpointError, match=message):
            sdjax.load(name)
    with pytest.raises(CheckpointError, match="on the hub: "):
        sdjax.load("a/files/sub/tiny.safetensors", revision="nowhere")
    with pytest.raises(ValueError, match="is no name on the hub"):
        sdjax.load(tiny_file, revision="old")


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    names = ["a/b", "runwayml/stable-diffusion-v1-5", "a/b/c.safetensors", "a/b/c/d.ckpt"]
    assert all(map(hub.is_name, names))
    others = [
        "a",
        "/a/b",
        "./a/b",
        "../a",
        "here/b",
        "a/model.safetensors",
        "a//b",
        "a/b/",
        "a b/c",
        "here",
        "a/-b",
        "~/x",
    ]
    assert not any(map(hub.is_name, others))


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"a/b: there is no such file .* pip install 'sdjax\[hub\]'"):
        hub.fetch("a/b")
    assert checkpoints.hub is hub
