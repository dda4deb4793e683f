"""A planar quadrotor follows a moving reference by model predictive control, pushed about by gusts of wind.

    python examples/mpc_quadrotor.py [PICTURE]

The clock is a tensor named in ``data``: the problem is lowered once, and each solve reads where the reference is now.
"""

import math
import sys

import torch
from torch import Tensor

import ocnopt as oc

torch.set_num_threads(1)
LEMNISCATE, HOVER = (2.0, 1.0), 9.81 / 2
clock = torch.zeros((), dtype=torch.float64)


def reference(t: Tensor) -> Tensor:
    """Where to be at time t: (y, z) on a figure of eight, once around in 2 pi seconds."""
    return torch.stack([LEMNISCATE[0] * torch.sin(t), LEMNISCATE[1] * torch.sin(2 * t)], dim=-1)


def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """x = (y, z, tilt, and their rates) in metres, radians, seconds; u = both thrusts per mass in m/s^2."""
    tilt, lift = x[..., 2], u.sum(-1)
    turn = 12 * (u[..., 1] - u[..., 0])
    rates = torch.stack([-lift * torch.sin(tilt), lift * torch.cos(tilt) - 9.81, turn], dim=-1)
    return torch.cat([x[..., 3:], rates], dim=-1)


def running_cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
    error = x[..., :2] - reference(clock + t)
    return 10 * (error**2).sum(-1) + 0.01 * (x[..., 3:] ** 2).sum(-1) + 0.01 * ((u - HOVER) ** 2).sum(-1)


def gust(t: Tensor, x: Tensor) -> Tensor:
    """A push sideways of 0.8 m/s every two seconds."""
    return torch.tensor([0, 0, 0, 0.8 if math.isclose(float(t) % 2, 1, abs_tol=0.02) else 0, 0, 0])


problem = oc.OCP(
    dynamics,
    running_cost,
    initial_state=[0.0] * 6,
    control_dim=2,
    horizon=1.2,
    control_bounds=(0.0, 12.0),
    data=(clock,),
    initial_guess={"controls": torch.full((30, 2), HOVER)},
)

if __name__ == "__main__":
    mpc = oc.MPC(oc.prepare(problem, steps=30), update=clock.fill_)
    loop = mpc.simulate([0.0] * 6, steps=200, disturbance=gust)
    errors = (loop.states[..., :2] - reference(loop.times)).norm(dim=-1)[50:]
    milliseconds = 1e3 * loop.solve_times
    print(loop.status)
    print(f"solve: median {float(milliseconds.median()):.1f} ms, longest {float(milliseconds.max()):.1f} ms")
    print(f"distance to the reference: mean {float(errors.mean()):.3f} m, largest {float(errors.max()):.3f} m")
    if len(sys.argv) > 1:
        loop.plot(sys.argv[1])
