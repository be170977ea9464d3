"""Stand-ins for TensorRT's objects, made from the classes of its real bindings.

A class of the bindings says what it has and, in its docstrings, what its methods take and give. A
stand-in has that and nothing else: another name is an AttributeError, other arguments are a
TypeError, and what comes back is of the type that is promised. So code runs here as far as names
and types carry it, in each release, without the libraries below the bindings. It computes nothing.

Run as a program, it puts stand-ins in place of a release and runs a piece of the package on them:
`python stand_ins.py MODULE FLAVOUR PIECE ARGUMENT...`, where MODULE is the bindings'.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

Answers = Mapping[str, Any]
"""What a member gives where its type alone is not enough: `INetworkDefinition.num_inputs`."""

MADE_BY_US = ("Builder", "OnnxParser", "Runtime")
SIGNATURE = re.compile(r"^(?:\d+\. )?\w*\((?P<takes>.*)\) -> (?P<gives>.+)$", re.MULTILINE)
PARAMETER = re.compile(r"(\w+): ((?:[^,=\[<]|\[.*?\])+)( = (?:<.*?>|[^,]+))?(?:, |$)")
OTHER_NAMES = {"IParserError": "ParserError"}


class StandIn:
    """An object of a class of the bindings; it accepts what that accepts."""

    def __init__(self, release: Release, of: type, **own: Any) -> None:
        vars(self).update(_release=release, _of=of, _own=own)

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._of, name)  # AttributeError as the real one
        if name in self._own:
            return self._own[name]
        if isinstance(member, property):
            return self._release.value(self._of, name, member.fget.__doc__)

        def method(*arguments: Any, **named: Any) -> Any:
            return self._release.called(self, name, member.__doc__, arguments, named)

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        member = getattr(self._of, name)
        assert member.fset is not None, f"{self._of.__name__}.{name} cannot be set"
        self._release.called(self, name, member.fset.__doc__, (value,), {})

    def __getitem__(self, index: int) -> Any:
        return self.__getattr__("__getitem__")(index)


class Release:
    """The bindings of a release, with stand-ins where they would need a library.

    Args:
        bindings: The module of the bindings.
        answers: What members give.
    """

    def __init__(self, bindings: ModuleType, answers: Answers) -> None:
        self.bindings, self.answers = bindings, answers
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def module(self, name: str) -> ModuleType:
        """Returns what `import name` gives where the release is installed."""
        module = ModuleType(name)
        vars(module).update(vars(self.bindings))
        module.__spec__ = ModuleSpec(name, None)
        for made in MADE_BY_US:
            setattr(module, made, self._maker(getattr(self.bindings, made)))
        return module

    def called(
        self,
        on: StandIn,
        name: str,
        doc: str,
        arguments: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> Any:
        """Checks arguments against a member's signatures; returns what it gives."""
        whole = f"{on._of.__name__}.{name}"
        self.calls.append((whole, arguments))
        for found in SIGNATURE.finditer(doc):
            parameters = PARAMETER.findall(found["takes"])[1:]  # without self
            if self._fits(parameters, arguments, named):
                answer = self.answers.get(whole)
                if callable(answer):
                    return answer(*arguments)
                return self.value(on._of, name, doc)
        raise TypeError(f"{whole} takes no {arguments} {dict(named)}: {doc}")

    def value(self, of: type, name: str, doc: str) -> Any:
        """Returns the answer for a member, or a value of the type that it promises."""
        whole = f"{of.__name__}.{name}"
        if whole in self.answers:
            return self.answers[whole]
        found = SIGNATURE.search(doc)
        assert found, f"{whole} does not say what it gives: {doc!r}"
        plain: dict[str, Any] = {
            "None": None,
            "bool": True,
            "int": 0,
            "str": "",
            "list[str]": [],
            "List[str]": [],
        }
        gives = found["gives"].strip()
        if gives in plain:
            return plain[gives]
        kind = self._class(gives)
        members = getattr(kind, "__members__", None)
        return next(iter(members.values())) if members else StandIn(self, kind)

    def _maker(self, of: type) -> Callable[..., StandIn]:
        def make(*arguments: Any) -> StandIn:
            made = StandIn(self, of)
            doc = vars(of)["__init__"].__doc__
            self.called(made, "__init__", doc, arguments, {})
            return made

        return make

    def _class(self, text: str) -> Any:
        name = re.split(r"\.|::", text)[-1]
        return getattr(self.bindings, OTHER_NAMES.get(name, name))

    def _fits(
        self,
        parameters: list[tuple[str, str, str]],
        arguments: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> bool:
        given = dict(zip((name for name, _, _ in parameters), arguments, strict=False))
        if len(arguments) > len(parameters) or given.keys() & named.keys():
            return False
        given |= named
        wanted = {name: kind for name, kind, _ in parameters}
        needed = {name for name, _, default in parameters if not default}
        return needed <= given.keys() <= wanted.keys() and all(
            self._is(value, wanted[name].strip()) for name, value in given.items()
        )

    def _is(self, value: Any, kind: str) -> bool:
        plain: dict[str, Any] = {
            "int": int,
            "typing.SupportsInt": int,
            "str": str,
            "bool": bool,
            "tuple": tuple,
            "list": list,
            "buffer": bytes,
            "typing_extensions.Buffer": bytes,
            "object": object,
        }
        if kind in plain:
            return isinstance(value, plain[kind])
        if kind.endswith(".Dims"):  # the bindings make one of any sequence of numbers
            return isinstance(value, tuple | list) and all(isinstance(n, int) for n in value)
        wanted = self._class(kind)
        return (
            issubclass(value._of, wanted)
            if isinstance(value, StandIn)
            else isinstance(value, wanted)
        )


def building(release: Release) -> dict[str, Any]:
    """Answers for a network of one convolution, with the inputs x and t; `bad.onnx` is refused."""
    kinds, floats = release.bindings.LayerType, release.bindings.DataType

    def tensor(name: str, shape: tuple[int, ...], dtype: Any) -> StandIn:
        own = {"name": name, "shape": shape, "dtype": dtype, "is_shape_tensor": False}
        return StandIn(release, release.bindings.ITensor, **own)

    inputs = [tensor("x", (-1, 1, 8, 8), floats.FLOAT), tensor("t", (-1,), floats.INT64)]
    layer = StandIn(release, release.bindings.ILayer, type=kinds.CONVOLUTION, num_outputs=1)
    return {
        "Builder.build_serialized_network": b"a plan",
        "IBuilderConfig.DLA_core": -1,
        "IBuilderConfig.int8_calibrator": None,
        "ILayer.get_output": lambda index: tensor("y", (-1, 1, 8, 8), floats.HALF),
        "ILayer.precision_is_set": False,
        "INetworkDefinition.__getitem__": [layer].__getitem__,
        "INetworkDefinition.get_input": inputs.__getitem__,
        "INetworkDefinition.num_inputs": len(inputs),
        "IOptimizationProfile.__bool__": True,
        "ITimingCache.serialize": b"what was measured",
        "OnnxParser.num_errors": 1,
        "OnnxParser.parse_from_file": lambda path: not path.endswith("bad.onnx"),
        "ParserError.code": lambda: release.bindings.ErrorCode.UNSUPPORTED_NODE,
        "ParserError.desc": "no such operator",
        "ParserError.node_name": "/attention",
        "ParserError.node_operator": "Attention",
    }


def running(release: Release) -> dict[str, Any]:
    """Answers for a plan with the input x and the output out."""
    modes = release.bindings.TensorIOMode
    return {
        "ICudaEngine.get_tensor_dtype": release.bindings.DataType.FLOAT,
        "ICudaEngine.get_tensor_mode": {"x": modes.INPUT, "out": modes.OUTPUT}.__getitem__,
        "ICudaEngine.get_tensor_name": ["x", "out"].__getitem__,
        "ICudaEngine.get_tensor_shape": (-1, 1, 8, 8),
        "ICudaEngine.num_io_tensors": 2,
        "IRuntimeCache.serialize": b"what was compiled",
    }


def run_network(release: Release, trt: ModuleType, flavour: Any, plan: Path) -> None:
    """Runs `TrtNetwork` from its plan to its end; says what it called, as JSON."""
    from ddpm_deploy.engines.runtime_cache import RuntimeCache
    from ddpm_deploy.engines.trt_network import TrtNetwork
    from ddpm_deploy.errors import EngineError
    from tests.engines.plans import record

    said = record(flavour=flavour, version_compatible=flavour == "tensorrt")
    for _ in range(2):  # twice: the second start finds what the first one stored
        network = TrtNetwork(trt, plan, said, RuntimeCache(plan, {}))
        network.bind(1, {"x": (2, 1, 8, 8)}, {"x": 256, "out": 512}, 5)
        network.enqueue(5)
        network.keep_compiled()
        network.close()
    report: dict[str, Any] = {
        "called": [name for name, _ in release.calls],
        "loggers": len({id(a[0]) for n, a in release.calls if n == "Runtime.__init__"}),
        "tensors": {n: [t.dtype, t.is_input] for n, t in network.tensors.items()},
        "refused": {},
    }
    for name, answer in FAILURES.items():
        release.answers = {**running(release), name: answer}
        network = TrtNetwork(trt, plan, said, RuntimeCache(plan, {}))
        try:
            network.bind(1, {"x": (2, 1, 8, 8)}, {"x": 256, "out": 512}, 5)
        except EngineError as error:
            report["refused"][name] = str(error)
        network.keep_compiled()
    print(json.dumps(report))


def _raise(*_: Any) -> Any:
    raise RuntimeError("as the bindings do")


FAILURES = {
    "IExecutionContext.set_optimization_profile_async": _raise,
    "IExecutionContext.set_input_shape": False,
    "IExecutionContext.infer_shapes": _raise,
    "IExecutionContext.set_tensor_address": False,
    "IRuntimeCache.serialize": None,
}
"""How the bindings tell a failure, by their source: by False, by raising, or by None."""


def be_refused(trt: Any, logger: Any) -> None:
    """Says which of some wrong calls are refused, and how, as JSON."""
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    wrong: dict[str, Callable[[], Any]] = {
        "no such name": lambda: builder.no_such_name,
        "no such flag": lambda: trt.BuilderFlag.NO_SUCH_FLAG,
        "a text for a number": lambda: builder.create_network("1"),
        "too few": lambda: builder.build_serialized_network(builder.create_network()),
        "too many": lambda: config.clear_flag(trt.BuilderFlag.TF32, 1),
        "another class": lambda: builder.build_serialized_network(config, config),
        "another enum": lambda: config.clear_flag(trt.DataType.FLOAT),
        "a name unknown": lambda: builder.create_network(flag=1),
    }
    said = {name: _refusal(call) for name, call in wrong.items()}
    print(json.dumps(said))


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (AttributeError, TypeError) as error:
        return type(error).__name__
    return ""


def main() -> None:
    name, flavour, piece, *arguments = sys.argv[1:]
    answers: dict[str, Any] = {}
    release = Release(importlib.import_module(name), answers)
    module = sys.modules[flavour] = release.module(flavour)
    if piece == "network":
        answers |= running(release)
        run_network(release, module, flavour, Path(arguments[0]))
    elif piece == "refusals":
        logger = type("Log", (module.ILogger,), {"log": lambda *_: None})()
        be_refused(module, logger)
    else:
        from ddpm_deploy.engines import trt_worker

        answers |= building(release)
        sys.argv[1:] = [flavour]
        trt_worker.main()


if __name__ == "__main__":
    main()
