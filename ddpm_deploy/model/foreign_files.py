"""Files without tensors of PyTorch, told by their first bytes, and folders by what is in them."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_deploy.errors import CheckpointError

_HEAD = 4096
_LATER = "Give what PyTorch's training saved: .pt, .pth, .ckpt, .bin or .safetensors."
_CONVERT = (
    "Load its weights into the PyTorch network of the same layers, and save that: "
    "torch.save(model.state_dict(), 'ckpt.pt')"
)

WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Suffixes of files that may be a network's weights."""


class NoModelError(CheckpointError):
    """A folder is of no kind that has a name, and holds nothing that opens as one."""


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """A kind of file that is no checkpoint of PyTorch.

    Attributes:
        name: For tests and lists.
        says: What it is, after "is".
        hint: What to type or get instead.
        starts: What its first bytes may be, where they tell it.
        test: From its first bytes and its path, where more is needed.
    """

    name: str
    says: str
    hint: str
    starts: tuple[bytes, ...] = ()
    test: Callable[[bytes, Path], bool] | None = None

    def matches(self, head: bytes, path: Path) -> bool:
        """Tells whether a file is of this kind."""
        if self.starts and head.startswith(self.starts):
            return True
        return self.test is not None and self.test(head, path)


def _named(*endings: str) -> Callable[[bytes, Path], bool]:
    return lambda _, path: path.name.lower().endswith(endings)


def _html(head: bytes, _: Path) -> bool:
    start = head.lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head")) or b"<html" in start[:512]


def _xml(head: bytes, _: Path) -> bool:
    return head.lstrip().startswith((b"<?xml", b"<Error>"))


def _onnx(head: bytes, _: Path) -> bool:
    # ModelProto: its version, then its producer
    return re.match(rb"\x08[\x03-\x14]\x12[\x01-\x40][\w.\-]{3}", head) is not None


def _text(head: bytes) -> str | None:
    """Returns the text that a file begins with; None where it is not text."""
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < _HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    return text if text.strip() and all(c.isprintable() or c in "\r\n\t" for c in text) else None


def _json(head: bytes, path: Path) -> bool:
    text = _text(head)
    if text is None or not text.lstrip().startswith(("{", "[")):
        return False
    return path.suffix.lower() == ".json" or re.match(r"\s*[{\[]\s*[\"{\[\d]", text) is not None


def _yaml(head: bytes, path: Path) -> bool:
    return path.suffix.lower() in {".yaml", ".yml", ".toml", ".ini", ".cfg"} and bool(_text(head))


def _csv(head: bytes, path: Path) -> bool:
    text = _text(head)
    if text is None:
        return False
    lines = text.splitlines()[:-1] or text.splitlines()
    counts = {line.count(",") for line in lines}
    return path.suffix.lower() == ".csv" or (len(lines) > 1 and counts == {max(counts)} != {0})


def _python(head: bytes, path: Path) -> bool:
    text = _text(head)
    return text is not None and (
        path.suffix == ".py" or re.search(r"^(import|from) \w+", text, re.MULTILINE) is not None
    )


