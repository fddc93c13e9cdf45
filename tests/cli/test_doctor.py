"""`pmvis doctor`: a report that never fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pmvis_core import doctor


def test_the_table_names_every_operation(pmvis: Callable[..., Any]) -> None:
    outcome = pmvis("doctor")
    assert outcome.code == 0
    for word in (
        "python",
        "torch",
        "deformable_attention",
        "masks",
        "evaluator",
        "COCO reader",
        "opencv",
    ):
        assert word in outcome.out


def test_json_is_one_object(pmvis: Callable[..., Any]) -> None:
    outcome = pmvis("doctor", "--json")
    assert outcome.code == 0
    findings = json.loads(outcome.out)["findings"]
    assert {"part", "name", "state", "value", "reason"} == set(findings[0])
    assert {finding["state"] for finding in findings} <= {"good", "fallback", "missing"}


def test_what_is_broken_is_reported(
    pmvis: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[doctor.Finding]:
        raise ImportError("no module [here]")

    monkeypatch.setattr(doctor, "_operations", broken)
    outcome = pmvis("doctor")
    assert outcome.code == 0
    assert "no module [here]" in outcome.out
