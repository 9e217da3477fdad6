"""Confidence sequences and order certificates: what the images seen so far prove about all images.

The population is finite (N images) and read in uniformly random order, so image i is a draw without
replacement: given the images before it, its expected value is the mean of those not yet seen.

**A test of one mean.** Scale the values to v in [0, 1]. If their mean over the population is mu,
the mean of the unseen before image i is mu_i = (N mu - (v_1 + .. + v_{i-1})) / (N - i + 1), hence
for a constant fraction f in (0, 1) the capital prod_i (1 - f + f v_i / mu_i), which starts at 1, is
a non-negative martingale: a gambler who stakes the fraction f on v at fair odds. So is a weighted
mean over several f. By Ville's inequality it ever reaches 1 / alpha with probability at most alpha,
hence "mu is the mean" may be rejected the first time that it does, however often one looks.
Staking a fraction of the largest legal bet keeps the capital non-negative wherever mu_i wanders;
once the sum of the unseen would have to be negative, mu is impossible and the capital infinite.

**An interval.** The capital falls as mu grows, so rejecting means leaving below: the smallest mu not
yet rejected is a lower bound at all times at once, and its running maximum is one too. The upper
bound is the same on 1 - v. Each side takes alpha / 2. This is the hedged capital of Waudby-Smith &
Ramdas (JRSS-B 2024, arXiv 2010.09686, section 4, and 5 without replacement; NeurIPS 2020, arXiv
2006.04347) with a mixture of constant bets in place of their plug-in bet: no time is lost on
learning the variance.

**The order.** For every pair of teachers one such interval of the mean paired difference, at
alpha = delta / pairs; Bonferroni's inequality makes all of them hold together, at all times, with
probability 1 - delta. A state reads off it only whether it excludes 0, -tie and +tie, so by duality
the capitals at these three nulls, followed image by image, are enough.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from tokdiv.errors import UsageError

# The fractions staked, and their shares of the capital. Between two bets a factor of 2.1 apart, the
# better one grows at 87% or more of the best rate there is: more bets gain less than they cost. The
# smallest suits gaps of a thousandth of the range. The shares fall as 1 / k^2 because paired scores
# use a small part of their range: the largest bet is then the best for every gap that is found soon,
# and pays only log(1.5) for sharing; where a small one is the best, its log(98) is soon earned.
FRACTIONS = np.geomspace(0.99, 0.005, 8)
SHARES = np.arange(1.0, 9.0) ** -2 / np.sum(np.arange(1.0, 9.0) ** -2)

BLOCK = 64  # images between two rescalings
SMALLEST_MEAN = 1e-3  # what a stake is divided by, at least: 1000**64 and 0.01**64 are in float64
ROUNDING = 1e-6  # scores this far outside their range are float32 rounding, and clipped
EXACT = 1e-12  # means of float64 sums are trusted to this part of the range
MAX_EVIDENCE = 1000.0  # log10; also stands for a mean that the images seen rule out with certainty
NEVER = np.iinfo(np.int64).max

Columns = np.ndarray | slice
State = Literal["decided", "tie", "open"]
Name = TypeVar("Name", int, str)  # of a teacher: its column, or its label

# The two classes below take centred values, x = v - 1/2 in [-1/2, 1/2]: 1 - v is -x, and the paired
# differences of equal teachers sum to an exact 0. Columns are sequences of their own, side by side;
# those no longer measured are left out of `columns`, and stay as they are.


class _Capital:
    """The capital against "the mean is at most `null`", for C columns, image by image.

    Args:
        nulls: (C,) centred means in (-1/2, 1/2).
        population: N, or None for draws with replacement.
        log_threshold: the natural logarithm of the capital that rejects.

    Attributes:
        total: (C,) sums of the values.
        peak: (C,) natural logarithms of the largest capital so far (at least 0, where it starts).
        crossed: (C,) the image count at which the threshold was first reached, else `NEVER`.
    """

    def __init__(self, nulls: np.ndarray, population: int | None, log_threshold: float) -> None:
        self.nulls, self.population, self.log_threshold = nulls, population, log_threshold
        self.total = np.zeros(len(nulls))
        self.peak = np.zeros(len(nulls))
        self.crossed = np.full(len(nulls), NEVER)
        # The capital of each bet is `scaled * exp(log_scale)`.
        self.scaled = np.repeat(SHARES[:, None], len(nulls), axis=1)  # (bets, C)
        self.log_scale = np.zeros(len(nulls))

    def update(self, x: np.ndarray, columns: Columns, seen: int) -> None:
        """Take x (n, len(columns)) as the images number `seen` + 1, `seen` + 2, ... of `columns`."""
        for start, stop in _cuts(seen, len(x), _next_block):
            self._block(x[start:stop], columns, seen + start)

    def _block(self, x: np.ndarray, columns: Columns, seen: int) -> None:
        totals = _fold(np.add, np.concatenate([self.total[None, columns], x]))
        mean = _mean_of_unseen(self.nulls[columns], totals[:-1], seen, self.population)
        # A larger mean is a smaller capital, so the floor (which keeps it finite) is conservative.
        returns = (x + 0.5) / np.maximum(mean + 0.5, SMALLEST_MEAN) - 1
        capital = FRACTIONS[:, None] * returns[:, None, :]  # (n, bets, columns)
        capital += 1
        capital[0] *= self.scaled[:, columns]
        capital = _fold(np.multiply, capital)
        wealth = capital.sum(axis=1)
        counts = seen + 1 + np.arange(len(x))
        if self.population is not None:
            unseen = self.population * self.nulls[columns] - totals[1:]  # what they must sum to
            lowest = -0.5 * (self.population - counts)[:, None]
            wealth[unseen < lowest - EXACT * self.population] = np.inf

        log_scale = self.log_scale[columns]
        self.total[columns] = totals[-1]
        self.peak[columns] = np.maximum(self.peak[columns], log_scale + np.log(wealth.max(axis=0)))
        reached = log_scale + np.log(wealth) >= self.log_threshold
        first = np.where(reached.any(axis=0), counts[reached.argmax(axis=0)], NEVER)
        self.crossed[columns] = np.minimum(self.crossed[columns], first)

        scaled = capital[-1]
        if counts[-1] % BLOCK == 0:
            largest = scaled.max(axis=0)
            scaled = scaled / largest
            scaled[scaled < 1e-150] = 0  # a bet that has lost this much; spares the denormals
            self.log_scale[columns] = log_scale + np.log(largest)
        self.scaled[:, columns] = scaled

    def images_to_cross(self, mean: np.ndarray, second: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """About how many more images each column needs to reach the threshold; inf if it never will.

        Bet k, worth L_k now, grows by about f g - f^2 q / 2 an image, g and q being the mean and the
        mean square of the returns; the first bet to get there alone is the estimate. Without
        replacement the null moves away as the unseen become few: q images count for
        N log((N - n) / (N - n - q)).

        Args:
            mean, second: (C,) means of x and of its square so far.
            seen: (C,) image counts n.
        """
        stake = self.nulls + 0.5
        gain = (mean - self.nulls) / stake
        square = (second - 2 * self.nulls * mean + self.nulls**2) / stake**2
        bets = FRACTIONS[:, None]
        rate = bets * gain - bets**2 * square / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            missing = self.log_threshold - self.log_scale - np.log(self.scaled)
            needed = np.where(rate > 0, np.maximum(missing, 0) / rate, np.inf).min(axis=0)
        if self.population is not None:
            needed = (self.population - seen) * -np.expm1(-needed / self.population)
        return np.where(self.crossed < NEVER, 0, needed)


class _LowerBound:
    """A lower confidence bound of the mean for C columns, in one pass and constant memory.

    The bound is where the capital, as a function of the mean m, falls to the threshold. Keeping that
    function would take all images. But the logarithm of each bet's capital is convex in m: so is
    log(1 - f + f v / mu) = log((1 - f) mu + f v) - log(mu) in mu (its second derivative is
    1 / mu^2 - (1 - f)^2 / ((1 - f) mu + f v)^2 >= 0), and mu_i is affine in m. Every image's tangent
    therefore lies below it, and the sum of the tangents below the logarithm of the capital, wherever
    each tangent touches. What is rejected with the tangents is rejected with the capital, so the
    bound is valid; it is close, because the tangents touch near the mean and the last bound.

    Args:
        columns: C.
        population, log_threshold: as for `_Capital`.
    """

    def __init__(self, columns: int, population: int | None, log_threshold: float) -> None:
        self.population, self.log_threshold = population, log_threshold
        self.total = np.zeros(columns)
        self.low = np.full(columns, -0.5)  # the running maximum of the bound
        # The sum of the tangents is `log + log(product) + slope * (m - anchor)` for each bet.
        self.anchor = np.zeros(columns)
        self.lowest_touch = np.full(columns, 0.25)
        self.log = np.repeat(np.log(SHARES)[:, None], columns, axis=1)  # (bets, C)
        self.product = np.ones((len(FRACTIONS), columns))
        self.slope = np.zeros((len(FRACTIONS), columns))
        # Anchors move at fixed counts: 1, 2, .. 8, then by a quarter of the images seen or left.
        self.next_move = 1

    def update(
        self, x: np.ndarray, columns: Columns, seen: int, wanted: np.ndarray | None = None
    ) -> np.ndarray:
        """Take x (n, len(columns)) as the images number `seen` + 1, `seen` + 2, ... of `columns`.

        Returns the bounds after the images that `wanted` (n,) marks, (wanted.sum(), len(columns)):
        running maxima over these images and over the fixed counts at which anchors move.
        """
        lows = []
        for start, stop in _cuts(
            seen, len(x), lambda count: min(_next_block(count), self.next_move)
        ):
            rows = np.arange(0) if wanted is None else np.flatnonzero(wanted[start:stop])
            lows.append(self._block(x[start:stop], columns, seen + start, rows))
            if seen + stop == self.next_move:
                self._move_anchor(columns, seen + stop)
        return np.concatenate(lows)

    def _block(self, x: np.ndarray, columns: Columns, seen: int, rows: np.ndarray) -> np.ndarray:
        totals = _fold(np.add, np.concatenate([self.total[None, columns], x]))
        anchor = _mean_of_unseen(self.anchor[columns], totals[:-1], seen, self.population) + 0.5
        # Near the end a mean that is far from the truth leaves too little for the unseen: there the
        # tangents touch elsewhere, and are extended to the anchor.
        touch = np.maximum(anchor, self.lowest_touch[columns])
        factor = FRACTIONS[:, None] * ((x + 0.5) / touch - 1)[:, None, :]
        factor += 1
        slope = FRACTIONS[:, None] * (-(x + 0.5) / touch**2)[:, None, :]
        slope /= factor  # d log(factor) / d mu_i
        every = len(rows) > 0
        log = self.log[None, :, columns]
        if (anchor < touch).any():
            extension = slope * (anchor - touch)[:, None, :]
            extension[0] += log[0]
            log = _fold(np.add, extension, every)
        if self.population is not None:  # d mu_i / d m = N / (N - i + 1)
            slope *= (self.population / (self.population - seen - np.arange(len(x))))[:, None, None]
        slope[0] += self.slope[:, columns]
        slope = _fold(np.add, slope, every)
        factor[0] *= self.product[:, columns]
        product = _fold(np.multiply, factor, every)

        low = np.empty((0, len(totals[0])))
        if every:
            log_capital = log + np.log(product)
            counts = (seen + 1 + rows)[:, None]
            bound = self._solve(
                log_capital[rows], slope[rows], self.anchor[columns], totals[1 + rows], counts
            )
            low = np.maximum.accumulate(np.maximum(bound, self.low[columns]), axis=0)
            self.low[columns] = low[-1]
        self.total[columns], self.slope[:, columns] = totals[-1], slope[-1]
        self.log[:, columns], self.product[:, columns] = log[-1], product[-1]
        if (seen + len(x)) % BLOCK == 0:
            self.log[:, columns] += np.log(product[-1])
            self.product[:, columns] = 1
        return low

    def _move_anchor(self, columns: Columns, seen: int) -> None:
        """Put the anchor, near which the next tangents touch, between the mean and the bound."""
        self.low[columns] = low = self.current(seen)[columns]
        mean = self.total[columns] / (seen + 0.5)  # as if half an image at 0 had been seen
        # The first bounds say nothing: halfway to them would be far from where they will be.
        anchor = mean if seen < BLOCK else mean - np.maximum(mean - low, 0) / 2
        self.log[:, columns] += self.slope[:, columns] * (anchor - self.anchor[columns])
        self.anchor[columns] = anchor
        self.lowest_touch[columns] = np.maximum((mean + 0.5) / 2, SMALLEST_MEAN)
        reach = seen if self.population is None else min(seen, self.population - seen)
        self.next_move = seen + max(1, reach // 4)

    def current(self, seen: int | np.ndarray) -> np.ndarray:
        """(C,) the bounds after `seen` images (one count, or one for each column)."""
        log_capital = self.log + np.log(self.product)
        bound = self._solve(log_capital, self.slope, self.anchor, self.total, seen)
        return np.maximum(self.low, bound)

    def _solve(
        self,
        log_capital: np.ndarray,
        slope: np.ndarray,
        anchor: np.ndarray,
        total: np.ndarray,
        seen: int | np.ndarray,
    ) -> np.ndarray:
        """The m where log(sum_k exp(log_capital_k + slope_k (m - anchor))) is the log threshold.

        That function is convex and falls, so none of Newton's steps ends right of its zero: the
        bound is valid wherever they stop. The first point is the best bound of a single bet.

        Args:
            log_capital, slope: (..., bets, C). anchor: (C,). total: (..., C) sums of x.
            seen: broadcasts to `total`.
        """
        certain = np.full(total.shape, -0.5)
        if self.population is not None:  # if all the unseen were at the lower end
            certain = (total + 0.5 * seen) / self.population - 0.5
        with np.errstate(divide="ignore", invalid="ignore"):
            alone = np.where(slope < 0, (self.log_threshold - log_capital) / slope, -np.inf)
        m = np.maximum(alone.max(axis=-2) + anchor, -0.5)
        for _ in range(4):
            exponent = log_capital + slope * (m - anchor)[..., None, :]
            largest = exponent.max(axis=-2)
            capital = np.exp(exponent - largest[..., None, :])
            wealth = capital.sum(axis=-2)
            fall = (capital * slope).sum(axis=-2) / wealth
            surplus = np.log(wealth) + largest - self.log_threshold
            m = np.maximum(m - surplus / np.where(fall < 0, fall, -np.inf), -0.5)
        return np.maximum(m, certain)


def _next_block(count: int) -> int:
    return (count // BLOCK + 1) * BLOCK


def _cuts(seen: int, rows: int, following: Callable[[int], int]) -> Iterator[tuple[int, int]]:
    """Cut rows seen + 1, seen + 2, ... at absolute counts, so that the arithmetic on an image is the
    same, to the last bit, however the images are cut into calls."""
    start = 0
    while start < rows:
        stop = min(following(seen + start) - seen, rows)
        yield start, stop
        start = stop


def _fold(operation: np.ufunc, values: np.ndarray, every: bool = True) -> np.ndarray:
    """Running values over axis 0 (in place), or if not `every` the last alone, (1, ...).

    All ways go row by row, so they agree to the last bit; `accumulate` strides through long rows.
    """
    if not every:
        return operation.reduce(values, axis=0, keepdims=True)
    if values[0].size < 100:
        return operation.accumulate(values, axis=0)
    for before, row in itertools.pairwise(values):
        operation(before, row, row)
    return values


def _mean_of_unseen(
    mean: np.ndarray, totals: np.ndarray, seen: int, population: int | None
) -> np.ndarray:
    """(n, C) mean of the images not yet seen, before each of n, if `mean` (C,) is that of all."""
    if population is None:
        return np.broadcast_to(mean, totals.shape)
    return (population * mean - totals) / (population - seen - np.arange(len(totals)))[:, None]


@dataclasses.dataclass(frozen=True)
class ConfidenceSequence:
    """Bounds of a mean that hold at all times together.

    Attributes:
        times: (k,) image counts.
        low, high: (k,) the bounds after so many images, in the unit of the values; (k, C) where C
            sequences were given. Each is a running intersection: `low` never falls, `high` never rises.
    """

    times: np.ndarray
    low: np.ndarray
    high: np.ndarray


def confidence_sequence(
    x: np.ndarray,
    population: int | None,
    alpha: float,
    lower: float = -1.0,
    upper: float = 1.0,
    method: Literal["hedged", "bernstein"] = "hedged",
    times: np.ndarray | None = None,
) -> ConfidenceSequence:
    """Confidence sequence of the population's mean: with probability 1 - alpha it holds at all times.

    Args:
        x: (n,) values in [lower, upper] in the (random) order of the images; NaN where an image was
            unusable, for which the end of the range is taken that widens the interval. (n, C): C
            sequences of the same images, each with its own alpha.
        population: the number N >= n of images; at n = N the interval is the mean itself, if all were
            usable. None: independent draws from an unlimited source.
        alpha: probability, in (0, 1), that the sequence misses the mean at any time.
        lower, upper: the range of the values.
        method: "hedged": betting, the tighter one (module docstring). "bernstein": predictable plug-in
            empirical Bernstein (arXiv 2010.09686, theorem 2; without replacement arXiv 2006.04347,
            section 3), in closed form.
        times: increasing image counts in [1, n] at which to give the bounds; every one by default,
            which costs five times as much.

    Raises:
        ValueError: a value out of its range or infinite, a bad argument.

    In the rare event that the running intersection becomes empty (which proves that the mean was
    missed, or that the order was not random), `high` is given as `low`.
    """
    values = np.asarray(x, np.float64)
    if values.ndim not in (1, 2):
        raise UsageError(f"x has shape {values.shape}: expected (n,) or (n, C)")
    if not 0 < alpha < 1:
        raise UsageError(f"alpha is {alpha}: expected a number between 0 and 1")
    _check_range(lower, upper)
    _check_population(population, len(values))
    columns = _checked(values[:, None] if values.ndim == 1 else values, lower, upper, 0)
    num_images, num_columns = columns.shape
    counts = np.arange(1, num_images + 1) if times is None else np.asarray(times, np.int64)
    if len(counts) and (counts[0] < 1 or counts[-1] > num_images or (np.diff(counts) <= 0).any()):
        raise UsageError(f"times are not increasing image counts from 1 to {num_images}")
    wanted = np.zeros(num_images, bool)
    wanted[counts - 1] = True

    unit = (columns - lower) / (upper - lower) - 0.5
    log_threshold = math.log(2 / alpha)
    if method == "hedged":
        bound = _LowerBound(2 * num_columns, population, log_threshold)
        lows = [np.empty((0, 2 * num_columns))]
        for start in range(0, num_images, 4096):
            slab = unit[start : start + 4096]
            both = np.nan_to_num(np.concatenate([slab, -slab], axis=1), nan=-0.5)
            lows.append(bound.update(both, slice(None), start, wanted[start : start + 4096]))
        both = np.concatenate(lows)
    elif method == "bernstein":
        both = np.concatenate([unit, -unit], axis=1)
        both = _bernstein_low(np.nan_to_num(both, nan=-0.5), population, log_threshold)[wanted]
    else:
        raise UsageError(f"method is {method!r}: expected 'hedged' or 'bernstein'")
    low, high = both[:, :num_columns], -both[:, num_columns:]
    if len(counts) and counts[-1] == population:
        known = ~np.isnan(unit).any(axis=0)
        low[-1, known] = high[-1, known] = unit[:, known].mean(axis=0)
    low, high = (lower + (upper - lower) * (bounds + 0.5) for bounds in (low, high))
    shape = (len(counts), *values.shape[1:])
    return ConfidenceSequence(counts, low.reshape(shape), np.maximum(low, high).reshape(shape))


def _bernstein_low(x: np.ndarray, population: int | None, log_threshold: float) -> np.ndarray:
    """(n, C) lower bounds, running maxima, for centred x (n, C).

    With lambda_i <= 1/2 known before image i, psi(l) = -log(1 - l) - l and any predicted mean p_i,
    exp(sum_i lambda_i (v_i - mu_i) - psi(lambda_i) (v_i - p_i)^2) is a supermartingale that starts
    at 1. mu_i is affine in the mean, so Ville's inequality solves for it.
    """
    num_images = len(x)
    count = np.arange(1.0, num_images + 1)[:, None]
    v = x + 0.5
    totals = np.cumsum(v, axis=0)
    mean = (0.5 + totals) / (count + 1)
    variance = (0.25 + np.cumsum((v - mean) ** 2, axis=0)) / (count + 1)
    prior_mean = np.concatenate([np.full_like(v[:1], 0.5), mean[:-1]])
    prior_variance = np.concatenate([np.full_like(v[:1], 0.25), variance[:-1]])
    bet = np.sqrt(2 * log_threshold / (prior_variance * count * np.log1p(count)))
    bet = np.minimum(bet, 0.5)
    psi = -np.log1p(-bet) - bet
    seen_share, growth = np.zeros_like(v), np.ones_like(count)
    certain = np.zeros_like(v)
    if population is not None:  # mu_i = growth_i * mean - seen_share_i
        left = population - count + 1
        seen_share, growth = (totals - v) / left, population / left
        certain = totals / population
    spent = log_threshold + np.cumsum(psi * (v - prior_mean) ** 2, axis=0)
    won = np.cumsum(bet * (v + seen_share), axis=0)
    low = np.maximum((won - spent) / np.cumsum(bet * growth, axis=0), certain)
    return np.maximum.accumulate(low, axis=0) - 0.5


@dataclasses.dataclass(frozen=True)
class Pair(Generic[Name]):
    """What is known of two teachers.

    Attributes:
        first, second: column numbers, in a ranking labels; `first` is the more diverse one (the lower
            similarity): certified where the state is "decided", else by the estimate.
        state: "decided": the mean similarities differ, in this direction (final). "tie": they differ
            by less than `tie`. "open": neither is certain yet.
        gap: estimate of mean(similarity of second) - mean(similarity of first), over the pair's images.
        low, high: its confidence sequence, so low > 0 where decided, and -tie < low, high < tie in a tie.
        evidence: log10 of the largest e-value so far against equal means, two-sided, in
            [0, `MAX_EVIDENCE`]; the largest value also stands for certainty. Decided from
            log10(pairs / delta) on.
        images: usable images measured by both.
        more_images: about how many more would settle an open pair (at most the rest of the population,
            which settles it if all images are usable); 0 where settled; None where that cannot be
            said: nothing measured, no longer measured, or equal in an unlimited source.
    """

    first: Name
    second: Name
    state: State
    gap: float
    low: float
    high: float
    evidence: float
    images: int
    more_images: int | None


@dataclasses.dataclass(frozen=True)
class Certificate(Generic[Name]):
    """The order of teachers by token diversity, and how far it is certain.

    Attributes:
        pairs: all T (T - 1) / 2 pairs.
        order: column numbers, in a ranking labels, most diverse first: never against a decided pair,
            otherwise by the mean. Columns no longer measured stand below the others, by their paired
            difference to the first when they were dropped; columns never measured come last.
        certified: all pairs are decided or tied. False where there is no pair to order.
        confidence: 1 - delta: the probability with which all that is decided or tied is true.
        images: images seen so far, unusable ones included. unusable: how many of them.
        population: the number of all images, None if unlimited.
        tie: the gap below which teachers count as tied.
        approximate: the images came in an order that is not uniformly random.
    """

    pairs: tuple[Pair[Name], ...]
    order: tuple[Name, ...]
    certified: bool
    confidence: float
    images: int
    unusable: int
    population: int | None
    tie: float
    approximate: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers, strings and None: what `json.dumps` takes."""
        return dataclasses.asdict(self) | {
            "pairs": [dataclasses.asdict(pair) for pair in self.pairs],
            "order": list(self.order),
        }

    @staticmethod
    def from_dict(content: dict[str, Any]) -> Certificate[str]:
        """A certificate with labels from what `to_dict` gave; further keys are ignored.

        Raises:
            KeyError, TypeError: something is missing.
        """
        fields = {f.name: content[f.name] for f in dataclasses.fields(Certificate)}
        pairs: tuple[Pair[str], ...] = tuple(Pair(**pair) for pair in fields["pairs"])
        return Certificate(**fields | {"pairs": pairs, "order": tuple(fields["order"])})

    def named(self: Certificate[int], names: Sequence[str]) -> Certificate[str]:
        """The same with the labels of the columns in place of their numbers."""
        pairs: tuple[Pair[str], ...] = tuple(
            Pair(**vars(pair) | {"first": names[pair.first], "second": names[pair.second]})
            for pair in self.pairs
        )
        order = tuple(names[column] for column in self.order)
        return Certificate(**vars(self) | {"pairs": pairs, "order": order})

    def decided(self) -> set[tuple[Name, Name]]:
        """All (a, b) where a is certified to be more diverse than b, also by way of others.

        A teacher that was dropped is no longer compared, but whoever beats what beat it beats it too; all
        decisions hold together with the certificate's confidence, hence so does what follows from them.
        """
        better = {(pair.first, pair.second) for pair in self.pairs if pair.state == "decided"}
        for middle, first, last in itertools.product(sorted(set(self.order)), repeat=3):
            if (first, middle) in better and (middle, last) in better:
                better.add((first, last))
        return better

    def best_of(self, eligible: Collection[Name]) -> list[Name]:
        """Those of the eligible that are decided or tied against every other one."""
        settled = self.decided()
        for pair in self.pairs:
            if pair.state == "tie":
                settled |= {(pair.first, pair.second), (pair.second, pair.first)}
        return [a for a in eligible if all((a, b) in settled for b in eligible if b != a)]


