"""What TensorRT-RTX compiled for a GPU, kept beside the plan: `unet.plan.cache`.

It saves the seconds of compiling at every start. It is never needed: a cache that is missing,
damaged, or for another plan, runtime or GPU is left aside and written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ddpm_deploy.files import whole_file

_LONGEST_HEADER = 4096


class RuntimeCache:
    """A file whose first line says what it is for, in JSON; the rest is the runtime's.

    Args:
        plan: The plan that it stands beside.
        key: What it is for: hash of the plan, version of the runtime, GPU and driver.
    """

    def __init__(self, plan: Path, key: Mapping[str, str]) -> None:
        self.path = plan.with_name(plan.name + ".cache")
        self._key = dict(key)
        self._stored = ""

    def read(self) -> bytes | None:
        """Returns what was written for this key; None where there is no such file."""
        with suppress(OSError, ValueError):
            with self.path.open("rb") as file:
                header = json.loads(file.readline(_LONGEST_HEADER))
                blob = file.read()
            digest = hashlib.sha256(blob).hexdigest()
            if header == {**self._key, "sha256": digest}:
                self._stored = digest
                return blob
        return None

    def write(self, blob: bytes) -> None:
        """Stores what the runtime compiled; a folder that cannot be written is no error."""
        digest = hashlib.sha256(blob).hexdigest()
        if digest == self._stored:
            return
        with suppress(OSError), whole_file(self.path) as partial:
            header = json.dumps({**self._key, "sha256": digest}, sort_keys=True)
            partial.write_bytes(header.encode() + b"\n" + blob)
        self._stored = digest
