"""What a discrete problem says of a given path: its cost, its gaps, and how far it breaks bounds and constraints."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import Bounds
from ocnopt.staged import Group, StagedOCP


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
    x = states[-1]
    cost, gaps = problem.terminal(x, p), x.new_zeros(x.shape[:-1])
    excess = [_outside(p, problem.parameter_bounds)]
    if problem.terminal_constraint is not None:
        excess.append(problem.terminal_constraint(*_with_p(problem, x, p)).abs())
    for group, bounds in zip(problem.groups, problem.control_bounds, strict=True):
        k, x, u, own = _stretch(group, states, controls, p)
        x_next, stage_cost = problem.advance(group.stage, k, x, u, own)
        ends = states[group.stop] if group.single else torch.stack([*states[group.start + 1 : group.stop + 1]])
        gap = (x_next - ends).abs().sum(-1)
        cost = cost + (stage_cost if group.single else stage_cost.sum(0))
        gaps = gaps + (gap if group.single else gap.sum(0))
        excess.append(_over_steps(_outside(u, bounds), group))
        if problem.path_constraint is not None:
            excess.append(_over_steps(problem.path_constraint(k, *_with_p(problem, x, u, own)), group))
    if problem.path_constraint is not None:
        last = problem.groups[-1]
        k = problem.steps if last.single else torch.tensor(problem.steps, device=p.device)
        excess.append(problem.path_constraint(k, *_with_p(problem, states[-1], controls[-1], p)))
    worst = torch.cat([part.flatten(len(problem.batch_shape)) for part in excess], dim=-1)
    # what is not finite is no path at all
    worst = torch.where(worst.isnan(), torch.inf, worst)
    violation = worst.clamp_min(0.0).amax(-1) if worst.shape[-1] else torch.zeros_like(cost)
    return Audit(cost, gaps, violation)


def _with_p(problem: StagedOCP, *arguments: Tensor) -> tuple[Tensor, ...]:
    """The arguments (.., p) of a function of the problem, without p where it has none."""
    return arguments[:-1] if problem.parameters is None else arguments


def _stretch(
    group: Group, states: Sequence[Tensor], controls: Sequence[Tensor], p: Tensor
) -> tuple[int | Tensor, Tensor, Tensor, Tensor]:
    """k, x, u, p of a group's steps: on a leading axis where one stage serves them all."""
    if group.single:
        return group.start, states[group.start], controls[group.start], p
    x, u = (torch.stack([*values[group.start : group.stop]]) for values in (states, controls))
    k = torch.arange(group.start, group.stop, device=p.device).reshape(-1, *(1,) * (x.ndim - 2))
    return k, x, u, p.expand(len(x), *p.shape)


def _outside(value: Tensor, bounds: Bounds | None) -> Tensor:
    return value.new_zeros(value.shape) if bounds is None else torch.maximum(bounds[0] - value, value - bounds[1])


def _over_steps(value: Tensor, group: Group) -> Tensor:
    """``(*batch, anything)``: the steps' axis behind the batch."""
    return value if group.single else value.movedim(0, -1)
