"""Densities: continuous normalising flows on a table of measurements, on points in the plane and on protein structures.

Every model returns the log-probability of each row, the loss is its negative mean; targets are the rows themselves. In
training the trace is Hutchinson's estimate, with one draw an iteration; the metric ``nll`` is the exact negative
log-likelihood in nats.

    breast_cancer_flow   30 standardised measurements; scikit-learn's table, 455 train, 114 test, stratified, seed 0
    circles_flow         two circles in the plane, radii 3 and 1.5, noise 0.24; 20,000 points, the last 2,000 test
    protein_flow         9 features of protein structures, see :mod:`ocnopt.problems.learning.protein`
    miniboone_flow       43 measurements of neutrinos, see :mod:`ocnopt.problems.learning.miniboone`

Shapes: rows ``(N, D)`` float32, log-probabilities ``(N,)``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.neural.cnf import CNF, FROM_DATA_TO_BASE
from ocnopt.ocp import FreeHorizon, Horizon
from ocnopt.problems.learning import miniboone, protein, tables
from ocnopt.problems.learning.fields import Activation, Squash, TimeNet
from ocnopt.problems.record import LearningRecord, Picture, Task

HIDDEN = (64, 64)
CIRCLES, CIRCLES_TEST = 20_000, 2_000


def nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of each sample in nats, ``(B,)``.

    Args:
        outputs: log-probabilities, ``(B,)``.
        targets: not looked at.
    """
    return -outputs


def mean_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """Their mean, ``()``.

    Args:
        outputs: log-probabilities, ``(B,)``.
        targets: not looked at.
    """
    return -outputs.mean()


def make_flow(
    dimension: int,
    activation: Activation,
    horizon: float | Horizon | FreeHorizon = FROM_DATA_TO_BASE,
    **options: Any,
) -> CNF:
    """A flow of three concat-squash layers, 64 wide.

    Args:
        dimension: D.
        activation: between the layers.
        horizon: from the data to the base.
        options: of :class:`ocnopt.neural.cnf.CNF`.
    """
    return CNF(TimeNet(Squash, (dimension, *HIDDEN, dimension), activation), dimension, horizon, **options)


def density_task(name: str, train: Tensor, test: Tensor, activation: Activation, split: str) -> Task:
    """The task of a density.

    Args:
        name: of the task.
        train: ``(N, D)``.
        test: likewise.
        activation: of the flow's field.
        split: in words.
    """
    return Task(
        name=name,
        train_inputs=train,
        train_targets=train,
        test_inputs=test,
        test_targets=test,
        make_model=partial(make_flow, train.shape[1], activation),
        loss=mean_nll,
        split=split,
        metrics={"nll": nll},
        pictures=(
            Picture("samples", "Test data, samples and, in the plane, the density.", _draw_samples, as_it_trains=True),
            Picture("transport", "How the flow carries points of the base to its samples.", _draw_transport),
        ),
    )


def _draw_samples(model: Any, task: Task) -> Any:
    from ocnopt.problems.learning.views import draw_samples

    return draw_samples(model, task.test_inputs)


def _draw_transport(model: Any, task: Task) -> Any:
    from ocnopt.problems.learning.views import draw_transport

    return draw_transport(model) if task.test_inputs.shape[1] == 2 else None


def breast_cancer(*, seed: int = 0) -> Task:
    """The 30 measurements of breast_cancer.

    Args:
        seed: of the split.

    Raises:
        DataError: scikit-learn is missing, or its data have another size.
    """
    data = tables.load("breast_cancer", test_size=114, seed=seed)
    return density_task("breast_cancer_flow", data.train_rows, data.test_rows, nn.functional.softplus, data.split)


def circles(*, samples: int = CIRCLES, seed: int = 0) -> Task:
    """Points on two circles.

    Args:
        samples: in all; a tenth are kept for testing.
        seed: of the points.

    Raises:
        DataError: scikit-learn is missing.
    """
    datasets = tables.scikit_learn("circles_flow")
    points, _ = datasets.make_circles(samples, factor=0.5, noise=0.08, random_state=seed)
    rows = torch.tensor(3 * points, dtype=torch.float32)
    kept = samples // 10
    split = f"{samples - kept} train, {kept} test, generated with seed {seed}"
    return density_task("circles_flow", rows[:-kept], rows[-kept:], torch.tanh, split)


def proteins(*, seed: int = 0) -> Task:
    """The nine features of protein structures.

    Args:
        seed: of the split.

    Raises:
        DataError: the file is missing or broken.
    """
    data = protein.load(seed=seed)
    rows = data.train_inputs, data.test_inputs
    return density_task("protein_flow", *rows, nn.functional.softplus, data.split)


def neutrinos() -> Task:
    """The 43 measurements of MiniBooNE.

    Raises:
        DataError: the file is missing or broken.
    """
    train, test = miniboone.load()
    split = f"{len(train)} train, {len(test)} test, as in the MAF paper"
    return density_task("miniboone_flow", train, test, nn.functional.softplus, split)


def _record(
    name: str, summary: str, build: Callable[..., Task], source: str, batch_size: int, epochs: int, adam: float
) -> LearningRecord:
    return LearningRecord(
        name=name,
        summary=f"{summary} by a continuous normalising flow",
        build=build,
        source=f"{source}; field as in FFJORD, arXiv 1810.01367",
        batch_size=batch_size,
        epochs=epochs,
        learning_rates={"adam": adam},
    )


RECORDS = (
    _record(
        "breast_cancer_flow",
        "density of 30 measurements of cells",
        breast_cancer,
        "scikit-learn breast_cancer (UCI, CC BY 4.0)",
        128,
        40,
        0.01,
    ),
    _record("circles_flow", "density of two circles", circles, "scikit-learn make_circles", 512, 3, 0.03),
    _record("protein_flow", "density of 9 features of proteins", proteins, protein.SOURCE, 512, 2, 0.01),
    _record("miniboone_flow", "density of 43 measurements of neutrinos", neutrinos, miniboone.SOURCE, 512, 5, 0.01),
)
