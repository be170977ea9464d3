"""A stand-in for a GPU on host memory, for tests of our own bookkeeping.

It runs no TensorRT and proves nothing about it. `HostCuda` does what `Cuda` promises, as late as it
may: work given to a stream is done when somebody waits, so a buffer that is written too early,
freed too early or read before it was filled gives wrong numbers here. `HostNetwork` computes with
ONNX Runtime on the bytes at the addresses that it was bound to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from ddpm_deploy import ModelSpec, open_engine
from ddpm_deploy.engines.cuda import Buffer, Cuda, Graph
from ddpm_deploy.engines.device import Device
from ddpm_deploy.engines.trt_network import Tensor
from ddpm_deploy.errors import EngineError
from ddpm_deploy.fused import COLUMNS

Work = Callable[[], None]


class HostGraph(Graph):
    def __init__(self, cuda: HostCuda, work: list[Work]) -> None:
        self.cuda, self.work = cuda, work

    def launch(self, stream: int) -> None:
        self.cuda.calls.append("launch")
        self.cuda.queue.extend(self.work)

    def close(self) -> None:
        self.work = []


class HostCuda(Cuda):
    """`Cuda` on host memory.

    Args:
        integrated: Whether host and device share memory, as on a Jetson.
        cannot_capture: What a capture fails with; empty where it works.
        room: Bytes that can be taken.

    Attributes:
        broken: What every wait fails with, as after an error of the device; empty where none did.
    """

    def __init__(
        self, *, integrated: bool = False, cannot_capture: str = "", room: int = 1 << 30
    ) -> None:
        super().__init__(
            Device(
                name="Host memory",
                compute_capability="8.6",
                memory=1 << 30,
                integrated=integrated,
                driver="13.0",
            )
        )
        self.cannot_capture, self.room, self.broken = cannot_capture, room, ""
        self.calls: list[str] = []
        self.queue: list[Work] = []
        self.passed: set[int] = set()
        self.set: set[int] = set()
        self.live: dict[int, np.ndarray] = {}
        self._recording: list[Work] | None = None
        self._handles = 0

    def give(self, work: Work) -> None:
        """Puts work behind what the stream has."""
        (self.queue if self._recording is None else self._recording).append(work)

    def memory(self, address: int) -> np.ndarray:
        assert address in self.live, "memory that was freed, or never taken"
        return self.live[address]

    def stream(self) -> int:
        return self._handle()

    def close_stream(self, stream: int) -> None:
        assert not self.queue, "a stream that still has work was closed"

    def synchronise(self, stream: int) -> None:
        assert self._recording is None, "waiting ends a capture"
        self.settle(stream)
        if self.broken:
            raise EngineError(self.broken)

    def settle(self, stream: int) -> None:
        while self.queue:
            self.queue.pop(0)()

    def event(self) -> int:
        return self._handle()

    def close_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        self.set.add(event)
        self.passed.discard(event)
        self.give(lambda: self.passed.add(event))

    def wait(self, event: int) -> None:
        self.calls.append("wait")
        while event in self.set and event not in self.passed:
            self.queue.pop(0)()

    def on_device(self, nbytes: int) -> Buffer:
        return self._allot(nbytes, host=False)

    def pinned(self, nbytes: int) -> Buffer:
        return self._allot(nbytes, host=True)

    def free(self, buffer: Buffer) -> None:
        if buffer.address:
            assert not self.queue, "memory was freed while a stream may use it"
            del self.live[buffer.address]
            buffer.address, buffer.host = 0, None

    def copy(self, to: Buffer, source: Buffer, nbytes: int, stream: int) -> None:
        self.calls.append("copy")
        to_, source_ = to.address, source.address

        def work() -> None:
            self.memory(to_)[:nbytes] = self.memory(source_)[:nbytes]

        self.give(work)
        if to.host is not None and source.host is not None:
            # Such a copy waits for the stream and for itself, says CUDA of its synchronisation.
            self.synchronise(stream)

    def zero(self, buffer: Buffer, stream: int) -> None:
        address = buffer.address
        self.give(lambda: self.memory(address).fill(0))

    def capture(self, stream: int, work: Work) -> Graph:
        self.calls.append("capture")
        if self.cannot_capture:
            raise EngineError(self.cannot_capture)
        self._recording = []
        try:
            work()
            return HostGraph(self, self._recording)
        finally:
            self._recording = None

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def _allot(self, nbytes: int, *, host: bool) -> Buffer:
        if nbytes + sum(len(memory) for memory in self.live.values()) > self.room:
            raise EngineError("no room")
        # Fresh memory holds NaN, so that what nobody filled shows.
        memory = np.full(nbytes, 0 if host else 255, dtype=np.uint8)
        address = memory.ctypes.data
        self.live[address] = memory
        return Buffer(address=address, nbytes=nbytes, host=memory if host else None)


class HostNetwork:
    """What a plan of `graph` would compute, by ONNX Runtime on host memory.

    Args:
        cuda: Where its memory is.
        graph: The network.
        batches: The batches of each profile: a call outside them is an error.
        fused: Whether the step is behind the network.
        timestep: Dtype of `t` in the plan.
    """

    def __init__(
        self,
        cuda: HostCuda,
        graph: Path,
        batches: Iterable[range],
        *,
        fused: bool = False,
        timestep: str = "int64",
        captures_itself: bool = False,
    ) -> None:
        self.cuda, self.batches, self.fused = cuda, list(batches), fused
        self.captures_itself = captures_itself
        self.engine = open_engine(graph)
        self.tensors = tensors_of(self.engine.spec, fused=fused, timestep=timestep)
        self.bound: list[tuple[int, int]] = []
        self.calls = 0
        self.kept = 0
        self.fed: dict[str, np.ndarray] = {}
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        self._addresses: Mapping[str, int] = {}

    def bind(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        stream: int,
    ) -> None:
        batch = shapes["x"][0]
        assert batch in self.batches[profile], "a batch outside its profile"
        assert shapes.keys() == {name for name, t in self.tensors.items() if t.is_input}
        assert addresses.keys() == self.tensors.keys()
        self.bound.append((profile, batch))
        self._shapes, self._addresses = dict(shapes), dict(addresses)

    def enqueue(self, stream: int) -> None:
        shapes, addresses = self._shapes, self._addresses

        def at(name: str, shape: tuple[int, ...]) -> np.ndarray:
            size = int(np.prod(shape)) * np.dtype(self.tensors[name].dtype).itemsize
            memory = self.cuda.memory(addresses[name])
            assert len(memory) == size, "a buffer of another size"
            return memory.view(self.tensors[name].dtype).reshape(shape)

        def work() -> None:
            self.calls += 1
            fed = {name: at(name, shape) for name, shape in shapes.items()}
            self.fed = {name: value.copy() for name, value in fed.items()}
            assert not any(np.isnan(value).any() for value in fed.values()), (
                "nobody filled an input"
            )
            conditions = {c.name: fed[c.name] for c in self.engine.spec.conditions}
            out = self.engine(fed["x"], fed["t"].astype(np.int64), **conditions)
            at("out", out.shape)[:] = out
            if self.fused:
                at("x_s", out.shape)[:] = step(fed["x"], out, fed["row"], fed["z"])

        self.cuda.give(work)

    def keep_compiled(self) -> None:
        self.kept += 1

    def close(self) -> None:
        self.engine.close()


def tensors_of(spec: ModelSpec, *, fused: bool, timestep: str = "int64") -> dict[str, Tensor]:
    """Lists what a plan of this network has, written out by hand."""
    sample = (-1, *spec.sample_shape)
    rows: list[tuple[str, str, tuple[int, ...], bool]] = [
        ("x", "float32", sample, True),
        ("t", timestep, (-1,), True),
        *((c.name, c.dtype, (-1, *c.shape), True) for c in spec.conditions),
        ("out", "float32", sample, False),
    ]
    if fused:
        rows += [
            ("row", "float32", (9,), True),
            ("z", "float32", sample, True),
            ("x_s", "float32", sample, False),
        ]
    return {n: Tensor(name=n, dtype=d, shape=s, is_input=i) for n, d, s, i in rows}


def step(x: np.ndarray, out: np.ndarray, row: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Returns x_s by the equations at the head of `sampling`, without a learned variance."""
    a = dict(zip(COLUMNS, row, strict=True))
    x0 = np.clip(a["x0_from_x"] * x + a["x0_from_out"] * out, -a["clip"], a["clip"])
    mean = a["x_from_x0"] * x0 + a["x_from_x"] * x + a["x_from_out"] * out
    return np.asarray(mean + a["x_from_noise"] * z, dtype=np.float32)
