r"""A problem at one point, ready to be differentiated along its path.

Where the staged control u is constant, it is one more state that stands still: X = (x, u), of size d = n + m, and
every function is written for X and the static control p. Shapes: x ``(*batch, n)``, u ``(*batch, m)``, p ``(q,)``
shared by the samples, its last entry T where the horizon is free.
"""

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ocnopt import linearise
from ocnopt.linearise import Function, Linear, Quadratic
from ocnopt.ocp import Lifted


@dataclass(frozen=True, eq=False)
class Flow:
    """A lifted problem at p, and the tolerances of its solves."""

    lifted: Lifted
    p: Tensor
    rtol: float
    atol: float

    @property
    def n(self) -> int:
        """Size of the moving part of X."""
        return self.lifted.state_dim

    @property
    def batch(self) -> tuple[int, ...]:
        """The samples' axes."""
        return self.lifted.batch_shape

    @property
    def samples(self) -> int:
        """Their number, B."""
        return math.prod(self.batch)

    @property
    def per_sample(self) -> bool:
        """Whether the functions accept a copy of p for each sample."""
        problem = self.lifted.problem
        return problem.parameters is None or problem.parameters_broadcast or not self.batch

    @property
    def has_running_cost(self) -> bool:
        """Whether the problem has an l."""
        return self.lifted.problem.running_cost is not None

    def dynamics(self, t: float | Tensor, X: Tensor, p: Tensor) -> Tensor:
        """F, the moving part of dX/dt, ``(..., n)``."""
        return self.lifted.dynamics(t, X[..., : self.n], X[..., self.n :], p)

    def running_cost(self, t: float | Tensor, X: Tensor, p: Tensor) -> Tensor:
        """The running cost l, ``(...)``."""
        return self.lifted.running_cost(t, X[..., : self.n], X[..., self.n :], p)

    def linearise(self, t: float, X: Tensor) -> Linear:
        """F, F_X and F_p."""
        return linearise.linearise(partial(self.dynamics, t), X, self.p, per_sample=self.per_sample)

    def pull_back(self, t: float, X: Tensor, columns: Tensor) -> Linear:
        """F, and F_X^T q_i, F_p^T q_i for columns q_i ``(..., K, n)``."""
        return linearise.pull_back(partial(self.dynamics, t), X, self.p, columns, per_sample=self.per_sample)

    def expand(self, function: Function, X: Tensor, r: Tensor) -> Quadratic:
        """Gradient and second derivatives of a scalar ``function(X, p)``, of the block pp its form in r alone."""
        return linearise.quadratic(function, X, self.p, r, per_sample=self.per_sample)

    def add_curvature_in_p(self, total: Tensor, weight: float, function: Function, X: Tensor) -> None:
        """Add the block pp, summed over the samples and weighted, to ``total`` in place."""
        linearise.add_curvature_in_p(total, weight, function, X, self.p)
