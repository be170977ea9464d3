"""The wrong file, or one that says other things than the reference."""

from __future__ import annotations

from collections.abc import Iterator

from ddpm_deploy.verify.cause import Cause
from ddpm_deploy.verify.suspects.evidence import Evidence

_NAMES = {
    "schedule": "wrong-schedule",
    "variance": "wrong-variance",
    "clip": "wrong-clip",
    "prediction": "wrong-prediction",
    "value_range": "wrong-value-range",
    "rounding": "pixel-rounding",
    "conditions": "other-conditions",
    "first_timestep": "timestep-convention",
    "timestep": "timestep-convention",
}


def file_causes(evidence: Evidence) -> Iterator[Cause]:
    """Yields what the two files say themselves."""
    for field, values in evidence.comparison.spec_differences.items():
        yield Cause(
            name=_NAMES.get(field, f"other-{field}"),
            place="file",
            says=f"The deployed file says another {field.replace('_', ' ')}.",
            evidence=(values,),
            mend="Export the network again from its checkpoint, or set what the file does not say.",
            certain=True,
        )
    ours, theirs = (side.spec.checkpoint_sha256 for side in (evidence.reference, evidence.engine))
    if ours and theirs and ours != theirs and evidence.network_is_off:
        yield Cause(
            name="another-checkpoint",
            place="file",
            says="The engine was made from another checkpoint file than the reference.",
            evidence=(f"SHA-256 {theirs[:12]}… in the engine, {ours[:12]}… in the reference",),
            mend="Export and build again from this checkpoint.",
        )
