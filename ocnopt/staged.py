r"""Problems in discrete time, and the way from continuous time to them.

Minimise   Phi(x_N, p) + sum_k l_k(x_k, u_k, p)   subject to   x_{k+1} = f_k(x_k, u_k, p),   x_0 given,   k = 0..N-1.

Shapes: x ``(*extra, *batch, n)``, u ``(*extra, *batch, m)``, p ``(*extra, *batch, q)`` (index ``p[..., i]``). Where one
stage serves all N steps, k is an integer tensor that broadcasts against ``x[..., 0]``, so that many steps are evaluated
at once; in a sequence of stages k is an int.

A static control is a state whose first value is free: :class:`ocnopt.paths.Widened` appends p to x, and a backward pass
over states and staged controls needs nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ocnopt import bounds, captured, checks, staged_checks
from ocnopt.errors import ProblemError
from ocnopt.integrate.implicit import implicit_step
from ocnopt.integrate.runge_kutta import combine, stages
from ocnopt.integrate.tableaus import IMPLICIT, Tableau, get_tableau
from ocnopt.names import read_names
from ocnopt.ocp import OCP, Function, Lifted, lift

Index = int | Tensor
Series = Tensor | Sequence[Tensor]  # stacked over time, or step by step where sizes vary
Advance = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Stage:
    """One stage: ``dynamics(k, x, u[, p]) -> x_next`` and ``cost(k, x, u[, p])``, none means zero; m = ``control_dim``.

    ``joint(k, x, u, p) -> (x_next, cost)`` replaces both where they share work; with ``step_data`` it takes the step's
    row of it as one argument more. ``parts`` takes the same and calls once each what a step calls many times.
    """

    dynamics: Function | None
    cost: Function | None = None
    control_dim: int = 0
    joint: Advance | None = None
    parts: Callable[..., tuple[Tensor, ...]] | None = None

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
        control_bounds: ``(lower, upper)``, scalars, vectors ``(m,)``, ``(N, m)`` or anything that broadcasts to
            ``(*batch, N, m)``, as in :class:`ocnopt.OCP`.
        state_bounds: likewise, to ``(*batch, N + 1, n)``, at the nodes 1..N; one for all states where their number
            varies.
        parameter_bounds: likewise, ``(q,)`` or ``(*batch, q)``.
        path_constraint: ``c(k, x, u[, p]) -> (..., c)``, <= 0 at the nodes 0..N-1, and at N with the last control.
        terminal_constraint: ``e(x[, p]) -> (..., e)``, == 0.
        state_names: one for each state where its size does not vary; as in :class:`ocnopt.OCP`.
        control_names: likewise.
        constraint_names: as in :class:`ocnopt.OCP`.
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
    """Of each group, ``(m,)``, ``(steps, m)`` or ``(steps, *batch, m)``."""
    state_bounds: checks.Bounds | None
    """``(n,)``, ``(N + 1, n)`` or ``(N + 1, *batch, n)``."""
    parameter_bounds: checks.Bounds | None
    path_constraint: Function | None
    terminal_constraint: Function | None
    state_names: tuple[str, ...] | None
    control_names: tuple[str, ...] | None
    constraint_names: tuple[str, ...] | None
    data: tuple[Tensor, ...]
    initial_guess: Any
    dtype: torch.dtype
    origin: Lifted | None
    traced_state: Tensor | None = field(init=False)
    """The initial state with its graph, where it came with one."""
    step_data: Tensor | None = field(init=False, default=None)
    """What each step and the end are given besides, ``(N + 1, *batch, s)``: see :meth:`altered`."""
    data_of_each: tuple[bool, ...] | None = field(init=False, default=None)
    """Which data belong to one problem of the batch each; None: all whose leading axes are the batch's."""
    tableau: Tableau | None = field(init=False, default=None)
    """The method that the continuous problem behind it was cut by."""
    nodes: Tensor | None = field(init=False, default=None)
    """The times between which the steps run, where they were given."""
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
        state_bounds: Any = None,
        parameter_bounds: Any = None,
        path_constraint: Function | None = None,
        terminal_constraint: Function | None = None,
        state_names: Any = None,
        control_names: Any = None,
        constraint_names: Any = None,
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
        put(self, "traced_state", checks.traced(initial_state, dtype))
        put(self, "parameters", p)
        put(self, "control_bounds", bounds.of_controls(control_bounds, groups, x0))
        n, q = self.state_dim, self.parameter_dim
        box = bounds.read("parameter_bounds", parameter_bounds, q, x0, batch=self.batch_shape)
        put(self, "parameter_bounds", box)
        put(self, "path_constraint", path_constraint)
        put(self, "terminal_constraint", terminal_constraint)
        put(self, "state_names", read_names("state_names", state_names, n))
        put(self, "control_names", read_names("control_names", control_names, groups[0].stage.control_dim))
        put(self, "constraint_names", read_names("constraint_names", constraint_names))
        put(self, "data", checks.data_tensors(data, dtype, x0.device))
        put(self, "initial_guess", checks.start_guess(initial_guess))
        put(self, "dtype", dtype)
        put(self, "origin", origin)
        put(self, "state_sizes", (n,) * (self.steps + 1))
        if origin is None:
            with captured.must_be_read(self.data):
                put(self, "state_sizes", staged_checks.check_stages(self))
        given = state_bounds is not None
        put(self, "state_bounds", staged_checks.state_bounds(self, state_bounds) if given else None)

    def altered(self, **changes: Any) -> "StagedOCP":
        """The same problem with some attributes replaced, unchecked: another initial state, other ``step_data``.

        With ``step_data (N + 1, *batch, s)`` every stage is a joint one that takes its row ``(*batch, s)`` as last
        argument, and so does the terminal cost, which gets the last row.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__ | changes)
        return other

    @property
    def constrained(self) -> bool:
        """Whether anything but bounds on the controls and the parameters has to hold."""
        given = (self.terminal_constraint, self.path_constraint, self.state_bounds)
        return any(constraint is not None for constraint in given)

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
        """The control bounds of each of the N steps, ``(m,)`` or ``(*batch, m)``."""
        pairs = zip(self.groups, self.control_bounds, strict=True)
        return [own for group, given in pairs for own in bounds.each(given, group.stop - group.start)]

    @property
    def bounds_differ(self) -> bool:
        """Whether problems of the batch have bounds of their own."""
        timed = any(pair is not None and pair[0].ndim > 2 for pair in (*self.control_bounds, self.state_bounds))
        return timed or (self.parameter_bounds is not None and self.parameter_bounds[0].ndim > 1)

    def for_rows(self, rows: Tensor | int) -> "StagedOCP":
        """With the ``step_data`` and the bounds of some rows of the flattened batch, or of one without a batch."""
        table = self.step_data
        if table is None and not self.bounds_differ:
            return self
        return self.altered(
            control_bounds=tuple(bounds.picked(pair, rows, 1) for pair in self.control_bounds),
            state_bounds=bounds.picked(self.state_bounds, rows, 1),
            parameter_bounds=bounds.picked(self.parameter_bounds, rows, 0),
            step_data=None if table is None else table.flatten(1, -2)[:, rows],
        )

    def times(self, p: Tensor) -> Tensor:
        """Times of the nodes ``(..., N + 1)`` for p ``(..., q)``; step numbers where there is no continuous problem."""
        if self.nodes is not None:
            return self.nodes
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
        box = self.parameter_bounds
        return checks.clipped(p, box if box is not None and box[0].ndim > 1 else None).expand(*self.batch_shape, -1)


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


def transcribe(problem: OCP, steps: int, integrator: str = "rk4") -> StagedOCP:
    """Cut a continuous problem into N equal steps, each with one constant control.

    The integrator's stages integrate the running cost along with the state.

    Args:
        problem: the continuous problem; a free T becomes the last static control.
        steps: N.
        integrator: "euler", "midpoint", "rk4", or any tableau of :mod:`ocnopt.integrate.tableaus`; for stiff dynamics
            an implicit one: "implicit_euler", "implicit_midpoint", "radau2".

    Returns:
        The discrete problem; its ``origin`` is the lifted continuous one.

    Raises:
        ProblemError: steps < 1, or an unknown integrator.
    """
    steps = checks.whole("steps", steps, 1)
    tableau = get_tableau(integrator)
    lifted = lift(problem)
    h = (lifted.t1 - lifted.t0) / steps

    def time(k: Index, x: Tensor) -> float | Tensor:
        # an integer tensor times a float would be float32
        return lifted.t0 + h * (k if isinstance(k, int) else k.to(x.dtype))

    def joint(k: Index, x: Tensor, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        if tableau.name in IMPLICIT:
            end, seen = implicit_step(tableau, lifted.field(u, p), time(k, x), h, x)
        else:
            seen = stages(tableau, lifted.field(u, p), time(k, x), h, x)
            end = combine(x, h, tableau.b, seen.slopes)
        if problem.running_cost is None:
            return end, x.new_zeros(x.shape[:-1])
        used = [i for i, b in enumerate(tableau.b) if b != 0.0]
        costs = [lifted.running_cost(seen.times[i], seen.points[i], u, p) for i in used]
        zero = x.new_zeros(x.shape[:-1])
        return end, combine(zero, h, [tableau.b[i] for i in used], costs)

    def parts(k: Index, x: Tensor, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        t = time(k, x)
        return lifted.dynamics(t, x, u, p), lifted.running_cost(t, x, u, p)

    along = problem.path_constraint and (lambda k, x, u, p: lifted.path_constraint(time(k, x), x, u, p))
    stage = Stage(None, None, problem.control_dim, joint, parts)
    return cut(problem, lifted, stage, steps, along).altered(tableau=tableau)


def cut(problem: OCP, lifted: Lifted, stage: Stage, steps: int | Tensor, path_constraint: Function | None) -> StagedOCP:
    """What all ways of cutting a problem into steps share: everything but its stage and its path constraint.

    Args:
        problem: the continuous problem.
        lifted: the same in the one form.
        stage: of all steps.
        steps: N equal steps, or the times of the N + 1 nodes.
        path_constraint: ``c(k, x, u, p)``.
    """
    nodes, count = (steps, len(steps) - 1) if isinstance(steps, Tensor) else (None, steps)
    has_parameters = lifted.parameter_dim > 0
    staged = StagedOCP(
        stage,
        problem.terminal_cost and _arity(lifted.terminal_cost, has_parameters),
        initial_state=problem.initial_state if problem.traced_state is None else problem.traced_state,
        steps=count,
        parameters=lifted.parameters if has_parameters else None,
        control_bounds=problem.control_bounds_of(lifted.times(count, lifted.parameters) if nodes is None else nodes),
        state_bounds=problem.state_bounds,
        parameter_bounds=lifted.parameter_bounds,
        path_constraint=path_constraint and _arity(path_constraint, has_parameters),
        terminal_constraint=problem.terminal_constraint and _arity(lifted.terminal_constraint, has_parameters),
        state_names=problem.state_names,
        control_names=problem.control_names,
        constraint_names=problem.constraint_names,
        data=problem.data,
        initial_guess=problem.initial_guess,
        dtype=problem.dtype,
        origin=lifted if nodes is None else None,
    )
    return staged.altered(nodes=nodes)


def _arity(function: Function, has_parameters: bool) -> Function:
    """A lifted function as a StagedOCP has it: p is an argument only where the problem has one."""
    if has_parameters:
        return function
    return lambda *arguments: function(*arguments, arguments[-1].new_zeros(0))
