"""The scalar equation of a discrete gradient, f(s) + s^2 / tau = 0 with s other than 0, where f(s) = V(s) - V(0).

Call the left side phi. Where V has a slope at 0, phi is negative next to 0 on the side where V falls, and positive far
out if V is bounded from below: a root lies between. On either side of 0 the quotient phi / |s| is a line if V is a
parabola, so that secants of it find the root at once; values at -h, 0 and h suggest where.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from ocnopt.errors import ProblemError

EXPANSIONS = 40  # by growing factors, before V counts as falling without bound
SECANTS = 200


class Point(NamedTuple):
    """A step with V there, f and phi."""

    s: float
    value: float
    f: float
    phi: float

    @property
    def quotient(self) -> float:
        """Phi / |s|."""
        return self.phi / abs(self.s)


class Equation(NamedTuple):
    """The equation along one line.

    ``value`` computes V(s), ``start`` is V(0), what is below ``noise`` is rounding error, a root is one up to
    ``tolerance`` times the fall of V.
    """

    value: Callable[[float], float]
    start: float
    tau: float
    noise: float
    tolerance: float

    def at(self, s: float) -> Point:
        """Evaluate V once; NaN counts as infinity."""
        value = self.value(s)
        value = math.inf if math.isnan(value) else value
        f = value - self.start
        return Point(s, value, f, f + s * s / self.tau)

    def solves(self, point: Point) -> bool:
        """Whether V falls by s^2 / tau."""
        return -math.inf < point.f < 0 and abs(point.phi) <= max(self.noise, self.tolerance * -point.f)


def solve(equation: Equation, h: float, scale: float, least: float) -> Point:
    """A root, or the point s = 0 where V does not fall to either side.

    Args:
        equation: along a line.
        h: a first guess at the length of the step.
        scale: a length over which V is nearly a parabola and its change still visible.
        least: a length that is lost in the rounding of the parameter.

    Raises:
        ProblemError: V falls without bound.
    """
    while h > least:
        right, left = equation.at(h), equation.at(-h)
        slope, bend = (right.phi - left.phi) / (2 * h), (right.phi + left.phi) / (2 * h * h)
        is_parabola = 0 < bend < math.inf
        guess = -slope / bend if is_parabola else 0.0
        low = min(right, left, key=lambda point: point.phi)
        if low.phi < 0:
            return low if equation.solves(low) else _outward(equation, low, guess)
        if is_parabola and h <= scale and slope * slope <= 4 * bend * equation.noise:
            break  # the lowest point of the parabola is in the noise
        if guess:
            inner = equation.at(guess)
            if equation.solves(inner):
                return inner
            if inner.phi < 0:
                return _between(equation, inner, right if guess > 0 else left)
        h = min(h / 8, abs(guess) / 2 or h)
    return Point(0.0, equation.start, 0.0, 0.0)


def _outward(equation: Equation, low: Point, guess: float) -> Point:
    """From a point where phi is negative, look further out for one where it is not; first where a parabola has it."""
    following = guess if guess / low.s > 1 else 2 * low.s
    factor = 2.0
    for _ in range(EXPANSIONS):
        point = equation.at(following)
        if equation.solves(point):
            return point
        if point.phi >= 0:
            return _between(equation, low, point)
        if point.value == -math.inf:
            break
        low, following, factor = point, factor * point.s, 2 * factor
    raise ProblemError(
        f"the loss falls without bound, to {low.value:.3g} after a step of {low.s:.3g} along one coordinate; expected "
        "a loss that is bounded from below: add weight decay to it, or lower lr"
    )


def _between(equation: Equation, low: Point, high: Point) -> Point:
    """The root between a point where phi is negative and one where it is not.

    By secants, the end that stays discounted as by Anderson and Björck, and a halving where three of them did not halve
    the interval. Where the root cannot be resolved the point with negative phi is returned: V falls by more than
    s^2 / tau there.
    """
    q_low, q_high = low.quotient, high.quotient
    width, side = math.inf, 0.0
    for count in range(SECANTS):
        gap = high.s - low.s
        if abs(gap) <= 2 * math.ulp(high.s):
            break
        is_slow = count % 4 == 3 and abs(gap) > width / 2
        width = abs(gap) if count % 4 == 3 else width
        s = math.nan if is_slow or q_high == math.inf else low.s + gap * (q_low / (q_low - q_high))
        if not 0 < (s - low.s) / gap < 1:
            is_far = high.s / low.s > 4  # then halve the exponent
            s = low.s * math.sqrt(high.s / low.s) if is_far else low.s + gap / 2
        point = equation.at(s)
        if equation.solves(point):
            return point
        q = point.quotient
        replaced = q_low if q < 0 else q_high
        weight = (1 - q / replaced if abs(q) < abs(replaced) else 0.5) if q * side > 0 else 1.0
        if q < 0:
            low, q_low, q_high = point, q, q_high * weight
        else:
            high, q_high, q_low = point, q, q_low * weight
        side = q
    return low