KINDS: tuple[FileKind, ...] = (
    FileKind(
        name="unfinished download",
        says="a download that is not finished",
        hint="Let it end, or fetch it anew: its name has no such suffix then.",
        test=_named(".part", ".crdownload", ".download", ".incomplete", ".aria2", ".partial"),
    ),
    FileKind(
        name="git-lfs pointer",
        says="a pointer of git-lfs: a few lines in the file's place",
        hint="Fetch the file itself, in its repository: git lfs pull",
        starts=(b"version https://git-lfs",),
    ),
    FileKind(
        name="web page",
        says="a web page, not the file: what a server sends in place of a download",
        hint="Open it in a browser to see what it says; then fetch the file by its direct address "
        "(of Hugging Face: /resolve/ in place of /blob/).",
        test=_html,
    ),
    FileKind(
        name="XML",
        says="XML, which servers send as an error in place of a download",
        hint="Look at it: head -c 500 FILE; then fetch the file anew.",
        test=_xml,
    ),
    FileKind(
        name="Keras HDF5",
        says="an HDF5 file, as Keras saves its weights",
        hint=_CONVERT,
        starts=(b"\x89HDF\r\n\x1a\n",),
    ),
    FileKind(
        name="GGUF",
        says="a GGUF file, of llama.cpp and its kin: weights that were quantised for them",
        hint="Give the checkpoint that it was converted from.",
        starts=(b"GGUF", b"ggml", b"lmgg"),
    ),
    FileKind(
        name="NumPy array",
        says="one NumPy array (.npy)",
        hint="Save a network's weights with their names: torch.save(model.state_dict(), 'ckpt.pt')",
        starts=(b"\x93NUMPY",),
    ),
    FileKind(
        name="TensorFlow checkpoint",
        says="a part of a TensorFlow checkpoint",
        hint=_CONVERT,
        test=lambda _, path: (
            re.search(r"\.(ckpt.*\.)?(index|meta|data-\d+-of-\d+)$", path.name) is not None
        ),
    ),
    FileKind(
        name="TensorFlow graph",
        says="a TensorFlow graph (SavedModel or frozen)",
        hint=_CONVERT,
        test=_named(".pb", ".pbtxt"),
    ),
    FileKind(
        name="TensorFlow Lite",
        says="a TensorFlow Lite model",
        hint=_CONVERT,
        test=lambda head, _: head[4:8] == b"TFL3",
    ),
    FileKind(
        name="Flax",
        says="msgpack, as Flax saves the weights of JAX networks",
        hint="Convert it: diffusers loads one with from_pretrained(FOLDER, from_flax=True), and "
        "save_pretrained(NEW) writes a folder for this package.",
        test=_named(".msgpack", ".flax"),
    ),
    FileKind(
        name="picture",
        says="a picture",
        hint=_LATER,
        starts=(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM6", b"II*\x00", b"MM\x00*"),
        test=lambda head, _: head[:4] == b"RIFF" and head[8:12] == b"WEBP",
    ),
    FileKind(
        name="film or sound",
        says="a film or a sound",
        hint=_LATER,
        starts=(b"ID3", b"OggS", b"fLaC", b"\x1aE\xdf\xa3"),
        test=lambda head, _: (
            head[4:8] == b"ftyp" or (head[:4] == b"RIFF" and head[8:12] in {b"WAVE", b"AVI "})
        ),
    ),
    FileKind(name="PDF", says="a PDF", hint=_LATER, starts=(b"%PDF",)),
    FileKind(
        name="program",
        says="a program or a library of this machine",
        hint=_LATER,
        starts=(b"\x7fELF", b"MZ", b"\xcf\xfa\xed\xfe"),
    ),
    FileKind(
        name="tar",
        says="a tar archive",
        hint="Unpack it, and give the checkpoint in it: tar -xf FILE",
        test=lambda head, _: head[257:262] == b"ustar" and not head.startswith(b"\x80"),
    ),
    FileKind(
        name="packed",
        says="packed (gzip, xz, zstd, 7z, rar or bzip2)",
        hint="Unpack it, and give the checkpoint in it.",
        starts=(b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"(\xb5/\xfd", b"\xfd7zXZ", b"BZh"),
    ),
    FileKind(
        name="ONNX",
        says="an ONNX file under another name: an engine already",
        hint="Rename it to end in .onnx, and draw with it: ddpm-deploy sample --engine unet.onnx",
        test=_onnx,
    ),
    FileKind(
        name="plan",
        says="a plan of TensorRT: an engine already",
        hint="Give the checkpoint that it was built from.",
        starts=(b"ftrt", b"ptrt"),
        test=_named(".engine", ".trt"),
    ),
    FileKind(
        name="TensorBoard",
        says="a log of TensorBoard",
        hint="The weights are usually beside it, in a .pt or .ckpt file.",
        test=lambda _, path: path.name.startswith("events.out.tfevents"),
    ),
    FileKind(
        name="SQLite",
        says="an SQLite database",
        hint=_LATER,
        starts=(b"SQLite format 3",),
    ),
    FileKind(name="Parquet", says="a table of data (Parquet)", hint=_LATER, starts=(b"PAR1",)),
    FileKind(
        name="configuration",
        says="a configuration: words about a network, not its weights",
        hint="Give the weights beside it, or of diffusers the whole folder.",
        test=_yaml,
    ),
    FileKind(
        name="JSON",
        says="JSON: a configuration or an index, not the weights",
        hint="Give the weights beside it, or of diffusers the whole folder.",
        test=_json,
    ),
    FileKind(
        name="table",
        says="a table of numbers in text (CSV), not a network",
        hint=_LATER,
        test=_csv,
    ),
    FileKind(
        name="Python",
        says="Python code, not the weights",
        hint="Give the weights, and name the code: ddpm-deploy export ckpt.pt --model "
        "package.module:factory --spec spec.toml",
        test=_python,
    ),
)
"""In the order in which they are tried; what is sure before what is likely."""


def check_file(path: Path) -> None:
    """Refuses a file that is of a kind with a name.

    Args:
        path: There, and not empty.

    Raises:
        CheckpointError: It is.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for kind in KINDS:
        if kind.matches(head, path):
            raise CheckpointError(f"{path} is {kind.says}.", hint=kind.hint)


def is_zip(path: Path) -> bool:
    """Tells whether a file is a zip archive, or so damaged a one that reading it says why."""
    try:
        return zipfile.is_zipfile(path)
    except Exception:  # noqa: BLE001  (it raises nearly anything)
        return True


def is_safetensors(path: Path) -> bool:
    """Tells whether a file is one of safetensors, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:9] == b"{" and 2 <= length <= path.stat().st_size - 8


