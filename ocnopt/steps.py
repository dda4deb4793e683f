r"""Control steps: paths of a discrete problem, walked, evaluated and expanded into local models.

A path is stacked over time from end to end: states X ``(N + 1, *lead, n)``, controls U ``(N, *lead, m)``. Static
controls are part of the state (:class:`Widened`), and an infeasible path has gaps g = f(x_k, u_k) - x_{k+1}.

With w = (x, u) of size d = n + m, a step's dynamics f and cost l expand to f_w (n, d), l_w (d), l_ww (d, d). They are
kept in homogeneous coordinates (1, dw), where the gap is one more column and a quadratic function one symmetric matrix:

    F = [1  0  ]  (1 + n, 1 + d)        L = [0    l_w^T]  (1 + d, 1 + d),   cost change = 1/2 (1, dw) L (1, dw)^T
        [g  f_w]                            [l_w  l_ww ]

Exact curvature needs f_ww only as c . f_ww, for a vector c that the backward sweep finds on its way. Either all of f_ww
``(N, n, d, d)`` is computed beforehand, which takes few calls, or c . f_ww alone at each step, which takes n times
less arithmetic and memory: the larger of the two costs decides.

How: functions may capture per-sample data, so they are evaluated on extra leading axes, never mapped over samples.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt import checks, problem_checks
from ocnopt.errors import ProblemError
from ocnopt.linearise import derivatives, gradient, jacobian
from ocnopt.staged import Group, Index, StagedOCP

Series = Tensor | Sequence[Tensor]  # stacked over time, or step by step where sizes vary

# Beyond this many points in one evaluation a CPU gets slower per point (caches), and memory grows: cut along the steps.
_POINTS = 100_000
# Second derivatives of a step, all at once, as long as that many points cost less than one more call for each step.
_FEW = 1_500


class Path(NamedTuple):
    """A path with time in front: states ``(N + 1, *lead, n)``, controls ``(N, *lead, m)``, cost ``(*lead)``.

    Gaps f(x_k, u_k) - x_{k+1} are ``(N, *lead, n)``, or None where the path obeys the dynamics.
    """

    states: Tensor
    controls: Tensor
    cost: Tensor
    gaps: Tensor | None = None


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
        """Two tensors ``(N, m)``; no control that is only there to fill up may move."""
        given, m = self.problem.step_bounds, self.m
        if not any(given):
            return None
        infinite = self.problem.initial_state.new_full((m,), torch.inf)
        pairs = [
            bounds or (-infinite[:size], infinite[:size])
            for bounds, size in zip(given, self.control_sizes, strict=True)
        ]
        lower, upper = (
            torch.stack([pad(side, (0, m - len(side))) for side in sides]) for sides in zip(*pairs, strict=True)
        )
        return lower, upper

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

    def cut_gains(self, K: Tensor) -> Series:
        """Feedback gains of x alone, a list where sizes vary."""
        sizes = list(zip(self.control_sizes, self.state_sizes, strict=False))
        if len(set(sizes)) == 1:
            return K[..., : self.state_sizes[0]]
        return [gain[..., :m, :n] for gain, (m, n) in zip(K, sizes, strict=True)]

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

    def walk(
        self,
        policy: Callable[[int, Tensor], Tensor],
        start: Tensor,
        gaps: Tensor | None = None,
        after: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Path:
        """Walk along the steps with u_k = policy(k, z_k); z_{k+1} = f(z_k, u_k) - gap_k, moved by ``after(k, .)``."""
        states, controls, cost = [start], [], start.new_zeros(start.shape[:-1])
        for group in self.groups:
            for k in range(group.start, group.stop):
                u = policy(k, states[-1])
                z, stage_cost = self.advance(group, step_number(group, k, start), states[-1], u)
                z = z if gaps is None else z - gaps[k]
                states.append(z if after is None else after(k, z))
                controls.append(u)
                cost = cost + stage_cost
        return Path(torch.stack(states), torch.stack(controls), cost + self.terminal(states[-1]), gaps)

    def evaluate(self, states: Tensor, controls: Tensor) -> Path:
        """A given path: its cost and its gaps, every step started at its own state."""
        gaps, cost = [], self.terminal(states[-1])
        for group, start, stop in self.stretches():
            k = step_numbers(group, start, stop, states)
            z, stage_cost = self.advance(group, k, states[start:stop], controls[start:stop])
            gaps.append(z - states[start + 1 : stop + 1])
            cost = cost + stage_cost.sum(0)
        return Path(states, controls, cost, torch.cat(gaps))

    def stretches(self, length: int | None = None) -> Iterator[tuple[Group, int, int]]:
        """Runs of steps, of at most the given length, that are evaluated at once."""
        for group in self.groups:
            step = length or group.stop - group.start
            for start in range(group.start, group.stop, step):
                yield group, start, min(start + step, group.stop)


def _stacked(values: Series, size: int) -> Tensor:
    """A series of varying sizes as one tensor, filled up with zeros."""
    if isinstance(values, Tensor):
        return values
    return torch.stack([v if v.shape[-1] == size else pad(v, (0, size - v.shape[-1])) for v in values])


def step_number(group: Group, k: int, like: Tensor) -> Index:
    """Step k as a stage's functions expect it."""
    return k if group.single or group.stage.joint is not None else torch.tensor(k, device=like.device)


