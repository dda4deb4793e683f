"""Check DDP against CasADi/IPOPT on a problem of one's own: the same torch functions serve both.

A lander comes down on the moon with little fuel and in good time: the end time T is free.
State x = (height, speed), control u = thrust per mass, between 0 and 4 m/s^2.
"""

import torch
from torch import Tensor

import ocnopt as oc


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    return torch.stack([x[..., 1], u[..., 0] - 1.62], dim=-1)


def fuel(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    return 0.1 * u[..., 0] ** 2


def touchdown(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * t + 10 * x[..., 0] ** 2 + 10 * x[..., 1] ** 2


problem = oc.OCP(
    dynamics,
    fuel,
    touchdown,
    initial_state=[20.0, -2.0],
    control_dim=1,
    horizon=oc.FreeHorizon(initial=5.0, lower=1.0, upper=30.0),
    control_bounds=(0.0, 4.0),
)


def main() -> None:
    comparison = oc.compare(problem, ("ddp", "casadi"), steps=50)
    print(comparison)
    for name, solution in comparison.solutions.items():
        print(f"{name}: {solution.status}")


if __name__ == "__main__":
    main()
