r"""Control steps: paths of a discrete problem, walked, evaluated, expanded into local models and swept.

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt import checks, problem_checks
from ocnopt.checks import Bounds
from ocnopt.differential.sweep import (
    BellmanStep,
    CostToGo,
    Curvature,
    Hessians,
    StepAt,
    bellman_step,
    minimise_start,
    sweep,
)
from ocnopt.linearise import derivatives
from ocnopt.staged import Series, StagedOCP, Widened, step_number, step_numbers

# Beyond this many points in one evaluation a CPU gets slower per point (caches), and memory grows: cut along the steps.
_POINTS = 100_000
# All step sizes are tried in one rollout where a batch is so small that only calls cost time.
_SMALL = 64
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


class StepModels(NamedTuple):
    """Models of all steps in homogeneous coordinates, and the means to find c . f_ww at each.

    F is ``(N, *lead, 1 + n, 1 + d)`` and L ``(N, *lead, 1 + d, 1 + d)``; no curvature for Gauss-Newton.
    """

    F: Tensor
    L: Tensor
    curvature: list[Curvature] | None

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
    curved: list[Curvature] = []
    for group, start, stop in wide.stretches(max(1, _POINTS // max(1, per_step))):
        k = step_numbers(group, start, stop, path.states)
        w = torch.cat([path.states[start:stop], path.controls[start:stop]], dim=-1)
        value, slopes, hessian = derivatives(wide.outputs(group, k), w, hessian=at_once)
        lww = (hessian if at_once else derivatives(wide.cost(group, k), w, hessian=True)[2])[..., -1, :, :]
        F.append(_affine(wide, value[..., :-1] - path.states[start + 1 : stop + 1][..., :n], slopes[..., :-1, :]))
        L.append(_quadratic(slopes[..., -1, :], lww))
        for fill in range(1 + wide.n + group.stage.control_dim, 1 + d):
            # a control that only fills up: its minimum is where it stands
            L[-1][..., fill, fill] = 1.0
        if at_once:
            curved += [Hessians(fww) for fww in hessian[..., :-1, :, :].unbind(0)]
        else:
            numbers = [step_numbers(group, i, i + 1, path.states) for i in range(start, stop)]
            curved += [StepAt(wide.outputs(group, i), point[None]) for i, point in zip(numbers, w, strict=True)]
    return StepModels(torch.cat(F), torch.cat(L), curved if exact else None)


def expand_terminal(wide: Widened, z: Tensor) -> Tensor:
    """The model L ``(*lead, 1 + n, 1 + n)`` of the terminal cost at z ``(*lead, n)``."""
    _, gradient, hessian = derivatives(wide.phi, z, hessian=True)
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


class Direction(NamedTuple):
    """What a sweep finds, time in front: gains, costates, the step dp of the static controls, the predicted change.

    k ``(N, *lead, m)``, K ``(N, *lead, m, n)``, costates ``(N + 1, *lead, n)``, dp ``(*lead, q)``. With a step of size
    alpha the cost changes by alpha * linear + alpha^2 * quadratic, both ``(*lead)``, where ``solvable``.
    """

    k: Tensor
    K: Tensor
    costates: Tensor
    dp: Tensor
    linear: Tensor
    quadratic: Tensor
    solvable: Tensor


def sweep_path(wide: Widened, path: Path, models: StepModels, terminal: Tensor, mu: Tensor) -> Direction:
    """Sweep backwards over the models of a path, then minimise over the static controls."""
    damping = mu[..., None, None] * torch.eye(wide.m, dtype=mu.dtype, device=mu.device)
    rooms = _rooms(wide, path)
    curvature: Sequence[Curvature | None] = models.curvature or [None] * wide.steps
    steps = [
        BellmanStep(F, L, curved, room, damping)
        for F, L, curved, room in zip(models.F.unbind(0), models.L.unbind(0), curvature, rooms, strict=True)
    ]
    end = CostToGo(terminal, terminal[..., 0, :], torch.ones_like(path.cost, dtype=torch.bool))
    value, gains = sweep(bellman_step, steps, end)
    K = torch.stack([gain.K for gain in gains])
    dp = path.states[0][..., :0]
    if wide.q:
        p, damping = path.states[0][..., -wide.q :], mu[..., None, None] * torch.eye(wide.q).to(mu)
        dp, value = minimise_start(value, wide.q, damping, _room(wide.parameter_bounds, p))
    return Direction(
        k=K[..., 0],
        K=K[..., 1:],
        costates=torch.stack([*(gain.costate for gain in gains), terminal[..., 0, 1:]]),
        dp=dp,
        linear=value.linear,
        quadratic=value.quadratic,
        solvable=value.solvable & torch.isfinite(value.linear),
    )


def _room(bounds: Bounds | None, value: Tensor) -> Bounds | None:
    return None if bounds is None else (bounds[0] - value, bounds[1] - value)


def _rooms(wide: Widened, path: Path) -> list[Bounds] | list[None]:
    """How far the controls of each step may move."""
    if wide.control_bounds is None:
        return [None] * wide.steps
    lower, upper = (side.reshape(wide.steps, *(1,) * path.cost.ndim, wide.m) for side in wide.control_bounds)
    return list(zip((lower - path.controls).unbind(0), (upper - path.controls).unbind(0), strict=True))


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
    except Exception:
        # whatever a function of the user's makes of rows that it did not expect
        return False


class TorchKernel:
    """The kernel for any function and any device."""

    name, window = "torch", 512

    def __init__(self, wide: Widened) -> None:
        self.wide = wide
        self.apart = rows_stand_alone(wide)
        self._expanded: tuple[Any, ...] = (None, False)

    def evaluate(self, states: Tensor, controls: Tensor) -> Path:
        """See :class:`ocnopt.solvers.search.Kernel`."""
        return evaluate(self.wide, states, controls)

    def direction(self, path: Path, mu: Tensor, *, exact: bool) -> Direction:
        """See :class:`ocnopt.solvers.search.Kernel`; a path swept again, with another mu, is not expanded again."""
        if self._expanded[0] is not path.states or (exact and not self._expanded[1]):
            models = expand_path(self.wide, path, exact=exact), expand_terminal(self.wide, path.states[-1])
            self._expanded = path.states, exact, *models
        models, terminal = self._expanded[2:]
        return sweep_path(self.wide, path, models if exact else models._replace(curvature=None), terminal, mu)

    def roll_out(self, path: Path, direction: Direction, alphas: Tensor) -> Path:
        """See :class:`ocnopt.solvers.search.Kernel`."""
        a, start = alphas.reshape((-1, *(1,) * path.states[0].ndim)), path.states[0]
        start = start.expand(len(alphas), *start.shape)
        if self.wide.q:
            start = torch.cat([start[..., : -self.wide.q], start[..., -self.wide.q :] + a * direction.dp], dim=-1)
        law = FeedbackLaw(path.states, path.controls, direction.k, direction.K, a, self.wide.control_bounds)
        return walk(self.wide, law, start, None if path.gaps is None else (1 - a) * path.gaps[:, None])

    def ladder(self, lanes: int, alphas: Sequence[float]) -> Sequence[Sequence[float]]:
        """See :class:`ocnopt.solvers.search.Kernel`."""
        return (alphas,) if lanes <= _SMALL else (alphas[:1], alphas[1:])
