"""The plan file of DiTFastAttn: what it may hold, what it says when it may not, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models import Plan
from models.errors import ModelLoadError

FACTS: dict[str, Any] = {
    "schema_version": 1,
    "model": "dit",
    "config_hash": "hash",
    "scheduler": "euler",
    "num_inference_steps": 3,
    "tokens": 64,
    "guidance": True,
    "window": 7,
    "threshold": 0.1,
    "metric": "signed",
    "table": [["full", "full"], ["ast", "wa-rs+asc"], ["full", "wa-rs"]],
}


def read(folder: Path, **changes: Any) -> Plan:
    """The plan of a file with these facts; a fact that is None is left out."""
    file = folder / "plan.json"
    file.write_text(json.dumps({name: value for name, value in (FACTS | changes).items() if value is not None}))
    return Plan.load(file)


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    plan = read(tmp_path)
    assert json.loads(plan.model_dump_json()) == FACTS
    assert plan.counts == {"full": 3, "ast": 1, "wa-rs+asc": 1, "wa-rs": 1}
    assert plan.shares_guidance
    assert not read(tmp_path, table=[["full"], ["wa-rs"], ["ast"]]).shares_guidance


def test_what_may_be_left_out(tmp_path: Path) -> None:
    plan = read(tmp_path, schema_version=None, metric=None)
    assert (plan.schema_version, plan.metric) == (1, "paper")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"schema_version": 2}, "schema_version"),
    ({"more": 1}, "more"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"tokens": 0}, "tokens"),
    ({"window": -1}, "window"),
    ({"threshold": -0.1}, "threshold"),
    ({"metric": "l2"}, "metric"),
    ({"table": []}, "table"),
    ({"table": [["full"], ["fast"]]}, "table"),
    ({"table": [["full", "full"], ["ast"]]}, "every step must name a method for every block"),
    ({"table": [["full", "ast"], ["ast", "ast"]]}, "step 0 must be full"),
    ({"guidance": False}, "asc needs guidance"),
    *[({name: None}, name) for name in FACTS if name not in ("schema_version", "metric")],
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=str)
def test_what_is_no_plan(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"not a DiTFastAttn plan: .*plan\.json") as caught:
        read(tmp_path, **changes)
    assert reason in str(caught.value)


def test_the_least_of_each_number(tmp_path: Path) -> None:
    plan = read(tmp_path, tokens=1, window=0, threshold=0.0, num_inference_steps=1, table=[["full"]])
    assert (plan.tokens, plan.window, plan.threshold, plan.num_inference_steps) == (1, 0, 0.0, 1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"lost\.json"):
        Plan.load(tmp_path / "lost.json")


def test_a_line_a_step_is_written(tmp_path: Path) -> None:
    read(tmp_path).save(tmp_path / "copy.json")
    assert Plan.load(tmp_path / "copy.json") == read(tmp_path)
    lines = (tmp_path / "copy.json").read_text().splitlines()
    assert lines[-6:] == [
        '  "table": [',
        '    ["full", "full"],',
        '    ["ast", "wa-rs+asc"],',
        '    ["full", "wa-rs"]',
        "  ]",
        "}",
    ]
