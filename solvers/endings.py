"""Why a search ends: its time is up, Ctrl-C was pressed, or what it found; and the sentence that says so."""

import math
import signal
import threading
import time
from typing import Any

from ocnopt.solvers.search import Outcome

# Why a solve stopped that nothing was wrong with, and what to do.
_STOPPED = {
    Outcome.LATE: ("the time limit was reached", "raise time_limit, or start from this solution"),
    Outcome.INTERRUPTED: ("Ctrl-C was pressed", "start from this solution to go on"),
}


class Stopwatch:
    """Says when a solve has to stop. Within it Ctrl-C is noted; pressed again it raises as ever.

    One within another stops with that too.
    """

    def __init__(self, limit: float | None) -> None:
        self._end = math.inf if limit is None else time.perf_counter() + limit
        self._pressed, self._before = False, signal.getsignal(signal.SIGINT)
        outer = getattr(self._before, "__self__", None)
        self._outer = outer if isinstance(outer, Stopwatch) else None
        main = threading.current_thread() is threading.main_thread()
        self._listens = main and self._before is signal.default_int_handler

    def __enter__(self) -> "Stopwatch":
        if self._listens:
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        if self._listens:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: Any) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True

    @property
    def reason(self) -> int | None:
        """Why to stop now, an :class:`Outcome`; None to go on."""
        if self._pressed:
            return Outcome.INTERRUPTED
        if time.perf_counter() > self._end:
            return Outcome.LATE
        return None if self._outer is None else self._outer.reason

    @property
    def left(self) -> float | None:
        """A time limit for what is still to come, above zero; None without one."""
        return None if self._end == math.inf else max(self._end - time.perf_counter(), 1e-9)


def stopped(outcome: int) -> tuple[str, str]:
    """Why a solve was stopped, and what to do."""
    return _STOPPED[outcome]


def sentence(kernel: str, outcome: int, iterations: int, gap: float, rounds: int = 0, worst: str = "") -> str:
    """How one search ended, and what to do about it.

    Args:
        kernel: its name.
        outcome: an :class:`Outcome`.
        iterations: accepted steps.
        gap: the largest that is open.
        rounds: how many inner solves a constrained problem took.
        worst: the constraint that is off by most.
    """
    steps = f"{iterations} step{'' if iterations == 1 else 's'}"
    steps += f" in {rounds} round{'' if rounds == 1 else 's'} of multipliers" if rounds else ""
    if outcome == Outcome.CONVERGED:
        return f"converged after {steps} ({kernel} kernel)"
    if outcome == Outcome.SADDLE:
        where = "to a saddle, from which the cost falls along some direction"
        return f"converged after {steps} {where}; start elsewhere, or pass restarts= ({kernel} kernel)"
    if outcome == Outcome.NOT_FINITE:
        return "given up: the first path is not finite; pass another initial_guess"
    reason, advice = {
        Outcome.STUCK: (
            "no step decreases the cost under the largest regularisation",
            "look for a kink in the functions, or start elsewhere",
        ),
        Outcome.NOT_SMOOTH: (
            "a derivative is NaN or infinite",
            "look for a square root, a norm or a division at zero, also behind torch.where, or start elsewhere",
        ),
        Outcome.UNBOUNDED: (
            "the cost falls without bound",
            "bound the controls, or look for a cost that is not bounded below",
        ),
        Outcome.LIMIT: ("the iteration limit was reached", "raise max_iterations, or start from this solution"),
        Outcome.UNMET: (
            "the constraints cannot be met near this path",
            "check that constraints and bounds can be met together, lengthen the horizon, or start elsewhere",
        ),
        Outcome.ROUNDS: ("max_outer rounds were not enough", "raise max_outer, or start from this solution"),
        **_STOPPED,
    }[outcome]
    gaps = f"; gaps up to {gap:.1e} are still open" if gap > 0 else ""
    gaps += f"; {worst}" if worst else ""
    return f"stopped after {steps}: {reason}{gaps}; {advice} ({kernel} kernel)"
