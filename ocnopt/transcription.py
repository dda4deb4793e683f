"""The way from continuous to discrete time: N steps of a Runge-Kutta method, each with one constant control."""

from torch import Tensor

from ocnopt import checks
from ocnopt.integrate.runge_kutta import combine, stages
from ocnopt.integrate.tableaus import get_tableau
from ocnopt.ocp import OCP, Function, lift
from ocnopt.staged import Index, Stage, StagedOCP


def transcribe(problem: OCP, steps: int, integrator: str = "rk4") -> StagedOCP:
    """Cut a continuous problem into N equal steps, each with one constant control.

    The integrator's stages integrate the running cost along with the state.

    Args:
        problem: the continuous problem; a free T becomes the last static control.
        steps: N.
        integrator: "euler", "midpoint", "rk4", or any tableau of :mod:`ocnopt.integrate.tableaus`.

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
        seen = stages(tableau, lifted.field(u, p), time(k, x), h, x)
        if problem.running_cost is None:
            return combine(x, h, tableau.b, seen.slopes), x.new_zeros(x.shape[:-1])
        used = [i for i, b in enumerate(tableau.b) if b != 0.0]
        costs = [lifted.running_cost(seen.times[i], seen.points[i], u, p) for i in used]
        zero = x.new_zeros(x.shape[:-1])
        return combine(x, h, tableau.b, seen.slopes), combine(zero, h, [tableau.b[i] for i in used], costs)

    has_parameters = lifted.parameter_dim > 0
    along = problem.path_constraint and (lambda k, x, u, p: lifted.path_constraint(time(k, x), x, u, p))
    return StagedOCP(
        Stage(None, None, problem.control_dim, joint),
        problem.terminal_cost and _arity(lifted.terminal_cost, has_parameters),
        initial_state=problem.initial_state,
        steps=steps,
        parameters=lifted.parameters if has_parameters else None,
        control_bounds=problem.control_bounds,
        parameter_bounds=lifted.parameter_bounds,
        path_constraint=along and _arity(along, has_parameters),
        terminal_constraint=problem.terminal_constraint and _arity(lifted.terminal_constraint, has_parameters),
        data=problem.data,
        initial_guess=problem.initial_guess,
        dtype=problem.dtype,
        origin=lifted,
    )


def _arity(function: Function, has_parameters: bool) -> Function:
    """A lifted function as a StagedOCP has it: p is an argument only where the problem has one."""
    if has_parameters:
        return function
    return lambda *arguments: function(*arguments, arguments[-1].new_zeros(0))
