"""``solve`` and ``prepare``: a problem and a solver in, a :class:`Solution` out. Thin: read, transcribe, delegate."""

import threading
import time
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, NoReturn, Protocol, runtime_checkable

from torch import Tensor

from ocnopt.checks import Bounds, can_differentiate, float_tensor, is_whole, listed, nearest, numbers, shape, traced
from ocnopt.errors import ConvergenceError, ProblemError
from ocnopt.grids import transcribe
from ocnopt.ocp import OCP
from ocnopt.paths import Widened, behind
from ocnopt.solvers.files import stays_here
from ocnopt.solvers.guess import own_guess, read_guess
from ocnopt.solvers.sensitivity import refuse_gradients, with_gradients
from ocnopt.solvers.shared import Shared
from ocnopt.solvers.solution import Gains, Guess, Result, Solution
from ocnopt.staged import StagedOCP
from ocnopt.staged import transcribe as transcribe_equal

_SOLVERS = {
    "ddp": ("ocnopt.solvers.ddp", "DDP"),
    "casadi": ("ocnopt.solvers.direct.casadi_solver", "CasADi"),
    "indirect": ("ocnopt.solvers.indirect", "Indirect"),
    "shooting": ("ocnopt.solvers.shooting", "Shooting"),
}


@runtime_checkable
class Solver(Protocol):
    """A frozen record of options with one method."""

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve the discrete problem from a guess; the continuous one is ``problem.origin``."""
        ...


def solve(
    problem: OCP | StagedOCP,
    solver: str | Solver = "ddp",
    *,
    steps: Any = 100,
    integrator: str = "rk4",
    initial_guess: Any = None,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    strict: bool = False,
    progress: bool = False,
    differentiable: bool = False,
    shared_parameters: bool = False,
    **options: Any,
) -> Solution:
    """Solve an optimal-control problem; a leading batch shape means independent problems.

    Args:
        problem: continuous, or discrete (then ``steps`` and ``integrator`` are not used).
        solver: "ddp", "casadi", "indirect", "shooting", or a solver object.
        steps: N equal steps with one constant control each, or the N + 1 times between which they run.
        integrator: "euler", "midpoint", "rk4", ...; "implicit_midpoint", "radau2" for stiff dynamics.
        initial_guess: controls ``(..., N, m)``, a mapping with any of controls, states, parameters, horizon, or a
            Solution.
        max_iterations: of the solver; its own default if None.
        tolerance: of the solver; its own default if None.
        strict: raise instead of returning what did not converge.
        progress: show the iterations.
        differentiable: give states, controls, parameters, horizon and cost gradients in the initial state and in the
            problem's data, where those require them; of first order.
        shared_parameters: the batch are experiments with one system: one p, and one T where it is free, for all of
            them, which minimise the sum of their costs.
        **options: the solver's own.

    Raises:
        ProblemError: unknown solver or option, or a problem that the solver cannot handle (the message says which can).
        ConvergenceError: ``strict`` and not converged; its ``solution`` is what was reached.

    Example:
        >>> cost = lambda t, x, u: (x**2 + u**2).sum(-1)
        >>> problem = OCP(lambda t, x, u: u, cost, initial_state=[1.0], control_dim=1, horizon=1.0)
        >>> round(float(solve(problem, steps=200).cost), 4)  # tanh(1)
        0.7616
    """
    chosen = make_solver(solver, _given(options, max_iterations=max_iterations, tolerance=tolerance))
    staged = read_problem(problem, steps, integrator)
    if differentiable:
        refuse_gradients(staged, chosen)
    if shared_parameters:
        chosen = Shared(chosen, staged)
    result = chosen.solve(staged, read_guess(staged, initial_guess), progress=progress)
    if differentiable:
        result = with_gradients(staged, result, shared=shared_parameters)
    return _finished(make_solution(staged, result), strict)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A problem with a solver that is built for it, as ``oc.prepare`` returns it.

    The tensors named in the problem's ``data`` may change in place between two solves.

    Attributes:
        problem: the discrete problem.
        solver: built for this problem.
        build_time: seconds that took.
        shared_parameters: as for ``solve``.
    """

    problem: StagedOCP
    solver: Solver
    build_time: float
    shared_parameters: bool = False
    _timed: tuple[Any, Tensor, Bounds] | None = field(default=None, repr=False)
    _alone: Any = field(default_factory=threading.RLock, init=False, repr=False, compare=False)

    def __reduce__(self) -> NoReturn:
        raise stays_here("a Prepared", "in another process or for another user call oc.prepare(..) again")

    def solve(
        self,
        initial_state: Any = None,
        *,
        initial_guess: Any = None,
        strict: bool = False,
        progress: bool = False,
        differentiable: bool = False,
    ) -> Solution:
        """Solve from a state.

        Args:
            initial_state: ``(*batch, n)``, or ``(n,)`` for all problems of a batch; the problem's own if None.
            initial_guess: as for ``solve``.
            strict: as for ``solve``.
            progress: as for ``solve``.
            differentiable: as for ``solve``.

        Returns:
            As ``solve`` would; its ``build_time`` is zero, and the status of a DDP that stopped early leaves out the
            gradient that is left.

        Raises:
            ProblemError: the state has another shape or is not finite, or something that the functions capture has
                changed without being named in ``data``.
            ConvergenceError: ``strict`` and not converged.
        """
        can_differentiate()
        problem = self.problem
        if self._timed is not None:
            _refuse_new_bounds(*self._timed)
        if initial_state is not None:
            wanted = (*problem.batch_shape, problem.state_dim)
            x0 = float_tensor("initial_state", initial_state, problem.dtype, problem.device)
            if tuple(x0.shape) not in (wanted, wanted[-1:]):
                raise ProblemError(
                    f"initial_state has shape {shape(x0)}; expected {wanted}, as the problem was prepared for: prepare "
                    "again for another batch"
                )
            graph = traced(initial_state, problem.dtype)
            graph = None if graph is None else graph.expand(wanted)
            problem = problem.altered(initial_state=x0.expand(wanted), traced_state=graph)
        if differentiable:
            refuse_gradients(problem, self.solver)
        guess = read_guess(problem, initial_guess)
        # what was built works in memory of its own
        with self._alone:
            result = self.solver.solve(problem, guess, progress=progress)
        if differentiable:
            result = with_gradients(problem, result, shared=self.shared_parameters)
        return _finished(make_solution(problem, result), strict)


