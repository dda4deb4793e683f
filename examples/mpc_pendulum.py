"""A pendulum swung up and held by model predictive control, with a plant that is heavier than the model.

    python examples/mpc_pendulum.py [PICTURE]

Each plan is made one step ahead of its use (``delay=1``), as on real hardware, where a solve takes time.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import ocnopt as oc

torch.set_num_threads(1)


def dynamics(mass: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Of a pendulum of that mass: x = (angle from below, rate), u = torque."""

    def slope(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
        return torch.stack([x[..., 1], u[..., 0] / mass - 9.81 * torch.sin(x[..., 0])], dim=-1)

    return slope


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    return 4 * (1 + torch.cos(x[..., 0])) + 0.1 * x[..., 1] ** 2 + 0.01 * u[..., 0] ** 2


problem = oc.OCP(
    dynamics(1.0),
    running_cost,
    lambda t, x: 20 * (1 + torch.cos(x[..., 0])) + 2 * x[..., 1] ** 2,
    initial_state=[0.0, 0.0],
    control_dim=1,
    horizon=2.0,
    control_bounds=(-5.0, 5.0),
)


def plant(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """What 50 ms make of the real pendulum, in small steps."""
    for _ in range(100):
        x = x + 0.0005 * dynamics(1.15)(t, x, u)
    return x


mpc = oc.MPC(oc.prepare(problem, steps=40), delay=1)
loop = mpc.simulate([0.1, 0.0], steps=160, plant=plant)
angle, rate = loop.states[-1].tolist()
print(loop.status)
print(f"after {float(loop.times[-1]):.0f} s: {abs(angle):.3f} rad from below (pi is upright), {rate:.3f} rad/s")
if len(sys.argv) > 1:
    loop.plot(sys.argv[1])
