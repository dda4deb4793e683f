"""Solves in which each sample has its own error control, and perhaps its own end times.

The field is called with times ``(B, 1, ..., 1)``, one for each sample, which broadcast against the state where a 0-d
time does. Samples that met in the field would do so at different times: that is looked for and refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocnopt.differential.discrete import Costate, EndObserver, Replays, Trajectory
from ocnopt.differential.samples import Arrival, SampleBack
from ocnopt.differential.sweep import sweep
from ocnopt.errors import ProblemError
from ocnopt.integrate.runge_kutta import closed
from ocnopt.integrate.samples import SampleStep, SampleWalk, column
from ocnopt.integrate.walk import Step
from ocnopt.neural.evaluation import Evaluation
from ocnopt.neural.second import take_again
from ocnopt.neural.solve import Walked
from ocnopt.neural.state_layout import StateLayout


def check_samples(layout: StateLayout, x: Tensor) -> None:
    """Refuse a state whose leading axis does not hold the samples."""
    shared = layout.shapes is None or {shape[:1] for shape in layout.shapes} == {x.shape[:1]}
    if x.ndim == 0 or not shared:
        came = "no axis" if layout.shapes is None else f"parts of shapes {[tuple(shape) for shape in layout.shapes]}"
        raise ProblemError(
            f'error_norm="sample" met a state with {came}; expected the samples along the leading axis of every part: '
            "write x[None] for a single one"
        )


@dataclass(frozen=True)
class SampleJob:
    """One solve: the field, the walk with method and tolerances bound, start and output times ``(1 + K, B)``.

    ``ends`` are told about the last of them, with no costate for samples that are not ``at_end`` ``(B,)`` there.
    """

    evaluation: Evaluation
    integrate: partial[SampleWalk]
    times: Tensor
    at_end: Tensor
    ends: Sequence[EndObserver] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of dL/dtimes."""
        return tuple(self.times.shape)

    def walk(self, x: Tensor, first: Tensor | None = None, on_step: Any = None) -> SampleWalk:
        """Walk the paths and note their statistics."""
        walk = self.integrate(self.evaluation, x, self.times, first=first, on_step=on_step)
        self.evaluation.statistics.steps, self.evaluation.statistics.rejected = walk.steps, walk.rejected
        return walk


class SampleDiscrete:
    """The exact gradient of the accepted steps, whose states are kept within ``budget`` bytes."""

    def __init__(self, job: SampleJob, budget: int) -> None:
        self.job, self._budget = job, budget

    def forward(self, x: Tensor) -> Walked:
        """Walk; saved is x(T), then the trajectory's states."""
        evaluation = self.job.evaluation
        root = evaluation.root(column(self.job.times[0], x), x)
        self._tableau = closed(self.job.integrate.keywords["tableau"])
        self._trajectory = Trajectory(self._tableau, evaluation, self._budget)
        self._arrivals: list[Arrival] = []
        walk = self.job.walk(root.x, root.slope, self._append)
        evaluation.note_attributes()
        # The last output is the caller's, who may work on it in place.
        return Walked(walk.states, x, [walk.states[-1].clone(), *self._trajectory.release()])

    def _append(self, taken: SampleStep) -> None:
        self._arrivals.append(Arrival(taken.interval, taken.arrived))
        self._trajectory.append(Step(taken.times, taken.sizes, taken.stages, None, taken.state))

    def backward(self, saved: Sequence[Tensor], value: Costate, jumps: dict[int, Tensor]) -> Costate:
        """Pull the steps back from the last to the first."""
        job, (end, *states) = self.job, saved
        if job.ends:
            costate = jumps.get(len(job.times) - 1, torch.zeros_like(end))
            costate = torch.where(column(job.at_end, end), costate, 0.0)
            slope = job.evaluation(column(job.times[-1], end), end)
            for observer in job.ends:
                observer.terminal(end, slope, costate)
        times = job.times if job.evaluation.moving else None
        step = SampleBack(self._tableau, job.evaluation, jumps, self._arrivals, times)
        return sweep(step, Replays(self._trajectory, states, end), value)[0]

    @property
    def evaluation(self) -> Evaluation:
        """The field."""
        return self.job.evaluation

    def again(self, x: Tensor, saved: Sequence[Tensor]) -> dict[int, Tensor]:
        """The outputs with the graph of all steps: see :class:`ocnopt.neural.second.Repeatable`."""
        outputs: dict[int, Tensor] = {}
        steps, evaluation = self._trajectory.steps, self.job.evaluation
        for taken, (interval, arrived) in zip(steps, self._arrivals, strict=True):
            _, x = take_again(self._tableau, evaluation, [taken], (), x)
            if arrived is None:
                continue
            for i in interval[arrived].unique().tolist():
                outputs[i] = torch.where(column(arrived & interval.eq(i), x), x, outputs.get(i, x))
        evaluation.require_same(x, saved[0])
        return outputs
