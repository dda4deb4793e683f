"""Peak memory of a training iteration against the number of steps of its solve, for each way to the gradient.

The bytes are those of all tensors alive at once, weights and optimiser included, as :mod:`ocnopt.training.memory`
counts them; Runge-Kutta steps of order 4 on a batch of digit images.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ocnopt.optim.snopt import SNOpt
from ocnopt.problems import Task, learning_task
from ocnopt.solvers.plotting import finish, legend, panels, styled
from ocnopt.training.curves import plain_numbers
from ocnopt.training.measurement import Drawn, Line, Lines, Measurement, Sheet, cell, distinct, middle
from ocnopt.training.memory import PeakMemory
from ocnopt.training.ways import CONTINUOUS, DISCRETE, ODEINT, ODEINT_ADJOINT, by, parts, timed

STEPS, BATCH = (10, 20, 40, 80, 160), 128
BUDGET = 2**20
SNOPT, SNOPT_CONTINUOUS = "SNOpt, discrete", "SNOpt, continuous"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    ODEINT: (ODEINT, {}),
    ODEINT_ADJOINT: (ODEINT_ADJOINT, {}),
    "discrete, as it is": (DISCRETE, {}),
    "discrete, 1 MiB": (DISCRETE, {"checkpoint_bytes": BUDGET}),
    "discrete, 0 bytes": (DISCRETE, {"checkpoint_bytes": 0}),
    CONTINUOUS: (CONTINUOUS, {}),
    SNOPT: (DISCRETE, {}),
    SNOPT_CONTINUOUS: (CONTINUOUS, {}),
}


def measure(seed: int, quick: bool) -> Iterator[Line]:
    """The lines of one seed.

    Args:
        seed: of the weights.
        quick: two numbers of steps, and a small batch.
    """
    task = learning_task("digits_ode").build()
    batch = task.batch(0, size=16 if quick else BATCH, seed=seed)
    for steps in (2, 4) if quick else STEPS:
        iterations = {way: _iteration(task, way, steps, batch, seed) for way in WAYS}
        for way, (_, milliseconds) in timed(iterations, 1 if quick else 3).items():
            peak = _peak(task, way, steps, batch, seed)
            yield {"steps": steps, "way": way, "bytes": peak, "ms": milliseconds}


def _peak(task: Task, way: str, steps: int, batch: Any, seed: int) -> int:
    with PeakMemory() as memory:
        iterate = _iteration(task, way, steps, batch, seed)
        for _ in range(2):
            iterate()
    return memory.peak


def _iteration(task: Task, way: str, steps: int, batch: Any, seed: int) -> Callable[[], None]:
    """One iteration of training, of a model of its own."""
    kind, options = WAYS[way]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = task.make_model()
    before, ode, after = parts(made)
    model = nn.Sequential(*before, by(kind, ode.field, "rk4", steps=steps, **options), *after)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    if way in (SNOPT, SNOPT_CONTINUOUS):
        optimizer = SNOpt(model, lr=1e-3, curvature="costate", refresh_every=1)
    inputs, targets = batch

    def iterate() -> None:
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()

    return iterate


def sheets(lines: Lines) -> list[Sheet]:
    """Memory and time by way and number of steps.

    Args:
        lines: of all seeds.
    """
    steps = distinct(lines, "steps")
    head = ("way", *(f"{count} steps" for count in steps))
    found = []
    for key, title, scale, note in (("bytes", "peak memory, MB", 1e-6, _MEMORY), ("ms", "time, ms", 1.0, _TIME)):
        rows = []
        for way in distinct(lines, "way"):
            values = [middle(lines, key, way=way, steps=count) for count in steps]
            rows.append((way, *(cell(None if value is None else scale * value) for value in values)))
        found.append(Sheet(title, head, rows, note))
    return found


_MEMORY = (
    "The most bytes of tensors alive at once in an iteration of training digits_ode by rk4, batches of 128 in single "
    "precision, Adam but for SNOpt. 1 MiB, 0 bytes: checkpoint_bytes, 256 MiB as it is. SNOpt: factors of the costate, "
    "gathered in every iteration."
)
_TIME = "CPU time of such an iteration, medians."


def draw(lines: Lines) -> list[Drawn]:
    """Memory against steps.

    Args:
        lines: of all seeds.
    """
    figure, (axis,) = panels(1)
    steps = distinct(lines, "steps")
    for way, values, look in styled(
        {way: [1e-6 * (middle(lines, "bytes", way=way, steps=n) or 0) for n in steps] for way in distinct(lines, "way")}
    ):
        axis.loglog(steps, values, **look, marker="o", ms=4, label=way)
    axis.set_xticks(steps, [str(count) for count in steps])
    axis.minorticks_off()
    plain_numbers(axis.yaxis)
    finish(axis, "steps of the solve", "peak memory of an iteration (MB)")
    legend(figure, axis)
    return [Drawn("memory", figure, "Peak memory of a training iteration against the depth of its solve.")]


def says(lines: Lines) -> str:
    """What they show.

    Args:
        lines: of all seeds.
    """
    steps = distinct(lines, "steps")

    def growth(way: str) -> str:
        first, last = (middle(lines, "bytes", way=way, steps=n) or 1.0 for n in (steps[0], steps[-1]))
        return f"{last / first:.2g}"

    return (
        f"From {steps[0]} to {steps[-1]} steps the memory of back-propagation grows {growth(ODEINT)} times, of the "
        f"discrete adjoint {growth('discrete, as it is')} while its graph fits the budget, {growth('discrete, 1 MiB')} "
        f"with 1 MiB and {growth('discrete, 0 bytes')} with none, of the continuous one {growth(CONTINUOUS)}, of "
        f"SNOpt's refresh {growth(SNOPT)} by the discrete and {growth(SNOPT_CONTINUOUS)} by the continuous adjoint."
    )


MEMORY = Measurement(
    "memory",
    "peak memory of a training iteration against the number of steps, by adjoint",
    "digits_ode",
    measure,
    sheets,
    draw,
    says,
    seeds=1,
)
