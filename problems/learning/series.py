"""Time series: ODE-RNNs that carry their state from one observation to the next by a Neural ODE.

    japanese_vowels   nine speakers by 12 coefficients of their vowels: UEA archive (M. Kudo, J. Toyama, M. Shimbo,
                      1999), 270 train and 370 test utterances of 7 to 29 steps, the published split; what follows the
                      end of an utterance is zero, and is read like any other step
    spoken_digits     ten digits by 13 coefficients of each frame: Free Spoken Digit Dataset (Z. Jackson et al., CC
                      BY-SA 4.0), 3,000 utterances of 6 to 92 frames; 2,400 train and 600 test, stratified, seed 0;
                      half of the frames, drawn by the seed, are dropped, so that the times between them differ
    spoken_arabic_digits, articulary_words, character_trajectories   the other sets of SNOpt's paper, likewise

The ``.ts`` files of the first are looked for in the data folder and in the aeon package, which brings them;
``spoken-digits-mfcc.npz`` in the data folder. Channels are standardised by the training part.

Shapes: series ``(N, L, C)`` float32, NaN after the end where lengths differ, classes ``(N,)`` int64, logits ``(N, K)``.

Source of the model: Rubanova, Chen and Duvenaud, arXiv 1907.03907; sizes as in SNOpt's paper, arXiv 2109.14158.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.errors import DataError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.problems.learning.fields import Still
from ocnopt.problems.learning.files import Series, data_folder, find, read_arrays, read_series
from ocnopt.problems.learning.tables import scikit_learn
from ocnopt.problems.record import LearningRecord, Picture, Task

HIDDEN, FIELD_LAYERS = 32, 4
DIGITS_FILE, DIGITS_SHAPE, DIGITS_TEST = "spoken-digits-mfcc.npz", (3_000, 13), 600


class OdeRnn(nn.Module):
    """A state that flows between observations, each of which a GRU cell takes in.

    Args:
        channels: C, the gap not counted.
        classes: K.
        horizon: of the Neural ODE over one unit of time.
        gaps: whether the first entry of an observation is the time since the last one, instead of one unit.
        hidden: width of the state.
        options: of :class:`ocnopt.neural.neural_ode.NeuralODE`.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        horizon: float | FreeHorizon = 1.0,
        *,
        gaps: bool = False,
        hidden: int = HIDDEN,
        **options: Any,
    ) -> None:
        super().__init__()
        self.gaps = gaps
        self.ode = NeuralODE(Still([hidden] * (FIELD_LAYERS + 1)), horizon, **options)
        self.cell = nn.GRUCell(channels, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, series: Tensor) -> Tensor:
        """``(B, L, C or 1 + C) -> (B, K)``, read off after each series' own end."""
        return self.head(self.states(series)[:, -1])

    def states(self, series: Tensor) -> Tensor:
        """The state after each observation, which rests where a series has ended, ``(B, l, hidden)``.

        Args:
            series: as in :meth:`forward`; l is the longest length among them.
        """
        seen = ~series.isnan().any(dim=2)
        length = int(seen.any(dim=0).sum())
        h = series.new_zeros(len(series), self.cell.hidden_size)
        states: list[Tensor] = []
        for x, goes_on in zip(series.nan_to_num().unbind(dim=1)[:length], seen.unbind(dim=1), strict=False):
            gap, values = (x[:, :1], x[:, 1:]) if self.gaps else (None, x)
            if states:
                h = self.ode(h) if gap is None else self.ode((h, gap))[0]
            taken = self.cell(values, h)
            h = taken if bool(goes_on.all()) else torch.where(goes_on[:, None], taken, h)
            states.append(h)
        return torch.stack(states, dim=1)


def aeon_folder(name: str) -> list[Path]:
    """Where the aeon package, if it is installed, keeps a data set.

    Args:
        name: of the set.
    """
    spec = find_spec("aeon")
    return [Path(place) / "datasets" / "data" / name for place in (spec and spec.submodule_search_locations) or ()]


def padded(series: Sequence[Tensor], rest: float, length: int = 0) -> Tensor:
    """Series of one length, ``(N, length, C)``.

    Args:
        series: ``(l, C)`` each.
        rest: what follows their ends.
        length: of the table, if the longest is shorter.
    """
    length = max(length, *map(len, series))
    table = torch.full((len(series), length, series[0].shape[1]), rest)
    for row, values in zip(table, series, strict=True):
        row[: len(values)] = values
    return table