class OrderCertifier:
    """The certificate of a growing score array: `update` with new rows, `certificate` at any time.

    Looking does not change anything, and the result is the same, to the last bit, however the rows
    were cut into updates. Memory is constant: about 500 numbers a pair.

    Args:
        num_teachers: T, the number of columns.
        population: the number N of images, or None for independent draws from an unlimited source.
        delta: probability, in (0, 0.5), that anything decided or tied, at any time, is wrong.
        tie: in [0, upper - lower), in the unit of the scores. 0: only what is equal over the whole
            population is a tie.
        lower, upper: range of the scores.
        approximate: passed on to the certificate.

    A row of NaN is an unusable image. For "equal means" it counts as a difference of 0, the population
    unchanged: the sum of the differences, and with it the sign of the mean over the usable images, is
    as if it had not been there, so decisions stay exact. For ties and intervals it takes the worst
    value, on either side, so they hold for the mean over the usable images, whatever it is. (A decided
    pair's `low` is kept above 0 even then.) A single NaN in a row with scores means that the teacher
    was dropped: its pairs end before that row.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        num_teachers: int,
        population: int | None,
        delta: float = 0.01,
        tie: float = 0.002,
        lower: float = -1.0,
        upper: float = 1.0,
        approximate: bool = False,
    ) -> None:
        if num_teachers < 1:
            raise UsageError(f"{num_teachers} teachers: expected at least one")
        if not 0 < delta < 0.5:
            raise UsageError(f"delta is {delta}: expected a number between 0 and 0.5")
        _check_range(lower, upper)
        if not 0 <= tie < upper - lower:
            raise UsageError(f"tie is {tie}: expected a gap from 0 to below {upper - lower}")
        _check_population(population, 0)
        self.num_teachers, self.population, self.delta, self.tie = (
            num_teachers,
            population,
            delta,
            tie,
        )
        self.lower, self.upper, self.approximate = lower, upper, approximate
        self.images = 0
        self.unusable = 0
        self.measured = np.ones(num_teachers, bool)  # not dropped
        self.left, self.right = np.triu_indices(num_teachers, 1)
        num_pairs = len(self.left)
        self.pair_images = np.zeros(num_pairs, np.int64)  # unusable ones included
        self.pair_usable = np.zeros(num_pairs, np.int64)
        self.squares = np.zeros(num_pairs)
        # Of 2 x pairs columns the first half gathers evidence that right is above left, the second
        # the reverse. The tests have 2 x 2 x pairs: "equal" (null 0) before "no tie" (null -tie).
        self.scale = 2 * (upper - lower)  # of a difference, to [-1/2, 1/2]
        threshold = math.log(2 * max(num_pairs, 1) / delta)
        both = 2 * num_pairs
        self.tests = _Capital(np.repeat([0, -tie / self.scale], both), population, threshold)
        self.bound = _LowerBound(both, population, threshold)

    def update(self, scores: np.ndarray) -> None:
        """Take the scores (n, T) of the next n images in order; NaN where unmeasured.

        Raises:
            ValueError: wrong shape, more images than the population has, a score that is infinite or
                more than 1e-6 outside [lower, upper], or a column that was dropped and came back.
                Nothing has been taken then.
        """
        scores = np.asarray(scores)
        if scores.ndim != 2 or scores.shape[1] != self.num_teachers:
            raise ValueError(f"scores have shape {scores.shape}: expected (n, {self.num_teachers})")
        _check_population(self.population, self.images + len(scores))
        scores = _checked(scores, self.lower, self.upper, self.images)
        present = ~np.isnan(scores)
        usable = present.any(axis=1)
        # The row from which each column is dropped: 0 if it was before, the number of rows if never.
        gone = usable[:, None] & ~present
        end = np.where(gone.any(axis=0), gone.argmax(axis=0) if len(gone) else 0, len(scores))
        end = np.where(self.measured, end, 0)
        back = present & (np.arange(len(scores))[:, None] >= end)
        if back.any():
            row, column = np.argwhere(back)[0]
            raise ValueError(
                f"column {column} has a score at image {self.images + row} after images without one, "
                "which others have: a teacher that was dropped cannot come back"
            )
        slabs = np.arange(0, len(scores), 4096)
        cuts = np.unique(np.concatenate([slabs, end, [len(scores)]]))
        for start, stop in itertools.pairwise(cuts):
            self.measured &= end > start
            self._take(scores[start:stop], usable[start:stop])

    def _take(self, scores: np.ndarray, usable: np.ndarray) -> None:
        """The same, for rows on which every teacher still measured has a score or none has."""
        alive = np.flatnonzero(self.measured[self.left] & self.measured[self.right])
        seen = self.images
        self.images += len(scores)
        self.unusable += int((~usable).sum())
        if len(alive) == 0:
            return
        # Columns picked out of rows lie in memory column by column; the arithmetic is row by row.
        right, left = scores[:, self.right[alive]], scores[:, self.left[alive]]
        difference = np.ascontiguousarray(right - left) / self.scale
        both = np.concatenate([difference, -difference], axis=1)
        zero, worst = both, both
        if not usable.all():
            zero, worst = np.nan_to_num(both, nan=0.0), np.nan_to_num(both, nan=-0.5)
        pairs, num_pairs = np.concatenate([alive, alive + len(self.left)]), len(self.left)
        self.bound.update(worst, slice(None) if len(alive) == num_pairs else pairs, seen)
        # A test at -tie is over once it rejects, or once the pair is decided.
        testing = np.tile(self._direction() == 0, 2) & (
            self.tests.crossed[2 * num_pairs :] == NEVER
        )
        testing = testing[pairs] & (self.tie > 0)
        values = np.concatenate([zero, np.ascontiguousarray(worst[:, testing])], axis=1)
        columns = np.concatenate([pairs, 2 * num_pairs + pairs[testing]])
        whole = len(columns) == 4 * num_pairs
        self.tests.update(values, slice(None) if whole else columns, seen)
        self.pair_images[alive] = self.images
        self.pair_usable[alive] += usable.sum()
        squares = np.concatenate([self.squares[None, alive], zero[:, : len(alive)] ** 2])
        self.squares[alive] = _fold(np.add, squares)[-1]

    def _direction(self) -> np.ndarray:
        """(pairs,) 1 if right is decided to be above left, -1 if below, else 0: the first to be shown."""
        above, below = self.tests.crossed.reshape(4, -1)[:2]
        return np.where(above < below, 1, np.where(below < above, -1, 0))

    def certificate(self) -> Certificate[int]:
        """What is known after the images so far."""
        num_pairs = len(self.left)
        direction = self._direction()
        gap = self.tests.total[:num_pairs] / np.maximum(self.pair_usable, 1)
        low, high, tied = self._intervals(direction, gap)
        evidence = (self.tests.peak.reshape(4, -1)[:2].max(axis=0) - math.log(2)) / math.log(10)
        evidence = np.clip(evidence, 0, MAX_EVIDENCE)
        more = self._more_images((direction != 0) | tied)
        pairs: list[Pair[int]] = []
        for i in range(num_pairs):
            first, second, sign = self.left[i], self.right[i], self.scale
            if direction[i] < 0 or (direction[i] == 0 and gap[i] < 0):
                first, second, sign = second, first, -self.scale
            bounds = sorted((sign * low[i], sign * high[i]))
            state: State = "decided" if direction[i] else "tie" if tied[i] else "open"
            pairs.append(
                Pair(
                    first=int(first),
                    second=int(second),
                    state=state,
                    gap=float(sign * gap[i]) + 0.0,  # no -0.0
                    low=float(bounds[0]),
                    high=float(bounds[1]),
                    evidence=float(evidence[i]),
                    images=int(self.pair_usable[i]),
                    more_images=more[i],
                )
            )
        return Certificate(
            pairs=tuple(pairs),
            order=self._order(pairs),
            certified=bool(pairs) and all(pair.state != "open" for pair in pairs),
            confidence=1 - self.delta,
            images=self.images,
            unusable=self.unusable,
            population=self.population,
            tie=self.tie,
            approximate=self.approximate,
        )

    def _intervals(
        self, direction: np.ndarray, gap: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pairs,) low, high (centred) and whether tied.

        The capital at a null tells exactly whether the interval excludes it; the bound, which lies a
        little outside the interval, is moved over the null or kept from it to say the same.
        """
        num_pairs = len(self.left)
        tiny, tie = np.finfo(np.float64).tiny, self.tie / self.scale
        bounds = self.bound.current(np.tile(self.pair_images, 2))
        is_open = np.tile(direction == 0, 2)
        inside = (
            self.tests.crossed[2 * num_pairs :] < NEVER
        )  # -tie is excluded, in either direction
        at_tie = np.where(inside, np.maximum(bounds, -tie * (1 - EXACT)), np.minimum(bounds, -tie))
        if self.tie > 0:
            bounds = np.where(is_open, at_tie, bounds)
        bounds = np.where(is_open, np.minimum(bounds, 0), bounds)
        low, high = bounds[:num_pairs], -bounds[num_pairs:]
        low = np.where(direction > 0, np.maximum(low, tiny), low)
        high = np.where(direction < 0, np.minimum(high, -tiny), high)
        # An empty intersection is an error that the confidence allows for; it is shown as a point.
        low, high = (
            np.where(direction < 0, np.minimum(low, high), low),
            np.where(direction < 0, high, np.maximum(low, high)),
        )
        tied = inside.reshape(2, -1).all(axis=0) & (self.tie > 0)
        complete = (self.pair_images == self.population) & (self.pair_usable == self.pair_images)
        low, high = np.where(complete, gap, low), np.where(complete, gap, high)
        return low, high, (tied | complete) & (direction == 0)

    def _more_images(self, settled: np.ndarray) -> list[int | None]:
        """(pairs,) `Pair.more_images`: until 0 is excluded, or both -tie and tie."""
        usable = np.maximum(self.pair_usable, 1)
        mean = self.tests.total[: len(usable)] / usable
        more = self.tests.images_to_cross(
            np.concatenate([mean, -mean, mean, -mean]),
            np.tile(self.squares / usable, 4),
            np.tile(self.pair_images, 4),
        ).reshape(4, -1)
        to_decide, to_tie = more[:2].min(axis=0), more[2:].max(axis=0)
        more = np.minimum(to_decide, to_tie) if self.tie > 0 else to_decide
        growing = self.measured[self.left] & self.measured[self.right] & (self.pair_usable > 0)
        if self.population is not None:
            left = self.population - self.pair_images
            more = np.minimum(more, left)
            growing &= left > 0
        more = np.where(settled, 0, np.where(growing, np.ceil(more), np.inf))
        return [int(count) if np.isfinite(count) else None for count in more]

    def _order(self, pairs: list[Pair[int]]) -> tuple[int, ...]:
        """`Certificate.order`."""
        gaps = np.zeros((self.num_teachers, self.num_teachers))
        common = np.zeros_like(gaps, bool)
        for pair in pairs:
            gaps[pair.first, pair.second], gaps[pair.second, pair.first] = pair.gap, -pair.gap
            common[pair.first, pair.second] = common[pair.second, pair.first] = pair.images > 0
        present = np.flatnonzero(self.measured)
        leader = present[np.argmin(gaps[present[0], present])]
        common[leader, leader] = True

        def place(column: int) -> tuple[bool, bool, float]:
            return not self.measured[column], not common[leader, column], gaps[leader, column]

        above = {(pair.first, pair.second) for pair in pairs if pair.state == "decided"}
        waiting = sorted(range(self.num_teachers), key=place)
        order: list[int] = []
        while waiting:
            free = [j for j in waiting if not any((i, j) in above for i in waiting)]
            order.append((free or waiting)[0])  # decisions go round in a circle only in error
            waiting.remove(order[-1])
        return tuple(order)


