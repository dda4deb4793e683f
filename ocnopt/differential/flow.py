r"""A problem at one point, ready to be differentiated along its path: what the derivative functions are asked for.

There is one treatment of what is chosen once: p ``(q,)`` is shared by the samples, its last entry T where the horizon
is free; a staged control u that is constant over an interval is one more state that stands still, X = (x, u), of size
d = n + m. Shapes: x ``(*batch, n)``, u ``(*batch, m)``.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt import checks
from ocnopt.errors import ProblemError
from ocnopt.linearise import leaves, linearise, pull
from ocnopt.ocp import OCP, Lifted, lift


class Pulled(NamedTuple):
    """F ``(..., n)``, and of columns q the products F_X^T q and F_p^T q; the last is None if unwanted or zero."""

    F: Tensor
    FXq: Tensor
    Fpq: Tensor | None


@dataclass(frozen=True, eq=False)
class Flow:
    """A lifted problem at p, on an interval with the constant control u, and the tolerances of its solves."""

    lifted: Lifted
    p: Tensor
    u: Tensor
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

    def at(self, u: Tensor) -> "Flow":
        """The same on another interval."""
        return replace(self, u=u)

    def join(self, x: Tensor) -> Tensor:
        """X = (x, u)."""
        return torch.cat([x, self.u], dim=-1)

    def leaves(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """X and p, or a copy of p per sample, as the start of a graph."""
        return leaves(X, self.p, self.per_sample)

    def dynamics(self, t: float | Tensor, X: Tensor, p: Tensor) -> Tensor:
        """F, the moving part of dX/dt, ``(..., n)``."""
        return self.lifted.dynamics(t, X[..., : self.n], X[..., self.n :], p)

    def running_cost(self, t: float | Tensor, X: Tensor, p: Tensor) -> Tensor:
        """The running cost l, ``(...)``."""
        return self.lifted.running_cost(t, X[..., : self.n], X[..., self.n :], p)

    def rates(self, t: float | Tensor, x: Tensor, *cost: Tensor) -> list[Tensor]:
        """F, and l where a ``cost`` travels along."""
        X = self.join(x)
        return [self.dynamics(t, X, self.p), *(self.running_cost(t, X, self.p) for _ in cost)]

    def pull(self, t: float | Tensor, x: Tensor, columns: Tensor, *, wanted: bool) -> Pulled:
        """F, and F_X^T q_i ``(..., R, d)``, F_p^T q_i ``(..., R, q)`` (if ``wanted``) of q_i ``(..., R, d)``."""
        columns = columns[..., : self.n]
        with torch.enable_grad():
            inputs = self.leaves(self.join(x))
            F = self.dynamics(t, inputs[0], inputs[1])
            if self.per_sample:
                of = inputs if wanted else inputs[:1]
                products = [product.movedim(0, -2) for product in pull(F, of, columns.movedim(-2, 0))]
            else:
                products = [columns @ block for block in linearise(F, inputs)]
        return Pulled(F.detach(), products[0], products[1] if wanted else None)


def read_request(
    problem: Any, parameters: Any, controls: Any, horizon: Any, rtol: Any, atol: Any
) -> tuple[Flow, Tensor]:
    """Read where to differentiate; None stands for the problem's own parameters and end time.

    The controls come back as ``(*batch, N, m)``: one interval with m = 0 where there are none.
    Steps are held to a tenth of the tolerances, so that the results meet them, but no tighter than the dtype rounds.

    Raises:
        ProblemError: something is missing, superfluous or of a wrong shape.
    """
    checks.can_differentiate()
    if not isinstance(problem, OCP):
        raise ProblemError(
            f"problem is {type(problem).__name__}; expected an oc.OCP (oc.from_module makes one of a network)"
        )
    lifted = _with_horizon(lift(problem), horizon)
    p = lifted.parameters
    if parameters is not None:
        p = torch.cat([_parameters(problem, parameters), p[problem.parameter_dim :]])
    floor = 16 * torch.finfo(problem.dtype).eps
    tenths = (max(_tolerance(name, value) / 10, floor) for name, value in (("rtol", rtol), ("atol", atol)))
    u = _controls(problem, controls)
    return Flow(lifted, p, u[..., 0, :], *tenths), u


def _with_horizon(lifted: Lifted, horizon: Any) -> Lifted:
    if horizon is None:
        return lifted
    time, start = checks.float_tensor("horizon", horizon, torch.float64), lifted.problem.horizon.t0
    if time.numel() != 1 or time.item() <= start:
        raise ProblemError(f"horizon is {horizon!r}; expected one end time T after the start {start}")
    if not lifted.free:
        return replace(lifted, t1=time.item())
    return replace(lifted, parameters=torch.cat([lifted.parameters[:-1], lifted.parameters.new_tensor([time.item()])]))


def _parameters(problem: OCP, value: Any) -> Tensor:
    if problem.parameters is None:
        raise ProblemError(
            "parameters are given for a problem without any; expected none: pass parameters= to oc.OCP to have some"
        )
    p = checks.float_tensor("parameters", value, problem.dtype, problem.device)
    if p.shape != problem.parameters.shape:
        raise ProblemError(
            f"parameters have shape {checks.shape(p)}; expected {checks.shape(problem.parameters)}: one vector for all "
            "samples, without T (which is horizon=)"
        )
    return p


def _tolerance(name: str, value: Any) -> float:
    if not (checks.is_number(value) and value > 0):
        raise ProblemError(f"{name} is {value!r}; expected a number > 0, such as 1e-8")
    return float(value)


def _controls(problem: OCP, controls: Any) -> Tensor:
    batch, m = problem.batch_shape, problem.control_dim
    if controls is None and m == 0:
        return problem.initial_state.new_zeros((*batch, 1, 0))
    if controls is None:
        raise ProblemError(
            f"no controls are given for a problem with {m} staged ones; expected controls= (..., N, {m}), constant on "
            "each of N equal steps"
        )
    if m == 0:
        raise ProblemError(
            "controls are given for a problem without any; expected none: pass control_dim= to oc.OCP to have some"
        )
    u = checks.float_tensor("controls", controls, problem.dtype, problem.device)
    if u.ndim < 2 or u.shape[-1] != m or u.shape[-2] == 0 or u.shape[:-2] not in ((), batch):
        raise ProblemError(
            f"controls have shape {checks.shape(u)}; expected (N, {m}) or (*batch, N, {m}) with batch {batch}, N >= 1"
        )
    return u.expand(*batch, *u.shape[-2:])
