"""Paths of a discrete problem: walked, evaluated, and walked under a feedback law.

A path is stacked over time from end to end: states X ``(N + 1, *lead, n)``, controls U ``(N, *lead, m)``. Static
controls are part of the state (:class:`~ocnopt.staged.Widened`), and an infeasible path has gaps g = f(x_k, u_k) -
x_{k+1}. Functions may capture data of each problem, so they are evaluated on extra leading axes, never mapped over
problems.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt import checks, problem_checks
from ocnopt.captured import belongs_to_each, substituted, which_of_each
from ocnopt.staged import Group, Index, Series, StagedOCP


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


class Widened:
    """A discrete problem with its static controls as states: z = (x, p), p_{k+1} = p_k, the first p being free.

    Its unknowns are states and staged controls alone, stacked over time: z ``(*extra, *batch, n)`` and u ``(*extra,
    *batch, m)``, n and m the largest of all steps. Smaller states and controls are followed by zeros, p comes last.
    """

    def __init__(self, problem: StagedOCP) -> None:
        self.problem, self.groups, self.steps = problem, problem.groups, problem.steps
        self.q = problem.parameter_dim
        self.state_sizes = problem.state_sizes
        self.control_sizes = [
            group.stage.control_dim for group in problem.groups for _ in range(group.start, group.stop)
        ]
        self.n, self.m = max(self.state_sizes) + self.q, max(self.control_sizes)
        self.parameter_bounds = problem.parameter_bounds
        self.control_bounds = self._stacked_bounds()

    def _stacked_bounds(self) -> checks.Bounds | None:
        """Two tensors ``(N, m)`` or ``(N, *batch, m)``; no control that is only there to fill up may move."""
        groups, m = self.problem.control_bounds, self.m
        first = groups[0]
        if all(bounds is first for bounds in groups) and len(set(self.control_sizes)) == 1:
            if first is None or first[0].ndim > 1:
                return first
            return first[0].expand(self.steps, m), first[1].expand(self.steps, m)
        infinite = self.problem.initial_state.new_full((m,), torch.inf)
        pairs = [
            bounds or (-infinite[:size], infinite[:size])
            for bounds, size in zip(self.problem.step_bounds, self.control_sizes, strict=True)
        ]
        lower, upper = (
            torch.stack([pad(side, (0, m - side.shape[-1])) for side in sides]) for sides in zip(*pairs, strict=True)
        )
        return lower, upper

    @property
    def state_bounds(self) -> checks.Bounds | None:
        """Two tensors ``(N + 1, n - q)`` or ``(N + 1, *batch, n - q)``.

        Infinite for the first state, which is given, and for what only fills up.
        """
        given = self.problem.state_bounds
        if given is None:
            return None
        sizes = torch.tensor([0, *self.state_sizes[1:]], device=given[0].device)[:, None]
        bounded = torch.arange(self.n - self.q, device=given[0].device) < sizes
        bounded = bounded.reshape(len(bounded), *(1,) * (given[0].ndim - 2), self.n - self.q)
        return torch.where(bounded, given[0], -torch.inf), torch.where(bounded, given[1], torch.inf)

    def join(self, states: Series, p: Tensor) -> Tensor:
        """States and static controls as z, stacked over time."""
        x = _stacked(states, self.n - self.q)
        return x if not self.q else torch.cat([x, p.expand(*x.shape[:-1], self.q)], dim=-1)

    def join_controls(self, controls: Series) -> Tensor:
        """Controls stacked over time."""
        return _stacked(controls, self.m)

    def split(self, z: Tensor) -> tuple[Series, Tensor]:
        """The states behind stacked z, a list where their sizes vary, and p at the start."""
        return self.cut(z, self.state_sizes), z[0, ..., self.n - self.q :]

    def cut(self, values: Tensor, sizes: Sequence[int]) -> Series:
        """What belongs to each step out of a stacked series, a list where sizes vary."""
        if len(set(sizes)) == 1:
            return values[..., : sizes[0]]
        return [value[..., :size] for value, size in zip(values, sizes, strict=True)]

    def advance(self, group: Group, k: Index, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """One step: the next z and the stage's cost."""
        first, p = group.start, z[..., self.n - self.q :]
        x, u = z[..., : self.state_sizes[first]], u[..., : group.stage.control_dim]
        x_next, cost = self.problem.advance(group.stage, k, x, u, p)
        room = self.n - self.q - x_next.shape[-1]
        parts = [x_next, *([x.new_zeros((*x_next.shape[:-1], room))] if room else []), *([p] if self.q else [])]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else x_next, cost

    def terminal(self, z: Tensor) -> Tensor:
        """Phi(x_N, p)."""
        return self.problem.terminal(z[..., : self.state_sizes[-1]], z[..., self.n - self.q :])

    def path_excess(self, group: Group, k: Index, z: Tensor, u: Tensor) -> Tensor:
        """c(k, x, u, p) <= 0 at steps of a group, or at the end with the last control."""
        x, u = z[..., : self.state_sizes[k if isinstance(k, int) else group.start]], u[..., : group.stage.control_dim]
        return self.problem.path_excess(k, x, u, z[..., self.n - self.q :])

    def path_excesses(self, states: Tensor, controls: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Along a path: the first step of each run and c ``(steps, *lead, c)`` there, the end last."""
        for group, start, stop in self.stretches():
            k = step_numbers(group, start, stop, states)
            yield start, self.path_excess(group, k, states[start:stop], controls[start:stop])
        last = self.groups[-1]
        yield self.steps, self.path_excess(last, step_number(last, self.steps, states), states[-1], controls[-1])[None]

    def end_error(self, z: Tensor) -> Tensor:
        """e(x_N, p) == 0."""
        return self.problem.end_error(z[..., : self.state_sizes[-1]], z[..., self.n - self.q :])

    def everything(self, z: Tensor, u: Tensor) -> list[Tensor]:
        """What all functions give at one z and u, those of a group at its first step."""
        found = [self.terminal(z), self.end_error(z)]
        for group in self.groups:
            k = step_number(group, group.start, z)
            found += [*self.advance(group, k, z, u), self.path_excess(group, k, z, u)]
        return found

    def times(self, z: Tensor) -> Tensor:
        """Times of the nodes for a z of any of them."""
        return self.problem.times(z[..., self.n - self.q :])

    def stretches(self, length: int | None = None) -> Iterator[tuple[Group, int, int]]:
        """Runs of steps, of at most the given length, that are evaluated at once."""
        for group in self.groups:
            step = length or group.stop - group.start
            for start in range(group.start, group.stop, step):
                yield group, start, min(start + step, group.stop)

    def outputs(self, group: Group, k: Index) -> Callable[[Tensor], Tensor]:
        """Next state, without the static controls, and cost of a step as a function of w = (z, u)."""

        def outputs(w: Tensor) -> Tensor:
            z, cost = self.advance(group, k, w[..., : self.n], w[..., self.n :])
            return torch.cat([z[..., : self.n - self.q], cost[..., None]], dim=-1)

        return outputs

    def cost(self, group: Group, k: Index) -> Callable[[Tensor], Tensor]:
        """The cost of a step alone as a function of w, ``(..., 1)``."""
        outputs = self.outputs(group, k)
        return lambda w: outputs(w)[..., -1:]

    def phi(self, z: Tensor) -> Tensor:
        """Phi(x_N, p), ``(..., 1)``."""
        return self.terminal(z)[..., None]


def _stacked(values: Series, size: int) -> Tensor:
    """A series of varying sizes as one tensor, filled up with zeros."""
    if isinstance(values, Tensor):
        return values
    return torch.stack([v if v.shape[-1] == size else pad(v, (0, size - v.shape[-1])) for v in values])


def fitted(bounds: checks.Bounds, values: Tensor) -> checks.Bounds:
    """Bounds ``(size,)``, ``(steps, size)`` or ``(steps, *batch, size)`` beside values ``(steps, *lead, size)``."""
    if bounds[0].ndim == 1:
        return bounds
    lower, upper = (side.reshape(len(side), *(1,) * (values.ndim - side.ndim), *side.shape[1:]) for side in bounds)
    return lower, upper


def step_number(group: Group, k: int, like: Tensor) -> Index:
    """Step k as a stage's functions expect it."""
    return k if group.single or group.stage.joint is not None else torch.tensor(k, device=like.device)


def step_numbers(group: Group, start: int, stop: int, states: Tensor) -> Index:
    """The numbers of several steps, for a leading axis of states ``(N + 1, *lead, n)``."""
    if group.single:
        return start
    return torch.arange(start, stop, device=states.device).reshape(-1, *(1,) * (states.ndim - 2))


def looked_up(function: Callable[..., Sequence[Tensor]], k: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """``function(k, x, ..)`` where k is traced: behind one more axis, table[k] is an indexing that needs no number."""
    return tuple(v[0] for v in function(k.reshape((1,) * x.ndim), x[None], *(v[None] for v in rest)))


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
    problem, axes = wide.problem, len(wide.problem.batch_shape)
    first = wide.join([problem.initial_state], problem.start_parameters())[0].flatten(0, -2)
    z, u = problem_checks.nearby(first), first.new_zeros(len(first), wide.m)
    near = [problem_checks.nearby(v.detach()) for v in problem.data]
    alone, moved = torch.arange(len(z), device=z.device), torch.arange(-1, len(z), device=z.device) % len(z)

    def values(rows: Tensor) -> list[Tensor]:
        each = zip(near, which_of_each(problem), strict=True)
        data = [v.flatten(0, axes - 1)[rows] if own else v for v, own in each]
        table = None if problem.step_data is None else problem.step_data.flatten(1, axes)[:, rows]
        own = Widened(problem.altered(step_data=table))
        with substituted(problem.data, data):
            return own.everything(z[rows], u[rows])

    try:
        pairs = zip(values(alone), values(moved), strict=True)
        return all(torch.allclose(value[moved], other, equal_nan=True) for value, other in pairs)
    except Exception:
        # whatever a function of the user's makes of rows that it did not expect
        return False


def data_of_each(problem: StagedOCP) -> tuple[bool, ...]:
    """Which data belong to one problem of the batch each: their leading axes are the batch's, and they change no other.

    A vector for all may have as many entries as there are problems: then its first entry changes the others too.
    """
    batch, wide = problem.batch_shape, Widened(problem)
    z = problem_checks.nearby(wide.join([problem.initial_state], problem.start_parameters())[0])
    u = z.new_zeros((*batch, wide.m))

    def others(i: int, tensor: Tensor) -> list[Tensor]:
        with torch.no_grad(), substituted((problem.data[i],), (tensor,)):
            return [value.flatten(0, len(batch) - 1)[1:] for value in wide.everything(z, u)]

    def own(i: int, tensor: Tensor) -> bool:
        if not belongs_to_each(tensor, batch):
            return False
        here = tensor.detach().flatten(0, len(batch) - 1)
        first = torch.arange(len(here), device=here.device).reshape(-1, *(1,) * (here.ndim - 1)) == 0
        moved = torch.where(first, problem_checks.nearby(here), here).reshape(tensor.shape)
        pairs = zip(others(i, tensor.detach()), others(i, moved), strict=True)
        return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)

    return tuple(own(i, tensor) for i, tensor in enumerate(problem.data))
