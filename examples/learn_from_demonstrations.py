"""Learn a pendulum's mass and the weights of its cost from demonstrations: torch.optim around the solver.

An expert brings pendulums to rest with a weak motor. We see angles, rates and torques, and know neither the mass nor
what the expert minimises. Every evaluation solves all demonstrations anew and differentiates their solutions.
"""

import torch
from torch import Tensor

import ocnopt as oc

starts = [[1.0, 0.0], [-0.6, 1.5], [0.3, -1.0], [2.0, 0.5]]


def pendulum(logs: Tensor) -> oc.OCP:
    """The logarithms are of the mass, the weight of the angle, and the weight of its rate."""

    def dynamics(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
        return torch.stack([x[..., 1], u[..., 0] / logs[0].exp() - 2 * torch.sin(x[..., 0])], dim=-1)

    def cost(t: Tensor, x: Tensor, u: Tensor) -> Tensor:
        return logs[1].exp() * x[..., 0] ** 2 + logs[2].exp() * x[..., 1] ** 2 + 0.5 * u[..., 0] ** 2

    bounds = (-1.5, 1.5)
    return oc.OCP(dynamics, cost, initial_state=starts, control_dim=1, horizon=3.0, control_bounds=bounds, data=(logs,))


def main() -> None:
    expert = oc.solve(pendulum(torch.tensor([1.4, 3.0, 0.5], dtype=torch.float64).log()), steps=20)
    held = int((expert.controls.abs() == 1.5).sum())
    print(f"{held} of {expert.controls.numel()} torques of the expert are at a bound")

    logs = torch.tensor([0.8, 1.0, 1.0], dtype=torch.float64).log().requires_grad_()
    learner = oc.prepare(pendulum(logs), steps=20)
    optimizer = torch.optim.LBFGS([logs], max_iter=25, line_search_fn="strong_wolfe")
    losses = []

    def imitate() -> Tensor:
        optimizer.zero_grad()
        solution = learner.solve(differentiable=True)
        loss = (solution.states - expert.states).square().mean() + (solution.controls - expert.controls).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(imitate)
    mass, angle, rate = logs.exp().tolist()
    print(f"imitation loss from {losses[0]:.1e} to {min(losses):.1e} in {len(losses)} evaluations")
    print(f"mass {mass:.5f} (1.4), weights {angle:.5f} (3) and {rate:.5f} (0.5)")


if __name__ == "__main__":
    main()
