"""``solve``: a problem and a solver's name in, a :class:`Solution` out. Thin: read, transcribe, delegate."""

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.checks import can_differentiate, clipped, float_tensor, listed, nearest, shape
from ocnopt.errors import ConvergenceError, ProblemError
from ocnopt.ocp import OCP
from ocnopt.paths import behind, rollout
from ocnopt.solvers.solution import Gains, Guess, Result, Solution, perturbed
from ocnopt.staged import StagedOCP, transcribe

_KEYS = ("controls", "states", "parameters", "horizon")
_SOLVERS = {"ddp": ("ocnopt.solvers.ddp", "DDP"), "casadi": ("ocnopt.solvers.direct.casadi_solver", "CasADi")}


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
    steps: int = 100,
    integrator: str = "rk4",
    initial_guess: Any = None,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    strict: bool = False,
    progress: bool = False,
    **options: Any,
) -> Solution:
    """Solve an optimal-control problem; a leading batch shape means independent problems.

    Args:
        problem: continuous, or discrete (then ``steps`` and ``integrator`` are not used).
        solver: "ddp", "casadi", or a solver object.
        steps: N equal steps with one constant control each.
        integrator: "euler", "midpoint", "rk4", ...
        initial_guess: controls ``(..., N, m)``, a mapping with any of controls, states, parameters, horizon, or a
            Solution.
        max_iterations: of the solver; its own default if None.
        tolerance: of the solver; its own default if None.
        strict: raise instead of returning what did not converge.
        progress: show the iterations.
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
    given = {"max_iterations": max_iterations, "tolerance": tolerance}
    chosen = make_solver(solver, {**options, **{key: value for key, value in given.items() if value is not None}})
    staged = read_problem(problem, steps, integrator)
    solution = make_solution(staged, chosen.solve(staged, read_guess(staged, initial_guess), progress=progress))
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


def read_problem(problem: Any, steps: int, integrator: str) -> StagedOCP:
    """The discrete problem behind what the caller gave.

    Raises:
        ProblemError: no problem; the message says how to come by one.
    """
    can_differentiate()
    if isinstance(problem, StagedOCP):
        return problem
    if isinstance(problem, OCP):
        return transcribe(problem, steps, integrator)
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
    own, end = (p, cost.new_tensor(float(problem.steps))) if lifted is None else lifted.split(p)
    same = len({group.stage.control_dim for group in problem.groups}) == 1
    shaped = {
        "states": behind(result.states),
        "controls": behind(result.controls),
        "parameters": own,
        "costates": None if result.costates is None else behind(result.costates),
        "gains": None if result.gains is None else Gains(behind(result.gains[0]), behind(result.gains[1], tail=2)),
    }
    return Solution(
        **{**result._asdict(), **shaped},
        times=problem.times(p).expand(*cost.shape, -1),
        horizon=end.expand(cost.shape),
        control_bounds=problem.control_bounds[0] if same else None,
        problem=problem,
    )


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


def read_guess(problem: StagedOCP, given: Any) -> Guess:
    """The start of every solver: what the caller gave, else the problem's own, else zero controls clipped to bounds.

    Controls that nobody gave are zero; where the gradient is zero there, they are perturbed (seeded) with a warning,
    since every solver would stop. A start with controls or states is taken as it is, so that an optimum stays one.

    Raises:
        ProblemError: unknown keys, wrong shapes, or non-finite numbers.
    """
    own = problem.initial_guess if given is None else given
    if callable(own):
        own = own(problem.steps)
    if own is None:
        return _leave_stationary_point(problem, default_guess(problem))
    mapping = _as_mapping(problem, own)
    guess = _from_mapping(problem, mapping)
    chosen = mapping.get("controls") is not None or mapping.get("states") is not None
    return guess if chosen else _leave_stationary_point(problem, guess)


def default_guess(problem: StagedOCP) -> Guess:
    """Zero controls clipped to the bounds, and the problem's parameters."""
    controls = []
    for group, bounds in zip(problem.groups, problem.control_bounds, strict=True):
        u = problem.initial_state.new_zeros((*problem.batch_shape, group.stage.control_dim))
        controls += [clipped(u, bounds)] * (group.stop - group.start)
    return Guess(controls, problem.start_parameters())


def _as_mapping(problem: StagedOCP, given: Any) -> Mapping[str, Any]:
    if isinstance(given, Solution):
        # every Solution has an end time; it is a guess only where the end time is free
        keys = _KEYS if _has_free_end(problem) else _KEYS[:-1]
        return {key: getattr(given, key) for key in keys}
    if isinstance(given, Mapping):
        for key in given:
            if key not in _KEYS:
                offer = nearest(str(key), _KEYS)
                raise ProblemError(f"initial_guess has the key {key!r}; expected any of {', '.join(_KEYS)}{offer}")
        return given
    return {"controls": given}


