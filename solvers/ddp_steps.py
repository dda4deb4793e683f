"""The two halves of a DDP iteration: a direction from a backward sweep, and a search along it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ocnopt.checks import Bounds
from ocnopt.differential.bellman import BellmanStage, bellman_step, minimise_start, terminal_value
from ocnopt.differential.sweep import sweep
from ocnopt.expansion import StageModel, TerminalModel
from ocnopt.solvers.ddp_state import Direction, Iterate, rounding
from ocnopt.staged import StagedOCP, rollout

_ALPHAS = tuple(0.5**i for i in range(1, 14))


def find_direction(problem: StagedOCP, iterate: Iterate, models: Sequence[StageModel], terminal: TerminalModel, mu: Tensor) -> Direction:
    """Sweep backwards over the local models, then minimise over the static controls."""
    rooms = [_room(bounds, u) for bounds, u in zip(problem.step_bounds, iterate.controls, strict=True)]
    damping = {size: _damping(mu, size) for size in {u.shape[-1] for u in iterate.controls}}
    stages = [
        BellmanStage(model, room, damping[u.shape[-1]])
        for model, room, u in zip(models, rooms, iterate.controls, strict=True)
    ]
    end = terminal_value(terminal)
    value, gains = sweep(bellman_step, stages, end)
    q = problem.parameter_dim
    p = iterate.states[0][..., problem.state_dim :]
    dp = torch.zeros_like(p)
    if q > 0:
        dp, value = minimise_start(value, q, _damping(mu, q), _room(problem.parameter_bounds, p))
    return Direction(
        k=[gain.K[..., 0] for gain in gains],
        K=[gain.K[..., 1:] for gain in gains],
        costates=[*(gain.costate for gain in gains), end.J[..., 1:]],
        dp=dp,
        linear=value.linear,
        quadratic=value.quadratic,
        solvable=value.solvable & torch.isfinite(value.linear),
    )


def line_search(problem: StagedOCP, iterate: Iterate, direction: Direction, active: Tensor) -> tuple[Iterate, Tensor]:
    """Try the full step, then all shorter ones at once; each problem takes the longest that decreases its merit enough.

    Returns:
        The new iterate and the step taken, zero where none was.
    """
    step = torch.zeros_like(iterate.cost)
    for alphas in ((1.0,), _ALPHAS):
        open_ = active & (step == 0)
        if not bool(open_.any()):
            break
        trial, accepted = _try(problem, iterate, direction, step.new_tensor(alphas))
        accepted = accepted & open_
        chosen = accepted.to(torch.int8).argmax(0)
        found = accepted.any(0)
        step = torch.where(found, step.new_tensor(alphas)[chosen], step)
        iterate = iterate.replace_where(found, trial.select(chosen))
    return iterate, step


def _try(problem: StagedOCP, iterate: Iterate, direction: Direction, alphas: Tensor) -> tuple[Iterate, Tensor]:
    """Roll the feedback law out for each step size on a leading axis; which of them decrease the merit enough."""
    alpha = alphas.reshape(-1, *(1,) * iterate.cost.ndim)
    a = alpha[..., None]
    bounds = problem.step_bounds
    first = iterate.states[0].expand(len(alphas), *iterate.states[0].shape)
    q = direction.dp.shape[-1]
    if q > 0:
        first = torch.cat([first[..., :-q], first[..., -q:] + a * direction.dp], dim=-1)

    def law(k: int, x: Tensor) -> Tensor:
        feedback = (direction.K[k] @ (x - iterate.states[k])[..., None])[..., 0]
        u = iterate.controls[k] + a * direction.k[k] + feedback
        bound = bounds[k]
        return u if bound is None else u.clamp(*bound)

    gaps = iterate.gaps
    after = None if gaps is None else lambda k, x_next: x_next - (1 - a) * gaps[k]
    path = rollout(problem, law, first, after=after)
    left = None if gaps is None else [(1 - a) * gap for gap in gaps]
    trial = Iterate(path.states, path.controls, path.cost, left, iterate.weight)
    infeasible, weight = iterate.gap_sum(), iterate.weight
    if gaps is not None:
        # twice the smallest weight for which the step descends on cost + weight * |gaps| (Nocedal and Wright, 18.36)
        weight = torch.maximum(weight, 2 * (direction.linear + direction.quadratic.clamp_min(0)) / infeasible.clamp_min(1e-300))
    slope = weight * infeasible - direction.linear
    actual = iterate.cost - trial.cost + weight * alpha * infeasible
    # a step predicted to gain less than rounding is taken if it loses no more
    noise = rounding(iterate.cost)
    enough = actual >= torch.minimum(1e-4 * alpha * slope, alpha * slope - noise)
    return trial._replace(weight=weight.expand_as(trial.cost)), enough & (slope >= 0) & trial.finite()


def _room(bounds: Bounds | None, value: Tensor) -> Bounds | None:
    return None if bounds is None else (bounds[0] - value, bounds[1] - value)


def _damping(mu: Tensor, size: int) -> Tensor:
    """Mu I, ``(..., size, size)``."""
    return mu[..., None, None] * torch.eye(size, dtype=mu.dtype, device=mu.device)
