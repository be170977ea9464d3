"""A verification as SARIF 2.1.0, which GitHub's code scanning and other CI systems read."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ddpm_deploy._version import __version__
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.compare import Check, plain
from ddpm_deploy.verify.verification import Verification

VERSION = "2.1.0"
SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(found: Verification) -> dict[str, Any]:
    """Returns a verification as a SARIF log, in JSON's types.

    Each check is a rule. A failed one is a result of level `error`; each cause is one of level
    `warning`, or `note` where the evidence leaves others, and names the checks that it explains.

    References:
        https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
    """
    failed = [check for check in found.comparison.checks if not check.passed]
    rules = [_rule(check.name) for check in found.comparison.checks]
    rules += [_rule(f"cause/{cause.name}") for cause in found.causes]
    results = [_failure(check, found) for check in failed]
    results += [_cause(cause, failed, found) for cause in found.causes]
    index = {rule["id"]: i for i, rule in enumerate(rules)}
    for result in results:
        result["ruleIndex"] = index[result["ruleId"]]
    driver = {
        "name": "ddpm-deploy",
        "version": __version__,
        "rules": rules,
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [_invocation(found)],
        "artifacts": [artifact for artifact in map(_artifact, _sides(found)) if artifact],
        "results": results,
        "columnKind": "unicodeCodePoints",
        "properties": _provenance(found),
    }
    log = plain({"$schema": SCHEMA, "version": VERSION, "runs": [run]})
    return {name: _encodable(value) for name, value in log.items()}


def _rule(name: str) -> dict[str, Any]:
    kind, _, rest = name.partition("/")
    says = {
        "local": f"The error of a step from the reference's own x_t ({rest}) is inside its budget.",
        "accumulated": f"The error that adds up over the loop ({rest}) is inside its budget.",
        "spec": f"Reference and engine agree in {rest}.",
        "steps": "Both loops have as many steps.",
        "finite": "All numbers are finite.",
        "state": "x is float32 in the loop.",
        "pixels": "Enough of the last pictures' values are within one level of the reference's.",
        "equal": "Enough of the last pictures' values are equal to the reference's.",
        "bias": "The last pictures are as bright as the reference's.",
        "cause": "What likely explains the failures.",
    }.get(kind, f"{name} of the last pictures is inside its budget.")
    return {
        "id": name,
        "name": "".join(part.capitalize() for part in name.replace("-", "/").split("/")),
        "shortDescription": {"text": says},
        "defaultConfiguration": {"level": "note" if kind == "cause" else "error"},
    }


def _failure(check: Check, found: Verification) -> dict[str, Any]:
    text = f"{check.says[:1].upper()}{check.says[1:]}."
    numbers = {"value": check.value, "bound": check.bound, "t": check.t}
    return {
        "ruleId": check.name,
        "kind": "fail",
        "level": "error",
        "message": {"text": text},
        "locations": [_location(found.engine)],
        # The same failure of the same file is one alert, whatever its numbers.
        "partialFingerprints": {"check/v1": check.name},
        "properties": {name: value for name, value in numbers.items() if value is not None},
    }


def _cause(cause: Cause, failed: list[Check], found: Verification) -> dict[str, Any]:
    lines = [cause.says, *(f"- {evidence}" for evidence in cause.evidence)]
    lines += [f"What to do: {cause.mend}"] if cause.mend else []
    reference = _location(found.reference)
    return {
        "ruleId": f"cause/{cause.name}",
        "kind": "fail",
        "level": "warning" if cause.certain else "note",
        "message": {"text": "\n".join(lines)},
        "locations": [_location(found.engine)],
        "relatedLocations": [{**reference, "id": 1, "message": {"text": "the reference"}}],
        "partialFingerprints": {"check/v1": f"cause/{cause.name}"},
        "properties": {"place": cause.place, "explains": [check.name for check in failed]},
    }


def _location(side: Mapping[str, Any]) -> dict[str, Any]:
    location: dict[str, Any] = {"logicalLocations": [{"name": str(side.get("name", "loop"))}]}
    if side.get("path"):
        # An engine has no lines; GitHub shows only what has one.
        place = {"artifactLocation": {"uri": _uri(side["path"])}, "region": {"startLine": 1}}
        location["physicalLocation"] = place
    return location


def _artifact(side: Mapping[str, Any]) -> dict[str, Any] | None:
    if not side.get("path"):
        return None
    hashes = {"sha-256": side["sha256"]} if side.get("sha256") else {}
    return {"location": {"uri": _uri(side["path"])}, "hashes": hashes}


def _sides(found: Verification) -> tuple[Mapping[str, Any], ...]:
    same = found.engine.get("path") == found.reference.get("path")
    return (found.engine,) if same else (found.engine, found.reference)


def _uri(path: str) -> str:
    """Returns a path as a URI: relative to the working folder where the file is below it."""
    place = Path(path)
    if place.is_absolute():
        if not place.is_relative_to(Path.cwd()):
            return place.as_uri()
        place = place.relative_to(Path.cwd())
    # From its bytes, which need not be UTF-8; a colon would make a scheme of what is before it.
    return quote(os.fsencode(place.as_posix()), safe="/")


def _invocation(found: Verification) -> dict[str, Any]:
    return {
        "executionSuccessful": True,  # it could compare; what it found is in the exit code
        "exitCode": 0 if found.passed else 1,
        "exitCodeDescription": "the same model" if found.passed else "outside the budget",
        "commandLine": shlex.join(found.command),
        "arguments": list(found.command[1:]),
    }


def _provenance(found: Verification) -> dict[str, Any]:
    return {
        "checkpoint_sha256": found.spec.checkpoint_sha256,
        "same_checkpoint": found.same_checkpoint,
        "engine": found.engine,
        "reference": found.reference,
        "recipe": asdict(found.recipe),
        "images": list(found.images),
        "sampled": found.sampled.says,
        "seconds": found.seconds,
    }


def _encodable(value: Any) -> Any:
    """Returns a record without the halves of characters that paths of other encodings have."""
    if isinstance(value, Mapping):
        return {_encodable(key): _encodable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_encodable(inner) for inner in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return value
