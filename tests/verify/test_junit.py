from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from ddpm_deploy.files import sha256
from ddpm_deploy.verify.junit import junit
from tests.verify.verifications import CAUSE, STRANGE, renamed, verified


def suite_of(text: str) -> ET.Element:
    """Reads a report as its readers do: one suite below the root."""
    root = ET.fromstring(text)
    assert root.tag == "testsuites"
    (suite,) = root
    assert suite.tag == "testsuite"
    return suite


def properties(suite: ET.Element) -> dict[str, str]:
    return {p.attrib["name"]: p.attrib["value"] for p in suite.findall("properties/property")}


def test_every_check_is_a_test_case(tmp_path: Path) -> None:
    found = verified(tmp_path)
    suite = suite_of(junit(found))
    cases = suite.findall("testcase")
    names = [case.attrib["name"] for case in cases]
    assert names == [check.name for check in found.comparison.checks]
    assert {"finite", "local/out/max", "accumulated/x/max", "pixels"} <= set(names)
    assert {case.attrib["classname"] for case in cases} == {"verify.my engine_onnx"}
    counts = [suite.attrib[name] for name in ("tests", "failures", "errors")]
    assert counts == [str(len(names)), "0", "0"]
    assert suite.findall(".//failure") == []
    total = sum(float(case.attrib["time"]) for case in cases)
    assert total == pytest.approx(found.seconds, abs=0.0005 * len(cases))
    assert cases[0].findtext("system-out") == "all numbers are finite"


def test_a_failure_has_its_values_its_cause_and_the_command(tmp_path: Path) -> None:
    found = verified(tmp_path, bias=0.05, causes=(CAUSE,))
    suite = suite_of(junit(found))
    assert suite.attrib["failures"] == str(len(found.comparison.failures))
    case = suite.find("testcase[@name='local/out/max']")
    assert case is not None
    (failure,) = case
    assert (failure.tag, failure.attrib["type"]) == ("failure", "local/out/max")
    assert failure.attrib["message"] == found.comparison.failures[0]
    assert failure.text == (
        f"{found.comparison.failures[0]}\n\n"
        "likely cause: t is <one> too large & the schedule is not\n"
        "- at t + 1 the error is 1e-7\n- at t it is 1e-3\nwhat to do: export it again\n\n"
        "again: ddpm-deploy verify -e 'my engine.onnx'"
    )
    certain = replace(found, causes=(replace(CAUSE, certain=True),), command=())
    text = suite_of(junit(certain)).findtext("testcase/failure") or ""
    assert text.endswith("what to do: export it again")
    assert "\ncause: t is" in text


def test_the_properties_say_where_the_numbers_come_from(tmp_path: Path) -> None:
    given = properties(suite_of(junit(verified(tmp_path))))
    assert given["engine.sha256"] == sha256(tmp_path / "my engine.onnx")
    assert given["reference.sha256"] == sha256(tmp_path / "unet.onnx")
    assert given["engine.name"] == "onnxruntime CPU"
    assert (given["recipe.sampler"], given["recipe.steps"], given["recipe.seed"]) == (
        "ddim",
        "4",
        "0",
    )
    assert given["sampled"] == "4 of 20 timesteps, those that the loop visits"
    assert given["images"] == "0 1"
    assert re.fullmatch(r"ddpm-deploy \S+", given["tool"])


def test_what_xml_cannot_say_is_replaced(tmp_path: Path) -> None:
    found = verified(tmp_path, bias=0.05)
    cause = replace(CAUSE, says="a bell \x07, a null \x00, \ufffe and half of \ud83d")
    text = junit(replace(renamed(found, STRANGE), causes=(cause,)))
    text.encode("utf-8")
    assert text.startswith("<?xml version='1.0' encoding='utf-8'?>\n")
    suite = suite_of(text)
    assert properties(suite)["engine.path"] == "out/� ��<&\"'>%: é.onnx"
    failure = suite.findtext("testcase/failure") or ""
    assert "a bell �, a null �, � and half of �" in failure
