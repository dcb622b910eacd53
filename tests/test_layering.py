"""Imports point one way (docs/architecture.md), and torch is none of ours."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "sdjax"
LOW = {
    "compilation_cache", "fast", "files", "guidance", "images", "noise", "ops", "options", "outputs", "schedule",
    "tokenizer",
}  # fmt: skip
MAY = {
    **{room: set() for room in LOW},  # "sdjax" itself is the version
    "images": {"files"},
    "models": {"ops"},
    "checkpoints": {"files", "models.config", "tokenizer"},
    "spacings": {"schedule"},
    "samplers": {"schedule", "spacings", "noise"},
    "prompts": {"tokenizer"},
    "recipe": {"images"},
    "arguments": {"models.config", "tokenizer"},
    "canvas": {"arguments", "images", "models.config"},
    "control": {"guidance", "images"},
    "executables": {"compilation_cache"},
    "job": {"models.config", "prompts", "samplers"},
    "contexts": {"job", "models", "prompts"},
    "program": {"contexts", "executables", "job", "models", "samplers", "guidance", "noise"},
    "transformed": {"checkpoints", "compilation_cache", "models", "ops"},
    "placement": {"checkpoints"},
    "pipeline": {
        "arguments", "checkpoints", "compilation_cache", "models", "placement", "samplers", "schedule", "tokenizer",
        "transformed",
    },
    "loading": {"checkpoints", "models", "pipeline", "placement", "schedule", "tokenizer", "transformed"},
    "tasks": {"canvas", "guidance", "images", "job", "noise", "prompts", "samplers"},
    "plan": {
        "arguments", "canvas", "control", "fast", "guidance", "images", "job", "loading", "models", "pipeline",
        "placement", "prompts",
        "recipe", "samplers", "tasks",
    },
    "generation": {
        "compilation_cache", "control", "fast", "guidance", "images", "job", "pipeline", "plan", "program", "samplers",
    },
    "training": {"models", "ops", "schedule", "samplers", "guidance", "noise", "images", "tokenizer", "checkpoints"},
    "cli": {
        *LOW, "prompts", "checkpoints", "control", "generation", "loading", "pipeline", "plan", "recipe", "samplers",
    },
    "__init__": {
        "checkpoints", "control", "fast", "generation", "guidance", "loading", "pipeline", "prompts", "samplers",
        "schedule", "spacings",
    },
}  # fmt: skip


def imported(path):
    """Dotted names that a file imports, `from sdjax import x` as sdjax.x."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    wrong, rooms = [], set()
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        rooms.add(room)
        for name in imported(path):
            top, _, inner = name.partition(".")
            if top in ("torch", "transformers", "diffusers"):
                wrong.append(f"{path}: {name}")
            own = top == "sdjax" and inner not in ("", room) and not inner.startswith(f"{room}.")
            if own and not any(inner == allowed or inner.startswith(f"{allowed}.") for allowed in MAY[room]):
                wrong.append(f"{room} must not import {name} ({path.name})")
    assert wrong == []
    assert rooms == set(MAY)
