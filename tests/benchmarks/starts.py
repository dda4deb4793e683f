"""DDP from the starts that the reference solutions name, and from random ones: where it ends, and whether IPOPT stays.

A random start is white noise on the controls, rolled out. All starts of a problem are one batch.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ocnopt as oc

# problem, N, standard deviation of the controls
CASES: list[tuple[str, int, float]] = [
    ("double_integrator_min_energy", 50, 1.0),
    ("discrete_lqr_double_integrator", 50, 1.0),
    ("pendulum_swing_up", 100, 3.0),
    ("pendulum_swing_up", 500, 3.0),
    ("pendulum_swing_up_u5", 100, 3.0),
    ("pendulum_swing_up_u5", 500, 3.0),
    ("cartpole_swing_up_soft", 100, 3.0),
    ("cartpole_swing_up_soft", 500, 3.0),
    ("car_parking_tassa", 100, 1.0),
    ("car_parking_tassa", 500, 1.0),
]
# with 100 steps the car's answer stands beside the reference's, not in the record
CAR_100 = 4.3564366222
# IPOPT is to look at the point itself: its usual first barrier would push it away from the bounds
STAY = {"mu_init": 1e-9, "bound_push": 1e-9, "bound_frac": 1e-9}


# problem, N, start, cost in reference-solutions.json, running cost integrated by the stages ("rk4")
NAMED: list[tuple[str, int, str, float]] = [
    ("pendulum_swing_up", 100, "own", 2.8280299143),
    ("pendulum_swing_up", 500, "own", 2.8278410532),
    ("pendulum_swing_up_u5", 100, "own", 4.7970766764),
    ("pendulum_swing_up_u5", 500, "own", 4.7962058561),
    ("cartpole_swing_up_soft", 100, "line", 2.6313393299),
    ("cartpole_swing_up_soft", 500, "line", 2.6278533266),
    ("cartpole_swing_up_soft", 100, "push", 3.87853097),
    ("cartpole_swing_up_soft", 500, "push", 3.87493651),
    ("car_parking_tassa", 100, "own", CAR_100),
    ("car_parking_tassa", 500, "own", 1.4361004746),
]
# the same with N = 100 and the running cost times h at the left node
LEFT: list[tuple[str, str, float]] = [
    ("pendulum_swing_up", "own", 2.8688890144),
    ("pendulum_swing_up_u5", "own", 4.8375041858),
    ("cartpole_swing_up_soft", "push", 3.91917985),
]


def named_start(name: str, steps: int, start: str) -> Any:
    """The library's own start, or those that the reference names for the cart-pole: a line over all of it, a push."""
    if start == "push":
        return torch.full((steps, 1), 0.1, dtype=torch.float64)
    if start == "own":
        return oc.problems.control(name).initial_guess
    states = torch.zeros(steps + 1, 4, dtype=torch.float64)
    states[:, 1] = torch.linspace(0, math.pi, steps + 1, dtype=torch.float64)
    return {"states": states, "controls": torch.zeros(steps, 1, dtype=torch.float64)}


def with_cost_at_the_left(problem: oc.OCP, steps: int) -> oc.StagedOCP:
    """The discrete problem by steps of RK4, its running cost h l(x_k, u_k)."""
    h = problem.horizon.t1 / steps

    def step(k: Any, x: Tensor, u: Tensor) -> Tensor:
        t = h * torch.as_tensor(k, dtype=x.dtype)
        k1 = problem.dynamics(t, x, u)
        k2 = problem.dynamics(t, x + h / 2 * k1, u)
        k3 = problem.dynamics(t, x + h / 2 * k2, u)
        k4 = problem.dynamics(t, x + h * k3, u)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def cost(k: Any, x: Tensor, u: Tensor) -> Tensor:
        return h * problem.running_cost(h * torch.as_tensor(k, dtype=x.dtype), x, u)

    return oc.StagedOCP(
        oc.Stage(step, cost, problem.control_dim),
        lambda x: problem.terminal_cost(x.new_tensor(problem.horizon.t1), x),
        steps=steps,
        initial_state=problem.initial_state,
        control_bounds=problem.control_bounds,
    )