def prepare(
    problem: OCP | StagedOCP,
    solver: str | Solver = "ddp",
    *,
    steps: Any = 100,
    integrator: str = "rk4",
    max_iterations: int | None = None,
    tolerance: float | None = None,
    shared_parameters: bool = False,
    **options: Any,
) -> Prepared:
    """Check, lower and compile a problem once, to solve it many times from other states and with other data.

    "indirect" and "shooting" work off the problems of a batch one by one: what is built once serves them all, unless
    the functions hold data of each or their bounds differ, and then it is built at each solve.

    Args:
        problem: as for ``solve``.
        solver: as for ``solve``.
        steps: as for ``solve``.
        integrator: as for ``solve``.
        max_iterations: as for ``solve``.
        tolerance: as for ``solve``.
        shared_parameters: as for ``solve``.
        **options: the solver's own.

    Raises:
        ProblemError: as for ``solve``.

    Example:
        >>> import torch
        >>> target = torch.tensor([1.0], dtype=torch.float64)
        >>> cost = lambda t, x, u: ((x - target) ** 2 + u**2).sum(-1)
        >>> problem = OCP(lambda t, x, u: u, cost, initial_state=[1.0], control_dim=1, horizon=1.0, data=(target,))
        >>> prepared = prepare(problem, steps=50)
        >>> round(float(prepared.solve([2.0]).cost), 4), round(float(prepared.solve([3.0]).cost), 4)
        (0.7616, 3.0465)
        >>> _ = target.fill_(2.0)
        >>> round(float(prepared.solve([3.0]).cost), 4)
        0.7616
    """
    chosen = make_solver(solver, _given(options, max_iterations=max_iterations, tolerance=tolerance))
    staged = read_problem(problem, steps, integrator)
    if shared_parameters:
        chosen = Shared(chosen, staged)
    began = time.perf_counter()
    prepare_it = getattr(chosen, "prepare", None)
    built = chosen if prepare_it is None else prepare_it(staged, own_guess(staged))
    build_time = time.perf_counter() - began
    return Prepared(staged, built, build_time, shared_parameters, _timed_bounds(problem, staged))


def _timed_bounds(problem: OCP | StagedOCP, staged: StagedOCP) -> tuple[Any, Tensor, Bounds] | None:
    """Control bounds that are a function of time: it, the time of the step in the middle, and what was read there."""
    lifted = staged.origin
    origin = problem if isinstance(problem, OCP) else None if lifted is None else lifted.problem
    read, k = staged.control_bounds[0], staged.steps // 2
    if origin is None or read is None or not callable(origin.control_bounds):
        return None
    row = read if read[0].ndim == 1 else (read[0][k], read[1][k])
    return origin.control_bounds, staged.times(staged.start_parameters())[k], row


def _refuse_new_bounds(function: Any, t: Tensor, read: Bounds) -> None:
    """Refuse control bounds that are a function of time and no longer what was read."""
    for side, given in zip(read, function(t), strict=True):
        if not bool((side == numbers("control_bounds", given, side.dtype, side.device)).all()):
            raise ProblemError(
                "control_bounds is no longer what it was when the problem was prepared: a tensor or number that the "
                "function captures has changed, but bounds are read once; expected constant ones: prepare again, or "
                "write bounds that change as a path_constraint with that tensor in data=(..)"
            )