def certify_order(
    scores: np.ndarray,
    population: int | None,
    delta: float = 0.01,
    tie: float = 0.002,
    lower: float = -1.0,
    upper: float = 1.0,
    approximate: bool = False,
) -> Certificate[int]:
    """Which teacher is more diverse, with probability 1 - delta for all that is said at any time.

    Args:
        scores: (n, T) token similarities in [lower, upper], one row an image in (random) order, one
            column a teacher; NaN where unmeasured.
        population, delta, tie, lower, upper, approximate: see `OrderCertifier`, whose certificate
            after these rows this is.

    Raises:
        ValueError: as `OrderCertifier` and its `update` do.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {scores.shape}: expected (images, teachers)")
    certifier = OrderCertifier(scores.shape[1], population, delta, tie, lower, upper, approximate)
    certifier.update(scores)
    return certifier.certificate()


def look_schedule(limit: int) -> np.ndarray:
    """Image counts (int64) at which to look: 64, then a tenth more each time, and last `limit`.

    They are fixed beforehand so that all processes look alike; the guarantees hold for any others.
    """
    counts, count = [], 64
    while count < limit:
        counts.append(count)
        count += count // 10
    return np.array([*counts, limit], np.int64)


def _check_range(lower: float, upper: float) -> None:
    if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
        raise UsageError(
            f"the range is [{lower}, {upper}]: expected two numbers, the lower one first"
        )


def _check_population(population: int | None, images: int) -> None:
    if population is not None and population < max(images, 1):
        raise UsageError(
            f"population is {population}, with {images} images given: expected the number of all "
            "images, or None for an unlimited source"
        )


def _checked(values: np.ndarray, lower: float, upper: float, seen: int) -> np.ndarray:
    """(n, C) float64 in [lower, upper], with NaN; rounding is clipped, else a ValueError names it."""
    values = np.ascontiguousarray(values, np.float64)
    outside = (values < lower - ROUNDING) | (values > upper + ROUNDING)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"image {seen + row}, column {column}: {values[row, column]} is outside "
            f"[{lower}, {upper}]; expected a score in that range, or NaN where there is none"
        )
    return np.clip(values, lower, upper)
