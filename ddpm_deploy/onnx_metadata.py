"""The metadata of an ONNX file, read past its weights: no runtime and no onnx package needed.

An ONNX file is a protobuf message; of its fields, `metadata_props` (14) is a list of pairs, key (1)
and value (2), and the rest is skipped without being read.

References:
    https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, ModelProto and StringStringEntryProto.
    https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ddpm_deploy.errors import EngineError

_METADATA_PROPS = 14
_KEY, _VALUE = 1, 2
_LONGEST = 2**26
"""Bytes of an entry, at most; a spec with a thousand betas has some ten thousand."""


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the `metadata_props` of an ONNX file.

    Raises:
        EngineError: The file cannot be read, or is no ONNX file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return dict(
                _pair(content)
                for number, content in _fields(file, size, wanted={_METADATA_PROPS})
                if number == _METADATA_PROPS
            )
    except (OSError, ValueError) as error:
        raise EngineError(
            f"{path} cannot be read as an ONNX file: {error}.",
            hint="Export the network again: ddpm-deploy export CHECKPOINT",
        ) from error


def _pair(content: bytes) -> tuple[str, str]:
    found = {
        number: text.decode("utf-8")
        for number, text in _fields(io.BytesIO(content), len(content), wanted={_KEY, _VALUE})
    }
    return found.get(_KEY, ""), found.get(_VALUE, "")


def _fields(file: BinaryIO, size: int, *, wanted: set[int]) -> Iterator[tuple[int, bytes]]:
    """Yields number and bytes of the wanted fields of a message, and skips the others."""
    while file.tell() < size:
        number, kind = divmod(_varint(file), 8)
        match kind:
            case 0:
                _varint(file)
            case 1:
                _skip(file, 8, size)
            case 5:
                _skip(file, 4, size)
            case 2:
                length = _varint(file)
                if number not in wanted:
                    _skip(file, length, size)
                elif length > min(_LONGEST, size - file.tell()):
                    raise ValueError("it is cut off, or damaged")
                else:
                    yield number, file.read(length)
            case _:
                raise ValueError(f"it has a field of kind {kind}")


def _skip(file: BinaryIO, length: int, size: int) -> None:
    if file.tell() + length > size:
        raise ValueError("it is cut off, or damaged")
    file.seek(length, os.SEEK_CUR)


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("it is cut off, or damaged")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("it has a number of more than 64 bits")