def from_named_start(name: str, steps: int, start: str, *, left: bool = False) -> oc.Solution:
    """DDP's answer."""
    guess = named_start(name, steps, start)
    sized = {"steps": steps} if name == "car_parking_tassa" else {}
    problem = oc.problems.control(name).build(**sized)
    if left:
        problem = with_cost_at_the_left(problem, steps)
    return oc.solve(problem, steps=steps, initial_guess=guess(steps) if callable(guess) else guess)


class Ends(NamedTuple):
    """How many of the starts DDP converged from, reached the reference's cost from, or one that IPOPT confirms."""

    name: str
    steps: int
    starts: int
    converged: int
    best: int
    confirmed: int
    costs: tuple[float, ...]
    iterations: float
    wrong: tuple[str, ...]


def distinct(costs: torch.Tensor) -> tuple[float, ...]:
    """Costs that differ by more than a millionth, smallest first."""
    found: list[float] = []
    for cost in costs.sort().values.tolist():
        if not found or cost - found[-1] > 1e-6 * (1 + abs(cost)):
            found.append(cost)
    return tuple(found)


def wanted(name: str, steps: int) -> float:
    """The cost that the reference solutions name for this number of steps."""
    record = oc.problems.control(name)
    if name == "car_parking_tassa" and steps == 100:
        return CAR_100
    return record.discrete_values.get(steps, record.optimal_cost)


def random_batch(name: str, steps: int, spread: float, starts: int, seed: int = 0) -> tuple[oc.OCP, torch.Tensor]:
    """The problem as often as there are starts, and controls for each."""
    record = oc.problems.control(name)
    sized = {"steps": steps} if name == "car_parking_tassa" else {}
    state = record.build().initial_state
    generator = torch.Generator().manual_seed(seed)
    controls = spread * torch.randn(starts, steps, len(record.control_labels), generator=generator, dtype=state.dtype)
    return record.build(initial_state=state.expand(starts, -1), **sized), controls


def measure(name: str, steps: int, spread: float, starts: int = 10, seed: int = 0) -> Ends:
    """Solve from every start, then by IPOPT from where DDP ended."""
    problem, controls = random_batch(name, steps, spread, starts, seed)
    solution = oc.solve(problem, steps=steps, initial_guess=controls)
    confirming = oc.solvers.CasADi(restarts=0, ipopt=STAY)
    again = oc.solve(problem, confirming, steps=steps, initial_guess=solution)
    best = torch.isclose(solution.cost, solution.cost.new_tensor(wanted(name, steps)), rtol=1e-7, atol=0)
    stays = again.converged & torch.isclose(again.cost, solution.cost, rtol=1e-7, atol=1e-9)
    good = solution.converged & (best | stays)
    return Ends(
        name,
        steps,
        starts,
        int(solution.converged.sum()),
        int(best.sum()),
        int(good.sum()),
        distinct(solution.cost),
        float(solution.iterations.double().mean()),
        tuple(solution.status[row] for row in (~good).nonzero()[:, 0].tolist()),
    )


# problem, N, the most sweeps that it may take
FREE: list[tuple[str, int, int]] = [
    ("double_integrator_min_time", 50, 500),
    ("brachistochrone", 100, 500),
    ("goddard_rocket", 100, 500),
    ("planar_quadrotor_min_time", 100, 500),
    ("planar_quadrotor_min_time", 300, 2000),
]


def free_end(name: str, steps: int, limit: int) -> oc.Solution:
    """DDP's answer to a problem with a free end time."""
    return oc.solve(oc.problems.control(name).build(), steps=steps, max_iterations=limit)
