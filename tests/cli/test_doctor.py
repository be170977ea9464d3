from __future__ import annotations

import json
import sys

import pytest

from ddpm_deploy import __version__
from tests.commands import run


def test_a_machine_that_can_run_an_engine_is_well() -> None:
    outcome = run("doctor")
    assert outcome.code == 0
    first, second, *rest = outcome.out.splitlines()
    assert first.startswith(f"ddpm-deploy {__version__}, Python 3.")
    assert " cores, " in second
    assert any(line.startswith("ok  onnxruntime CPU") for line in rest)
    assert all(line == line.rstrip() and len(line) <= 80 for line in rest)
    assert outcome.err == ""


def test_json_has_the_findings() -> None:
    report = json.loads(run("doctor", "--json").out)
    assert report.keys() == {"ddpm_deploy", "machine", "findings", "can_run"}
    assert report["can_run"] is True
    assert all(found.keys() == {"what", "ok", "detail", "fix"} for found in report["findings"])


def test_a_machine_without_a_runtime_exits_with_1_and_says_what_to_add(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("onnxruntime", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    outcome = run("doctor")
    assert outcome.code == 1
    assert "--  onnxruntime CPU" in outcome.out
    assert "to add: pip install 'ddpm-deploy[cpu]' (or [gpu] with an NVIDIA GPU)" in outcome.out
    assert outcome.out.endswith("nothing here can run an engine yet\n")
    assert outcome.out.count("to add: pip install 'ddpm-deploy[export]'") == 1
    outcome = run("doctor", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["can_run"] is False
