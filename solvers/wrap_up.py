"""The last step of every solver: from stage-by-stage lists to a :class:`Solution`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ocnopt.solvers.solution import Gains, Solution, series
from ocnopt.staged import StagedOCP


def make_solution(
    problem: StagedOCP,
    *,
    states: list[Tensor],
    controls: list[Tensor],
    parameters: Tensor,
    cost: Tensor,
    converged: Tensor,
    iterations: Tensor,
    status: str | list[str],
    constraint_violation: Tensor,
    wall_time: float,
    build_time: float,
    history: Mapping[str, Tensor],
    costates: list[Tensor] | None = None,
    gains: tuple[list[Tensor], list[Tensor]] | None = None,
) -> Solution:
    """Collect results in a Solution's shapes; ``parameters (*batch, q)`` still hold T where the horizon is free."""
    form = problem.origin
    if form is None:
        times = torch.arange(problem.steps + 1, dtype=cost.dtype, device=cost.device).expand(*cost.shape, -1)
        p, horizon = parameters, torch.full_like(cost, float(problem.steps))
    else:
        p, end = form.split(parameters)
        horizon = end.expand(cost.shape)
        times = form.times(problem.steps, parameters).expand(*cost.shape, -1)
    same = len({group.stage.control_dim for group in problem.groups}) == 1
    return Solution(
        times=times,
        states=series(states),
        controls=series(controls),
        parameters=p,
        horizon=horizon,
        cost=cost,
        converged=converged,
        iterations=iterations,
        status=status,
        constraint_violation=constraint_violation,
        wall_time=wall_time,
        build_time=build_time,
        history=history,
        costates=None if costates is None else series(costates),
        gains=None if gains is None else Gains(series(gains[0]), _matrices(gains[1])),
        control_bounds=problem.control_bounds[0] if same else None,
        problem=problem,
    )


def _matrices(values: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Stack (..., m, n) along the time axis in front of the matrix axes."""
    return torch.stack(values, dim=-3) if len({tuple(v.shape) for v in values}) == 1 else tuple(values)
