"""Checks of a discrete problem: its stages, one after the other, and its ends."""

from typing import Any

import torch
from torch import Tensor

from ocnopt import bounds, checks, problem_checks
from ocnopt.errors import ProblemError


def check_stages(problem: Any) -> tuple[int, ...]:
    """Walk along the stages with zero controls, clipped to their bounds, check what all functions return; the sizes."""
    x, p = problem.initial_state, problem.start_parameters()
    static = {} if problem.parameters is None else {"p": p}
    sizes = [x.shape[-1]]
    for group in problem.groups:
        bounds = problem.step_bounds[group.start]
        u = x.new_zeros((*problem.batch_shape, group.stage.control_dim))
        k: Any = group.start if group.single else torch.tensor(group.start, device=x.device)
        arguments = {"k": k, "x": x, "u": checks.clipped(u, bounds)}
        x = _check_stage(problem, group, {**arguments, **(static if group.stage.joint is None else {"p": p})})
        sizes += [x.shape[-1]] * (group.stop - group.start)
    problem_checks.check_ends(problem, x)
    return tuple(sizes)


def _check_stage(problem: Any, group: Any, arguments: dict[str, Any]) -> Tensor:
    """Check one stage's functions and return its next state, which keeps its size where the stage is applied again."""
    stage, name = group.stage, f"stage {group.start}'s"
    dynamics, cost, joint = stage.dynamics, stage.cost, stage.joint
    if joint is not None:
        dynamics, cost = (lambda *given: joint(*given)[0]), (lambda *given: joint(*given)[1])
    checks.callable_or_none(f"{name} dynamics", dynamics, required=True)
    checks.callable_or_none(f"{name} cost", cost)
    if cost is not None:
        _check_function(problem, f"{name} cost", cost, arguments)
    size = None if group.single else arguments["x"].shape[-1]
    return _check_function(problem, f"{name} dynamics", dynamics, arguments, size)


def _check_function(problem: Any, name: str, function: Any, here: dict[str, Any], size: int | None = None) -> Tensor:
    rows = [here, {key: problem_checks.nearby(argument) for key, argument in here.items()}]
    return problem_checks.check_function(
        name, function, rows, batch=problem.batch_shape, dtype=problem.dtype, size=size
    )


def state_bounds(problem: Any, value: Any) -> checks.Bounds | None:
    """Read bounds of the states, of the largest state's size."""
    sizes, batch = set(problem.state_sizes), problem.batch_shape
    pair = bounds.read("state_bounds", value, max(sizes), problem.initial_state, batch=batch, rows="N + 1")
    if pair is not None and len(sizes) > 1 and any(bool((side != side[..., :1]).any()) for side in pair):
        raise ProblemError(
            f"state_bounds are vectors, but the size of the state varies from {min(sizes)} to {max(sizes)}; expected a "
            "pair of scalars: write other bounds as path_constraint="
        )
    return bounds.by_step("state_bounds", pair, problem.steps + 1, "nodes", batch)
