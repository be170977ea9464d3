"""Shorter loops, written as OpenAI's `timestep_respacing` writes them: `10`, `5,3,2`, `ddim10`."""

from __future__ import annotations

from ddpm_deploy.sampling import Sampler

_DDIM = "ddim"


def respaced(T: int, text: str) -> tuple[int, ...]:  # noqa: N803
    """Chooses the timesteps that a shorter loop visits.

    `5,3,2` cuts the schedule into three equal sections, the first of them one longer where a rest
    is left over, and keeps so many timesteps of each, evenly spread with both ends; `10` is a
    single section. `ddim10` counts in whole strides from 0.

    Args:
        T: Length of the training schedule.
        text: As above.

    Returns:
        The timesteps in sampling order, noisiest first, each once.

    Raises:
        ValueError: It is no such text, or the schedule has too few timesteps for it.

    References:
        Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, section 4, and their code.
    """
    if text.startswith(_DDIM):
        return _strided(T, text)
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 0 or not any(counts):
        raise ValueError(
            f"respacing is {text!r}; it is a number such as 250, numbers of sections such as "
            "10,15,20, or ddim and a number, such as ddim25"
        )
    size, longer = divmod(T, len(counts))
    chosen: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if count > length:
            raise ValueError(
                f"respacing {text} keeps {count} timesteps of {length}: each of {len(counts)} "
                f"sections of {T} has no more"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # The sum is the original's: its rounding decides which neighbour a half goes to.
        at = 0.0
        for _ in range(count):
            chosen.add(start + round(at))
            at += stride
        start += length
    return tuple(sorted(chosen, reverse=True))


def respaced_sampler(text: str) -> Sampler | None:
    """Returns the sampler that a text asks for: `ddim` for strides of DDIM, else None."""
    return "ddim" if text.startswith(_DDIM) else None


def _strided(T: int, text: str) -> tuple[int, ...]:  # noqa: N803
    number = text.removeprefix(_DDIM)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"respacing is {text!r}; after ddim comes a number, such as ddim25")
    count = int(number)
    # The least stride with exactly so many stands last. Like the original, it keeps two at least.
    lengths = {len(range(0, T, stride)): stride for stride in range(max(T - 1, 1), 0, -1)}
    if count not in lengths:
        nearest = min(lengths, key=lambda length: (abs(length - count), length))
        raise ValueError(
            f"respacing {text}: no whole stride keeps exactly {count} of {T} timesteps; nearest is "
            f"ddim{nearest}"
        )
    return tuple(range(0, T, lengths[count]))[::-1]