def _given(options: dict[str, Any], **common: Any) -> dict[str, Any]:
    """The options that were given, those that most solvers have among them."""
    return {**options, **{name: value for name, value in common.items() if value is not None}}


def _finished(solution: Solution, strict: bool) -> Solution:
    """The solution, unless it had to converge and did not."""
    if strict and not bool(solution.converged.all()):
        raise ConvergenceError(_unfinished(solution), solution)
    return solution


def _unfinished(solution: Solution) -> str:
    """Which problems did not converge, and why the first did not."""
    cure = "pass strict=False to look at the result, or read it from this error's .solution"
    if isinstance(solution.status, str):
        return f"not converged: {solution.status}; {cure}"
    rows = (~solution.converged).reshape(-1).nonzero()[:, 0].tolist()
    indices = [tuple(row) for row in (~solution.converged).nonzero().tolist()]
    named = listed([str(index[0] if len(index) == 1 else index) for index in indices]).replace("'", "")
    return f"not converged: {len(rows)} of {len(solution.status)}, problems {named}: {solution.status[rows[0]]}; {cure}"


def read_problem(problem: Any, steps: Any, integrator: str) -> StagedOCP:
    """The discrete problem behind what the caller gave.

    Raises:
        ProblemError: no problem; the message says how to come by one.
    """
    can_differentiate()
    if isinstance(problem, StagedOCP):
        return problem
    if isinstance(problem, OCP):
        return (transcribe_equal if is_whole(steps) else transcribe)(problem, steps, integrator)
    came, cure = (
        f"of type {type(problem).__name__}",
        "use oc.OCP(dynamics, running_cost, ..), oc.StagedOCP or oc.from_module",
    )
    if isinstance(problem, str):
        came, cure = f"the name {problem!r}", f"take it from the library, oc.problems.get({problem!r}).build()"
    elif callable(getattr(problem, "build", None)):
        came, cure = f"the record of {getattr(problem, 'name', problem)!r}", "call its build() and pass what it returns"
    raise ProblemError(f"problem is {came}; expected an oc.OCP or oc.StagedOCP: {cure}")


def make_solution(problem: StagedOCP, result: Result) -> Solution:
    """What a solver found, in the shapes of a Solution."""
    p, cost, lifted = result.parameters, result.cost, problem.origin
    own, end = (p, problem.times(p)[-1]) if lifted is None else lifted.split(p)
    same = len({group.stage.control_dim for group in problem.groups}) == 1
    shaped = {
        "states": behind(result.states),
        "controls": behind(result.controls),
        "parameters": own,
        "costates": None if result.costates is None else behind(result.costates),
        "gains": None if result.gains is None else Gains(behind(result.gains[0]), behind(result.gains[1], tail=2)),
        "multipliers": result.multipliers
        and {
            name: value if name == "terminal_constraint" else value.movedim(0, -2)
            for name, value in result.multipliers.items()
        },
    }
    return Solution(
        **{**result._asdict(), **shaped},
        times=problem.times(p).expand(*cost.shape, -1),
        horizon=end.expand(cost.shape),
        control_bounds=_bounds(problem) if same else None,
        state_names=problem.state_names,
        control_names=problem.control_names,
        problem=problem,
    )


def _bounds(problem: StagedOCP) -> Bounds | None:
    """The control bounds, with a row for each step where they vary, and for each problem where they differ."""
    first = problem.control_bounds[0]
    if first is None or (first[0].ndim == 1 and all(pair is first for pair in problem.control_bounds)):
        return first
    whole = Widened(problem).control_bounds
    return whole and (whole[0].movedim(0, -2), whole[1].movedim(0, -2))


def make_solver(solver: str | Solver, options: dict[str, Any]) -> Solver:
    """A solver object from a name and its options; an object is taken as it is."""
    if not isinstance(solver, str):
        if isinstance(solver, type):
            raise ProblemError(f"solver is the class {solver.__name__}; expected an object: write {solver.__name__}()")
        if not isinstance(solver, Solver):
            raise ProblemError(
                f"solver is {type(solver).__name__}; expected a name ({', '.join(_SOLVERS)}) or a solver object "
                "such as oc.solvers.DDP()"
            )
        if options:
            raise ProblemError(
                f"options {', '.join(options)} came beside a solver object; expected them in its constructor"
            )
        return solver
    if solver not in _SOLVERS:
        raise ProblemError(
            f"solver {solver!r} is unknown; expected one of {', '.join(_SOLVERS)}{nearest(solver, _SOLVERS)}"
        )
    module, name = _SOLVERS[solver]
    kind = getattr(import_module(module), name)
    known = [f.name for f in fields(kind)]
    for option in options:
        if option not in known:
            offer = nearest(option, known)
            raise ProblemError(f"solver {solver!r} has no option {option!r}; expected one of {', '.join(known)}{offer}")
    made: Solver = kind(**options)
    return made
