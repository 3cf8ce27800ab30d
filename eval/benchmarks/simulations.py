"""How often the truth lies within its 95% interval, where the truth is known.

    python -m eval.benchmarks.simulations
    python -m eval.benchmarks.simulations differences --trials 2000

differences   of two checkpoints, with the documents, skews and rare changes that scores have
real          of two checkpoints on the demo text, whose documents are drawn again and again
laws          parameters of scaling laws, what a model is worth, and losses not measured
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import compress
from eval.compare import difference, paired
from eval.harness import evaluate
from eval.results import Result
from eval.scaling import degradation, law
from eval.scaling.degradation import Loss
from eval.scaling.equivalent import equivalent

Draw = Callable[[random.Random], tuple[list[float], list[int]]]
"""Differences whose true mean is 0, and the document of each."""

# nll = E + A·N^−α of dense models of SIZES parameters
SIZES = np.array([1e5, 2e5, 4e5, 8e5, 1.5e6, 3e6, 7e6])
E, A, ALPHA = 2.2, 40.0, 0.25
# what compressing loses: e^(C − P·bits − FALL·ln N) · group^G, N in millions
C, P, FALL, G = 2.0, 1.5, 0.1, 0.2


def clustered(noise: random.Random) -> tuple[list[float], list[int]]:
    """24 documents of 1 to 8 windows that share half of the variance."""
    values, documents = [], []
    for document in range(24):
        shared = noise.gauss(0, 1)
        for _ in range(noise.randint(1, 8)):
            values.append(shared + noise.gauss(0, 1))
            documents.append(document)
    return values, documents


def alone(noise: random.Random) -> tuple[list[float], list[int]]:
    """The same, with each window taken for a document of its own."""
    return clustered(noise)[0], []


def skewed(noise: random.Random) -> tuple[list[float], list[int]]:
    """64 windows, most a little better and some much worse."""
    return [noise.expovariate(1) - 1 for _ in range(64)], []


def right_or_wrong(count: int, changed: float) -> Draw:
    """Answers, of which a few are right only before, or only after."""

    def draw(noise: random.Random) -> tuple[list[float], list[int]]:
        return [noise.choice((-1, 1)) * (noise.random() < changed) for _ in range(count)], []

    return draw


def coverage(draw: Draw, trials: int, binary: bool = False) -> float:
    """How often the interval of a difference holds the truth, 0."""
    inside = 0
    for seed in range(trials):
        values, documents = draw(random.Random(seed))
        ones = [1.0] * len(values)
        found = difference("x", values, ones, documents, higher_is_better=True, binary=binary)
        inside += found.low <= 0 <= found.high
    return inside / trials


def dense(noise: float, seed: int) -> np.ndarray:
    """nll of ``SIZES`` by the law, times lognormal noise."""
    scatter = np.random.default_rng(seed).standard_normal(len(SIZES))
    return (E + A * SIZES**-ALPHA) * np.exp(noise * scatter)


def losses(
    bits: list[float], sizes: list[int], groups: list[int], scatter: float = 0.05, seed: int = 0
) -> list[Loss]:
    """Losses of compressed checkpoints by the law, times lognormal noise."""
    rng = random.Random(seed)
    made = []
    for b in bits:
        for N in sizes:
            for group in groups:
                loss = math.exp(C - P * b - FALL * math.log(N / 1e6)) * group**G
                loss *= math.exp(scatter * rng.gauss(0, 1))
                size = N / 8 * (b + 16 / group + 3)
                name = f"rtn-{b:g}-{N}-{group}"
                made.append(Loss(name, "rtn", "bits", b, group, N, loss, loss / 50, size))
    return made


def differences(trials: int) -> None:
    cases: list[tuple[str, Draw, bool]] = [
        ("24 documents of 1 to 8 windows", clustered, False),
        ("the same, if documents were ignored", alone, False),
        ("64 windows, skewed", skewed, False),
        ("100 answers, 15% changed", right_or_wrong(100, 0.15), True),
        ("40 answers, 5% changed", right_or_wrong(40, 0.05), True),
    ]
    for words, draw, binary in cases:
        say(f"differences: {words}", coverage(draw, trials, binary), trials)


def real(trials: int) -> None:
    """One block in 8 bits, on 1,500 windows; 24 of their documents drawn at random, many times."""

    def rows(folder: str) -> Result:
        measured = evaluate([folder], ["nll"], data="demo", baseline="demo", samples=1500)
        return next(row for row in measured if isinstance(row, Result))

    with tempfile.TemporaryDirectory() as root:
        stage = {"use": "rtn", "bits": 8, "blocks": [3]}
        compress.apply({"stages": [stage]}, model="demo", out=Path(root, "int8"), verify=False)
        small, original = rows(str(Path(root, "int8"))), rows("demo")
    print(f"block 3 in 8 bits: {paired(small, original).words}", flush=True)
    documents: dict[int, list[float]] = {}
    assert small.samples
    assert original.samples
    for a, b, document in zip(small.samples, original.samples, small.documents or (), strict=True):
        documents.setdefault(document, []).append(a - b)
    kept = list(documents.values())
    truth = sum(map(sum, kept)) / sum(map(len, kept))
    inside = 0
    for seed in range(trials):
        chosen = random.Random(seed).choices(kept, k=24)
        owners = [number for number, values in enumerate(chosen) for _ in values]
        values = [value for values in chosen for value in values]
        ones = [1.0] * len(values)
        found = difference("x", values, ones, owners, higher_is_better=False)
        inside += found.low <= truth <= found.high
    say(f"real differences: 24 documents drawn of {len(kept)}", inside / trials, trials)


def laws(trials: int) -> None:
    """A hundredth of the trials: each fits three laws, and draws their data again for intervals."""
    trials = max(trials // 100, 20)
    original, worth = 1_500_000, 1_200_000
    lost = A * worth**-ALPHA - A * original**-ALPHA
    inside, equal, predicted, found = np.zeros(3), 0, 0, []
    for seed in range(trials):
        curve = law.fit(SIZES, dense(0.005, seed), draws=200)
        low, high = np.percentile(curve.draws, [2.5, 97.5], axis=0)
        inside += (low <= [E, A, ALPHA]) & (high >= [E, A, ALPHA])
        measured = lost + 0.002 * random.Random(seed).gauss(0, 1)
        said = equivalent(curve, original, measured, 0.002)
        equal += said.low <= worth <= said.high
        made = losses([2, 3, 4, 5, 6], [400_000, 1_500_000, 6_000_000], [32, 128], seed=seed)
        drop = degradation.fit(made, draws=200)
        if drop.form == "exponential":
            low, high = np.percentile(drop.draws, [2.5, 97.5], axis=0)
            truth = [P, G, FALL]
            found.append((low[1:] <= truth) & (high[1:] >= truth))
        *made, new = losses([2, 3, 4, 5, 6, 4.5], [1_000_000], [64], scatter=0.1, seed=seed)
        guess = degradation.fit(made, draws=200).predict(4.5)
        predicted += guess.low <= new.delta <= guess.high
    for name, hits in zip(("E", "A", "α"), inside / trials, strict=True):
        say(f"law of dense models: {name}", hits, trials)
    say("what a model is worth in parameters", equal / trials, trials)
    for name, hits in zip(("bits", "group", "size"), np.mean(found, axis=0), strict=True):
        say(f"law of compressed models: {name} (its form found {len(found)} times)", hits, trials)
    say("a loss at bits that were not measured", predicted / trials, trials)


def say(what: str, share: float, trials: int) -> None:
    stderr = (share * (1 - share) / trials) ** 0.5
    print(f"{what}: {100 * share:.1f}% ± {100 * stderr:.1f} of {trials}", flush=True)


PARTS = {"differences": differences, "real": real, "laws": laws}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--trials", type=int, default=10_000)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in options.parts or PARTS:
        PARTS[name](options.trials)


if __name__ == "__main__":
    main()
