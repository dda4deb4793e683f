"""The exact gradient of a solve in which each sample has steps of its own.

A step of the walk moves the samples that accept it and leaves the others where they are, h_i = 0: it is one Runge-Kutta
step of all samples with a vector of sizes, pulled back like any other (:mod:`ocnopt.differential.discrete`). Sample i
meets the cotangent of an output at the step with which it arrives there.

Step sizes count as constants but for the times of the outputs: between T_k-1 and T_k a step is

    t = T_k-1 + a (T_k - T_k-1),   h = s (T_k - T_k-1),   a and s held,

so that its dL/dt and dL/dh go to both ends. An interval of no length is one step with s = 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt.differential.discrete import Costate, Differentiable, Replay, accumulate, pull, shortened
from ocnopt.integrate.runge_kutta import step
from ocnopt.integrate.samples import column
from ocnopt.integrate.tableaus import Tableau


class Arrival(NamedTuple):
    """The output that each sample is on its way to in a step ``(B,)``, and which of them arrive; None where none."""

    interval: Tensor
    arrived: Tensor | None


class SampleBack:
    """The step of the sweep, with the samples' own sizes.

    Args:
        tableau: the method.
        field: the field.
        jumps: dL/dx at outputs, by their index in the times.
        arrivals: of the steps, in their order.
        times: start and outputs ``(1 + K, B)``, where dL/dtimes is wanted.
    """

    def __init__(
        self,
        tableau: Tableau,
        field: Differentiable,
        jumps: Mapping[int, Tensor],
        arrivals: Sequence[Arrival],
        times: Tensor | None,
    ) -> None:
        self._tableau, self._field, self._times = shortened(tableau), field, times
        self._arrivals, self._jumps = [*arrivals], None if not jumps else _stacked(jumps)

    def __call__(self, replay: Replay, value: Costate) -> tuple[Costate, None]:
        """Carry the costate from the end of a step to its start."""
        taken, start = replay.step, replay.start.detach().requires_grad_()
        interval, arrived = self._arrivals.pop()
        costate = value.x
        if arrived is not None and self._jumps is not None:
            jump = self._jumps[interval.clamp(max=len(self._jumps) - 1), torch.arange(len(start), device=start.device)]
            felt = arrived & (interval < len(self._jumps))
            costate = costate + torch.where(column(felt, start), jump, torch.zeros_like(jump))
        t: Any = taken.time
        h: Any = taken.size
        moves = [] if self._times is None else [t.clone().requires_grad_(), h.clone().requires_grad_()]
        if moves:
            t, h = moves
        inputs = (*self._field.parameters, *moves)
        field = self._field.noted(taken.notes)

        def advance(start: Tensor) -> Tensor:
            end, _ = step(self._tableau, field, t, h, start)
            self._field.require_same(end, replay.expected, (start, *inputs))
            return end

        x, found = pull(advance, start, inputs, costate)
        count = len(self._field.parameters)
        accumulate(value.parameters, found[:count])
        if self._times is not None:
            by_time, by_size = (0.0 if g is None else g.flatten().double() for g in found[count:])
            _share(value.times, self._times, interval, arrived, t.detach(), h.detach(), by_time, by_size)
        return value._replace(x=x), None


def _stacked(jumps: Mapping[int, Tensor]) -> Tensor:
    """The jumps by their index, zero where there is none."""
    any_jump = next(iter(jumps.values()))
    return torch.stack([jumps.get(i, torch.zeros_like(any_jump)) for i in range(max(jumps) + 1)])


def _share(
    total: Tensor,
    times: Tensor,
    interval: Tensor,
    arrived: Tensor | None,
    t: Tensor,
    h: Tensor,
    by_time: Tensor | float,
    by_size: Tensor | float,
) -> None:
    """Add what a step contributes to dL/dtimes at both ends of each sample's interval."""
    after = times.gather(0, interval[None])[0]
    before = times.gather(0, interval[None] - 1)[0]
    length = after - before
    safe = torch.where(length == 0, 1.0, length)
    along = torch.where(length == 0, 0.0, (t.flatten() - before) / safe)
    part = h.flatten().double() / safe
    if arrived is not None:
        part = torch.where(arrived & (length == 0), 1.0, part)
    total.scatter_add_(0, interval[None], (along * by_time + part * by_size)[None])
    total.scatter_add_(0, interval[None] - 1, ((1.0 - along) * by_time - part * by_size)[None])
