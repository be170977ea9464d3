from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest

from ddpm_deploy import __version__
from ddpm_deploy.files import sha256
from ddpm_deploy.verify.sarif import sarif
from ddpm_deploy.verify.verification import Verification
from tests.verify.verifications import CAUSE, STRANGE, renamed, verified


def run_of(found: Verification) -> dict[str, Any]:
    """Writes a log as strict JSON and reads its one run."""
    log = json.loads(json.dumps(sarif(found), allow_nan=False).encode("utf-8"))
    assert log["version"] == "2.1.0"
    assert log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    return dict(run)


def uri(result: dict[str, Any]) -> str:
    (location,) = result["locations"]
    return str(location["physicalLocation"]["artifactLocation"]["uri"])


def test_every_check_is_a_rule_and_what_passed_no_result(tmp_path: Path) -> None:
    found = verified(tmp_path)
    run = run_of(found)
    driver = run["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("ddpm-deploy", __version__)
    names = [rule["id"] for rule in driver["rules"]]
    assert names == [check.name for check in found.comparison.checks]
    assert {"finite", "local/out/max", "accumulated/x/max", "pixels"} <= set(names)
    assert all(rule["shortDescription"]["text"] for rule in driver["rules"])
    assert run["results"] == []
    (invocation,) = run["invocations"]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (True, 0)
    assert invocation["commandLine"] == "ddpm-deploy verify -e 'my engine.onnx'"


def test_a_failed_check_is_an_error_at_the_engine_s_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = verified(tmp_path, bias=0.05)
    monkeypatch.chdir(tmp_path)
    run = run_of(found)
    failed = [check.name for check in found.comparison.checks if not check.passed]
    assert {"local/out/max", "accumulated/x/max", "pixels"} <= set(failed)
    assert [(r["ruleId"], r["level"]) for r in run["results"]] == [(n, "error") for n in failed]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert uri(result) == "my%20engine.onnx"
    check = next(c for c in found.comparison.checks if c.name == "local/out/max")
    first = run["results"][failed.index(check.name)]
    said = f"{check.says[0].upper()}{check.says[1:]}."
    assert first["message"]["text"] == said
    assert first["properties"] == {"value": check.value, "bound": 2e-5, "t": check.t}
    assert run["invocations"][0]["exitCode"] == 1
    assert run["artifacts"][0]["hashes"] == {"sha-256": sha256(tmp_path / "my engine.onnx")}


def test_a_cause_is_a_note_and_a_certain_one_a_warning(tmp_path: Path) -> None:
    found = verified(tmp_path, bias=0.05, causes=(CAUSE, replace(CAUSE, name="x", certain=True)))
    *_, likely, certain = run_of(found)["results"]
    assert (likely["ruleId"], likely["level"]) == ("cause/timestep-off-by-one", "note")
    assert likely["message"]["text"].splitlines() == [
        "t is <one> too large & the schedule is not",
        "- at t + 1 the error is 1e-7",
        "- at t it is 1e-3",
        "What to do: export it again",
    ]
    explained = [check.name for check in found.comparison.checks if not check.passed]
    assert likely["properties"] == {"place": "input", "explains": explained}
    assert (certain["ruleId"], certain["level"]) == ("cause/x", "warning")
    (related,) = likely["relatedLocations"]
    assert related["physicalLocation"]["artifactLocation"]["uri"].endswith("/unet.onnx")


@pytest.mark.parametrize("path", [STRANGE, "a b/c:d?e#f%.onnx", "mailto:x.onnx"])
def test_any_path_is_a_relative_uri(tmp_path: Path, path: str) -> None:
    found = renamed(verified(tmp_path, bias=0.05), path)
    given = uri(run_of(found)["results"][0])
    assert set(given) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/%")
    assert unquote_to_bytes(given) == path.encode("utf-8", "surrogateescape")


def test_numbers_that_json_has_not_are_left_out(tmp_path: Path) -> None:
    found = verified(tmp_path)
    odd = replace(found, engine={**found.engine, "speed": float("inf")}, seconds=float("nan"))
    run = run_of(odd)
    assert run["properties"]["engine"]["speed"] is None
    assert run["properties"]["seconds"] is None
