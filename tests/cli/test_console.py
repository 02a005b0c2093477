"""What reaches the terminal: aligned text, one JSON object, and nothing that a file could do harm with."""

from __future__ import annotations

import json

import pytest

from rondel.cli import console

ESCAPE = "\x1b]0;owned\x07"
NOT_UTF8 = b"\x80name".decode("utf-8", "surrogateescape")


def test_hostile_text_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console.error(f"tensor {ESCAPE} is bad")
    console.warn(ESCAPE)
    told = {"key": ESCAPE, "list": [ESCAPE], "records": [{"name": ESCAPE + NOT_UTF8}]}
    console.result(told, console.lines(told), as_json=False)
    shown = "".join(capsys.readouterr())
    assert shown.count("owned") == 5
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_json_is_one_line_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    told = {"text": "größe\n", "name": NOT_UTF8}
    console.result(told, "never shown", as_json=True, quiet=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == told


def test_lines_align_and_records_become_tables() -> None:
    told = {"a": 1, "long": {"inner": 0.5, "empty": {}}, "rows": [{"name": "x", "n": 10}, {"name": "yy", "n": 5}]}
    assert console.lines(told).splitlines() == [
        "a           1",
        "long.inner  0.5",
        "long.empty  none",
        "",
        "rows:",
        "name   n",
        "x     10",
        "yy     5",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (7_351_296, "7.35 MB"), (2_000_000_000, "2.00 GB"), (10**15, "1000.00 TB")],
)
def test_sizes(count: int, text: str) -> None:
    assert console.size(count) == text


def test_progress_in_a_log_is_plain_and_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress(quiet=False) as progress:
        for done in range(101):
            progress(done, 100, "block")
    assert capsys.readouterr().err.splitlines() == ["block: 0/100", "block: 100/100"]
    with console.progress(quiet=True) as progress:
        progress(0, 1, "block")
    assert capsys.readouterr() == ("", "")