def check_archive(path: Path, names: Sequence[str]) -> None:
    """Refuses a zip archive that torch did not write.

    Args:
        path: The archive.
        names: Of its records.

    Raises:
        CheckpointError: It is none of torch's; says what is in it.
    """
    if any(name.endswith("data.pkl") for name in names):
        return
    tops = {name.rsplit("/", 1)[-1] for name in names}
    if tops & {"model.weights.h5", "metadata.json"} and "config.json" in tops:
        raise CheckpointError(f"{path} is a model of Keras 3 (.keras).", hint=_CONVERT)
    if names and all(name.endswith(".npy") for name in names):
        shown = ", ".join(name.removesuffix(".npy") for name in names[:5])
        raise CheckpointError(
            f"{path} is a NumPy archive (.npz) of {len(names)} arrays: {shown}.",
            hint=_CONVERT,
        )
    if "saved_model.pb" in tops:
        raise CheckpointError(f"{path} is a zipped SavedModel of TensorFlow.", hint=_CONVERT)
    inside = [name for name in names if name.endswith(WEIGHTS)]
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    raise CheckpointError(
        f"{path} is a zip archive that torch did not write: it holds {shown or 'nothing'}.",
        hint=f"Unpack it, and give {inside[0] if inside else 'the checkpoint in it'}: unzip {path}",
    )


