"""What a user's own code did wrong, in one line: the exception's text, and the line of code."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
_LONGEST = 400


def said(error: BaseException) -> str:
    """Returns an exception's type and text, with the last line of the user's own code."""
    root = _root(error)
    try:
        text = " ".join(str(root).split())
    except Exception:  # noqa: BLE001  (it is the user's code that writes the text)
        text = ""
    if isinstance(root, SyntaxError):
        name = Path(root.filename or "?").name
        return f"SyntaxError: {root.msg} ({name}, line {root.lineno}: {(root.text or '').strip()})"
    if isinstance(root, SystemExit):
        text = f"it ends the program with {root.code!r}"
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rsplit(" ", 1)[0] + " …"
    line = _line(error)
    return f"{type(root).__name__}{f': {text}' if text else ''}{f' ({line})' if line else ''}"


def _root(error: BaseException) -> BaseException:
    """Follows `raise ... from` down to what happened first."""
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:
        error = error.__cause__
        seen.add(id(error))
    return error


def _line(error: BaseException) -> str:
    """Returns the innermost line that is neither ours nor a library's; empty where none is."""
    found = ""
    for frame in _frames(error):
        inside = frame.filename.startswith((*_OURS, "<")) or "site-packages" in frame.filename
        inside = inside or "importlib" in frame.filename or "/lib/python" in frame.filename
        if not inside and frame.line:
            found = f"{Path(frame.filename).name}, line {frame.lineno}: {frame.line}"
    return found


def _frames(error: BaseException) -> Iterator[traceback.FrameSummary]:
    one: BaseException | None = error
    for _ in range(10):  # a chain without end would be of somebody's making
        if one is None:
            return
        yield from traceback.extract_tb(one.__traceback__)
        one = one.__cause__
