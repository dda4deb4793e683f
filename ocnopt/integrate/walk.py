"""What a walk along a path returns: accepted steps, states at the output times, counts.

A walk goes from ``times[0]`` through ``times[1:]``, forwards or backwards, and stops at each of them: the last step of
an interval is shortened to end there. A dense walk stops at the last time alone and interpolates the others. Step sizes
h carry the sign of the direction.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from ocnopt.integrate.runge_kutta import Stages
from ocnopt.integrate.tableaus import Tableau

T = TypeVar("T")
NOTHING = range(0)


class Step(NamedTuple):
    """One accepted step of length ``size`` from ``time`` to ``state``; of each sample, where these are tensors.

    ``output`` is i if it ends at ``times[i]``; the outputs ``inside`` are interpolated.
    """

    time: Any
    size: Any
    stages: Stages
    output: int | None
    state: Tensor
    inside: range = NOTHING


OnStep = Callable[[Step], None]


class Walk(NamedTuple):
    """A finished walk.

    ``states`` are those at ``times[1:]``; ``end`` is the last time, or that of the event which ended the walk;
    ``slope`` is F at the end where the method knows it; ``next_size`` is the
    step length that an adaptive walk would try next.
    """

    states: list[Tensor]
    slope: Tensor | None
    next_size: float
    steps: int
    rejected: int
    evaluations: int
    end: float

    @property
    def state(self) -> Tensor:
        """The state at the last time."""
        return self.states[-1]


class StageLog(Generic[T]):
    """What was noted at the evaluations of a walk, handed out for the stages of each accepted step.

    Evaluations of rejected attempts and of the search for a first step drop out; with ``first_same_as_last`` the note
    of a step's last stage is also that of the next step's first.
    """

    def __init__(self, tableau: Tableau) -> None:
        self._first: list[T] = []
        self._rest: deque[T] = deque(maxlen=len(tableau.c) - 1)
        self._reuse = tableau.first_same_as_last

    def add(self, note: T) -> None:
        """Note one evaluation."""
        (self._rest if self._first else self._first).append(note)

    def accept(self) -> list[T]:
        """The notes of the stages of the step just accepted."""
        notes = [*self._first, *self._rest]
        self._first = notes[-1:] if self._reuse else []
        self._rest.clear()
        return notes
