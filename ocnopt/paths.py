"""Paths of a discrete problem: walked, evaluated, and walked under a feedback law.

A path is stacked over time from end to end: states X ``(N + 1, *lead, n)``, controls U ``(N, *lead, m)``. Static
controls are part of the state (:class:`~ocnopt.staged.Widened`), and an infeasible path has gaps g = f(x_k, u_k) -
x_{k+1}. Functions may capture data of each problem, so they are evaluated on extra leading axes, never mapped over
problems.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt import checks, problem_checks
from ocnopt.captured import of_problems, substituted
from ocnopt.staged import Series, StagedOCP, Widened, step_number, step_numbers


class Path(NamedTuple):
    """A path with time in front: states ``(N + 1, *lead, n)``, controls ``(N, *lead, m)``, cost ``(*lead)``.

    Gaps f(x_k, u_k) - x_{k+1} are ``(N, *lead, n)``, or None where the path obeys the dynamics. ``rows`` says which
    problems of the batch these are, ``(*lead)``; None where they are all.
    """

    states: Tensor
    controls: Tensor
    cost: Tensor
    gaps: Tensor | None = None
    rows: Tensor | None = None


class Rollout(NamedTuple):
    """States, controls and cost in a problem's own sizes: stacked over time, or lists where sizes vary."""

    states: Series
    controls: Series
    cost: Tensor


def walk(
    wide: Widened,
    policy: Callable[[int, Tensor], Tensor],
    start: Tensor,
    gaps: Tensor | None = None,
    after: Callable[[int, Tensor], Tensor] | None = None,
) -> Path:
    """Walk along the steps with u_k = policy(k, z_k); z_{k+1} = f(z_k, u_k) - gap_k, moved by ``after(k, .)``."""
    states, controls, cost = [start], [], start.new_zeros(start.shape[:-1])
    for group in wide.groups:
        for k in range(group.start, group.stop):
            u = policy(k, states[-1])
            z, stage_cost = wide.advance(group, step_number(group, k, start), states[-1], u)
            z = z if gaps is None else z - gaps[k]
            states.append(z if after is None else after(k, z))
            controls.append(u)
            cost = cost + stage_cost
    return Path(torch.stack(states), torch.stack(controls), cost + wide.terminal(states[-1]), gaps)


def evaluate(wide: Widened, states: Tensor, controls: Tensor) -> Path:
    """A given path: its cost and its gaps, every step started at its own state."""
    gaps, cost = [], wide.terminal(states[-1])
    for group, start, stop in wide.stretches():
        k = step_numbers(group, start, stop, states)
        z, stage_cost = wide.advance(group, k, states[start:stop], controls[start:stop])
        gaps.append(z - states[start + 1 : stop + 1])
        cost = cost + stage_cost.sum(0)
    return Path(states, controls, cost, torch.cat(gaps))


@dataclass(frozen=True, eq=False)
class FeedbackLaw:
    """u_k = clip(ubar_k + alpha k_k + K_k (x - xbar_k)); alpha has the leading axes that the step sizes need."""

    states: Tensor
    controls: Tensor
    k: Tensor
    K: Tensor
    alpha: Tensor
    bounds: checks.Bounds | None

    def __call__(self, k: int, x: Tensor) -> Tensor:
        """The control at step k in state x."""
        feedback = (self.K[k] @ (x - self.states[k])[..., None])[..., 0]
        u = self.controls[k] + self.alpha * self.k[k] + feedback
        return u if self.bounds is None else u.clamp(self.bounds[0][k], self.bounds[1][k])


def rollout(
    problem: StagedOCP,
    policy: Callable[[int, Tensor], Tensor] | Series,
    x0: Tensor,
    p: Tensor | None = None,
    after: Callable[[int, Tensor], Tensor] | None = None,
) -> Rollout:
    """Walk along the steps with ``u_k = policy(k, x_k)``, or with given controls.

    ``after(k, x_next)`` may move the next state (a disturbance).
    """
    wide = Widened(problem)
    p = problem.start_parameters() if p is None else p
    chosen = policy if callable(policy) else lambda k, x: policy[k]
    sizes = wide.state_sizes

    def control(k: int, z: Tensor) -> Tensor:
        u = chosen(k, z[..., : sizes[k]])
        return u if u.shape[-1] == wide.m else pad(u, (0, wide.m - u.shape[-1]))

    def move(k: int, z: Tensor) -> Tensor:
        size = sizes[k + 1]
        return z if after is None else torch.cat([after(k, z[..., :size]), z[..., size:]], dim=-1)

    path = walk(wide, control, wide.join([x0], p)[0], after=move)
    states, _ = wide.split(path.states)
    return Rollout(states, wide.cut(path.controls, wide.control_sizes), path.cost)


def behind(values: Series, tail: int = 1) -> Tensor | tuple[Tensor, ...]:
    """A series with its time axis moved behind the batch, in front of ``tail`` axes; a tuple where sizes vary."""
    if not isinstance(values, Tensor):
        if len({tuple(value.shape) for value in values}) != 1:
            return tuple(values)
        values = torch.stack(list(values))
    return values.movedim(0, -1 - tail)


def rows_stand_alone(wide: Widened) -> bool:
    """Whether every function treats a problem alike wherever it stands in the batch: no data of one problem captured.

    The functions are called with the rows in another order and with one more; what belongs to a place in the batch
    then gives other values, or does not fit.
    """
    if not wide.problem.batch_shape:
        return True
    problem, batch, axes = wide.problem, wide.problem.batch_shape, len(wide.problem.batch_shape)
    first = wide.join([problem.initial_state], problem.start_parameters())[0].flatten(0, -2)
    z, u = problem_checks.nearby(first), first.new_zeros(len(first), wide.m)
    near = [problem_checks.nearby(v.detach()) for v in problem.data]
    alone, moved = torch.arange(len(z), device=z.device), torch.arange(-1, len(z), device=z.device) % len(z)

    def values(rows: Tensor) -> list[Tensor]:
        data = of_problems(near, batch, lambda v: v.flatten(0, axes - 1)[rows])
        table = None if problem.step_data is None else problem.step_data.flatten(1, axes)[:, rows]
        own = Widened(problem.altered(step_data=table))
        with substituted(problem.data, data):
            found = [own.terminal(z[rows]), own.end_error(z[rows])]
            for group in own.groups:
                k = step_number(group, group.start, z)
                found += [*own.advance(group, k, z[rows], u[rows]), own.path_excess(group, k, z[rows], u[rows])]
            return found

    try:
        pairs = zip(values(alone), values(moved), strict=True)
        return all(torch.allclose(value[moved], other, equal_nan=True) for value, other in pairs)
    except Exception:
        # whatever a function of the user's makes of rows that it did not expect
        return False
