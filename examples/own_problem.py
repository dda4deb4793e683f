"""Define an optimal-control problem, solve it, and steer through gusts with the feedback policy that comes out.

A boat crosses a river that is 20 m wide and fastest in its middle, and docks right opposite.
State x = (along, across, heading, speed), control u = (turn rate, thrust), both bounded.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import ocnopt as oc


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    across, heading, speed = x[..., 1], x[..., 2], x[..., 3]
    current = 1.2 * torch.exp(-(((across - 10) / 5) ** 2))
    along_slope = speed * torch.cos(heading) + current
    across_slope = speed * torch.sin(heading)
    return torch.stack([along_slope, across_slope, u[..., 0], u[..., 1] - 0.2 * speed], dim=-1)


def effort(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    return 0.5 * u[..., 0] ** 2 + 0.2 * u[..., 1] ** 2


def miss(t: Tensor, x: Tensor) -> Tensor:
    return 10 * x[..., 0] ** 2 + 10 * (x[..., 1] - 20) ** 2 + 10 * x[..., 3] ** 2


problem = oc.OCP(
    dynamics,
    effort,
    miss,
    initial_state=[0.0, 0.0, 1.5708, 0.0],
    control_dim=2,
    horizon=15.0,
    control_bounds=([-0.5, -1.0], [0.5, 0.5]),
)


def main() -> None:
    solution = oc.solve(problem, "ddp", steps=75)
    print(f"planned: cost {float(solution.cost):.4f} after {int(solution.iterations)} iterations, {solution.status}")

    def gusts(seed: int) -> Callable[[Tensor, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(seed)
        strength = torch.tensor([0.05, 0.05, 0.05, 0.0], dtype=torch.float64)
        return lambda t, x: strength * torch.randn(4, generator=generator, dtype=torch.float64)

    for name, plan in (("with feedback", solution), ("open loop", replace(solution, gains=None))):
        sailed = plan.rollout(problem.initial_state, disturbance=gusts(seed=0))
        along, across = sailed.states[-1, :2].tolist()
        print(f"{name:13} through gusts: ends at ({along:.2f}, {across:.2f}) m, cost {float(sailed.cost):.2f}")


if __name__ == "__main__":
    main()
