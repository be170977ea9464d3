"""The page: what was found, put into words, drawings and tables."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ddpm_deploy._version import __version__
from ddpm_deploy.images import is_picture
from ddpm_deploy.precision import LayerPrecision
from ddpm_deploy.report import words
from ddpm_deploy.report.charts import Chart, error_charts, line_chart
from ddpm_deploy.report.frames import loop_frames
from ddpm_deploy.report.layers import SHORT, layer_map, operator
from ddpm_deploy.report.pictures import PAIRS, picture_pairs
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.verify.budget import QUANTITIES
from ddpm_deploy.verify.compare import Comparison, StepErrors
from ddpm_deploy.verify.trace import chosen_steps
from ddpm_deploy.verify.verification import Verification

ROWS = 40
"""Timesteps in the table of errors, besides the worst ones."""

LONG = 160
"""Characters of a value in a table; of a longer one both ends are shown."""


def write_report(
    path: Path, found: Verification, *, layers: Sequence[LayerPrecision] | None = None
) -> None:
    """Writes the page.

    Args:
        path: Where to; `files.whole_file` gives a place where it appears whole or not at all.
        found: What a verification found.
        layers: As for `html`.

    Raises:
        OSError: The file cannot be written.
    """
    path.write_text(html(found, layers=layers), encoding="utf-8")


def html(found: Verification, *, layers: Sequence[LayerPrecision] | None = None) -> str:
    """Returns the page: one HTML document under 3 MB that asks the network for nothing.

    The same arguments give the same text.

    Args:
        found: What a verification found.
        layers: What each layer of the deployed network computes in, as `export.describe.layers`
            tells of its graph; None where that is not known.
    """
    environment = Environment(
        loader=PackageLoader("ddpm_deploy", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=words.number,
        short=short,
        operator=operator,
        long_text=long_text,
        percent=lambda v: f"{v:.2%}",
    )
    # The page's own files, in which nothing of the model's is put.
    style, script = (Markup(_source(environment, name)) for name in ("page.css", "page.js"))  # noqa: S704
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    comparison = found.comparison
    return environment.get_template("page.html.j2").render(
        found=found,
        comparison=comparison,
        words=words,
        style=style,
        script=script,
        script_hash=f"sha256-{digest}",
        version=__version__,
        quantities=[(name, words.QUANTITY_NAMES[name]) for name in QUANTITIES],
        charts=error_charts(comparison, T=found.spec.schedule.T),
        table=table_steps(comparison),
        pairs=picture_pairs(found) if is_picture(found.spec.sample_shape) else None,
        lines=[] if is_picture(found.spec.sample_shape) else _last_lines(found),
        loop_view=loop_frames(found),
        map=layer_map(layers or ()),
        groups=found.engine.get("groups") or {},
        sides=list(_sides(found)),
        spec=_spec(found.spec),
        recipe={key: value for key, value in asdict(found.recipe).items() if value is not None},
        command=words.command(found.command),
    )


def table_steps(comparison: Comparison) -> list[StepErrors]:
    """Returns the steps for the table: evenly spread, with the worst of each error."""
    steps = comparison.steps
    if not steps:
        return []
    shown = {i - 1 for i in chosen_steps(len(steps), ROWS)}
    for kind in ("local", "accumulated"):
        for quantity in QUANTITIES:
            errors = [getattr(getattr(step, kind), quantity).max for step in steps]
            shown.add(errors.index(max(errors)))
    return [steps[i] for i in sorted(shown)]


def short(precision: str) -> str:
    """Returns a precision's name for a narrow cell."""
    return SHORT.get(precision, precision)


def long_text(value: object) -> str:
    """Returns a value as text; of a very long one both ends."""
    text = "yes" if value is True else "no" if value is False else _listed(value)
    half = LONG // 2
    return text if len(text) <= LONG else f"{text[:half]} … {text[-half:]}"


def _listed(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(inner) for inner in value)
    return str(value)


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _last_lines(found: Verification) -> list[Chart]:
    """Returns the last samples as lines, where they are no pictures and the loop ended."""
    kept = found.comparison.kept
    if found.comparison.pictures is None or not kept or kept[-1].k != found.comparison.steps[-1].k:
        return []
    wanted, given = kept[-1].wanted.x, kept[-1].given.x
    return [
        line_chart(wanted[i], given[i], name=f"sample-{i}", heading=f"Sample {found.images[i]}")
        for i in range(min(len(wanted), PAIRS))
    ]


def _sides(found: Verification) -> Iterator[tuple[str, Any, Any]]:
    """Yields what is known of the two sides, a line each: what, the reference's, the deployed's."""
    names = {"name": "runtime", "path": "file", "runtime": "version", "sha256": "SHA-256"}
    keys = dict.fromkeys((*names, *found.reference, *found.engine))
    for key in keys:
        values = found.reference.get(key), found.engine.get(key)
        if key != "groups" and any(value not in (None, "", {}) for value in values):
            yield names.get(key, key.replace("_", " ")), *values


def _spec(spec: ModelSpec) -> dict[str, Any]:
    """Returns what the network is, for people: the names of classes are left out."""
    said = {
        "family": spec.family,
        "sample shape": " × ".join(map(str, spec.sample_shape)),
        "schedule": str(spec.schedule),
        "prediction": spec.prediction,
        "variance": spec.variance,
        "clip": "none" if spec.clip is None else spec.clip,
        "value range": f"{spec.value_range[0]:g} to {spec.value_range[1]:g}",
        "rounding": spec.rounding,
        "first timestep": spec.first_timestep,
        "sampler": spec.sampler,
        "conditions": ", ".join(
            f"{c.name} ({c.meaning.replace('_', ' ')}"
            + (f", {c.classes} classes)" if c.classes else ")")
            for c in spec.conditions
        ),
        "checkpoint SHA-256": spec.checkpoint_sha256,
        "written by": f"ddpm-deploy {spec.tool_version}",
    }
    return {key: value for key, value in said.items() if value != ""}
