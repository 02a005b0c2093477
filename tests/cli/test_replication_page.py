"""The page of `replicate --report`: every candidate in two pictures, safe whatever a model is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rondel.cli.replication_page import facts, render
from tests.cli.html_page import OUTSIDE, Page
from tests.cli.program import rondel
from tests.tiny import tiny_model

HOSTILE = "<script>alert(1)</script>\"' onload=x"
KEYS = [
    *("model", "family", "version", "config", "bytes", "compared", "tuning", "copies", "bases", "log", "replicated"),
    *("notes", "warnings"),
]
LOSSES = {
    "input": {"kl": 0.04, "nll": 2.6},
    "teacher": {"kl": 0.0, "nll": 2.5},
    "tuned": {"kl": 0.03, "nll": 2.58},
    "copies": {"kl": 0.028, "nll": 2.57},
}
ENTRY: dict[str, Any] = {
    "by": "screen",
    "plan": ["1:serial:1:block"],
    "bytes": 2052,
    "compute": 0.125,
    "screening": {"promised_nats": 0.004},
    "kl": 0.028,
    "control_kl": 0.031,
    "accepted": True,
    "why": None,
}


def manifest(**result: Any) -> dict[str, Any]:
    told = {"bytes": 1_000_000, "notes": ["a note"], "warnings": ["gains is better than the copies"], **result}
    stage = {"name": "replicate", "version": "0", "config": {"layers": [], "mode": "auto", "kv": None}, "result": told}
    return {"source": {"name": "tiny"}, "family": "llama", "stages": [stage]}


def whole() -> dict[str, Any]:
    """With everything that a run can tell of."""
    rival = {"bytes": 2000, "read": 2000, "kl": 0.029, "nll": 2.575}
    return manifest(
        losses=LOSSES,
        costs={"bytes": 2052, "read": 50_000, "compute": 0.125},
        rivals=[{"name": "gains", **rival, "bytes": 0, "read": 0}, {"name": "more bits, equal reads", **rival}],
        choice={"bases": [{"kl": 0.041, "nll": 2.59, "tuned": False}, {"kl": 0.031, "nll": 2.58, "tuned": True}]},
        log=[
            ENTRY,
            ENTRY | {"plan": ["0:parallel:1:ffn"], "kl": 0.032, "accepted": False, "why": "KL is not below"},
            ENTRY
            | {
                "plan": ["2:serial:1:attn"],
                "kl": None,
                "control_kl": None,
                "accepted": False,
                "why": "explains little",
            },
        ],
    )


def circles(page: Page, kind: str) -> list[tuple[float, float]]:
    found = [told for tag, told in page.tags if tag == "circle" and told["class"] == kind]
    return [(float(told["cx"] or ""), float(told["cy"] or "")) for told in found]


def test_every_candidate_is_drawn_twice() -> None:
    told = facts(whole())
    assert list(told) == KEYS
    page = Page(render(told))
    assert page.open == []
    # Of the deciding text: as it was, tuned; copies; two rivals. Of the choosing one: the same two, one kept, one not.
    assert len(circles(page, "model")) == 2 * (2 + 2)
    assert len(circles(page, "copies")) == 2 * (1 + 1)
    assert len(circles(page, "rival")) == 2 * 2
    assert len(circles(page, "rejected")) == 2 * 1
    for name in ("a note", "gains is better than the copies", "more bits, equal reads", "explains little"):
        assert name in page.text


def test_less_loss_is_lower_and_more_cost_is_further_right() -> None:
    page = Page(render(facts(whole())))
    (input_, tuned), (copies,) = circles(page, "model")[:2], circles(page, "copies")[:1]
    assert input_[0] == tuned[0] < copies[0]
    assert input_[1] < tuned[1] < copies[1]  # pixels count from the top


@pytest.mark.parametrize(
    "told", [manifest(), manifest(losses={"input": LOSSES["input"], "teacher": LOSSES["teacher"]})]
)
def test_a_run_with_little_to_tell_has_a_page(told: dict[str, Any]) -> None:
    page = Page(render(facts(told)))
    assert page.open == []
    assert "every layer once" in page.text


def test_names_of_others_are_escaped_and_nothing_comes_from_outside() -> None:
    hostile = whole()
    hostile["source"]["name"] = hostile["family"] = HOSTILE
    hostile["stages"][-1]["result"]["notes"] = [HOSTILE]
    text = render(facts(hostile))
    assert not OUTSIDE.search(text)
    assert HOSTILE in Page(text).text


@pytest.mark.parametrize("suffix", ["html", "json"])
def test_the_command_writes_it(suffix: str, tmp_path: Path) -> None:
    report = tmp_path / f"r.{suffix}"
    model = tiny_model("llama", tmp_path / "m")
    done = rondel("replicate", model, "-o", tmp_path / "out", "--report", report, "--quiet")
    assert done.code == 0, done.stderr
    text = report.read_text(encoding="utf-8")
    assert "no layer is replicated" in (text if suffix == "html" else json.loads(text)["notes"][0])
    refused = rondel("replicate", model, "-o", tmp_path / "other", "--report", report, "--dry-run")
    assert refused.code == 1
    assert "--report" in refused.stderr
