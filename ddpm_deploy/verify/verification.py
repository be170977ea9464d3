"""All that one verification found, and how it was made: what the reports are written from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from ddpm_deploy._version import __version__
from ddpm_deploy.arrays import Pixels
from ddpm_deploy.engines import Engine, open_engine
from ddpm_deploy.run import Recipe
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.verify.budget import ARITHMETICS, UNIT_ROUNDOFF, Budget
from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.causes import find_causes
from ddpm_deploy.verify.compare import Comparison, Side, StepErrors, Verifier, plain
from ddpm_deploy.verify.sampled import Sampled, looked_at
from ddpm_deploy.verify.suspects.evidence import Evidence
from ddpm_deploy.verify.trace import SUFFIX, Trace, read_trace


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a verification found.

    Attributes:
        comparison: The errors, and the verdict.
        causes: What explains a failure, the likeliest first; empty where nothing failed.
        spec: What the deployed network is.
        recipe: Sampler, seed and labels of the loop.
        images: Indices of the images.
        sampled: How much of the schedule was looked at.
        reference: The reference: its runtime, file and hash, in JSON's types.
        engine: The deployed side, likewise, with its `precision` and how many operators of it
            compute in what (`groups`).
        same_checkpoint: Whether both come from one file; None where one does not say.
        seconds: What the comparison took.
        command: What was typed; empty where it was called from Python.
        pixels: The last pictures of the reference and of the deployed side, uint8 (N, H, W, C);
            None where the loop did not come to its end.
        bisection: A walk through both graphs in JSON's types; None where none was made.
    """

    comparison: Comparison
    causes: tuple[Cause, ...]
    spec: ModelSpec
    recipe: Recipe
    images: tuple[int, ...]
    sampled: Sampled
    reference: Mapping[str, Any]
    engine: Mapping[str, Any]
    same_checkpoint: bool | None
    seconds: float
    command: tuple[str, ...] = ()
    pixels: tuple[Pixels, Pixels] | None = None
    bisection: Mapping[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Tells whether the deployed loop is the trained model, within the budget."""
        return self.comparison.passed

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole of it in JSON's types."""
        found = self.comparison.to_dict()
        return {
            "tool": f"ddpm-deploy {__version__}",
            "passed": found.pop("passed"),
            "failures": found.pop("failures"),
            "causes": [cause.to_dict() for cause in self.causes],
            "engine": plain(self.engine),
            "reference": plain(self.reference),
            "same_checkpoint": self.same_checkpoint,
            "recipe": plain(asdict(self.recipe)),
            "images": list(self.images),
            "sampled": {**asdict(self.sampled), "share": self.sampled.share},
            "seconds": self.seconds,
            "command": list(self.command),
            "bisection": self.bisection and plain(self.bisection),
            **found,
        }


def verify(
    engine: Side,
    against: Side,
    recipe: Recipe | None = None,
    images: Sequence[int] = range(4),
    *,
    budget: Budget | None = None,
    command: Sequence[str] = (),
    on_start: Callable[[Verifier], None] = lambda _: None,
    on_step: Callable[[StepErrors], None] = lambda _: None,
) -> Verification:
    """Compares a deployed loop with a reference, and says what is wrong with it.

    Args:
        engine: The deployed side: an engine, a loop of one's own, or its trace.
        against: The trained model: a checkpoint's engine, another engine, or a trace.
        recipe: Sampler, seed and labels; a trace's own where one side is a trace.
        images: Indices of the images; a trace's own where one side is a trace.
        budget: What may differ; by the engine's precision when None.
        command: What was typed, for the reports.
        on_start: Told of the verifier before the first step.
        on_step: Told of each step.

    Raises:
        ParityError, EngineInputError, ValueError: As from `Verifier`.
    """
    start = perf_counter()
    budget = budget or default_budget(engine)
    verifier = Verifier(against, engine, recipe, images, budget=budget)
    on_start(verifier)
    for step in verifier:
        on_step(step)
    result, pixels = verifier.result, verifier.pixels()
    return Verification(
        comparison=result,
        causes=() if result.passed else find_causes(_evidence(verifier, result), pixels),
        spec=engine.spec,
        recipe=verifier.recipe,
        images=tuple(verifier.images),
        sampled=looked_at(
            len(verifier),
            verifier.recipe,
            engine.spec,
            recorded=isinstance(engine, Trace) or isinstance(against, Trace),
        ),
        reference=described(against),
        engine=described(engine),
        same_checkpoint=_same_checkpoint(against.spec, engine.spec),
        seconds=perf_counter() - start,
        command=tuple(command),
        pixels=pixels,
    )


def open_side(
    stack: ExitStack,
    path: Path,
    *,
    spec: ModelSpec | None = None,
    threads: int | None = None,
    device: str = "auto",
    model: str | None = None,
) -> Engine | Trace:
    """Opens what can be compared, by its suffix: a `.trace`, or an engine.

    Args:
        stack: Closes it.
        path: The file.
        spec: What the network is, for a checkpoint that does not say.
        threads: As in `open_engine`.
        device: As in `open_engine`.
        model: As in `open_engine`.

    Raises:
        TraceError: The trace is missing or damaged.
        EngineError: As from `open_engine`, and its other errors too.
    """
    if path.suffix == SUFFIX:
        return read_trace(path)
    return stack.enter_context(
        open_engine(path, threads=threads, device=device, spec=spec, model=model)
    )


def _evidence(verifier: Verifier, result: Comparison) -> Evidence:
    return Evidence(
        comparison=result,
        reference=verifier.reference,
        engine=verifier.engine,
        loops=verifier.loops,
        recipe=verifier.recipe,
        images=verifier.images,
        noise=verifier.noise,
    )


def default_budget(engine: Side) -> Budget:
    """Returns the budget of what a deployed side says it computes in, or float32's."""
    said, rounds_input = None, False
    if isinstance(engine, Engine):
        said, rounds_input = engine.precision, engine.rounds_input
    elif isinstance(engine, Trace):
        said = engine.source.get("precision")
        rounds_input = engine.source.get("rounds_input") is True
    budget = Budget.of(said if said in ARITHMETICS else "fp32")
    if rounds_input and engine.spec.prediction == "epsilon":
        return budget.with_input_rounded(engine.spec.schedule, UNIT_ROUNDOFF["bf16"])
    return budget


def described(side: Side) -> dict[str, Any]:
    """Returns what a side is: runtime, file, hash, precision."""
    if isinstance(side, Engine):
        found = {**side.describe(), "precision": side.precision}
        if side.rounds_input:
            found["rounds_input"] = True
        return {**found, "sha256": side.sha256} if Path(side.path).exists() else found
    if isinstance(side, Trace):
        return {"name": "trace", **side.source, "trace": True}
    return {"name": "loop"}


def _same_checkpoint(reference: ModelSpec, engine: ModelSpec) -> bool | None:
    hashes = reference.checkpoint_sha256, engine.checkpoint_sha256
    return hashes[0] == hashes[1] if all(hashes) else None
