"""A rocket of two stages as one problem of several phases: climb on the first stage, drop it, reach an orbit's speed.

    python examples/two_stage_rocket.py

Each phase has its own dynamics and its own length, which is free: the durations are static parameters p, and a step of
phase i takes p_i / steps. Where the phases meet, the state jumps: the empty first stage is left behind. State (height,
speed, mass), control thrust, in units of a scaled vertical rocket (gravity 1, first mass 1).
"""

from collections.abc import Callable

import torch
from torch import Tensor

import ocnopt as oc

STEPS, DRY, FIRST_FUEL = 20, 0.2, 0.3
EXHAUST, THRUST = (0.9, 1.4), (2.2, 1.2)


def flight(exhaust: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Rates of a phase with that exhaust speed."""

    def rates(x: Tensor, u: Tensor) -> Tensor:
        height, speed, mass = x[..., 0], x[..., 1], x[..., 2]
        drag = 0.1 * speed * speed.abs() * torch.exp(-5 * height)
        return torch.stack([speed, (u[..., 0] - drag) / mass - 1 / (1 + height) ** 2, -u[..., 0] / exhaust], dim=-1)

    return rates


def stage(phase: int, last: bool) -> oc.Stage:
    """One step of a phase; the last of the first phase drops the empty stage."""
    rates = flight(EXHAUST[phase])

    def dynamics(k: int, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        h = p[..., phase : phase + 1] / STEPS
        middle = x + 0.5 * h * rates(x, u)
        after = x + h * rates(middle, u)
        return after - torch.tensor([0.0, 0.0, DRY], dtype=x.dtype) if last else after

    return oc.Stage(dynamics, lambda k, x, u, p: 1e-4 * (u**2).sum(-1), control_dim=1)


def burnt(x: Tensor, p: Tensor) -> Tensor:
    """Fuel used: what is to be least."""
    return 1 - DRY - x[..., 2]


def orbit(x: Tensor, p: Tensor) -> Tensor:
    """Height and speed at the end."""
    return x[..., :2] - torch.tensor([0.25, 0.35], dtype=x.dtype)


def limits(k: int, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Thrust of the phase; behind the drop, that the first stage was empty."""
    left = x[..., 2] - (1 - FIRST_FUEL - DRY) if k == STEPS else torch.full_like(x[..., 2], -1.0)
    return torch.stack([u[..., 0] - THRUST[min(k // STEPS, 1)], left], dim=-1)


steps = [stage(phase, phase == 0 and k == STEPS - 1) for phase in (0, 1) for k in range(STEPS)]
problem = oc.StagedOCP(
    steps,
    burnt,
    initial_state=[0.0, 0.0, 1.0],
    parameters=[0.3, 0.3],
    parameter_bounds=(0.1, 1.0),
    control_bounds=(0.0, 2.2),
    path_constraint=limits,
    terminal_constraint=orbit,
    initial_guess={"controls": torch.full((2 * STEPS, 1), 1.0)},
)

if __name__ == "__main__":
    solution = oc.solve(problem, "casadi")
    first, second = solution.parameters.tolist()
    height, speed, mass = solution.states[STEPS].tolist()
    print(solution.status)
    print(f"first stage burns for {first:.4f}, second for {second:.4f}")
    fuel = float(burnt(solution.states[-1], solution.parameters))
    print(f"dropped at height {height:.4f} and speed {speed:.4f}; fuel used {fuel:.5f}")
