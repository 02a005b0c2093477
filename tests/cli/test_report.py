"""The page of `quantize --report`: complete, safe whatever a tensor is called, and without anything from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rondel.cli.report import check_report, command, count, number, percent, render
from rondel.converters.errors import RondelError
from tests.cli.html_page import OUTSIDE, Page
from tests.cli.program import rondel
from tests.tiny import tiny_model

HOSTILE = "blk.0.<script>alert(1)</script>\"' onload=x.weight"


def tensor(name: str, layer: int | None, error: float | None, **more: Any) -> dict[str, Any]:
    told = {"name": name, "layer": layer, "role": name.split(".")[2] if layer is not None else name, "shape": [64, 64]}
    told |= {"format": "Q4_0", "weights": 4096, "bytes": 2304, "bits_per_weight": 4.5, **more}
    return told if error is None else {"error": error, "output_error": error, "weighted": True} | told


def facts(*tensors: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "family": "llama",
        "version": "1",
        "stages": ["rotate", "quantize"],
        "config": {"type": "Q4_0", "method": None, "tensors": [["ffn_down", "Q8_0"]], "pure": True},
        "calibration_tokens": 4096,
        "weights": 4096 * len(tensors),
        "bytes": 2304 * len(tensors),
        "bits_per_weight": 4.5,
        "formats": [{"format": "Q4_0", "tensors": len(tensors), "weights": 4096 * len(tensors), "bytes": 2304}],
        "warnings": [],
        "tensors": list(tensors),
    } | more


def test_every_matrix_is_in_the_pictures_and_every_tensor_in_the_table() -> None:
    tensors = [tensor(f"blk.{layer}.attn_q.weight", layer, 0.01 * (1 + layer)) for layer in range(3)]
    page = Page(render(facts(*tensors, tensor("output_norm", None, None), tensor("token_embd", None, 0.001))))
    assert not page.open
    cells = page.cells()
    assert len(cells) == 2 * 3 + 1  # two pictures of the layers, and the embedding beside the first
    assert "blk.2.attn_q.weight: Q4_0, 4.5 bits a weight, error 3 %" in cells
    for one in tensors:
        assert one["name"] in page.text
    assert "output_norm" in page.text
    levels = [attributes["class"] for _, attributes in page.tags if attributes.get("title", "").startswith("blk.")]
    assert {"cell h0", "cell h8"} <= set(levels)  # the smallest and the largest error have the colours at the ends


def test_hostile_names_are_text() -> None:
    page = Page(render(facts(tensor(HOSTILE, 0, 0.5, method=HOSTILE), model=HOSTILE, warnings=[HOSTILE])))
    assert not page.open
    assert page.text.count(HOSTILE) >= 3
    assert any(HOSTILE in title for title in page.cells())
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onload" in attributes for _, attributes in page.tags)


def test_the_page_needs_nothing_from_outside() -> None:
    page = render(facts(tensor("blk.0.attn_q.weight", 0, 0.5)))
    assert not OUTSIDE.search(page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_both_ways_are_shown_where_they_were_tried() -> None:
    tried = {"method": "gptq", "held_out_error": {"gptq": 0.11, "imatrix": 0.2}, "output_error": 0.11}
    told = tensor("blk.0.attn_q.weight", 0, 0.5, **tried)
    page = Page(render(facts(told, tensor("blk.1.attn_q.weight", 1, 0.2))))
    assert "imatrix 20 %" in page.text
    assert "blk.0.attn_q.weight: Q4_0, 4.5 bits a weight, error 11 %, gptq" in page.cells()
    assert "held out" in page.text
    assert "held out" not in Page(render(facts(tensor("blk.0.attn_q.weight", 0, 0.1)))).text


@pytest.mark.parametrize("errors", [(None,), (0.0,), (0.0, 0.5), (0.5, 0.5)])
def test_odd_errors_make_a_page(errors: tuple[float | None, ...]) -> None:
    assert not Page(render(facts(*(tensor(f"blk.{n}.a.weight", n, error) for n, error in enumerate(errors))))).open


@pytest.mark.parametrize(
    ("share", "text"), [(0.0690995, "6.9 %"), (0.000280203, "0.028 %"), (0.128, "13 %"), (1.0, "100 %"), (0.0, "0 %")]
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(("number", "text"), [(12, "12"), (131072, "131 k"), (3_670_000, "3.67 M"), (7e9, "7 G")])
def test_count(number: int, text: str) -> None:
    assert count(number) == text


def test_the_command_has_what_is_not_the_default() -> None:
    config = {"type": "Q2_K", "pure": True, "tensors": [["ffn.*", "Q4_K"]], "embedding_type": None, "method": None}
    wanted = "rondel quantize MODEL --stats calib/ --type Q2_K --pure --tensor 'ffn.*=Q4_K'"
    assert command(config, calibrated=True) == wanted


def test_quantize_writes_it(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "tiny")
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    arguments = ("quantize", model, "--type", "Q4_0", "-o", tmp_path / "out", "--quiet")
    assert rondel(*arguments, "--report", page).code == 0
    assert not Page(page.read_text(encoding="utf-8")).open
    assert rondel(*arguments, "--report", data).code == 0  # a finished output is reported on too
    told = json.loads(data.read_text(encoding="utf-8"))
    assert {tensor["format"] for tensor in told["tensors"]} >= {"F32", "Q4_0"}


@pytest.mark.parametrize("name", ["report.txt", "missing/report.html"])
def test_a_bad_report_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "tiny")
    done = rondel("quantize", model, "--type", "Q4_0", "-o", tmp_path / "out", "--report", tmp_path / name)
    assert done.code == 1
    assert "error: --report" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_plan_has_no_report(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = rondel(
        "quantize", tiny_model("llama", tmp_path / "tiny"), "-o", tmp_path / "out", "--dry-run", "--report", page
    )
    assert (done.code, page.exists()) == (1, False)
    assert "leave out --dry-run" in done.stderr


def test_a_folder_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RondelError, match="a file in a folder"):
        check_report(tmp_path / "report.html")


def test_measured_numbers_have_four_digits_or_all_before_the_point() -> None:
    told = [number(value) for value in (None, 0.0, -0.123456, 812.54, -12345.6, 1e-9, 2e12)]
    assert told == ["", "0", "-0.1235", "812.5", "-12346", "1e-09", "2e+12"]
