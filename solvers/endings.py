"""What a search went through and why it ends: its time is up, Ctrl-C, what it found; and the sentence that says so."""

import functools
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocnopt.solvers.kernels import Numbers
from ocnopt.solvers.search import Outcome, Progress

# Why a solve stopped that nothing was wrong with, and what to do.
_STOPPED = {
    Outcome.LATE: ("the time limit was reached", "raise time_limit, or start from this solution"),
    Outcome.INTERRUPTED: ("Ctrl-C was pressed", "start from this solution to go on"),
}


class History:
    """Cost, step and regularisation of every problem after each of its sweeps."""

    def __init__(self, progress: bool) -> None:
        self._rows: list[tuple[Numbers, ...]] = []
        self._print = progress

    def add(self, progress: Progress, cost: Numbers, step: Numbers, moving: Numbers) -> None:
        """Note one sweep of the problems that are moving."""
        told = progress.sweeps, progress.row, cost, step, progress.mu
        self._rows.append(told if np.ndim(moving) == 0 or moving.all() else tuple(v[moving] for v in told))
        if self._print:
            sweep, mu = np.max(progress.sweeps), np.max(progress.mu)
            print(f"{sweep:4.0f}  cost {np.mean(cost):.10g}  step {np.mean(step):.3g}  mu {mu:.1e}")  # noqa: T201

    def tables(self, like: Tensor) -> dict[str, Tensor]:
        """Each ``(sweeps + 1, *batch)``, the start first; what has ended stays as it was, without a step."""
        sweep, row, *values = (
            np.hstack([np.ravel(part) for part in column]) for column in zip(*self._rows, strict=True)
        )
        table = np.zeros((3, int(sweep.max()) + 1, like.numel()))
        table[:, sweep, row] = values
        last = np.zeros(like.numel(), dtype=int)
        np.maximum.at(last, row, sweep)
        number = np.arange(table.shape[1])[:, None]
        table = np.take_along_axis(table, np.minimum(number, last)[None], 1)
        table[1][number > last] = 0.0
        names = ("cost", "step", "regularisation")
        return {n: torch.from_numpy(v).to(like).reshape(-1, *like.shape) for n, v in zip(names, table, strict=True)}


class Tables(Mapping[str, Tensor]):
    """The tables of a history, made once somebody looks: they take longer than an iteration."""

    def __init__(self, history: History, like: Tensor) -> None:
        self._history, self._like = history, like

    @functools.cached_property
    def _tables(self) -> dict[str, Tensor]:
        return self._history.tables(self._like)

    def __repr__(self) -> str:
        return repr(self._tables)

    def __getitem__(self, name: str) -> Tensor:
        return self._tables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)


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