def check_folder(path: Path) -> None:
    """Refuses a folder that no family opens; says what it is, and which file in it is likely.

    Args:
        path: The folder.

    Raises:
        CheckpointError: Always.
    """
    inside = sorted(path.iterdir())
    names = {each.name for each in inside}
    if not inside:
        raise CheckpointError(
            f"{path} is a folder; a checkpoint is a file.",
            hint="It is empty: give the file that training saved, or a folder of diffusers.",
        )
    shards = [n for n in names if n.endswith((".index.json", ".bin.index.json"))]
    if "zero_to_fp32.py" in names or any("model_states.pt" in n for n in names):
        raise CheckpointError(
            f"{path} is a folder of DeepSpeed, whose weights lie in shards.",
            hint=f"Join them: python {path}/zero_to_fp32.py {path} ckpt.pt, and give that file.",
        )
    if any(n.endswith(".distcp") for n in names) or any(
        list(each.glob("*.distcp"))[:1] for each in inside if each.is_dir()
    ):
        raise CheckpointError(
            f"{path} is a sharded checkpoint of FSDP (torch.distributed.checkpoint).",
            hint="Join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{path} ckpt.pt, and give that file.",
        )
    if shards:
        raise CheckpointError(
            f"{path} holds weights in shards, as {shards[0]} lists them.",
            hint="Load them with the library that wrote them, and save one file: "
            "torch.save(model.state_dict(), 'ckpt.pt')",
        )
    if "saved_model.pb" in names:
        raise CheckpointError(f"{path} is a SavedModel of TensorFlow.", hint=_CONVERT)
    if any(n.endswith(".index") for n in names) and "checkpoint" in names:
        raise CheckpointError(f"{path} is a folder of TensorFlow checkpoints.", hint=_CONVERT)
    if names & {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}:
        raise CheckpointError(f"{path} is a checkpoint of Orbax, for JAX.", hint=_CONVERT)
    if {"refs", "snapshots"} <= names:
        snapshots = sorted((path / "snapshots").iterdir())
        raise CheckpointError(
            f"{path} is a cache of huggingface_hub: the files lie below snapshots.",
            hint=f"Give the snapshot: ddpm-deploy export {snapshots[0] if snapshots else path}",
        )
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{path} is a folder of a LoRA (peft): changes to the weights of another network.",
            hint="Merge it first: model.merge_and_unload().save_pretrained(NEW)",
        )
    pipeline = _class_in(path / "model_index.json")
    if pipeline:
        raise CheckpointError(
            f"{path} is a {pipeline} of diffusers, which this release does not read.",
            hint="It reads DDPMPipeline and DDIMPipeline with a UNet2DModel; others mostly work "
            "on latents or are guided by text.",
        )
    named = _class_in(path / "config.json")
    if named:
        raise CheckpointError(
            f"{path} is a {named}, which this release does not read.",
            hint="It reads UNet2DModel folders of diffusers; see docs/checkpoints.md",
        )
    raise _no_model(path, inside)


def likely(path: Path) -> Path | None:
    """Returns the file in a folder that is most likely its network; None where there is none."""
    found = [each for each in path.rglob("*") if each.suffix in WEIGHTS and each.is_file()][:1000]
    skipped = re.compile(r"optim|opt\d|scheduler|scaler|random_states|training_args|rng|vae|clip")
    kept = [each for each in found if not skipped.search(each.name)]

    def rank(each: Path) -> tuple[int, int, float]:
        ema = "ema" in each.name or "best" in each.name
        return (len(each.relative_to(path).parts), 0 if ema else 1, -each.stat().st_mtime)

    return min(kept, key=rank, default=None)


def weights_in(path: Path) -> list[Path]:
    """Returns the weights of an accelerate folder, `model.safetensors` and those numbered after."""
    names = re.compile(r"(model|pytorch_model)(_\d+)?\.(safetensors|bin)")
    return sorted(each for each in path.iterdir() if names.fullmatch(each.name))


def is_accelerate(path: Path) -> bool:
    """Tells whether a folder is what accelerate's `save_state` wrote."""
    names = {each.name for each in path.iterdir()}
    marks = {"optimizer.bin", "scheduler.bin", "scaler.pt", "random_states_0.pkl", "sampler.bin"}
    return bool(names & marks) and bool(weights_in(path))


def _no_model(path: Path, inside: Sequence[Path]) -> NoModelError:
    shown = ", ".join(each.name + ("/" if each.is_dir() else "") for each in inside[:8])
    more = f" and {len(inside) - 8} more" if len(inside) > 8 else ""
    file = likely(path)
    return NoModelError(
        f"{path} is a folder without a model that this release knows; it holds {shown}{more}.",
        hint=f"Give the file itself: {file}"
        if file
        else "No file in it has the suffix of a checkpoint: " + ", ".join(WEIGHTS),
    )


def _class_in(path: Path) -> str:
    """Returns the class that a JSON file of diffusers or transformers names, or an empty text."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    if not isinstance(data, dict):
        return ""
    architectures = data.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    found = data.get("_class_name") or first or data.get("model_type") or ""
    return str(found)[:80]
