"""`ddpm-deploy export`: a checkpoint becomes an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddpm_deploy.cli.common import Json, ModelName, SpecFile, note, print_json, settings, spec_of
from ddpm_deploy.cli.describe_checkpoint import (
    loop_in_words,
    parse_settings,
    parse_size,
    print_facts,
)


def command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint: .pt, .ckpt, .safetensors, a folder, or a .pt2.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write.")] = Path(
        "unet.onnx"
    ),
    image_size: Annotated[
        str | None, typer.Option(help="32, or height x width 16x24, where the file does not say.")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="linear, scaled_linear, cosine or sigmoid, where the file does not say."),
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="T of training, where the file does not say."),
    ] = None,
    prediction: Annotated[
        str | None,
        typer.Option(help="epsilon, sample or v_prediction, where the file does not say."),
    ] = None,
    said: Annotated[
        list[str] | None,
        typer.Option("--set", help="A fact of the table: --set heads=4. May be repeated."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="ema or online, where the file has both; ema if left out.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Put guidance of this scale into the graph: a doubled batch inside."),
    ] = None,
    model: ModelName = None,
    spec_file: SpecFile = None,
    opset: Annotated[int, typer.Option(help="ONNX opset; TensorRT 10.3 (Jetson) reads 20.")] = 20,
    json: Json = False,
) -> None:
    """Write a checkpoint's network as ONNX, checked against PyTorch.

    The file appears under its name only when ONNX Runtime gives what PyTorch
    gives, at several timesteps and batch sizes.
    """
    from dataclasses import asdict
    from typing import cast

    from ddpm_deploy.engines.base import needs
    from ddpm_deploy.sampling import Prediction
    from ddpm_deploy.schedule import named_schedule

    if weights not in {None, "ema", "online"}:
        raise typer.BadParameter(f"{weights!r} is neither ema nor online", param_hint="--weights")
    if output.suffix != ".onnx":
        raise typer.BadParameter(f"{output} must end in .onnx", param_hint="--output")
    options = {
        "--image-size": image_size,
        "--schedule": schedule,
        "--timesteps": timesteps,
        "--prediction": prediction,
    }
    typed = next((name for name, value in options.items() if value is not None), None)
    if spec_file is not None and typed is not None:
        raise typer.BadParameter(f"{spec_file} says it; leave {typed} out", param_hint=typed)
    with needs("torch", extra="export"):
        from ddpm_deploy.export.to_onnx import export_network
        from ddpm_deploy.model import load_network
        from ddpm_deploy.model.family import Weights
        from ddpm_deploy.model.spec_toml import read_spec_toml
    with needs("onnxruntime", extra="cpu"):
        import onnxruntime  # noqa: F401  (the check needs it: say so before the work)

    with settings("See: ddpm-deploy export --help"):  # before the work; the family's is not known
        named_schedule(schedule or "linear", timesteps or 1000)
    toml = spec_file is not None and spec_file.suffix == ".toml"
    told = read_spec_toml(spec_file) if spec_file is not None and toml else None
    loaded = load_network(
        checkpoint,
        image_size=parse_size(image_size),
        schedule=schedule,
        timesteps=timesteps,
        prediction=cast("Prediction | None", prediction),
        weights=cast("Weights | None", weights),
        settings=parse_settings(said or []),
        guidance=guidance,
        spec=spec_of(spec_file) if told is None else told.spec,
        model=model,
    )
    facts = (*loaded.facts, *(() if told is None else told.facts))
    spec = loaded.spec
    shape = "x".join(map(str, spec.sample_shape))
    weighed = f"{spec.weights} weights, " if spec.weights else ""
    note(f"{checkpoint}: {spec.family}, {weighed}{shape}")
    print_facts(facts)
    note(f"its own loop, which sample runs: {loop_in_words(spec)}")
    with settings("See: ddpm-deploy export --help"):
        exported = export_network(loaded.network, spec, output, opset=opset)
    worst = max(d.relative for d in exported.deviations)
    note(
        f"{exported.parameters / 1e6:.2f} M parameters, {exported.nodes} nodes, opset "
        f"{exported.opset}, {exported.bytes / 1e6:.1f} MB in {exported.seconds:.1f} s; at most "
        f"{worst:.1e} of the peak from PyTorch over {len(exported.deviations)} batches"
    )
    if json:
        print_json(
            {
                "path": str(exported.path),
                "opset": exported.opset,
                "nodes": exported.nodes,
                "parameters": exported.parameters,
                "bytes": exported.bytes,
                "seconds": exported.seconds,
                "largest_deviation": worst,
                "weights": spec.weights,
                "facts": [asdict(fact) for fact in facts],
                "spec": spec.to_dict(),
            }
        )
    else:
        typer.echo(exported.path)
