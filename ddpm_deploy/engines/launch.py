"""Calls of a network on a GPU: buffers, copies, and one launch for all of them.

It knows CUDA through `Cuda` and the runtime through `Network`, and neither by name, so that its
bookkeeping is tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np

from ddpm_deploy.arrays import Array
from ddpm_deploy.engines.batches import Cut
from ddpm_deploy.engines.cuda import Buffer, Cuda, Graph
from ddpm_deploy.engines.trt_network import Tensor
from ddpm_deploy.errors import EngineError


class Network(Protocol):
    """What is called here; `TrtNetwork` is one, and says more."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Inputs and outputs by name."""

    @property
    def captures_itself(self) -> bool:
        """Whether it makes CUDA graphs of its own."""

    def bind(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        stream: int,
    ) -> None:
        """Sets the batch and the memory of the calls that follow."""

    def enqueue(self, stream: int) -> None:
        """Gives one call to a stream."""

    def keep_compiled(self) -> None:
        """Stores what was compiled so far, where something is."""

    def close(self) -> None:
        """Gives the memory back."""


class Graphs:
    """Whether work is captured, and why not where it is not.

    Attributes:
        off: Why not; empty where it is.
    """

    def __init__(self, off: str = "") -> None:
        self.off = off


class Launch:
    """Work that a stream is given again and again: plainly at first, then as one CUDA graph.

    The first time is the run that the runtime wants before a capture. Where a capture fails, the
    reason is kept and the work is given plainly ever after.

    Args:
        cuda: The device.
        stream: Where to.
        work: Gives the work to the stream; the addresses in it never change.
        graphs: Shared by all launches of an engine.
    """

    def __init__(self, cuda: Cuda, stream: int, work: Callable[[], None], graphs: Graphs) -> None:
        self._cuda, self._stream, self._work, self._graphs = cuda, stream, work, graphs
        self._graph: Graph | None = None
        self._ran = False

    def __call__(self) -> None:
        """Gives the work to the stream, which may do it later."""
        if self._graph is None and self._ran and not self._graphs.off:
            try:
                self._graph = self._cuda.capture(self._stream, self._work)
            except EngineError as error:
                self._graphs.off = f"capture failed: {error}"
        if self._graph is None:
            self._work()
        else:
            self._graph.launch(self._stream)
        self._ran = True

    def close(self) -> None:
        """Gives the graph back; once more does nothing."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None


class Slot:
    """Pinned memory for arrays of one batch: what is put here, the device copies by itself."""

    def __init__(self, cuda: Cuda, tensors: Iterable[Tensor], batch: int) -> None:
        self._cuda = cuda
        self.buffers: dict[str, Buffer] = {}
        self.views: dict[str, Array] = {}
        try:
            for tensor in tensors:
                buffer = cuda.pinned(nbytes_of(tensor, batch))
                self.buffers[tensor.name] = buffer
                self.views[tensor.name] = buffer.view(shape_of(tensor, batch), tensor.dtype)
        except BaseException:  # no memory for one: none is kept
            self.close()
            raise

    def put(self, name: str, values: Array) -> None:
        """Writes an array, in the tensor's dtype; samples beyond its own become zero."""
        view = self.views[name]
        view[: len(values)] = values
        view[len(values) :] = 0

    def close(self) -> None:
        """Gives the memory back; once more does nothing."""
        self.views.clear()
        for buffer in self.buffers.values():
            self._cuda.free(buffer)
        self.buffers.clear()


class Binding:
    """A network bound to memory for one batch.

    Args:
        cuda: The device.
        network: The network.
        stream: Where its calls go.
        at: The batch.
        shared: Whether the buffers are the host's too, where host and device share their memory.

    Attributes:
        batch: Samples of one call.
        buffers: By tensor name.
        slot: The same memory for the host; None where it is the device's alone.
    """

    def __init__(self, cuda: Cuda, network: Network, stream: int, at: Cut, *, shared: bool) -> None:
        self.cuda, self.network, self.stream = cuda, network, stream
        self.batch, self.profile = at.batch, at.profile
        self.slot: Slot | None = None
        self.buffers: dict[str, Buffer] = {}
        tensors = network.tensors.values()
        try:
            if shared:
                self.slot = Slot(cuda, tensors, at.batch)
                self.buffers = self.slot.buffers
            else:
                for tensor in tensors:
                    buffer = cuda.on_device(nbytes_of(tensor, at.batch))
                    self.buffers[tensor.name] = buffer
                    cuda.zero(buffer, stream)  # what nobody fills must not be noise
            network.bind(
                at.profile,
                {t.name: shape_of(t, at.batch) for t in tensors if t.is_input},
                {name: buffer.address for name, buffer in self.buffers.items()},
                stream,
            )
            cuda.synchronise(stream)
        except BaseException:
            cuda.settle(stream)
            self.close()
            raise

    def upload(self, slot: Slot) -> None:
        """Gives the stream the copies of a slot's arrays to where the network reads them."""
        for name, source in slot.buffers.items():
            self.cuda.copy(self.buffers[name], source, source.nbytes, self.stream)

    def close(self) -> None:
        """Gives the memory back; the caller has waited for the stream."""
        for buffer in self.buffers.values():
            self.cuda.free(buffer)
        self.buffers = {}


class Call:
    """One call of a bound network: arrays in, `out` back.

    Args:
        binding: The network at this batch.
        inputs: The inputs that `out` depends on; nobody reads what the others lead to.
        graphs: Whether it becomes one launch.
    """

    def __init__(self, binding: Binding, inputs: Iterable[str], graphs: Graphs) -> None:
        self.binding = binding
        self._inputs = tuple(inputs)
        cuda, tensors = binding.cuda, binding.network.tensors
        self._launch = Launch(cuda, binding.stream, self._work, graphs)
        self._own: list[Slot] = []
        if binding.slot is not None:
            self._in = self._out = binding.slot
            return
        try:
            for names in (self._inputs, ("out",)):
                self._own.append(Slot(cuda, [tensors[name] for name in names], binding.batch))
        except BaseException:
            self.close()
            raise
        self._in, self._out = self._own

    def __call__(self, feeds: Mapping[str, Array], samples: slice) -> Array:
        """Runs some of the samples; returns a copy of their output, in the tensor's dtype."""
        self.binding.cuda.synchronise(self.binding.stream)  # a step may still read shared memory
        for name in self._inputs:
            self._in.put(name, feeds[name][samples])
        self._launch()
        self.binding.cuda.synchronise(self.binding.stream)
        out: Array = self._out.views["out"][: samples.stop - samples.start].copy()
        return out

    def close(self) -> None:
        """Gives graph and pinned memory back."""
        self._launch.close()
        for slot in self._own:
            slot.close()

    def _work(self) -> None:
        binding = self.binding
        if self._in is not binding.slot:
            binding.upload(self._in)
        binding.network.enqueue(binding.stream)
        if self._out is not binding.slot:
            out = self._out.buffers["out"]
            binding.cuda.copy(out, binding.buffers["out"], out.nbytes, binding.stream)


def shape_of(tensor: Tensor, batch: int) -> tuple[int, ...]:
    """Returns a tensor's shape at a batch; `row` alone has no batch, and none is free in it."""
    return tuple(batch if size == -1 else size for size in tensor.shape)


def nbytes_of(tensor: Tensor, batch: int) -> int:
    """Returns a tensor's size at a batch, in bytes."""
    return int(np.prod(shape_of(tensor, batch))) * np.dtype(tensor.dtype).itemsize
