"""Simulate what the certificates promise: coverage, wrong orders, images needed, width, cost.

Each claim is compared with a naive rule that ignores the number of looks, and that fails in the same
simulation. No data is needed.

    python benchmarks/certify.py [--sets 2000] [--repeats 101] [--seed 0]
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import machine
import numpy as np

from tokdiv.certify import OrderCertifier, certify_order, confidence_sequence, look_schedule

IMAGENET = 1_281_167
MISS = 0.05  # alpha of the simulated intervals
WRONG = 0.1  # delta of the simulated orders: large, so that a broken rule would show
TIE = 0.02
METHODS = ("hedged", "bernstein", "naive")
DECIDE = {0.05: 320, 0.02: 850, 0.01: 1900}  # true gap -> median images, at most
ASKED = {"hedged": "0.0130, 0.0045", "bernstein": "0.0160, 0.0047"}
Rng = np.random.Generator

# Populations of values in [0, 1], (N, sets), each column one data set in random order.
VALUES: dict[str, Callable[[Rng, int, int], np.ndarray]] = {
    "bounded (normal, sd 0.1)": lambda rng, n, m: np.clip(rng.normal(0.45, 0.1, (n, m)), 0, 1),
    "uniform": lambda rng, n, m: rng.uniform(0, 1, (n, m)),
    "skewed (Beta 0.2, 2)": lambda rng, n, m: rng.beta(0.2, 2, (n, m)),
    "two-point (1 in a tenth)": lambda rng, n, m: (rng.random((n, m)) < 0.1) * 1.0,
    "near-degenerate (0.5, rarely 1)": lambda rng, n, m: np.where(
        rng.random((n, m)) < 0.01, 1.0, 0.5
    ),
    "near-degenerate (sd 1e-6)": lambda rng, n, m: rng.normal(0.3, 1e-6, (n, m)),
}


def equal(difference: np.ndarray) -> np.ndarray:
    """(N,) differences in random order -> (N, 2) scores with exactly that mean difference."""
    return np.stack([np.full(len(difference), 0.4), 0.4 + difference], axis=1)


def balanced(rng: Rng, n: int, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """Differences whose mean over the population is exactly 0."""
    half = draw(n // 2)
    return equal(rng.permutation(np.concatenate([half, -half])))


def skewed(rng: Rng, n: int) -> np.ndarray:
    """Nine small differences down for each large one up; the mean is 0."""
    up = n // 10
    return equal(rng.permutation(np.repeat([0.54, -0.06], [up, 9 * up])))


def correlated(rng: Rng, n: int, gap: float) -> np.ndarray:
    """Three teachers that share what is in the image; the first two are equal over the population."""
    noise = rng.normal(0, 0.05, n)
    scores = rng.uniform(0.2, 0.6, (n, 1)) + np.stack(
        [rng.permutation(noise), rng.permutation(noise), rng.permutation(noise) + gap], axis=1
    )
    return np.clip(scores, 0, 1)


# Populations of scores in [0, 1], (N, T).
SCORES: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "equal means, normal differences": lambda rng, n: balanced(
        rng, n, lambda k: rng.normal(0, 0.08, k)
    ),
    "equal means, skewed": skewed,
    "equal means, two-point": lambda rng, n: balanced(rng, n, lambda k: np.full(k, 0.3)),
    "equal means, near-degenerate": lambda rng, n: balanced(
        rng, n, lambda k: np.where(np.arange(k) < 3, 0.4, 0.0)
    ),
    "three correlated, two of them equal": lambda rng, n: correlated(rng, n, 0.03),
    "a gap of exactly the tie": lambda rng, n: equal(
        rng.permutation(np.repeat([TIE + 0.05, TIE - 0.05], n // 2))
    ),
}


def coverage(method: str, sets: int, num_images: int, rng: Rng) -> dict[str, float]:
    """By population: how often the interval misses the mean at any time."""
    result = {}
    for name, draw in VALUES.items():
        x = draw(rng, num_images, sets)
        mean, n = x.mean(axis=0), np.arange(1, num_images + 1)[:, None]
        if method == "naive":
            center = np.cumsum(x, axis=0) / n
            spread = np.sqrt(np.maximum(np.cumsum(x**2, axis=0) / n - center**2, 0) / n)
            half = statistics.NormalDist().inv_cdf(1 - MISS / 2) * spread
            half *= np.sqrt(1 - n / num_images)
            low, high = (center - half)[30:], (center + half)[30:]
        else:
            sequence = confidence_sequence(x, num_images, MISS, 0, 1, method)
            low, high = sequence.low, sequence.high
        held = (low <= mean + 1e-12) & (mean <= high + 1e-12)
        result[name] = float(1 - held.all(axis=0).mean())
    return result


def wrong_orders(sets: int, num_images: int, rng: Rng) -> dict[str, tuple[float, float]]:
    """By population: how often anything certified is false, by the certificate and by t-tests."""
    result = {}
    for name, draw in SCORES.items():
        false_certificates = false_tests = 0
        for _ in range(sets):
            scores = draw(rng, num_images)
            means = np.round(scores.mean(axis=0), 12)
            scores = scores[: num_images - 1]  # with the last image every pair is known exactly
            certificate = certify_order(scores, num_images, WRONG, TIE, 0, 1)
            false_certificates += any(
                (pair.state == "decided" and means[pair.second] - means[pair.first] < 1e-9)
                or (
                    pair.state == "tie" and abs(means[pair.second] - means[pair.first]) > TIE - 1e-9
                )
                for pair in certificate.pairs
            )
            false_tests += naive_is_wrong(scores, means, num_images)
        result[name] = (false_certificates / sets, false_tests / sets)
    return result


def naive_is_wrong(scores: np.ndarray, means: np.ndarray, num_images: int) -> bool:
    """Whether t-tests of each pair at delta / pairs, repeated every ten images, are ever wrong.

    They decide when the gap differs significantly from 0, and call it a tie when it is significantly
    below `TIE` on both sides.
    """
    left, right = np.triu_indices(scores.shape[1], 1)
    z = statistics.NormalDist().inv_cdf(1 - WRONG / len(left) / 2)
    difference = scores[:, right] - scores[:, left]
    n = np.arange(30, len(scores), 10)[:, None]
    mean = np.cumsum(difference, axis=0)[n[:, 0] - 1] / n
    square = np.cumsum(difference**2, axis=0)[n[:, 0] - 1] / n
    error = np.sqrt(np.maximum(square - mean**2, 1e-18) / n * (1 - n / num_images))
    truth = means[right] - means[left]
    wrong_side = np.where(truth == 0, np.abs(mean), -np.sign(truth) * mean) > z * error
    wrong_tie = (np.abs(mean) + z * error < TIE) & (np.abs(truth) > TIE - 1e-9)
    return bool((wrong_side | wrong_tie).any())


def images_to_decide(gap: float, lower: float, repeats: int, rng: Rng) -> float:
    """Median images until a pair is decided, of six, at 99%; differences of sd 0.08."""
    counts = []
    for _ in range(repeats):
        difference = np.clip(rng.normal(gap, 0.08, 4000), -1, 1)
        scores = np.stack([-difference / 2, difference / 2], axis=1) + (1 + lower) / 2
        low, high = 0, len(scores)  # a decision is final: bisect
        while high - low > 1:
            middle = (low + high) // 2
            # Two teachers at a sixth of delta are one of the six pairs of four teachers.
            pair = certify_order(scores[:middle], IMAGENET, 0.01 / 6, lower=lower, upper=1).pairs[0]
            low, high = (low, middle) if pair.state == "decided" else (middle, high)
        counts.append(high)
    return statistics.median(counts)


def half_widths(method: str, lower: float, repeats: int, rng: Rng) -> tuple[float, float]:
    """Mean half-width after 1,000 and 10,000 values of sd 0.1."""
    widths = []
    for _ in range(repeats):
        x = np.clip(rng.normal((1 + lower) / 2, 0.1, 10_000), lower, 1)
        times = np.union1d(look_schedule(10_000), [1000])
        sequence = confidence_sequence(x, IMAGENET, 0.05 / 6, lower, 1, method, times)
        half = (sequence.high - sequence.low) / 2
        widths.append((half[times == 1000][0], half[-1]))
    return tuple(float(width) for width in np.mean(widths, axis=0))


def cost(num_images: int, rng: Rng) -> tuple[float, float]:
    """Processor seconds for ten teachers: 50,000 images at once; all looks up to `num_images`."""
    gaps = np.linspace(0, 0.02, 10)

    def draw(n: int) -> np.ndarray:
        return rng.uniform(0.2, 0.6, (n, 1)) + rng.normal(0, 0.05, (n, 10)).clip(-0.15, 0.15) + gaps

    scores = draw(50_000)
    start = time.process_time()
    certify_order(scores, IMAGENET, lower=0, upper=1)
    once = time.process_time() - start
    certifier, all_looks = OrderCertifier(10, IMAGENET, lower=0, upper=1), 0.0
    for look in look_schedule(num_images):
        scores = draw(look - certifier.images)
        start = time.process_time()
        certifier.update(scores)
        certifier.certificate()
        all_looks += time.process_time() - start
    return once, all_looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", type=int, default=2000, help="simulated data sets of each kind")
    parser.add_argument("--num-images", type=int, default=500, help="images of each data set")
    parser.add_argument("--repeats", type=int, default=101, help="repeats of each timing to decide")
    parser.add_argument(
        "--cost-images", type=int, default=IMAGENET, help="images of the longest run"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    sets, num_images = arguments.sets, arguments.num_images - arguments.num_images % 10

    missed = {method: coverage(method, sets, num_images, rng) for method in METHODS}
    wrong = wrong_orders(sets, num_images, rng)
    ranges = {"[-1, 1]": 0.0, "[-2, 2]": -1.0}
    needed = {
        (gap, name): images_to_decide(gap, lower, arguments.repeats, rng)
        for gap in DECIDE
        for name, lower in ranges.items()
    }
    widths = {
        (method, lower): half_widths(method, lower, 20, rng)
        for method in ("hedged", "bernstein")
        for lower in (0.0, -1.0)
    }
    once, all_looks = cost(arguments.cost_images, rng)

    noise = 2 * math.sqrt(WRONG * (1 - WRONG) / sets)
    lines = [
        f"## Intervals that miss the mean at any time ({sets:,} data sets of {num_images} images)",
        "",
        f"Promised: at most {MISS:.1%}. Naive: the textbook normal interval, read after every image.",
        "",
        "| population | hedged | bernstein | naive |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | " + " | ".join(f"{missed[m][name]:.2%}" for m in METHODS) + " |"
            for name in VALUES
        ),
        "",
        f"## Certificates with a false statement ({sets:,} data sets of {num_images} images)",
        "",
        f"Promised: at most {WRONG:.0%} (simulation noise {noise:.1%}); all images but the last are "
        f"seen, a tie is a gap below {TIE}. Naive: t-tests of each pair every ten images.",
        "",
        "| population | certificate | naive |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {ours:.2%} | {naive:.2%} |" for name, (ours, naive) in wrong.items()),
        "",
        f"## Images until a pair is decided (median of {arguments.repeats})",
        "",
        f"Differences of sd 0.08, one of six pairs, 99%, N = {IMAGENET:,}; by the range of differences.",
        "",
        "| true gap | target | [-1, 1] | [-2, 2] |",
        "| ---: | ---: | ---: | ---: |",
        *(
            f"| {gap} | {asked:,} | {needed[gap, '[-1, 1]']:,} | {needed[gap, '[-2, 2]']:,} |"
            for gap, asked in DECIDE.items()
        ),
        "",
        "## Half-width of the interval (sd 0.1, alpha 0.05 / 6)",
        "",
        "| method | range | at 1,000 | at 10,000 | target |",
        "| --- | --- | ---: | ---: | --- |",
        *(
            f"| {method} | [{lower:g}, 1] | {early:.4f} | {late:.4f} | {ASKED[method]} |"
            for (method, lower), (early, late) in widths.items()
        ),
        "",
        "Empirical Bernstein caps its bet at half of the range's inverse, so a wider range costs it more.",
        "",
        "## Cost for ten teachers (45 pairs), one core",
        "",
        f"A look at 50,000 images from scratch: {once:.2f} s. "
        f"All looks up to {arguments.cost_images:,} images together: {all_looks:.1f} s.",
    ]
    result = {
        "machine": machine.describe(),
        "arguments": vars(arguments),
        "missed": missed,
        "wrong": {name: {"certificate": a, "naive": b} for name, (a, b) in wrong.items()},
        "images_to_decide": {f"{gap} in {name}": count for (gap, name), count in needed.items()},
        "half_widths": {f"{m} on [{lower:g}, 1]": value for (m, lower), value in widths.items()},
        "seconds": {"look_at_50000": once, "all_looks": all_looks},
    }
    machine.write("certify", "What the certificates promise, simulated", result, "\n".join(lines))


if __name__ == "__main__":
    main()
