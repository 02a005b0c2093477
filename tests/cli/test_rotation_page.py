"""The page of `rotate --report`: every number of the facts, safe whatever a model is called, nothing from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rondel.cli.report import number
from rondel.cli.rotation_page import ROOM, box_chart, render
from tests.cli.html_page import OUTSIDE, Page
from tests.cli.program import rondel
from tests.tiny import tiny_model

KEYS = [
    "model",
    "family",
    "version",
    "config",
    "turned",
    "rotations",
    "calibration_tokens",
    "missing",
    "choice",
    "sites",
    "tensors",
    "stream",
]
HOSTILE = "<script>alert(1)</script>\"' onload=x"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its statistics, and the report of rotating it by default, as a page and as facts."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text("once on a time there was the water " * 60, encoding="utf-8")
    model, calib = tiny_model("llama", folder / "tiny", tied=True), folder / "calib"
    rondel("calibrate", model, "--text", folder / "text.txt", "-o", calib, "--context", 32, "--tokens", 256, "--quiet")
    for suffix in ("html", "json"):
        report = folder / f"auto.{suffix}"
        auto = ["--stats", calib, "--type", "Q4_0", "--report", report, "-o", folder / "out", "--quiet"]
        assert rondel("rotate", model, *auto).code == 0
    return folder


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "auto.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "auto.html").read_text(encoding="utf-8"))


def test_the_facts_have_their_keys(told: dict[str, Any]) -> None:
    assert list(told) == KEYS
    assert told["choice"]["type"] == "Q4_0"
    assert told["missing"] == []
    for part in ("sites", "tensors"):
        assert all(list(one) == ["name", "peak", "layers"] for one in told[part])
        assert all(list(one) == ["layer", "before", "after"] for found in told[part] for one in found["layers"])


def test_the_page_has_the_numbers_of_the_facts(told: dict[str, Any], page: Page) -> None:
    assert not page.open
    for part in ("sites", "tensors"):
        for found in told[part]:
            assert found["name"] in page.text or found["name"] == "residual"
            assert all(number(peak) in page.text for peak in found["peak"].values())
            for layer in found["layers"]:
                for basis in ("before", "after"):
                    if layer[basis]:
                        values = ", ".join(f"{name} {number(value)}" for name, value in layer[basis].items())
                        assert f"{basis}: {values}" in page.text
    for line in told["choice"]["tensors"]:
        assert all(str(value) in page.text for value in line.values()), line
    assert told["choice"]["reason"] in page.text
    for layer in told["stream"]:
        values = (layer["magnitude_99_9"], layer["massive_from"], layer["token_norm"]["max"])
        assert all(number(value) in page.text for value in values)
        for place in layer["positions_99_9"][:1]:
            share = f"position {place['position']}: {number(100 * place['share'])} %"
            assert f"layer {layer['layer']}, {share}" in page.text
    kinds = [attributes.get("class") for tag, attributes in page.tags if tag == "polyline"]
    assert kinds == ["rule", "limit"]  # the 99.9 % rule and 100 times the mean


def test_the_page_needs_nothing_from_outside(folder: Path) -> None:
    text = (folder / "auto.html").read_text(encoding="utf-8")
    assert not OUTSIDE.search(text)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_massive_activations_are_drawn_where_they_stand(told: dict[str, Any]) -> None:
    massive = [
        {"value": -812.5, "window": 0, "position": 3, "channel": 133},
        {"value": 700.0, "window": 1, "position": 3, "channel": 9},
    ]
    stream = [layer | {"massive_activations": massive * one} for one, layer in enumerate(told["stream"])]
    page = Page(render(told | {"stream": stream}))
    rings = [attributes for _, attributes in page.tags if attributes.get("class") == "ring"]
    dots = [attributes for _, attributes in page.tags if attributes.get("class") == "massive"]
    assert (len(rings), len(dots)) == (1, 1)
    assert "2 massive, -812.5 in channel 133" in page.text
    assert "layer 1: 812.5" in page.text


def test_only_so_many_positions_are_drawn(told: dict[str, Any]) -> None:
    places = [{"position": 5 * place, "share": 0.01} for place in range(ROOM + 4)]
    stream = [layer | {"positions_99_9": places} for layer in told["stream"]]
    page = Page(render(told | {"stream": stream}))
    assert "4 positions with less are left out" in page.text
    assert sum(attributes.get("class") == "share" for _, attributes in page.tags) == ROOM * len(stream)


def test_dead_channels_lie_on_the_axis() -> None:
    """A logarithm has no place for zero, and one wild value may not flatten all others."""
    ranges = {"least": 0.0, "low": 0.5, "median": 1.0, "high": 2.0, "most": 1e30}
    chart = box_chart([{"layer": 0, "before": ranges, "after": None}])
    (box,) = chart["boxes"]
    assert box["most"] < box["least"] <= chart["height"]
    nothing = dict.fromkeys(ranges, 0.0)
    (box,) = box_chart([{"layer": None, "before": nothing, "after": None}])["boxes"]
    assert box["most"] == box["least"]
    assert "outside the layers" in box["title"]


def test_hostile_names_are_text(told: dict[str, Any]) -> None:
    config = told["config"] | {"type": HOSTILE}
    page = Page(render(told | {"model": HOSTILE, "config": config, "missing": [HOSTILE]}))
    assert not page.open
    assert page.text.count(HOSTILE) >= 3
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onload" in attributes for _, attributes in page.tags)


def test_without_statistics_it_says_what_to_give(folder: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.html"
    done = rondel("rotate", folder / "tiny", "--report", report, "-o", tmp_path / "out", "--quiet")
    assert done.code == 0, done.stderr
    page = Page(report.read_text(encoding="utf-8"))
    assert not page.open
    assert "give --stats with the folder that rondel calibrate writes" in page.text
    assert "Weights" in page.text
    assert "Massive activations" not in page.text


@pytest.mark.parametrize(
    ("more", "wrong"),
    [(["--dry-run"], "leave out --dry-run"), (["--undo"], "--undo takes no --report")],
)
def test_nothing_is_told_of_what_is_not_written(folder: Path, tmp_path: Path, more: list[str], wrong: str) -> None:
    done = rondel("rotate", folder / "tiny", *more, "--report", tmp_path / "r.html", "-o", tmp_path / "out")
    assert done.code
    assert wrong in done.stderr
    assert not any(tmp_path.iterdir())