def _from_mapping(problem: StagedOCP, given: Mapping[str, Any]) -> Guess:
    start = default_guess(problem)
    controls, states = start.controls, None
    if given.get("controls") is not None:
        controls = _series("controls", given["controls"], [tuple(u.shape) for u in start.controls], problem)
        controls = [clipped(u, b) for u, b in zip(controls, problem.step_bounds, strict=True)]
    if given.get("states") is not None:
        with torch.no_grad():
            sizes = [tuple(x.shape) for x in rollout(problem, controls, problem.initial_state).states]
        states = _series("states", given["states"], sizes, problem)
        states[0] = problem.initial_state
    return Guess(controls, _parameters(problem, given), states)


def _series(name: str, value: Any, sizes: list[tuple[int, ...]], problem: StagedOCP) -> list[Tensor]:
    """Read ``(..., length, size)``, or one tensor a step, as a list over time; a leading batch may be left out."""
    name, unit = f"initial_guess {name}", "step" if name == "controls" else "node"
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        rows = [float_tensor(name, row, problem.dtype, problem.device) for row in value]
        came = f"{len(rows)} rows of sizes {sorted({row.shape[-1:].numel() for row in rows})}"
        wanted = f"{len(sizes)} rows of sizes {sorted({size[-1] for size in sizes})}"
    else:
        tensor = float_tensor(name, value, problem.dtype, problem.device)
        rows = list(tensor.unbind(-2)) if tensor.ndim > 1 else []
        came, wanted = f"shape {shape(tensor)}", f"(..., {len(sizes)}, {sizes[0][-1]})"
    if len(rows) != len(sizes) or any(row.shape[-1:] != size[-1:] for row, size in zip(rows, sizes, strict=True)):
        raise ProblemError(f"{name} has {came}; expected {wanted}: one row per {unit}")
    return [_expanded(name, row, size).clone() for row, size in zip(rows, sizes, strict=True)]


def _expanded(name: str, value: Tensor, size: tuple[int, ...]) -> Tensor:
    """The value for each problem of the batch."""
    try:
        return value.expand(size)
    except RuntimeError as error:
        raise ProblemError(
            f"{name} has batch shape {tuple(value.shape[:-1])}; expected {size[:-1]}, or none: one start for all"
        ) from error


def _has_free_end(problem: StagedOCP) -> bool:
    return problem.origin is not None and problem.origin.free


def _parameters(problem: StagedOCP, given: Mapping[str, Any]) -> Tensor:
    free = _has_free_end(problem)
    if not free and given.get("horizon") is not None:
        fixed = "is fixed" if problem.origin is not None else "is its number of steps"
        raise ProblemError(
            f"initial_guess has a horizon, but the problem's end time {fixed}; expected none: leave it out, or free "
            "the end time with oc.FreeHorizon(initial, lower, upper)"
        )
    p = problem.start_parameters()
    parts = {"parameters": p[..., :-1], "horizon": p[..., -1:]} if free else {"parameters": p}
    for name, part in parts.items():
        if given.get(name) is None:
            continue
        if part.shape[-1] == 0 and torch.as_tensor(given[name]).numel() > 0:
            raise ProblemError(
                "initial_guess has parameters, but the problem has none; expected none: leave them out, or give the "
                "problem parameters="
            )
        value = float_tensor(f"initial_guess {name}", given[name], problem.dtype, problem.device)
        value = value[..., None] if name == "horizon" else value
        if value.shape[-1:] != part.shape[-1:]:
            raise ProblemError(f"initial_guess {name} has shape {shape(value)}; expected (..., {part.shape[-1]})")
        parts[name] = _expanded(f"initial_guess {name}", value, tuple(part.shape))
    return clipped(torch.cat(list(parts.values()), dim=-1), problem.parameter_bounds)


def _leave_stationary_point(problem: StagedOCP, guess: Guess) -> Guess:
    """Perturb problems whose cost has a zero gradient at zero controls; constraints are left to their solver."""
    constrained = problem.terminal_constraint is not None or problem.path_constraint is not None
    if constrained or sum(u.shape[-1] for u in guess.controls) == 0:
        return guess
    controls = [u.clone().requires_grad_() for u in guess.controls]
    p = guess.parameters.clone().requires_grad_()
    with torch.enable_grad():
        cost = rollout(problem, controls, problem.initial_state, p).cost
        total = cost.sum()
    size = torch.zeros_like(cost)
    if cost.requires_grad:
        gradients = torch.autograd.grad(total, [*controls, p], allow_unused=True, materialize_grads=True)
        size = sum((gradient.abs().sum(-1) for gradient in gradients), size)
    still = torch.isfinite(cost) & (size <= 1e-12 * (1 + cost.detach().abs()))
    if not bool(still.any()):
        return guess
    which = "" if not problem.batch_shape else f" in {int(still.sum())} of {still.numel()} problems"
    warnings.warn(
        f"the start (zero controls) is a stationary point{which}: its gradient is zero and no solver would "
        "move; a seeded perturbation is used instead. Pass initial_guess= to choose the start",
        stacklevel=4,
    )
    generator = torch.Generator().manual_seed(0)
    pairs = zip(guess.controls, problem.step_bounds, strict=True)
    moved = [torch.where(still[..., None], perturbed(u, 0.1, b, generator), u) for u, b in pairs]
    return replace(guess, controls=moved)
