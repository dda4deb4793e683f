"""One iteration of SNOpt against one of Adam, and how many iterations DDP takes beside IPOPT.

SNOpt and Adam: same weights, same batches, so equal evaluations, stepped in turn. DDP and IPOPT: the same problem from
the same start, every sweep counted, whether its step was accepted or not.
"""

from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ocnopt as oc
from ocnopt.optim.states import FIRST
from ocnopt.problems import Task, learning_task
from tests.benchmarks import starts as random_starts
from tests.benchmarks.workload import adam, batches, snopt

REFRESH_EVERY = 5


class Net(NamedTuple):
    """A learning problem, perhaps with another model, and the ratios that SNOpt should keep to."""

    problem: str
    make_model: Callable[[], nn.Module] | None
    ordinary: float
    refresh: float


def plain(width: int = 512) -> nn.Module:
    """A wide network without a Neural ODE on the digits."""
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


NETS = {
    "img": Net("digits", None, 1.03, 1.5),
    "mlp": Net("digits_ode", None, 1.1, 1.5),
    "plain, 512 wide": Net("digits", plain, 1.3, 1.5),
}


class Ratios(NamedTuple):
    """Medians over iterations of the time of SNOpt over that of Adam, and the milliseconds of Adam.

    Wide matrices of other sizes are refreshed in other iterations: ``refresh`` is of those that take longest.
    """

    ordinary: float
    refresh: float
    adam_milliseconds: float
    pairs: int


def measure(net: Net, pairs: int = 60) -> Ratios:
    """Step both in turn; every matrix is refreshed in every fifth iteration, and in some of the first ones."""
    problem = learning_task(net.problem).build()
    first, second = (_made(net, problem) for _ in range(2))
    optimizers = adam(first), snopt(second, refresh_every=REFRESH_EVERY)
    ordinary, times = list[float](), list[float]()
    refresh: dict[int, list[float]] = {}
    for k, (inputs, targets) in zip(range(pairs), batches(problem, seed=0), strict=False):
        second.load_state_dict(first.state_dict())
        before, spent = _vectors(optimizers[1]), dict[nn.Module, tuple[float, int]]()
        for model, optimizer in list(zip((first, second), optimizers, strict=True))[:: 1 if k % 2 else -1]:
            began = process_time()
            optimizer.zero_grad()
            problem.loss(model(inputs), targets).backward()
            optimizer.step()
            spent[model] = process_time() - began, _evaluations(model)
        (base, few), (time, many) = spent[first], spent[second]
        if few != many:
            raise RuntimeError("the two models took different numbers of evaluations from the same weights")
        if k > max(FIRST):
            is_refreshed = not all(map(torch.equal, before, _vectors(optimizers[1])))
            (refresh.setdefault(k % REFRESH_EVERY, []) if is_refreshed else ordinary).append(time / base)
            times.append(base)
    return Ratios(median(ordinary), max(map(median, refresh.values())), 1e3 * median(times), len(times))


def _vectors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A copy of all eigenvectors."""
    kept = ("input_vectors", "output_vectors")
    return [state[key].clone() for state in optimizer.state.values() for key in kept if key in state]


def _made(net: Net, problem: Task) -> nn.Module:
    torch.manual_seed(0)
    return problem.make_model(1.0) if net.make_model is None else net.make_model()


def _evaluations(model: nn.Module) -> int:
    """Of the last forward pass."""
    return sum(module.statistics.forward for module in model.modules() if isinstance(module, oc.NeuralODE))


# problem, N; wanted are 1.5 times IPOPT's iterations at most
SWINGS = [
    (name, steps)
    for name in ("pendulum_swing_up", "pendulum_swing_up_u5", "cartpole_swing_up_soft", "car_parking_tassa")
    for steps in (100, 500)
]
# what might take fewer: the first regularisation, and a start that satisfies the dynamics
REMEDIES = {"mu = 1e-3": {"regularisation": 1e-3}, "mu = .1": {"regularisation": 0.1}, "auto": {"curvature": "auto"}}
WANTED = 1.5


class Counts(NamedTuple):
    """Sweeps of DDP with exact curvature, and of remedies, over the iterations of IPOPT from the same start."""

    name: str
    steps: int
    sweeps: int
    ipopt: int
    same: bool
    remedies: dict[str, int]

    @property
    def ratio(self) -> float:
        """DDP's over IPOPT's."""
        return self.sweeps / self.ipopt


def sweeps(problem: oc.OCP | oc.StagedOCP, steps: int, **options: Any) -> tuple[int, oc.Solution]:
    """How many sweeps DDP takes, whether their step was accepted or not."""
    solution = oc.solve(problem, steps=steps, **options)
    return len(solution.history["cost"]) - 1, solution


def count(name: str, steps: int) -> Counts:
    """Solve one problem every way."""
    sized = {"steps": steps} if name == "car_parking_tassa" else {}
    problem = oc.problems.control(name).build(**sized)
    theirs = oc.solve(problem, "casadi", steps=steps)
    own, solution = sweeps(problem, steps, curvature="exact")
    same = bool(torch.isclose(solution.cost, theirs.cost, rtol=1e-6))
    others = {remedy: sweeps(problem, steps, **({"curvature": "exact"} | way))[0] for remedy, way in REMEDIES.items()}
    return Counts(name, steps, own, int(theirs.iterations), same, others)


# problem, N, white noise on the controls, around the library's start or around zero
SPREAD = [
    ("pendulum_swing_up", 100, 3.0, False),
    ("pendulum_swing_up_u5", 100, 3.0, False),
    ("cartpole_swing_up_soft", 100, 3.0, False),
    ("cartpole_swing_up_soft", 500, 3.0, False),
    ("car_parking_tassa", 100, 1.0, False),
    ("car_parking_tassa", 500, 0.1, True),
]


class Means(NamedTuple):
    """Sweeps with exact and with the default curvature, and IPOPT's iterations, on average over some starts."""

    exact: float
    auto: float
    ipopt: float
    same: int


def average(name: str, steps: int, noise: float, around: bool, starts: int = 10) -> Means:
    """Solve from each start alone; ``same`` counts those that led exact DDP and IPOPT to the same cost."""
    batch, controls = random_starts.random_batch(name, steps, noise, starts)
    record = oc.problems.control(name)
    problem = record.build(
        initial_state=batch.initial_state[0], **({"steps": steps} if name == "car_parking_tassa" else {})
    )
    if around:
        controls = controls + record.initial_guess(steps)["controls"]
    counts, same = [], 0
    for guess in controls:
        exact, solution = sweeps(problem, steps, curvature="exact", initial_guess=guess)
        auto, _ = sweeps(problem, steps, initial_guess=guess)
        theirs = oc.solve(problem, "casadi", steps=steps, initial_guess=guess)
        counts.append([exact, auto, int(theirs.iterations)])
        same += bool(torch.isclose(solution.cost, theirs.cost, rtol=1e-6))
    return Means(*torch.tensor(counts, dtype=torch.float64).mean(0).tolist(), same)
