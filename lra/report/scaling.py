"""How figures grow with the length: fitted exponents, and the length from which one beats another.

Fits and interpolations are straight lines in the logarithms of length and figure.
"""

import math
from collections.abc import Mapping

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles of Student's t, of 1 degree of freedom and more."""


def exponent(values: Mapping[int, float | None]) -> float | None:
    """Returns the least-squares slope of log value over log length; None below three lengths."""
    interval = exponent_interval(values)
    return None if interval is None else interval[0]


def exponent_interval(
    values: Mapping[int, float | None],
) -> tuple[float, float, float] | None:
    """Returns `exponent` and the ends of its 95 % interval, by Student's t of the residuals."""
    points = [(math.log(n), math.log(v)) for n, v in values.items() if v]
    if len(points) < 3:
        return None
    x0, y0 = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - x0) ** 2 for x, _ in points)
    slope = sum((x - x0) * (y - y0) for x, y in points) / spread
    residuals = sum((y - y0 - slope * (x - x0)) ** 2 for x, y in points)
    freedom = len(points) - 2
    quantile = T_QUANTILES[min(freedom, len(T_QUANTILES)) - 1]
    reach = quantile * math.sqrt(residuals / freedom / spread)
    return slope, slope - reach, slope + reach


def crossover(ours: Mapping[int, float | None], base: Mapping[int, float | None]) -> float | None:
    """Returns the length from which ours is below base, at it and at every longer one measured.

    Args:
        ours: Figures by length; None where a limit was exceeded, which is above any figure.
        base: Those to compare with.

    Returns:
        A length interpolated between two measured ones; the shortest measured one if ours is below
        from there; infinity if it is not below at the longest; None without a common length.
    """
    ratios = []
    for n in sorted(set(ours) & set(base)):
        a, b = ours[n] or math.inf, base[n] or math.inf
        if not math.isinf(a) or not math.isinf(b):
            ratios.append((n, a / b if not math.isinf(b) else 0.0))
    if not ratios:
        return None
    if ratios[-1][1] >= 1:
        return math.inf
    first = len(ratios) - 1
    while first > 0 and ratios[first - 1][1] < 1:
        first -= 1
    if first == 0:
        return ratios[0][0]
    (n0, r0), (n1, r1) = ratios[first - 1], ratios[first]
    if math.isinf(r0) or r1 == 0:  # one of the two has no figure: it is known at n1 alone
        return n1
    part = math.log(r0) / (math.log(r0) - math.log(r1))
    return math.exp(math.log(n0) + part * (math.log(n1) - math.log(n0)))
