r"""Problems in discrete time.

Minimise   Phi(x_N, p) + sum_k l_k(x_k, u_k, p)   subject to   x_{k+1} = f_k(x_k, u_k, p),   x_0 given,   k = 0..N-1.

Shapes: x ``(*extra, *batch, n)``, u ``(*extra, *batch, m)``, p ``(*extra, *batch, q)`` (index ``p[..., i]``). Where one
stage serves all N steps, k is an integer tensor that broadcasts against ``x[..., 0]``, so that many steps are evaluated
at once; in a sequence of stages k is an int.

A static control is a state whose first value is free: :class:`Widened` appends p to x, and a backward pass over states
and staged controls needs nothing else.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt import captured, checks, staged_checks
from ocnopt.errors import ProblemError
from ocnopt.ocp import Function, Lifted

Index = int | Tensor
Series = Tensor | Sequence[Tensor]  # stacked over time, or step by step where sizes vary
Advance = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Stage:
    """One stage: ``dynamics(k, x, u[, p]) -> x_next`` and ``cost(k, x, u[, p])``, none means zero; m = ``control_dim``.

    ``joint(k, x, u, p) -> (x_next, cost)`` replaces both where they share work; with ``step_data`` it takes the step's
    row of it as one argument more.
    """

    dynamics: Function | None
    cost: Function | None = None
    control_dim: int = 0
    joint: Advance | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "control_dim", checks.whole("control_dim of a Stage", self.control_dim, 0))


@dataclass(frozen=True)
class Group:
    """A run of steps start..stop-1 that one stage serves; ``single`` steps of a sequence get k as an int."""

    stage: Stage
    start: int
    stop: int
    single: bool


@dataclass(frozen=True, eq=False, init=False)
class StagedOCP:
    """An optimal-control problem in discrete time.

    Args:
        stages: one :class:`Stage` that serves ``steps`` steps, or a sequence of stages whose sizes may vary.
        terminal_cost: ``Phi(x[, p])``, anything that broadcasts to ``x.shape[:-1]``.
        initial_state: x_0, ``(*batch, n)``.
        steps: N, with one stage.
        parameters: the static control p ``(q,)``; with it every function takes p as its last argument, indexed
            ``p[..., i]``.
        control_bounds: ``(lower, upper)``, scalars or vectors ``(m,)``.
        parameter_bounds: likewise, ``(q,)``.
        path_constraint: ``c(k, x, u[, p]) -> (..., c)``, <= 0 at the nodes 0..N-1, and at N with the last control.
        terminal_constraint: ``e(x[, p]) -> (..., e)``, == 0.
        data: captured tensors that may change in place between solves, as in :class:`ocnopt.OCP`.
        initial_guess: as in :class:`ocnopt.OCP`.
        dtype: of all tensors.
        origin: the continuous problem this one was transcribed from.

    Raises:
        ProblemError: a stage fails or returns a wrong shape, dtype or a non-finite value; bounds out of order.

    Example:
        >>> stage = Stage(lambda k, x, u: x + u, lambda k, x, u: (u**2).sum(-1), control_dim=1)
        >>> StagedOCP(stage, lambda x: (x**2).sum(-1), initial_state=[1.0], steps=3).steps
        3
    """

    groups: tuple[Group, ...] = field(init=False)
    terminal_cost: Function | None
    initial_state: Tensor
    parameters: Tensor | None
    control_bounds: tuple[checks.Bounds | None, ...]
    parameter_bounds: checks.Bounds | None
    path_constraint: Function | None
    terminal_constraint: Function | None
    data: tuple[Tensor, ...]
    initial_guess: Any
    dtype: torch.dtype
    origin: Lifted | None
    step_data: Tensor | None = field(init=False, default=None)
    """What each step and the end are given besides, ``(N + 1, *batch, s)``: see :meth:`altered`."""
    state_sizes: tuple[int, ...] = field(init=False)
    """n at each of the N + 1 nodes."""

    def __init__(
        self,
        stages: Stage | Sequence[Stage] = (),
        terminal_cost: Function | None = None,
        *,
        initial_state: Any,
        steps: int | None = None,
        parameters: Any = None,
        control_bounds: Any = None,
        parameter_bounds: Any = None,
        path_constraint: Function | None = None,
        terminal_constraint: Function | None = None,
        data: Any = (),
        initial_guess: Mapping[str, Any] | Function | None = None,
        dtype: torch.dtype = torch.float64,
        origin: Lifted | None = None,
    ) -> None:
        put = object.__setattr__
        x0, p = checks.start(initial_state, parameters, dtype)
        groups = _groups(stages, steps)
        put(self, "groups", groups)
        put(self, "terminal_cost", terminal_cost)
        put(self, "initial_state", x0)
        put(self, "parameters", p)
        dims = {group.stage.control_dim for group in groups}
        bounds = {m: checks.bounds("control_bounds", control_bounds, m, dtype, x0.device) for m in dims}
        put(self, "control_bounds", tuple(bounds[group.stage.control_dim] for group in groups))
        n, q = self.state_dim, self.parameter_dim
        put(self, "parameter_bounds", checks.bounds("parameter_bounds", parameter_bounds, q, dtype, x0.device))
        put(self, "path_constraint", path_constraint)
        put(self, "terminal_constraint", terminal_constraint)
        put(self, "data", captured.check_data(data, dtype, x0.device))
        put(self, "initial_guess", checks.start_guess(initial_guess))
        put(self, "dtype", dtype)
        put(self, "origin", origin)
        put(self, "step_data", None)
        put(self, "state_sizes", (n,) * (self.steps + 1))
        if origin is None:
            with captured.must_be_read(self.data):
                put(self, "state_sizes", staged_checks.check_stages(self))

    def altered(self, **changes: Any) -> "StagedOCP":
        """The same problem with some attributes replaced, unchecked: another initial state, other ``step_data``.

        With ``step_data (N + 1, *batch, s)`` every stage is a joint one that takes its row ``(*batch, s)`` as last
        argument, and so does the terminal cost, which gets the last row.
        """
        other = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        return other

    @property
    def steps(self) -> int:
        """N."""
        return self.groups[-1].stop

    @property
    def state_dim(self) -> int:
        """n of the initial state."""
        return self.initial_state.shape[-1]

    @property
    def parameter_dim(self) -> int:
        """q, with T where this problem was transcribed from one with a free horizon."""
        return 0 if self.parameters is None else self.parameters.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The initial state's shape without its last axis."""
        return tuple(self.initial_state.shape[:-1])

    @property
    def device(self) -> torch.device:
        """The initial state's device."""
        return self.initial_state.device

    @property
    def step_bounds(self) -> list[checks.Bounds | None]:
        """The control bounds of each of the N steps."""
        return [b for g, b in zip(self.groups, self.control_bounds, strict=True) for _ in range(g.start, g.stop)]

    def times(self, p: Tensor) -> Tensor:
        """Times of the nodes ``(..., N + 1)`` for p ``(..., q)``; step numbers where there is no continuous problem."""
        numbers = torch.arange(self.steps + 1, dtype=p.dtype, device=p.device)
        return numbers if self.origin is None else self.origin.times(self.steps, p)

    def advance(
        self, stage: Stage, k: Index, x: Tensor, u: Tensor, p: Tensor, row: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step: the next state and the stage's cost, shaped like ``x[..., 0]``.

        A ``row`` stands in for the step's own of ``step_data``.
        """
        if stage.joint is not None:
            return stage.joint(k, x, u, p, *self._given(k, row))
        extra = () if self.parameters is None else (p,)
        cost = x.new_zeros(()) if stage.cost is None else stage.cost(k, x, u, *extra)
        # a Stage without joint always has dynamics: check_stages refuses any other.
        x_next: Tensor = stage.dynamics(k, x, u, *extra)  # type: ignore[misc]
        return x_next, torch.as_tensor(cost, dtype=x.dtype, device=x.device).expand(x.shape[:-1])

    def _given(self, k: Index, row: Tensor | None) -> tuple[Tensor, ...]:
        """The row of step_data for one step, or the rows for several along the axis in front of the batch."""
        if self.step_data is None:
            return ()
        return (self.step_data[k if isinstance(k, int) or k.ndim == 0 else k.reshape(-1)] if row is None else row,)

    def terminal(self, x: Tensor, p: Tensor, row: Tensor | None = None) -> Tensor:
        """Phi(x_N, p), shaped like ``x[..., 0]``; ``row`` of step_data if not its own."""
        if self.terminal_cost is None:
            return x.new_zeros(x.shape[:-1])
        extra = () if self.parameters is None else (p,)
        value = self.terminal_cost(x, *extra, *self._given(-1, row))
        return torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(x.shape[:-1])

    def path_excess(self, k: Index, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        """c(k, x, u, p) <= 0, ``(..., c)``; empty without a path constraint."""
        c, extra = self.path_constraint, () if self.parameters is None else (p,)
        return x.new_zeros((*x.shape[:-1], 0)) if c is None else c(k, x, u, *extra)

    def end_error(self, x: Tensor, p: Tensor) -> Tensor:
        """e(x_N, p) == 0, ``(..., e)``; empty without a terminal constraint."""
        e, extra = self.terminal_constraint, () if self.parameters is None else (p,)
        return x.new_zeros((*x.shape[:-1], 0)) if e is None else e(x, *extra)

    def start_parameters(self) -> Tensor:
        """The first guess of p for each problem, ``(*batch, q)``."""
        p = self.initial_state.new_zeros(0) if self.parameters is None else self.parameters
        return p.expand(*self.batch_shape, p.shape[-1])


def _groups(stages: Any, steps: Any) -> tuple[Group, ...]:
    if isinstance(stages, Stage):
        if not checks.is_whole(steps) or steps < 1:
            raise ProblemError(
                f"one Stage came with steps={steps}; expected steps=N >= 1, the whole number of times it is applied"
            )
        return (Group(stages, 0, int(steps), single=False),)
    if not isinstance(stages, Sequence) or not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise ProblemError(
            f"stages is {type(stages).__name__}; expected one oc.Stage with steps=N, or one oc.Stage for each step: "
            "dataclasses.replace knows none, so write oc.StagedOCP(..) again, or replace the oc.OCP and transcribe it"
        )
    if steps is not None and steps != len(stages):
        raise ProblemError(f"{len(stages)} stages came with steps={steps}; expected no steps= beside a sequence")
    return tuple(Group(stage, k, k + 1, single=True) for k, stage in enumerate(stages))


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

    def end_error(self, z: Tensor) -> Tensor:
        """e(x_N, p) == 0."""
        return self.problem.end_error(z[..., : self.state_sizes[-1]], z[..., self.n - self.q :])

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


def step_number(group: Group, k: int, like: Tensor) -> Index:
    """Step k as a stage's functions expect it."""
    return k if group.single or group.stage.joint is not None else torch.tensor(k, device=like.device)


def step_numbers(group: Group, start: int, stop: int, states: Tensor) -> Index:
    """The numbers of several steps, for a leading axis of states ``(N + 1, *lead, n)``."""
    if group.single:
        return start
    return torch.arange(start, stop, device=states.device).reshape(-1, *(1,) * (states.ndim - 2))