def step_numbers(group: Group, start: int, stop: int, states: Tensor) -> Index:
    """The numbers of several steps, for a leading axis of states ``(N + 1, *lead, n)``."""
    if group.single:
        return start
    return torch.arange(start, stop, device=states.device).reshape(-1, *(1,) * (states.ndim - 2))


def rollout(
    problem: StagedOCP,
    policy: Callable[[int, Tensor], Tensor] | Series,
    x0: Tensor,
    p: Tensor | None = None,
    after: Callable[[int, Tensor], Tensor] | None = None,
) -> Rollout:
    """Walk along the stages with ``u_k = policy(k, x_k)``, or with given controls.

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

    path = wide.walk(control, wide.join([x0], p)[0], after=move)
    states, _ = wide.split(path.states)
    return Rollout(states, wide.cut(path.controls, wide.control_sizes), path.cost)


class StepModels(NamedTuple):
    """Models of all steps in homogeneous coordinates, and ``curvature(k, c)`` = c . f_ww at step k ``(*lead, d, d)``.

    F is ``(N, *lead, 1 + n, 1 + d)`` and L ``(N, *lead, 1 + d, 1 + d)``; no curvature for Gauss-Newton.
    """

    F: Tensor
    L: Tensor
    curvature: Callable[[int, Tensor], Tensor] | None

    @property
    def fw(self) -> Tensor:
        """Jacobians of the dynamics, ``(N, *lead, n, d)``."""
        return self.F[..., 1:, 1:]

    @property
    def gap(self) -> Tensor:
        """f(x_k, u_k) - x_{k+1}, ``(N, *lead, n)``."""
        return self.F[..., 1:, 0]

    @property
    def lw(self) -> Tensor:
        """Gradients of the cost, ``(N, *lead, d)``."""
        return self.L[..., 1:, 0]

    @property
    def lww(self) -> Tensor:
        """Hessians of the cost, ``(N, *lead, d, d)``."""
        return self.L[..., 1:, 1:]


def expand_path(wide: Widened, path: Path, *, exact: bool) -> StepModels:
    """Model every step along a path.

    Args:
        wide: the problem.
        path: where f(x_k, u_k) is not x_{k+1} the model has a gap.
        exact: with the curvature of the dynamics.
    """
    n, d = wide.n - wide.q, wide.n + wide.m
    lead = path.cost.numel()
    at_once = exact and lead * n * d <= _FEW
    per_step = lead * ((n + 1) * d if at_once else max(n + 1, d))
    F: list[Tensor] = []
    L: list[Tensor] = []
    fww: list[Tensor] = []
    for group, start, stop in wide.stretches(max(1, _POINTS // max(1, per_step))):
        outputs = _outputs(wide, group, start, stop, path)
        w = torch.cat([path.states[start:stop], path.controls[start:stop]], dim=-1)
        value, slopes, hessian = derivatives(outputs, w, hessian=at_once)
        lww = hessian[..., -1, :, :] if at_once else derivatives(_last(outputs), w, hessian=True)[2][..., 0, :, :]
        F.append(_affine(wide, value[..., :-1] - path.states[start + 1 : stop + 1][..., :n], slopes[..., :-1, :]))
        L.append(_quadratic(slopes[..., -1, :], lww))
        for fill in range(1 + wide.n + group.stage.control_dim, 1 + d):
            # a control that only fills up: its minimum is where it stands
            L[-1][..., fill, fill] = 1.0
        fww += hessian[..., :-1, :, :].unbind(0) if at_once else []

    def contracted(k: int, c: Tensor) -> Tensor:
        return (c[..., None, :n] @ fww[k].flatten(-2))[..., 0, :].unflatten(-1, (d, d))

    def contracting(k: int, c: Tensor) -> Tensor:
        w = torch.cat([path.states[k : k + 1], path.controls[k : k + 1]], dim=-1).requires_grad_()
        with torch.enable_grad():
            (slope,) = gradient(
                _outputs(wide, groups[k], k, k + 1, path)(w)[..., :-1] * c[..., :n], (w,), create_graph=True
            )
        return jacobian(slope, (w,))[0][0]

    groups = [group for group in wide.groups for _ in range(group.start, group.stop)]
    curvature = contracted if at_once else contracting
    return StepModels(torch.cat(F), torch.cat(L), curvature if exact else None)


def _outputs(wide: Widened, group: Group, start: int, stop: int, path: Path) -> Callable[[Tensor], Tensor]:
    """Next state, without the static controls, and cost of some steps as a function of w."""
    k = step_numbers(group, start, stop, path.states)

    def outputs(w: Tensor) -> Tensor:
        z, cost = wide.advance(group, k, w[..., : wide.n], w[..., wide.n :])
        return torch.cat([z[..., : wide.n - wide.q], cost[..., None]], dim=-1)

    return outputs


def _last(outputs: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The cost alone."""
    return lambda w: outputs(w)[..., -1:]


