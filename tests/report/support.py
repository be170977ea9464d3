"""Verifications to write reports of, and what a page holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_deploy import Engine, ModelSpec, linear
from ddpm_deploy.run import Recipe
from ddpm_deploy.verify.verification import Verification, verify
from tests.support import tiny_spec


class Bent(Engine):
    """out = 0.9·tanh(x) · (1 + error), of any shape; not a number from a timestep on.

    Args:
        spec: What it is.
        error: Relative, of every output.
        nan_from: Largest timestep at which the output is no number; None for none.
        path: What its file is called.
    """

    name = "bent"

    def __init__(
        self,
        spec: ModelSpec,
        *,
        error: float = 0.0,
        nan_from: int | None = None,
        path: str = "bent.onnx",
    ) -> None:
        self.spec, self.path = spec, Path(path)
        self.error, self.nan_from = error, nan_from

    def _run(self, feeds: Mapping[str, Any]) -> np.ndarray:
        out = np.tanh(feeds["x"]) * np.float32(0.9 * (1 + self.error))
        if self.nan_from is not None and feeds["t"][0] <= self.nan_from:
            out[0] = np.nan
        return np.asarray(out)


def shaped(shape: tuple[int, ...], *, timesteps: int = 20) -> ModelSpec:
    """A spec of samples of a shape."""
    schedule = linear(timesteps, start=1e-3, end=0.2)
    return replace(tiny_spec(), sample_shape=shape, schedule=schedule)


def found(
    spec: ModelSpec | None = None,
    *,
    images: int = 2,
    steps: int | None = None,
    name: str = "bent.onnx",
    **fault: Any,
) -> Verification:
    """Returns what a comparison finds, of a sound engine where no fault is named."""
    spec = spec or tiny_spec()
    engine = Bent(spec, path=name, **fault)
    recipe = Recipe(seed=1, steps=steps)
    return verify(engine, Bent(spec), recipe, range(images), command=["ddpm-deploy", "verify"])


class Page(HTMLParser):
    """The elements of a page: every one with its attributes, its ids, its text by element.

    Args:
        text: The page.
    """

    VOID = frozenset({"meta", "img", "input", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """What a reader sees, with what is said of drawings, without style and script."""
        return " ".join(text for tag, text in self.texts if tag not in {"style", "script"})
