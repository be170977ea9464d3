"""A verification as JUnit XML, which Jenkins, GitLab and GitHub's actions read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any
from xml.etree import ElementTree as ET

from ddpm_deploy._version import __version__
from ddpm_deploy.verify.compare import Check
from ddpm_deploy.verify.verification import Verification

_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot say, in no way of writing it: https://www.w3.org/TR/xml/#charsets."""


def junit(found: Verification) -> str:
    """Returns a verification as JUnit XML: a test case for each check.

    A failed one says in its text what likely caused it and how to see it again. Where the numbers
    come from, hashes, runtimes and recipe, is in the suite's properties.
    """
    checks = found.comparison.checks
    seconds = f"{found.seconds:.3f}"
    failed = str(sum(not check.passed for check in checks))
    counts = {"tests": str(len(checks)), "failures": failed, "errors": "0", "time": seconds}
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", {"name": "ddpm-deploy verify", **counts})
    properties = ET.SubElement(suite, "properties")
    for name, value in _provenance(found):
        ET.SubElement(properties, "property", {"name": _sound(name), "value": _sound(value)})
    for check in checks:
        # One comparison gave all of them; readers that add up the cases get its time.
        case = ET.SubElement(
            suite,
            "testcase",
            {
                "classname": _sound(f"verify.{_class_name(found)}"),
                "name": _sound(check.name),
                "time": f"{found.seconds / len(checks):.3f}",
            },
        )
        if check.passed:
            ET.SubElement(case, "system-out").text = _sound(check.says)
        else:
            failure = {"message": _sound(check.says), "type": _sound(check.name)}
            ET.SubElement(case, "failure", failure).text = _sound(_explained(check, found))
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text.decode() + "\n"


def _class_name(found: Verification) -> str:
    """The engine's file: readers cut a class's name at its dots."""
    name = PurePath(str(found.engine.get("path") or found.engine.get("name", "engine"))).name
    return name.replace(".", "_")


def _explained(check: Check, found: Verification) -> str:
    lines = [check.says]
    for cause in found.causes:
        lines += ["", f"{'cause' if cause.certain else 'likely cause'}: {cause.says}"]
        lines += [f"- {evidence}" for evidence in cause.evidence]
        lines += [f"what to do: {cause.mend}"] if cause.mend else []
    if found.command:
        lines += ["", f"again: {shlex.join(found.command)}"]
    return "\n".join(lines)


def _provenance(found: Verification) -> Iterator[tuple[str, str]]:
    yield "tool", f"ddpm-deploy {__version__}"
    yield "checkpoint.sha256", found.spec.checkpoint_sha256
    yield "same_checkpoint", str(found.same_checkpoint)
    yield from _flat("engine", found.engine)
    yield from _flat("reference", found.reference)
    yield from _flat("recipe", asdict(found.recipe))
    yield "images", " ".join(map(str, found.images))
    yield "sampled", found.sampled.says
    yield "command", shlex.join(found.command)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yields the leaves of a record, `engine.groups.conv`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        yield name, " ".join(map(str, value))
    elif value is not None:
        yield name, str(value)


def _sound(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
