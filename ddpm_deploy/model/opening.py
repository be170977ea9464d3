"""Opening checkpoint files without running code that is in them."""

from __future__ import annotations

import json
import pickletools
import re
import warnings
import zipfile
from collections import deque
from pathlib import Path
from typing import Any

import torch

from ddpm_deploy.errors import CheckpointError, MissingDependencyError
from ddpm_deploy.model.foreign import pickle_of
from ddpm_deploy.model.foreign_files import (
    check_archive,
    check_file,
    check_folder,
    is_safetensors,
    is_zip,
)
from ddpm_deploy.model.inert import read_beside, read_workspace

_FOLDER = 0x10
"""The attribute by which the zip library in torch takes a record for a folder."""


def read_content(path: Path) -> Any:
    """Reads a checkpoint file's content without running any code that is in it.

    Returns:
        What the file holds. Of pickles that import more than torch's reader allows: of a policy's
        workspace what `inert.read_workspace` makes of it, and of weights with NumPy's numbers
        beside them what `inert.read_beside` does.

    Raises:
        CheckpointError: The file is missing, damaged, or needs code to be read.
        MissingDependencyError: `.safetensors` needs the package of that name.
    """
    if path.is_dir():
        check_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; a checkpoint is a file.",
            hint="Check the path: ls " + str(path.parent),
        )
    if path.stat().st_size == 0:
        raise damaged(path, "it is empty")
    if path.suffix in {".onnx", ".plan"}:
        raise CheckpointError(
            f"{path} is an engine already; a checkpoint is what training saved.",
            hint=f"Build it or draw with it: ddpm-deploy sample --engine {path}",
        )
    check_file(path)
    torchs = is_zip(path) or _starts(path) in {b"PK", b"\x80\x02", b"\x80\x04"}
    if is_safetensors(path) or (path.suffix == ".safetensors" and not torchs):
        return _open_safetensors(path)
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks about the pickle's version
            if path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True)
            with path.open("rb") as file:  # torch goes by the suffix, too
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        if asked := _global_in(str(error)) or _global_of(path):
            if (workspace := read_workspace(path)) is not None:
                return workspace
            if (content := _beside(path)) is not None:
                return content
            saver, hint = pickle_of(asked)
            raise CheckpointError(
                f"{path} is a pickle that runs code when it is read: it asks for "
                f"{asked[:200]}.{saver} ddpm-deploy reads tensors only, since such a file can do "
                "anything to this machine.",
                hint=hint
                or "Where the file was made, save the weights alone: "
                "torch.save(model.state_dict(), 'ckpt.pt')",
            ) from error
        raise damaged(path, _reason(path, error)) from error


def _beside(path: Path) -> Any:
    try:
        return read_beside(path)
    except ValueError as error:
        raise damaged(path, str(error)) from error


def _open_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingDependencyError(
            f"safetensors is needed here to read {path}, and is not installed ({error}).",
            hint="pip install 'ddpm-deploy[export]'",
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise damaged(path, str(error)) from error


def _check_archive(path: Path) -> None:
    """Compares every record of a zip checkpoint with its checksum, which torch does not."""
    if not is_zip(path):
        return  # torch's form before 1.6 has no sums
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # zipfile raises nearly anything on a damaged archive
        raise damaged(path, str(error)) from error
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise CheckpointError(
            f"{path} is a TorchScript archive: a program, not the weights alone.",
            hint="Save its weights: torch.save(torch.jit.load(FILE).state_dict(), 'ckpt.pt')",
        )
    check_archive(path, [record.filename for record in records])
    # What torch writes is not compressed; a bomb is.
    if packed := [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]:
        raise damaged(path, f"its record {packed[0]} is compressed, which torch does not do")
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:
        raise damaged(path, str(error)) from error
    if bad is not None:
        raise damaged(path, f"the checksum of its record {bad} does not match")
    if folders := [r.filename for r in records if r.is_dir() or r.external_attr & _FOLDER]:
        # torch reads nothing for a folder, and hands out memory as it finds it.
        raise damaged(path, f"its record {folders[0]} is marked as a folder")


def _global_in(message: str) -> str:
    """Picks what a pickle wanted to import out of torch's message; empty if it says nothing."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    return found[1] if found else ""


def _global_of(path: Path) -> str:
    """Returns what a pickle would import besides torch's own, without running it.

    torch's reader stops at the first opcode of a newer protocol, before it comes to the import.
    """
    strings = deque[str](maxlen=2)
    try:
        for opcode, argument, _ in pickletools.genops(_pickle_in(path)):
            name = ""
            if opcode.name in {"GLOBAL", "INST"}:
                name = str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                name = ".".join(strings)
            elif isinstance(argument, str):
                strings.append(argument)
            if name and not name.startswith(("torch.", "collections.")):
                return name
    except Exception:  # noqa: BLE001  (no pickle, or a damaged one)
        return ""
    return ""


def _pickle_in(path: Path) -> bytes:
    if not is_zip(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)


def _starts(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def _reason(path: Path, error: Exception) -> str:
    """Says what is wrong with a file that torch cannot read, in words of ours.

    Torch's own text advises to load the file with `weights_only=False`, which runs its code.
    """
    start = _starts(path)
    if start == b"PK" and not is_zip(path):
        return "it begins as an archive whose end is missing"
    if start[:1] != b"\x80" and start != b"PK":
        return "it is neither an archive nor a pickle"
    line = next(iter(str(error).splitlines()), "")
    return "its pickle cannot be read" if not line or "weights_only" in line else line


def damaged(path: Path, what: str) -> CheckpointError:
    """Returns the error for a file that cannot be read."""
    return CheckpointError(
        f"{path} is damaged, or is no checkpoint: {what}.",
        hint="Copy it again from where it was trained, and compare: sha256sum " + str(path),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object from a JSON file; {} where there is no such file.

    Raises:
        CheckpointError: It is no JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise damaged(path, f"it holds a {type(data).__name__}, not settings by name")
    return data