def standardised(train: Sequence[Tensor], test: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Both parts, by mean and standard deviation of each channel of the first.

    Args:
        train: ``(l, C)`` each.
        test: likewise.
    """
    together = torch.cat([*train])
    mean, deviation = together.mean(dim=0), together.std(dim=0)
    return [(x - mean) / deviation for x in train], [(x - mean) / deviation for x in test]


def archive(name: str) -> Task:
    """A set of the UEA archive in its published split, an ODE-RNN and cross-entropy.

    Args:
        name: of the task.

    Raises:
        DataError: a file is missing or broken.
    """
    train, test = (_read(name, part) for part in ("TRAIN", "TEST"))
    values, test_values = standardised(train.values, test.values)
    length = max(map(len, (*values, *test_values)))
    channels, classes = values[0].shape[1], 1 + int(train.classes.max())

    def make_model(horizon: float | FreeHorizon = 1.0, **options: Any) -> nn.Module:
        return OdeRnn(channels, classes, horizon, **options)

    return Task(
        name=name,
        train_inputs=padded(values, 0.0, length),
        train_targets=train.classes,
        test_inputs=padded(test_values, 0.0, length),
        test_targets=test.classes,
        make_model=make_model,
        loss=nn.functional.cross_entropy,
        split=f"{len(train.classes)} train, {len(test.classes)} test, as published",
        pictures=(STATES,),
    )


def _read(name: str, part: str) -> Series:
    folder = FOLDERS[name]
    source, file = "https://timeseriesclassification.com", f"{name}/{folder}_{part}.ts"
    return read_series(find(file, dataset=name, source=source, others=[data_folder() / folder, *aeon_folder(folder)]))


@torch.no_grad()
def _draw_states(model: Any, task: Task) -> Any:
    from ocnopt.problems.learning.views import draw_paths

    chosen = slice(None, None, 1 + len(task.test_targets) // 256)  # test parts may be in the order of their classes
    inputs, classes = task.test_inputs[chosen], task.test_targets[chosen]
    lengths = (~inputs.isnan().any(dim=2)).sum(dim=1).tolist()
    return draw_paths(model.states(inputs).transpose(0, 1), classes, lengths)


STATES = Picture("states", "The state of each test series from observation to observation.", _draw_states)
FOLDERS = {
    "japanese_vowels": "JapaneseVowels",
    "spoken_arabic_digits": "SpokenArabicDigits",
    "articulary_words": "ArticularyWordRecognition",
    "character_trajectories": "CharacterTrajectories",
}


def spoken_digits(*, kept: float = 0.5, seed: int = 0) -> Task:
    """Utterances of ten digits with frames dropped at random, an ODE-RNN that sees the gaps, and cross-entropy.

    Args:
        kept: share of the frames; the first one always is. Gaps are in units of the mean gap.
        seed: of the split and of the frames.

    Raises:
        DataError: the file is missing or broken.
    """
    path = find(DIGITS_FILE, dataset="", source="https://github.com/Jakobovski/free-spoken-digit-dataset, as MFCCs")
    frames, digits, lengths = read_arrays(path, ("X", "y", "lengths"))
    count, channels = DIGITS_SHAPE
    if len(digits) != count or lengths.shape != digits.shape or frames.shape != (int(lengths.sum()), channels):
        raise DataError(
            f"{path} holds frames {tuple(frames.shape)} of {len(lengths)} utterances and {len(digits)} digits; "
            f"expected {count} of each and (sum of lengths, {channels}): bring it again"
        )
    scikit_learn("spoken_digits")
    from sklearn.model_selection import train_test_split

    parts = train_test_split(range(count), test_size=DIGITS_TEST, stratify=digits, random_state=seed)
    utterances = [x.float() for x in frames.split(lengths.tolist())]
    train, test = standardised(*([utterances[i] for i in part] for part in parts))
    random = torch.Generator().manual_seed(seed)
    inputs, test_inputs = (padded([_thinned(x, kept, random) for x in part], math.nan) for part in (train, test))

    def make_model(horizon: float | FreeHorizon = 1.0, **options: Any) -> nn.Module:
        return OdeRnn(channels, 10, horizon, gaps=True, **options)

    return Task(
        name="spoken_digits",
        train_inputs=inputs,
        train_targets=digits[parts[0]].long(),
        test_inputs=test_inputs,
        test_targets=digits[parts[1]].long(),
        make_model=make_model,
        loss=nn.functional.cross_entropy,
        split=f"{len(train)} train, {len(test)} test, stratified, seed {seed}, {kept:.0%} of the frames",
        pictures=(STATES,),
    )


def _thinned(frames: Tensor, kept: float, random: torch.Generator) -> Tensor:
    """Some of the frames, each with the time since the one before, ``(l, 1 + C)``."""
    chosen = torch.rand(len(frames), generator=random) < kept
    chosen[0] = True
    at = chosen.nonzero()[:, 0]
    gaps = torch.diff(at, prepend=at[:1]) * kept
    return torch.cat([gaps[:, None].to(frames), frames[at]], dim=1)


def _record(
    name: str, what: str, source: str, build: Callable[..., Task], epochs: int, **rates: float
) -> LearningRecord:
    return LearningRecord(
        name=name,
        summary=f"tell {what} with an ODE-RNN",
        build=build,
        source=f"{source}, from the data folder",
        batch_size=128,
        epochs=epochs,
        learning_rates=rates,
    )


def _of_archive(name: str, what: str, epochs: int, **rates: float) -> LearningRecord:
    return _record(name, what, f"{FOLDERS[name]} of the UEA archive", partial(archive, name), epochs, **rates)


RECORDS = (
    _of_archive("japanese_vowels", "nine speakers by their vowels", 50, adam=0.01),
    _record(
        "spoken_digits",
        "ten spoken digits by frames at irregular times",
        "Free Spoken Digit Dataset (CC BY-SA 4.0) as MFCCs",
        spoken_digits,
        10,
        adam=0.01,
    ),
    _of_archive("spoken_arabic_digits", "ten spoken digits", 5),
    _of_archive("articulary_words", "25 words by the movement of lips and tongue", 50),
    _of_archive("character_trajectories", "20 letters by the movement of the pen", 20),
)
