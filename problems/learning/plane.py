"""Four sets of points in the plane with two classes, and the Runge-Kutta networks that are trained on them.

The sets of Benning et al., "Deep learning as optimal control problems", arXiv 1904.05657, generated from a seed; noise
is added after labelling. r is the distance to the origin; the ring of class 0 is around r = 0.5.

    donut1d   points of a line, class 1 (a third) near 0, class 0 near r = 0.5, noise 0.1
    donut2d   points of the square, class 1 (half) near 0, class 0 near r = 0.5, noise 0.1
    squares   uniform on [-0.7, 0.7]^2, class 1 where x1 x2 > 0, noise 0.1
    spiral    two arms, half each, radius 0.1 to 1 while the angle grows from 0.1 to 2 pi, noise 0.05

Shapes: points ``(N, 2)`` and classes ``(N,)``, 0 or 1, both float64. The model puts out the probability of class 1,
``(N,)``, a logistic function of the last state; the loss is half the mean squared error.
"""

from collections.abc import Callable
from functools import partial
from math import pi
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ocnopt.checks import check_choice, check_count
from ocnopt.errors import ProblemError
from ocnopt.ocp import FreeHorizon
from ocnopt.problems.learning.networks import LAYERS as LAYERS
from ocnopt.problems.learning.networks import PlaneClassifier
from ocnopt.problems.record import LearningRecord, Picture, Task

SAMPLES, WIDTH_OF_RING = 500, 0.1


def _donut(grid: Tensor, count: int, share: float, random: Generator) -> tuple[Tensor, Tensor]:
    """Points of a grid ``(G, 2)``, a share of them class 1, drawn with the densities of the two classes."""
    r = torch.linalg.vector_norm(grid, dim=-1)
    inner = round(share * count)
    rows = [
        torch.multinomial(torch.exp(-0.5 * ((r - radius) / WIDTH_OF_RING) ** 2), size, True, generator=random)
        for radius, size in ((0.0, inner), (0.5, count - inner))
    ]
    return grid[torch.cat(rows)], _classes(inner, count - inner)


def _classes(ones: int, zeros: int) -> Tensor:
    return torch.cat([torch.ones(ones), torch.zeros(zeros)]).double()


def _donut1d(count: int, random: Generator) -> tuple[Tensor, Tensor]:
    line = torch.linspace(-1, 1, 100, dtype=torch.float64)
    return _donut(torch.stack([line, torch.zeros_like(line)], dim=-1), count, 1 / 3, random)


def _donut2d(count: int, random: Generator) -> tuple[Tensor, Tensor]:
    line = torch.linspace(-1, 1, 100, dtype=torch.float64)
    return _donut(torch.cartesian_prod(line, line), count, 1 / 2, random)


def _squares(count: int, random: Generator) -> tuple[Tensor, Tensor]:
    points = 1.4 * torch.rand(count, 2, generator=random, dtype=torch.float64) - 0.7
    return points, (points.prod(dim=-1) > 0).double()


def _spiral(count: int, random: Generator) -> tuple[Tensor, Tensor]:
    classes = _classes(count // 2, count - count // 2)
    along = torch.rand(count, generator=random, dtype=torch.float64)
    radius, angle = 0.1 + 0.9 * along, 0.1 + (2 * pi - 0.1) * along + pi * classes
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1), classes


SETS: dict[str, tuple[Callable[[int, Generator], tuple[Tensor, Tensor]], float]] = {
    "donut1d": (_donut1d, 0.1),
    "donut2d": (_donut2d, 0.1),
    "squares": (_squares, 0.1),
    "spiral": (_spiral, 0.05),
}


def points(name: str, count: int, random: Generator) -> tuple[Tensor, Tensor]:
    """Draw points ``(count, 2)`` and their classes ``(count,)``, in random order.

    Args:
        name: "donut1d", "donut2d", "squares" or "spiral".
        count: how many.
        random: where the random numbers come from.

    Raises:
        ProblemError: another name, or no positive number of points.
    """
    check_choice("name", name, tuple(SETS))
    check_count("count", count, SAMPLES)
    draw, noise = SETS[name]
    clean, classes = draw(count, random)
    noisy = clean + noise * torch.randn(count, 2, generator=random, dtype=torch.float64)
    order = torch.randperm(count, generator=random)
    return noisy[order], classes[order]


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the mean squared error, ``()``.

    Args:
        outputs: probabilities of class 1, ``(N,)``.
        targets: ``(N,)``, 0 or 1.
    """
    return 0.5 * (outputs - targets).square().mean()


def build(name: str, *, samples: int = SAMPLES, seed: int = 0) -> Task:
    """Points for training and for testing, the network and the loss.

    Args:
        name: "donut1d", "donut2d", "squares" or "spiral".
        samples: points of each part.
        seed: of the points.

    Raises:
        ProblemError: another name, or no positive number of points.
    """
    random = Generator().manual_seed(seed)
    inputs, targets = points(name, samples, random)
    test_inputs, test_targets = points(name, samples, random)

    def make_model(horizon: float | FreeHorizon = 1.0, **options: Any) -> nn.Module:
        if isinstance(horizon, FreeHorizon):
            raise ProblemError(
                f"horizon is {horizon}; expected a number: a Runge-Kutta network learns its step sizes with "
                'step="free" instead'
            )
        return PlaneClassifier(horizon=horizon, **options).double()

    return Task(
        name=name,
        train_inputs=inputs,
        train_targets=targets,
        test_inputs=test_inputs,
        test_targets=test_targets,
        make_model=make_model,
        loss=half_squared_error,
        split=f"{samples} train, {samples} test, generated with seed {seed}",
        pictures=(
            Picture("prediction", "probability of class 1 over the plane, with the test points", _draw_prediction),
            Picture("layers", "the test points layer by layer", _draw_layers),
            Picture("steps", "learned step sizes over the layers", _draw_steps),
        ),
    )


def _draw_prediction(model: Any, task: Task) -> Any:
    from ocnopt.problems.learning.pictures import draw_prediction

    return draw_prediction(model, task.test_inputs, task.test_targets)


def _draw_layers(model: Any, task: Task) -> Any:
    from ocnopt.problems.learning.pictures import draw_states

    return draw_states(model, task.test_inputs, task.test_targets)


def _draw_steps(model: Any, task: Task) -> Any:
    from ocnopt.problems.learning.pictures import draw_step_sizes

    return None if model.net.step == "fixed" else draw_step_sizes({task.name: model.net.step_sizes})


SUMMARIES = {
    "donut1d": "tell the middle of a line from its ends",
    "donut2d": "tell a disc from a ring around it",
    "squares": "tell two opposite quadrants from the other two",
    "spiral": "tell two arms of a spiral apart",
}

RECORDS = tuple(
    LearningRecord(
        name=name,
        summary=f"{SUMMARIES[name]} with a Runge-Kutta network in the plane",
        build=partial(build, name),
        source="generated; Benning et al., arXiv 1904.05657",
        batch_size=SAMPLES,
        epochs=2000,
        learning_rates={"adam": 0.1},
    )
    for name in SETS
)
