"""A batch of pendulums with bounded torque against mpc.pytorch (Amos et al., "Differentiable MPC", NeurIPS 2018).

No release of its package `mpc` can be installed as it is: each asks for "numpy>=1<2", which setuptools refuses since
66. Without its requirements, which are ours, and with an older setuptools for the building alone:

    echo "setuptools<66" > old.txt
    PIP_CONSTRAINT=old.txt PIP_BUILD_CONSTRAINT=old.txt .venv/bin/python -m pip install --no-deps mpc==0.0.6

The problem suits it: as in its own pendulum the state is (cos, sin, rate), in which the costs of the library's
pendulum are quadratic, 1 - cos = ((cos - 1)^2 + sin^2) / 2, a semi-implicit Euler step, and Jacobians by hand, its
fastest way. Tolerance and line search are those of its pendulum, too. Ours is the same problem in (angle, rate).
"""

import math
from importlib.util import find_spec
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ocnopt as oc
from tests.benchmarks.batch import starts_near
from tests.benchmarks.control import COMPILED, LOWERED, Way

INSTALLED = find_spec("mpc") is not None
STEPS, STEP, TORQUE = 100, 0.04, 5.0


class Throughput(NamedTuple):
    """CPU time per problem, throughput over the peer's, iterations, and how many problems end at the peer's cost."""

    name: str
    milliseconds: float
    gain: float
    iterations: float
    same: int


def _advance(angle: Tensor, sine: Tensor, rate: Tensor, torque: Tensor) -> tuple[Tensor, Tensor]:
    rate = rate + STEP * (9.81 * sine - 0.1 * rate + torque)
    return angle + STEP * rate, rate


class Embedded(nn.Module):
    """The step of (cos, sin, rate), with its Jacobians."""

    steps = 0

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        cosine, sine, rate = x.unbind(-1)
        angle, rate = _advance(torch.atan2(sine, cosine), sine, rate, u[..., 0])
        return torch.stack([torch.cos(angle), torch.sin(angle), rate], -1)

    def grad_input(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += 1
        cosine, sine, rate = x.unbind(-1)
        angle, _ = _advance(torch.atan2(sine, cosine), sine, rate, u[..., 0])
        zero, one = torch.zeros_like(rate), torch.ones_like(rate)
        of_rate = torch.stack([zero, 9.81 * STEP * one, (1 - 0.1 * STEP) * one, STEP * one], -1)
        of_angle = torch.stack([-sine, cosine, zero, zero], -1) / (sine**2 + cosine**2)[:, None] + STEP * of_rate
        rows = [-torch.sin(angle)[:, None] * of_angle, torch.cos(angle)[:, None] * of_angle, of_rate]
        both = torch.stack(rows, -2)
        return both[..., :3], both[..., 3:]


def pendulums(starts: Tensor) -> oc.StagedOCP:
    """The same problem for ours, initial states ``(B, 2)``."""

    def dynamics(k: Tensor, x: Tensor, u: Tensor) -> Tensor:
        return torch.stack(_advance(x[..., 0], torch.sin(x[..., 0]), x[..., 1], u[..., 0]), -1)

    def cost(k: Tensor, x: Tensor, u: Tensor) -> Tensor:
        return STEP * (1 - torch.cos(x[..., 0]) + 0.1 * x[..., 1] ** 2 + 0.01 * u[..., 0] ** 2)

    return oc.StagedOCP(
        oc.Stage(dynamics, cost, control_dim=1),
        lambda x: 100 * (1 - torch.cos(x[..., 0])) + 10 * x[..., 1] ** 2,
        initial_state=starts,
        steps=STEPS,
        control_bounds=(-TORQUE, TORQUE),
        initial_guess={"controls": first_controls()},
    )


def first_controls() -> Tensor:
    """Full torque at the frequency of small oscillations."""
    return TORQUE * torch.sin(math.sqrt(9.81) * STEP * torch.arange(STEPS, dtype=torch.float64))[:, None]


def cost_of(problem: oc.StagedOCP, controls: Tensor) -> Tensor:
    """The cost of controls ``(N, B, 1)``, rolled out by our own functions."""
    stage, x, total = problem.groups[0].stage, problem.initial_state, 0.0
    for k, u in enumerate(controls):
        total, x = total + stage.cost(torch.tensor(k), x, u), stage.dynamics(torch.tensor(k), x, u)
    return total + problem.terminal_cost(x)


@torch.no_grad()
def solve_by_peer(starts: Tensor, max_iterations: int = 200) -> tuple[Tensor, int]:
    """Controls ``(N, B, 1)`` and the number of iterations; its last step is the end, whose control costs 1 and is 0."""
    from mpc.mpc import MPC, GradMethods, QuadCost

    batch, like = len(starts), {"dtype": starts.dtype}
    weights = torch.tensor([1.0, 1.0, 0.2, 0.02], **like)
    last = torch.tensor([100.0, 100.0, 20.0, 1.0], **like)
    squares = torch.cat([(STEP * weights).expand(STEPS, 4), last[None]]).diag_embed()
    linear = torch.cat([torch.tensor([-STEP, 0, 0, 0], **like).expand(STEPS, 4), -100 * torch.eye(4, **like)[:1]])
    room = torch.full((STEPS + 1, batch, 1), TORQUE, **like)
    options: dict[str, Any] = {"eps": 1e-3, "linesearch_decay": 0.2, "max_linesearch_iter": 5, "best_cost_eps": 0.0}
    solver = MPC(
        3,
        1,
        STEPS + 1,
        u_lower=-room,
        u_upper=room,
        u_init=torch.cat([first_controls(), torch.zeros(1, 1, **like)])[:, None].repeat(1, batch, 1),
        lqr_iter=max_iterations,
        grad_method=GradMethods.ANALYTIC,
        n_batch=batch,
        exit_unconverged=False,
        detach_unconverged=False,
        backprop=False,
        verbose=-1,
        **options,
    )
    cost = QuadCost(*(value[:, None].expand(-1, batch, *value.shape[1:]) for value in (squares, linear)))
    dynamics = Embedded()
    _, controls, _ = solver(torch.stack([starts[:, 0].cos(), starts[:, 0].sin(), starts[:, 1]], -1), cost, dynamics)
    return controls[:-1], dynamics.steps - 1


def measure(batch: int, ways: tuple[Way, ...] = (COMPILED, LOWERED), max_iterations: int = 200) -> list[Throughput]:
    """Ours, the peer's, ours again; kernels are built beforehand."""
    starts = starts_near("pendulum_swing_up_u5", batch)
    problem = pendulums(starts)
    built = [oc.prepare(problem, way.solver) for way in ways]

    def ours() -> list[tuple[float, oc.Solution]]:
        timed = []
        for one in built:
            began = process_time()
            solution = one.solve()
            timed.append((process_time() - began, solution))
        return timed

    before = ours()
    began = process_time()
    controls, iterations = solve_by_peer(starts, max_iterations)
    seconds = process_time() - began
    pairs = list(zip(before, ours(), strict=True))
    theirs = cost_of(problem, controls)
    found = [Throughput("mpc.pytorch", 1e3 * seconds / batch, 1.0, iterations, batch)]
    for way, ((first, solution), (second, _)) in zip(ways, pairs, strict=True):
        own = min(first, second)
        same = int(torch.isclose(solution.cost, theirs, rtol=1e-6).sum())
        mean = solution.iterations.double().mean().item()
        found.append(Throughput(way.name, 1e3 * own / batch, seconds / own, mean, same))
    return found
