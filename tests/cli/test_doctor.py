from __future__ import annotations

import json

from ddpm_deploy import __version__
from tests.commands import finish, run, start


def test_this_machine_can_run_an_engine() -> None:
    outcome = finish(start("doctor"))
    first, second, *rest = outcome.out.splitlines()
    assert first == f"ddpm-deploy {__version__}"
    assert second.startswith("Python 3.")
    told = [" ".join(line.split()) for line in rest]
    assert any(line.startswith("ok sample -e unet.onnx ONNX Runtime") for line in told)
    assert outcome.err == ""
    assert outcome.code in {0, 1}  # a machine may have something to mend


def test_the_json_says_the_same() -> None:
    outcome = run("doctor", "--json")
    report = json.loads(outcome.out)
    keys = {"ddpm_deploy", "machine", "packages", "commands", "findings", "can_run", "ok"}
    assert report.keys() == keys
    assert report["can_run"] is True
    assert report["ok"] is (outcome.code == 0)
