r"""Continuous normalising flows: the density of data that an ODE carries to a standard normal.

Along ``dz/dt = F(t, z)`` the logarithm of a density falls by the field's divergence, so with z(data) = x

    log p(x) = log N(z(base); 0, I) + integral_data^base tr dF/dz dt.

The trace is exact, by D products with unit vectors, or Hutchinson's estimate e^T (dF/dz) e with one e a sample that
stays the same for a whole solve: the estimate is unbiased, and the integrand smooth.

Shapes: x ``(B, *shape)`` with D entries a sample, log-probabilities ``(B,)`` in nats.

Sources: Chen et al., arXiv 1806.07366; Grathwohl et al., FFJORD, arXiv 1810.01367.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.checks import check_choice, check_count
from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.neural.state_layout import State
from ocnopt.ocp import FreeHorizon, Horizon

TRACES = ("auto", "hutchinson", "exact")
NOISES = ("rademacher", "gaussian")
FROM_DATA_TO_BASE = Horizon(1.0, 0.0)


class Divergence(nn.Module):
    """A field, and beside it its divergence where the state is a pair (z, integral of the trace).

    Args:
        net: ``net(t, z) -> dz/dt``, each sample by itself.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.noise: Tensor | None = None  # e of one solve; None for the exact trace

    def forward(self, t: Tensor, state: State) -> State:
        """dz/dt, or the pair (dz/dt, tr dF/dz)."""
        if isinstance(state, Tensor):
            return self.net(t, state)
        z = state[0]
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            F = self.net(t, z)
            if self.noise is None:
                trace = _exact_trace(F, z, differentiable)
            else:
                along = _pulled(F, z, self.noise, differentiable)
                trace = (along * self.noise).flatten(1).sum(1, keepdim=True)
        return F, trace


def _exact_trace(F: Tensor, z: Tensor, differentiable: bool) -> Tensor:
    """One backward pass an entry, each for all samples at once."""
    rows = (_pulled(y, z, None, differentiable) for y in F.flatten(1).sum(0))
    return torch.stack([row.flatten(1)[:, i] for i, row in enumerate(rows)]).sum(0)[:, None]


def _pulled(F: Tensor, z: Tensor, cotangent: Tensor | None, differentiable: bool) -> Tensor:
    """cotangent^T dF/dz, which is zero for a field that does not see z."""
    along: Tensor | None = None
    if F.requires_grad:
        (along,) = torch.autograd.grad(
            F, z, cotangent, create_graph=differentiable, retain_graph=True, allow_unused=True
        )
    return torch.zeros_like(z) if along is None else along


class CNF(nn.Module):
    """A density on ``(*shape)``: a Neural ODE between data and a standard normal.

    Args:
        field: any module ``field(t, z) -> dz/dt`` that treats every sample by itself.
        shape: of one sample, or its number of entries.
        horizon: from the data to the base; ``FreeHorizon`` lets a policy move the base's end.
        trace: "exact"; "hutchinson"; or "auto": Hutchinson's in training mode, exact after ``eval()``.
        noise: e is drawn from "rademacher" (signs) or "gaussian" numbers.
        options: of :class:`ocnopt.neural.neural_ode.NeuralODE`; tolerances are 1e-5 unless given.

    Raises:
        ProblemError: an argument is wrong.

    Example: the field -z for one unit of time makes a normal of variance e^2 from the standard one.

    >>> class Shrink(nn.Module):
    ...     def forward(self, t, z):
    ...         return -z
    >>> flow = CNF(Shrink(), 2, trace="exact")
    >>> bool(abs(flow(torch.zeros(1, 2)) - (-math.log(2 * math.pi) + 2)) < 1e-4)
    True
    """

    def __init__(
        self,
        field: nn.Module,
        shape: int | Sequence[int],
        horizon: float | Horizon | FreeHorizon = FROM_DATA_TO_BASE,
        *,
        trace: str = "auto",
        noise: str = "rademacher",
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice("trace", trace, TRACES)
        check_choice("noise", noise, NOISES)
        self.shape = torch.Size([shape] if isinstance(shape, int) else shape)
        if not self.shape or self.shape.numel() < 1:
            raise ProblemError(f"shape is {shape!r}; expected a positive number of entries or the shape of a sample")
        self.trace, self.noise = trace, noise
        self.ode = NeuralODE(Divergence(field), horizon, **{"rtol": 1e-5, "atol": 1e-5, **options})

    def forward(self, x: Tensor) -> Tensor:
        """The log-probability of each sample, ``(B, *shape) -> (B,)``.

        Args:
            x: samples.

        Raises:
            ProblemError: another shape.
        """
        return self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """:meth:`forward` by its usual name."""
        z, log_determinant = self.encode(x)
        return self._base(z) + log_determinant

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the flow carries samples, ``(B, *shape)``, and log|det dz/dx|, ``(B,)``.

        Args:
            x: samples.

        Raises:
            ProblemError: another shape.
        """
        self._check(x)
        self._draw(x)
        z, trace = self.ode((x, x.new_zeros(len(x), 1)))
        return z, trace[:, 0]

    def decode(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`encode`, without the determinant.

        Args:
            z: points of the base, ``(B, *shape)``.

        Raises:
            ProblemError: another shape.
        """
        self._check(z)
        return self.ode(z, times=self.times(2))[-1]

    def times(self, count: int) -> list[float]:
        """Equal times from the base to the data: ``flow.ode(z, flow.times(9))`` is the path of samples.

        Args:
            count: at least 2.
        """
        start, horizon = self.ode.horizon.t0, self.ode.horizon
        end = float(self.ode.T) if isinstance(horizon, FreeHorizon) else horizon.t1
        return torch.linspace(end, start, count, dtype=torch.float64).tolist()

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Draw ``(count, *shape)`` by torch's random state, in the field's dtype and on its device.

        Args:
            count: how many.

        Raises:
            ProblemError: no positive number.
        """
        check_count("count", count, 100)
        like = next(self.ode.field.parameters(), torch.empty(()))
        return self.decode(torch.randn(count, *self.shape, dtype=like.dtype, device=like.device))

    def bits(self, x: Tensor) -> Tensor:
        """Bits an entry, -log2 p(x) / D, ``(B,)``.

        Args:
            x: samples.
        """
        return -self.log_prob(x) / (self.shape.numel() * math.log(2))

    def extra_repr(self) -> str:
        """What ``print(module)`` shows of the flow."""
        return f"shape={tuple(self.shape)}, trace={self.trace!r}"

    def _base(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square().flatten(1).sum(1) + self.shape.numel() * math.log(2 * math.pi))

    def _draw(self, x: Tensor) -> None:
        """Give the coming solve a field of its own, which keeps its noise until the last backward pass through it."""
        field: Any = copy.copy(self.ode.field)
        exact = self.trace == "exact" or (self.trace == "auto" and not self.training)
        if exact:
            field.noise = None
        elif self.noise == "rademacher":
            field.noise = torch.randint_like(x, 2) * 2 - 1
        else:
            field.noise = torch.randn_like(x)
        self.ode.field = field

    def _check(self, x: Tensor) -> None:
        if x.ndim < 1 or x.shape[1:] != self.shape:
            raise ProblemError(
                f"samples have shape {tuple(x.shape)}; expected (B, {', '.join(map(str, self.shape))}), a batch of the "
                "shape that the flow was made for"
            )
