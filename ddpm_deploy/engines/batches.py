"""How a batch of any size is cut for a plan, which takes those of its profiles alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ddpm_deploy.engines.plan import PlanRecord


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A batch in equal parts.

    Attributes:
        samples: How many there are.
        batch: What each part runs as; where fewer samples are left, the rest is padding.
        part: Samples of each part but the last, which may have fewer.
        profile: The profile's number.
    """

    samples: int
    batch: int
    part: int
    profile: int

    def slices(self) -> Iterator[slice]:
        """Yields the samples of each part."""
        for start in range(0, self.samples, self.part):
            yield slice(start, min(start + self.part, self.samples))


def cut(samples: int, record: PlanRecord) -> Cut:
    """Cuts a batch into as few parts as the profiles allow.

    The parts run at one size, so that shapes, buffers and graph stay from part to part: 20 samples
    on 1:8:8 are 7, 7 and 6, padded by one.

    Args:
        samples: How many, at least 1.
        record: What the plan takes.

    Raises:
        ValueError: There are no samples.
    """
    if samples < 1:
        raise ValueError(f"a batch has at least one sample, not {samples}")
    part = _ceil(samples, _ceil(samples, record.largest_batch))
    # A profile that begins above `part` takes it padded.
    batch = min(max(part, p.least) for p in record.profiles if p.most >= part)
    profile = record.profile_for(batch)
    assert profile is not None, "a profile takes its own least batch"
    return Cut(samples=samples, batch=batch, part=part, profile=profile)


def _ceil(of: int, by: int) -> int:
    return -(-of // by)
