"""Asks an independent classifier whether the digits that an engine draws can be read.

    python demo/check_digits.py --engine demo/digits.pt -n 1000

A support-vector machine learns scikit-learn's real digits, which is all it ever sees. The engine
then draws `-n` digits, the labels 0 to 9 in turn, and the machine reads them. Exit code 0 when it
reads at least `--at-least` of them as the label that was asked for, 1 when not, 2 when the engine
cannot be opened.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from ddpm_deploy import Recipe, open_engine, sample
from ddpm_deploy.errors import DDPMDeployError, EngineError
from ddpm_deploy.images import to_pixels


def main() -> int:
    """Parses, draws, reads, prints."""
    parser = argparse.ArgumentParser(description="Can an engine's digits be read?")
    parser.add_argument("--engine", type=Path, default=Path(__file__).with_name("digits.pt"))
    parser.add_argument("-n", type=int, default=1000, help="digits to draw")
    parser.add_argument("--sampler", choices=["ddpm", "ddim"], default="ddpm")
    parser.add_argument("--steps", type=int, default=None, help="transitions; all by default")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--at-least", type=float, default=0.9, help="share that must be read")
    args = parser.parse_args()

    real = load_digits()
    reader = SVC(gamma=0.001)
    own = cross_val_score(reader, real.data, real.target, cv=5).mean()
    reader.fit(real.data, real.target)
    print(f"the classifier reads {own:.1%} of real digits that it has not seen", file=sys.stderr)

    labels = np.arange(args.n, dtype=np.int64) % 10
    read = np.empty_like(labels)
    began = time.perf_counter()
    with open_engine(args.engine) as engine:
        if engine.spec.label is None:
            raise EngineError(f"{engine.path} draws without labels.", hint="Give demo/digits.pt")
        recipe = Recipe(
            seed=args.seed,
            sampler=args.sampler,
            steps=args.steps,
            labels=tuple(range(10)),
            guidance=args.guidance,
        )
        for first in range(0, args.n, args.batch):
            part = slice(first, min(first + args.batch, args.n))
            x = sample(engine, recipe, range(part.start, part.stop))
            # The classifier knows digits as 64 numbers from 0 to 16.
            sixteenths = to_pixels(x).reshape(len(x), -1).astype(np.float64) / 255 * 16
            read[part] = reader.predict(sixteenths)
            print(f"{part.stop} of {args.n} drawn", file=sys.stderr)
    right = read == labels
    for digit in range(min(10, args.n)):
        mine = right[labels == digit]
        print(f"{digit}: {mine.sum()} of {mine.size}", file=sys.stderr)
    steps = len(recipe.table(engine.spec))
    print(
        f"{right.mean():.1%} of {args.n} digits are read as their label "
        f"({args.sampler}, {steps} steps, guidance {args.guidance:g}, seed {args.seed}, "
        f"{time.perf_counter() - began:.0f} s)"
    )
    return 0 if right.mean() >= args.at_least else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DDPMDeployError as error:
        print(f"error: {error}\n hint: {error.hint}", file=sys.stderr)
        sys.exit(2)
