"""The sentences of the design that say which room may import which, and which library lives where."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("cli", "converters", "quant", "native", "configs")
MAY_IMPORT = {
    "cli": {"cli", "converters", "quant", "native", "configs"},
    "quant": {"quant", "converters", "native"},
    "converters": {"converters"},
    "native": {"native"},
}
LIVES_IN = {
    "torch": ("quant/", "converters/"),
    "transformers": ("converters/huggingface.py", "quant/decoder_layers.py"),
    "gguf": ("converters/",),
    "optuna": ("quant/search.py",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "cffi": ("native/",),
}
FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> list[str]:
    """Every module that a file imports, at any depth."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write rondel.<room>, not a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    place = path.relative_to(ROOT).as_posix()
    room = place.split("/")[0]
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in ROOMS, f"{place}: write rondel.{top}, not {top}"
        if top == "rondel":
            assert rest, f"{place}: import a room of rondel, not rondel"
            assert rest[0] in MAY_IMPORT[room], f"{place}: {room} may not import {rest[0]}"
            if room == "quant" and rest[0] == "native":
                assert rest[1] == "formats", f"{place}: quant uses the native room for its encoders alone"
        if top in LIVES_IN:
            assert place.startswith(LIVES_IN[top]), f"{place}: {top} lives in {' and '.join(LIVES_IN[top])}"


def test_every_room_is_in_the_wheel() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for room in ROOMS:
        assert f'"rondel/{room}" = "{room}"' in text, f"{room} works in an editable install and is missing in the wheel"
