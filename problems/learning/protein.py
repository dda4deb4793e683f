"""Physicochemical properties of protein tertiary structure: how far a decoy is from the native structure.

45,730 decoys, 9 features (areas, masses, distances, penalties) and the distance RMSD: UCI "Physicochemical Properties
of Protein Tertiary Structure" (P. S. Rana, 2013, CC BY 4.0). Either of two files is read from the data folder:
``protein/CASP.csv`` as published, with a header and the distance first, or ``protein.csv.gz``, without a header,
centred and with the distance last. Split: 36,584 for training and 9,146 for testing, shuffled by seed 0. Columns are
standardised by mean and standard deviation of the training part.

Shapes: features ``(N, 9)``, distances ``(N, 1)``, both float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.problems.learning.fields import TimeLinear, TimeNet
from ocnopt.problems.learning.files import data_folder, find, read_table
from ocnopt.problems.record import LearningRecord, Task

PUBLISHED, CENTRED = "protein/CASP.csv", "protein.csv.gz"
SIZE, TEST_SIZE = (45_730, 10), 9_146
SOURCE = "UCI Physicochemical Properties of Protein Tertiary Structure (CC BY 4.0), from the data folder"
WIDTH, HIDDEN = 48, 64


class Protein(NamedTuple):
    """The standardised table in two parts."""

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    split: str


def load(*, seed: int = 0) -> Protein:
    """Read, shuffle, split and standardise the table.

    Args:
        seed: of the order.

    Raises:
        DataError: the file is missing or broken.
    """
    if (data_folder() / CENTRED).is_file():
        table = read_table(data_folder() / CENTRED, SIZE)
    else:
        path = find(PUBLISHED, dataset="protein", source="https://archive.ics.uci.edu/dataset/265")
        table = read_table(path, SIZE, header=1).roll(-1, dims=1)
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))]
    train = table[:-TEST_SIZE]
    table = ((table - train.mean(dim=0)) / train.std(dim=0)).float()
    train, test = table[:-TEST_SIZE], table[-TEST_SIZE:]
    split = f"{len(train)} train, {len(test)} test, shuffled with seed {seed}"
    return Protein(train[:, :9], train[:, 9:], test[:, :9], test[:, 9:], split)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error of each sample, its mean over the entries, ``(B,)``.

    Args:
        outputs: ``(B, ...)``.
        targets: likewise.
    """
    return (outputs - targets).square().flatten(1).mean(dim=1)


def build(*, seed: int = 0) -> Task:
    """Data, a Neural ODE 48 wide between two linear layers, and the mean squared error.

    Args:
        seed: of the split.

    Raises:
        DataError: the file is missing or broken.
    """
    data = load(seed=seed)

    def make_model(horizon: float | FreeHorizon = 1.0, **options: Any) -> nn.Module:
        field = TimeNet(TimeLinear, (WIDTH, HIDDEN, WIDTH))
        return nn.Sequential(nn.Linear(9, WIDTH), NeuralODE(field, horizon, **options), nn.Linear(WIDTH, 1))

    return Task(
        name="protein",
        train_inputs=data.train_inputs,
        train_targets=data.train_targets,
        test_inputs=data.test_inputs,
        test_targets=data.test_targets,
        make_model=make_model,
        loss=nn.functional.mse_loss,
        split=data.split,
        metrics={"mse": squared_error},
    )


RECORDS = (
    LearningRecord(
        name="protein",
        summary="predict a protein's distance from its native structure with a Neural ODE",
        build=build,
        source=SOURCE,
        batch_size=256,
        epochs=2,
        learning_rates={"adam": 0.01},
    ),
)
