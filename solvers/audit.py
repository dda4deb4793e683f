"""What a discrete problem says of a given path: its cost, its gaps, and how far it breaks bounds and constraints."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import Bounds
from ocnopt.paths import Widened, evaluate, step_number, step_numbers
from ocnopt.staged import StagedOCP


class Audit(NamedTuple):
    """One number for each problem ``(*batch)``: cost, sum of |f(x_k, u_k) - x_{k+1}|, largest violation."""

    cost: Tensor
    gaps: Tensor
    violation: Tensor


def audit(problem: StagedOCP, states: Sequence[Tensor], controls: Sequence[Tensor], p: Tensor) -> Audit:
    """Evaluate every step at its own given state.

    Args:
        problem: the discrete problem.
        states: x_0..x_N, each ``(*batch, n)``.
        controls: u_0..u_{N-1}, each ``(*batch, m)``.
        p: ``(*batch, q)``, with T where it is free.
    """
    wide = Widened(problem)
    Z, U, last = wide.join(states, p), wide.join_controls(controls), wide.groups[-1]
    path = evaluate(wide, Z, U)
    excess = [_outside(U, wide.control_bounds), _outside(p, wide.parameter_bounds)[None]]
    for group, start, stop in wide.stretches():
        excess.append(wide.path_excess(group, step_numbers(group, start, stop, Z), Z[start:stop], U[start:stop]))
    excess.append(wide.path_excess(last, step_number(last, wide.steps, Z), Z[-1], U[-1])[None])
    if problem.state_bounds is not None:
        excess.append(_outside(Z[1:, ..., : wide.n - wide.q], problem.state_bounds))
    excess.append(wide.end_error(Z[-1]).abs()[None])
    worst = torch.cat([part.movedim(0, -1).flatten(len(problem.batch_shape)) for part in excess], dim=-1)
    # what is not finite is no path at all
    worst = torch.where(worst.isnan(), torch.inf, worst)
    violation = worst.clamp_min(0.0).amax(-1) if worst.shape[-1] else torch.zeros_like(path.cost)
    gaps = torch.zeros_like(path.cost) if path.gaps is None else path.gaps.abs().sum(-1).sum(0)
    return Audit(path.cost, gaps, violation)


def _outside(value: Tensor, bounds: Bounds | None) -> Tensor:
    """How far values, with time in front where their bounds have it, are beyond them."""
    if bounds is None:
        return value.new_zeros(value.shape)
    lower, upper = (side.reshape(*side.shape[:-1], *(1,) * (value.ndim - side.ndim), side.shape[-1]) for side in bounds)
    return torch.maximum(lower - value, value - upper)