def expand_terminal(wide: Widened, z: Tensor) -> Tensor:
    """The model L ``(*lead, 1 + n, 1 + n)`` of the terminal cost at z ``(*lead, n)``."""
    _, gradient, hessian = derivatives(lambda w: wide.terminal(w)[..., None], z, hessian=True)
    return _quadratic(gradient[..., 0, :], hessian[..., 0, :, :])


def _affine(wide: Widened, gap: Tensor, jacobian: Tensor) -> Tensor:
    """The map (1, w) -> (1, gap + jacobian w, p)."""
    n, q, d = wide.n, wide.q, wide.n + wide.m
    F = gap.new_zeros((*gap.shape[:-1], 1 + n, 1 + d))
    F[..., 0, 0] = 1.0
    F[..., 1 : 1 + n - q, 0] = gap
    F[..., 1 : 1 + n - q, 1:] = jacobian
    F[..., 1 + n - q :, 1 + n - q : 1 + n] = torch.eye(q, dtype=gap.dtype, device=gap.device)
    return F


def _quadratic(gradient: Tensor, hessian: Tensor) -> Tensor:
    """The symmetric matrix of gradient^T w + 1/2 w^T hessian w on (1, w)."""
    L = pad(0.5 * (hessian + hessian.mT), (1, 0, 1, 0))
    L[..., 0, 1:] = gradient
    L[..., 1:, 0] = gradient
    return L


def rows_stand_alone(wide: Widened) -> bool:
    """Whether every function treats a problem alike wherever it stands in the batch: no data of one problem captured.

    The functions are called with the rows in another order and with one more; what belongs to a place in the batch
    then gives other values, or does not fit.
    """
    if not wide.problem.batch_shape:
        return True
    first = wide.join([wide.problem.initial_state], wide.problem.start_parameters())[0].flatten(0, -2)
    z = problem_checks.nearby(first)
    order = torch.arange(-1, len(z), device=z.device) % len(z)
    try:
        for group in wide.groups:
            u = z.new_zeros(len(z), wide.m)
            k = step_number(group, group.start, z)
            alone, moved = (
                torch.cat([v if v.ndim > 1 else v[:, None] for v in wide.advance(group, k, zs, us)], -1)
                for zs, us in ((z, u), (z[order], u[order]))
            )
            if not torch.allclose(alone[order], moved, equal_nan=True):
                return False
        return torch.allclose(wide.terminal(z)[order], wide.terminal(z[order]), equal_nan=True)
    except (RuntimeError, IndexError, ProblemError):
        return False
