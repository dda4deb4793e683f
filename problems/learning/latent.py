r"""A latent ODE for series at irregular times, and the noisy spirals on which it is shown.

An encoder reads the observations backwards, each with the time to the one before it, and gives the mean and the
variance of a latent state z at the first time; a Neural ODE carries z through all times; a decoder reads the values
off. The loss is the negative evidence lower bound in nats a series,

    - sum_observed log N(x; decoded, NOISE^2) + KL(N(mean, variance) || N(0, I)).

``spirals``: 1,000 spirals in the plane for training and 200 for testing, half of each wound outwards and half inwards,
generated from a seed, 40 equal times; at each time one half are observed, with noise. Inputs and training targets are
these observations, NaN elsewhere; the test targets are the true places at all other times, which no model saw.

Shapes: series ``(N, L, C)`` float32, latent states ``(N, latent)``.

Source: Chen et al., arXiv 1806.07366, section 5; Rubanova, Chen and Duvenaud, arXiv 1907.03907.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.problems.learning.fields import Still
from ocnopt.problems.record import LearningRecord, Picture, Task

TIMES, NOISE, SPAN = 40, 0.1, 4.0
TRAIN, TEST = 1_000, 200


class Decoded(NamedTuple):
    """What a latent ODE says of a series: decoded values ``(B, L, C)``, and the distribution of z, ``(B, latent)``."""

    values: Tensor
    mean: Tensor
    log_variance: Tensor


class LatentOde(nn.Module):
    """Encoder, flow and decoder.

    Args:
        channels: C.
        horizon: from the first of the equal times to the last.
        latent: size of z.
        hidden: width of encoder, field and decoder.
        options: of :class:`ocnopt.neural.neural_ode.NeuralODE`; values on the way are interpolated unless said
            otherwise.
    """

    def __init__(
        self, channels: int, horizon: float | FreeHorizon = SPAN, *, latent: int = 4, hidden: int = 32, **options: Any
    ) -> None:
        super().__init__()
        self.cell = nn.GRUCell(channels + 1, hidden)
        self.posterior = nn.Linear(hidden, 2 * latent)
        self.ode = NeuralODE(Still([latent, hidden, hidden, latent]), horizon, **{"dense": True, **options})
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, channels))

    def forward(self, series: Tensor) -> Decoded:
        """Encode observations, NaN where there are none, and decode the path; z is its mean after ``eval()``."""
        mean, log_variance = self.encode(series)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return Decoded(self.decode(z, series.shape[1]), mean, log_variance)

    def encode(self, series: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of z.

        Args:
            series: ``(B, L, C)``.
        """
        seen = ~series.isnan().any(dim=2, keepdim=True)
        h, gap = series.new_zeros(len(series), self.cell.hidden_size), series.new_zeros(len(series), 1)
        for x, is_seen in zip(reversed(series.nan_to_num().unbind(dim=1)), reversed(seen.unbind(dim=1)), strict=True):
            h = torch.where(is_seen, self.cell(torch.cat([gap, x], dim=1), h), h)
            gap = torch.where(is_seen, 0, gap) + 1
        mean, log_variance = self.posterior(h).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor, count: int) -> Tensor:
        """The path of latent states at equal times, decoded, ``(B, count, C)``.

        Args:
            z: at the first time.
            count: of the times.
        """
        horizon = self.ode.horizon
        end = float(self.ode.T) if isinstance(horizon, FreeHorizon) else horizon.t1
        path = self.ode(z, torch.linspace(horizon.t0, end, count, dtype=torch.float64))
        return self.decoder(path).transpose(0, 1)


def negative_elbo(outputs: Decoded, targets: Tensor) -> Tensor:
    """The negative evidence lower bound, its mean over the series, ``()``.

    Args:
        outputs: of the model.
        targets: ``(B, L, C)``, NaN where nothing was observed.
    """
    observed = ~targets.isnan()
    errors = (outputs.values - targets.nan_to_num()) / NOISE
    density = -0.5 * errors.square() - math.log(NOISE * math.sqrt(2 * math.pi))
    variance = outputs.log_variance.exp()
    divergence = 0.5 * (outputs.mean.square() + variance - 1 - outputs.log_variance)
    return (divergence.sum() - density[observed].sum()) / len(targets)


def squared_error(outputs: Decoded, targets: Tensor) -> Tensor:
    """The squared distance at the known times, its mean over each series, ``(B,)``.

    Args:
        outputs: of the model.
        targets: ``(B, L, C)``, NaN where nothing is known.
    """
    return (outputs.values - targets).square().sum(dim=2).nanmean(dim=1)


def paths(count: int, random: Generator) -> Tensor:
    """True spirals, ``(count, TIMES, 2)``: the first half wound outwards, the second inwards, from random angles.

    Args:
        count: how many.
        random: where the random numbers come from.
    """
    start = 2 * math.pi * torch.rand(count, 1, generator=random)
    swept = torch.linspace(0, 2.5 * math.pi, TIMES)
    outwards = (torch.arange(count) < count // 2)[:, None]
    along = torch.where(outwards, swept, swept.flip(0))
    radius, angle = 0.3 + 0.15 * along, start + along
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def observed(true: Tensor, random: Generator) -> tuple[Tensor, Tensor]:
    """Noisy values at half of the times of each path, NaN elsewhere; and the true values at the others.

    Args:
        true: ``(N, L, C)``.
        random: where the random numbers come from.
    """
    order = torch.rand(true.shape[:2], generator=random).argsort(dim=1)
    seen = (order < true.shape[1] // 2)[..., None]
    noisy = true + NOISE * torch.randn(true.shape, generator=random)
    return torch.where(seen, noisy, math.nan), torch.where(seen, math.nan, true)


def build(*, samples: int = TRAIN, seed: int = 0) -> Task:
    """Spirals, a latent ODE and the evidence lower bound; the metric is the squared distance at times not observed.

    Args:
        samples: for training.
        seed: of the spirals and their observations.
    """
    random = Generator().manual_seed(seed)
    inputs, _ = observed(paths(samples, random), random)
    test_inputs, unseen = observed(paths(TEST, random), random)

    def make_model(horizon: float | FreeHorizon = SPAN, **options: Any) -> nn.Module:
        return LatentOde(2, horizon, **options)

    return Task(
        name="spirals",
        train_inputs=inputs,
        train_targets=inputs,
        test_inputs=test_inputs,
        test_targets=unseen,
        make_model=make_model,
        loss=negative_elbo,
        split=f"{samples} train, {TEST} test at the {TIMES // 2} times not observed, generated with seed {seed}",
        metrics={"mse": squared_error},
        pictures=(Picture("paths", "Six test spirals and what is decoded.", _draw_filled, as_it_trains=True),),
    )


def _draw_filled(model: Any, task: Task) -> Any:
    from ocnopt.problems.learning.views import draw_filled

    return draw_filled(model, task.test_inputs, task.test_targets)


RECORDS = (
    LearningRecord(
        name="spirals",
        summary="fill in and draw noisy spirals seen at irregular times with a latent ODE",
        build=build,
        source="generated, after Chen et al., arXiv 1806.07366",
        batch_size=100,
        epochs=60,
        learning_rates={"adam": 0.01},
    ),
)
