"""For a user's own tests: does the deployed loop stay the trained model?

from ddpm_deploy.testing import assert_same_model

def test_the_deployed_loop_is_the_trained_model():
assert_same_model("unet.onnx", "ckpt.pt", timesteps=50)
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from ddpm_deploy.run import Recipe
from ddpm_deploy.verify.budget import Arithmetic, Budget, read_budget
from ddpm_deploy.verify.sampled import drawn_steps
from ddpm_deploy.verify.trace import Trace
from ddpm_deploy.verify.verification import Verification, open_side, verify


def assert_same_model(
    engine: str | Path,
    against: str | Path,
    *,
    budget: Budget | Arithmetic | Path | None = None,
    timesteps: int | None = None,
    images: int = 4,
    recipe: Recipe | None = None,
    threads: int | None = None,
    device: str = "auto",
) -> Verification:
    """Fails a test where a deployed loop is not the trained model, and says why.

    Args:
        engine: The deployed engine, or its `.trace`.
        against: The trained checkpoint, another engine, or a `.trace`.
        budget: What may differ: a `Budget`, the name of an arithmetic, or a TOML file; by the
            engine's precision when None.
        timesteps: How many are compared, drawn from all of the schedule; those of the recipe's loop
            when None.
        images: How many are drawn.
        recipe: Sampler, seed and labels; a trace's own where one side is a trace.
        threads: As in `open_engine`.
        device: As in `open_engine`.

    Returns:
        What was found, where nothing is outside the budget.

    Raises:
        AssertionError: Something is; the message has each value, and the likely cause.
        DDPMDeployError: The two cannot be compared.
    """
    __tracebackhide__ = True  # pytest then shows the test's line, not this one
    if isinstance(budget, Path):
        budget = read_budget(budget)
    elif isinstance(budget, str):
        budget = Budget.of(budget)
    with ExitStack() as stack:
        deployed = open_side(stack, Path(engine), threads=threads, device=device)
        reference = open_side(
            stack, Path(against), spec=deployed.spec, threads=threads, device=device
        )
        chosen = recipe or Recipe()
        traced = isinstance(deployed, Trace) or isinstance(reference, Trace)
        if timesteps is not None and not traced:
            steps = drawn_steps(deployed.spec, timesteps, seed=chosen.seed)
            chosen = replace(chosen, steps=steps)
        found = verify(deployed, reference, chosen, range(images), budget=budget)
        if not found.passed:
            with suppress(ImportError):  # onnx, which the loop does not need
                from ddpm_deploy.export.explain import explain  # noqa: PLC0415

                found = replace(found, causes=explain(found, reference, deployed))
    if not found.passed:
        raise AssertionError(_said(engine, against, found))
    return found


def _said(engine: str | Path, against: str | Path, found: Verification) -> str:
    lines = [f"{engine} is not the model of {against}:"]
    lines += [f"  {failure}" for failure in found.comparison.failures]
    for cause in found.causes:
        word = "cause" if cause.certain else "likely cause"
        lines += [f"{word}: {cause.says}", *(f"  {line}" for line in cause.evidence)]
        lines += [f"  mend: {cause.mend}"] if cause.mend else []
    return "\n".join(lines)
