"""The first example of the README: a pendulum too weak to lift itself swings up, by DDP and by CasADi."""

import torch

import ocnopt as oc

dynamics = lambda t, x, u: torch.stack([x[..., 1], torch.sin(x[..., 0]) + u[..., 0]], dim=-1)
effort = lambda t, x, u: 1 - torch.cos(x[..., 0]) + 0.1 * u[..., 0] ** 2
miss = lambda t, x: 20 * (1 - torch.cos(x[..., 0])) + 10 * x[..., 1] ** 2  # x = (angle from upright, its rate)
problem = oc.OCP(
    dynamics, effort, miss, initial_state=[2.5, 0.0], control_dim=1, horizon=8.0, control_bounds=(-0.6, 0.6)
)
solution = oc.solve(problem)  # states, controls, feedback gains, and a sentence on how it went
print(solution.status)
solution.plot("pendulum.png")
print(oc.compare(problem))  # the same functions, solved by CasADi and IPOPT
