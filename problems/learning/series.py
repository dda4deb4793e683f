"""Time series: ODE-RNNs that carry their state from one observation to the next by a Neural ODE.

    japanese_vowels   nine speakers by 12 coefficients of their vowels: UEA archive (M. Kudo, J. Toyama, M. Shimbo,
                      1999), 270 train and 370 test utterances of 7 to 29 steps, the published split

The two ``.ts`` files are looked for in the data folder and in the aeon package, which brings them. Channels are
standardised by the training part; what follows the end of an utterance is zero, and is read like any other step.

Shapes: series ``(N, L, C)`` float32, classes ``(N,)`` int64, logits ``(N, classes)``.

Source of the model: Rubanova, Chen and Duvenaud, arXiv 1907.03907; sizes as in SNOpt's paper, arXiv 2109.14158.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.problems.learning.files import Series, data_folder, find, read_series
from ocnopt.problems.record import LearningRecord, Task

HIDDEN, FIELD_LAYERS = 32, 4


class Still(nn.Module):
    """A field that does not see the time: linear layers of one width with tanh between them.

    Args:
        width: of all layers.
        layers: linear ones.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        stack = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
        self.net = nn.Sequential(*stack[:-1])

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """``(B, width) -> (B, width)``."""
        return self.net(h)


class OdeRnn(nn.Module):
    """A state that flows for one unit of time between observations, each of which a GRU cell takes in.

    Args:
        channels: C.
        classes: of the logits.
        horizon: of the Neural ODE between two observations.
        hidden: width of the state.
        options: of :class:`ocnopt.neural.neural_ode.NeuralODE`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        horizon: float | FreeHorizon = 1.0,
        *,
        hidden: int = HIDDEN,
        **options: Any,
    ) -> None:
        super().__init__()
        self.ode = NeuralODE(Still(hidden, FIELD_LAYERS), horizon, **options)
        self.cell = nn.GRUCell(channels, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, series: Tensor) -> Tensor:
        """``(B, L, C) -> (B, classes)``, read off after the last step."""
        first, *others = series.unbind(dim=1)
        h = self.cell(first)
        for x in others:
            h = self.cell(x, self.ode(h))
        return self.head(h)


def aeon_folder(name: str) -> list[Path]:
    """Where the aeon package, if it is installed, keeps a data set.

    Args:
        name: of the set.
    """
    spec = find_spec("aeon")
    return [Path(place) / "datasets" / "data" / name for place in (spec and spec.submodule_search_locations) or ()]


def _read(name: str, part: str) -> Series:
    places = [data_folder() / name, *aeon_folder(name)]
    source = "https://timeseriesclassification.com"
    return read_series(find(f"{name}_{part}.ts", dataset=name, source=source, others=places))


def padded(series: list[Tensor], length: int, mean: Tensor, deviation: Tensor) -> Tensor:
    """Standardised series of one length, zero after their ends, ``(N, length, C)``.

    Args:
        series: ``(l, C)`` each.
        length: of the longest.
        mean: ``(C,)``.
        deviation: likewise.
    """
    table = torch.zeros(len(series), length, len(mean))
    for row, values in zip(table, series, strict=True):
        row[: len(values)] = (values - mean) / deviation
    return table


def japanese_vowels() -> Task:
    """Utterances of nine speakers, an ODE-RNN and cross-entropy.

    Raises:
        DataError: a file is missing or broken.
    """
    train, test = (_read("JapaneseVowels", part) for part in ("TRAIN", "TEST"))
    together = torch.cat(train.values)
    scale = together.mean(dim=0), together.std(dim=0)
    length = max(map(len, (*train.values, *test.values)))

    def make_model(horizon: float | FreeHorizon = 1.0, **options: Any) -> nn.Module:
        return OdeRnn(len(scale[0]), 9, horizon, **options)

    return Task(
        name="japanese_vowels",
        train_inputs=padded(train.values, length, *scale),
        train_targets=train.classes,
        test_inputs=padded(test.values, length, *scale),
        test_targets=test.classes,
        make_model=make_model,
        loss=nn.functional.cross_entropy,
        split=f"{len(train.classes)} train, {len(test.classes)} test, as published",
    )


RECORDS = (
    LearningRecord(
        name="japanese_vowels",
        summary="tell nine speakers by their vowels with an ODE-RNN",
        build=japanese_vowels,
        source="Japanese Vowels of the UEA archive (UCI, CC BY 4.0), from the data folder or the aeon package",
        batch_size=128,
        epochs=50,
        learning_rates={"adam": 0.01},
    ),
)
