"""The walks that the layout must keep short: one solve, one training step, one Hessian.

At most nine files each (checks and warnings, SNOpt's lengths of steps, its list of matrices and where they lie, the
reading of a start, a state, times, bounds and names, errors and tableaus aside), and no two files that call each other
both ways.
How the lowered kernel is built is left out: it happens once, before anything is iterated, and hands the problem's step
down to the tracer, which calls it back by design.
"""

import pytest
import torch
from torch import Tensor, nn

import ocnopt as oc
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.guess import read_guess
from ocnopt.solvers.lowered.kernel import LoweredKernel
from tests.layout.walk import Walk, walk

ASIDE = (
    "ocnopt/checks.py",
    "ocnopt/problem_checks.py",
    "ocnopt/bounds.py",
    "ocnopt/names.py",
    "solvers/guess.py",
    "solvers/endings.py",
    "ocnopt/neural/checks.py",
    "ocnopt/neural/memory_checks.py",
    "ocnopt/neural/state_layout.py",  # a tuple as one tensor
    "ocnopt/neural/times.py",
    "ocnopt/neural/statistics.py",  # counts
    "ocnopt/optim/checks.py",
    "ocnopt/optim/draw_checks.py",
    "ocnopt/optim/gradient_checks.py",
    "ocnopt/optim/group_checks.py",
    "ocnopt/optim/state_checks.py",
    "ocnopt/optim/notices.py",
    "ocnopt/optim/blocks.py",  # which matrices there are, and which parameters belong to each
    "ocnopt/optim/arrangement.py",  # which of them lie side by side in memory,
    "ocnopt/optim/stack.py",  # what is asked of that memory,
    "ocnopt/optim/several.py",  # the memory,
    "ocnopt/optim/narrow.py",  # of two kinds
    "ocnopt/optim/thin.py",
    "ocnopt/optim/stacks.py",  # and the list of its parts
    "ocnopt/optim/states.py",  # running means, each in the state of its parameter
    "ocnopt/optim/bases.py",  # the algebra of a matrix, as torch.linalg is
    "ocnopt/optim/step_hooks.py",  # what torch puts around each step
    "ocnopt/optim/lengths.py",  # a guard, and one number for each matrix
    "ocnopt/errors.py",
    "ocnopt/integrate/tableaus.py",
)


def check(path: Walk) -> None:
    visited = path.visited(aside=ASIDE)
    assert len(visited) <= 9, visited
    assert path.both_ways() == ()


@pytest.mark.parametrize("name", ["torch", "lowered"])
def test_from_a_problem_to_its_feedback_gains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = oc.OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
        lambda t, x, u: 0.1 * u[..., 0] ** 2,
        lambda t, x: t + 20 * ((x[..., 0] - 1) ** 2 + x[..., 1] ** 2),
        initial_state=[0.0, 0.0],
        control_dim=1,
        control_bounds=(-3.0, 3.0),
        horizon=oc.FreeHorizon(2.0, 0.1, 10.0),
    )
    if name == "lowered":
        staged = oc.transcribe(problem, 20)
        kernel = LoweredKernel(staged, read_guess(staged, None))
        monkeypatch.setattr(DDP, "make_kernel", lambda *arguments: kernel)
    path = walk(lambda: oc.solve(problem, steps=20, kernel=name))
    assert bool(path.result.converged)
    assert path.result.gains is not None
    assert f"({name} kernel)" in path.result.status
    check(path)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_training_step_of_a_neural_ode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), oc.NeuralODE(Field()), nn.Linear(4, 2))
    inputs, targets = torch.randn(8, 3), torch.randint(0, 2, (8,))

    def train() -> float:
        optimizer = oc.SNOpt(model, lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
        return loss.item()

    path = walk(train)
    assert path.result > 0
    check(path)


# Handed down to the integrator, which calls them back by design: the field of a stretch, its steps, its norm.
HANDED_DOWN = (
    "ocnopt/differential/stretches.py::walk.<locals>",
    "ocnopt/differential/stretches.py::carry.<locals>",
    "ocnopt/differential/stretches.py::_Cutter.__call__",
    "ocnopt/differential/stretches.py::Packing",
)


def test_a_problem_to_its_hessian() -> None:
    problem = oc.OCP(
        lambda t, x, u, p: torch.stack([x[..., 1], u[..., 0] - p[..., 0] * x[..., 0]], dim=-1),
        lambda t, x, u, p: p[..., 1] * u[..., 0] ** 2,
        lambda t, x, p: t + (x**2).sum(-1),
        initial_state=[1.0, 0.0],
        control_dim=1,
        parameters=[2.0, 0.1],
        horizon=oc.FreeHorizon(1.0, 0.1, 10.0),
    )
    path = walk(lambda: oc.differentiate(problem, controls=torch.ones(3, 1), rtol=1e-4, atol=1e-4), exclude=HANDED_DOWN)
    assert path.result.pp.shape == (2, 2)
    check(path)
