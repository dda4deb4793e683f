"""A policy for the integration time T of a Neural ODE, learned beside its weights.

T is one more static control. For the cost Phi(x(T)) + (c/2) T^2 with Phi a mean over B samples, s_i = F_i . dPhi/dx_i
at T is what sample i adds to dPhi/dT. With the empirical Gauss-Newton matrix of (p, T),

    Q_T = c T + sum_i s_i,    Q_TT = c + mean_i (B s_i)^2,    Q_Tp . dp = (sum_i s_i) (Q_p . dp),

the minimum over T, after the parameters have moved by dp, is the feedback rule T <- T - eta (Q_T + Q_Tp . dp) / Q_TT.
All three belong to the parameters that dp starts from: the policy notes them during the backward pass, before the
optimiser moves. F and dPhi/dx at T are handed over by that pass itself. Q_Tp is the product of means that the paper
uses; the mean of products s_i g_i would need the gradient of each sample.

Source: Liu, Chen, Theodorou, arXiv 2109.14158.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ocnopt.checks import check_choice, check_count, check_number
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon


class HorizonPolicy:
    """Moves the integration time of a NeuralODE that was built with ``horizon=oc.FreeHorizon(...)``.

    Call ``policy.step()`` after ``optimizer.step()`` and before the gradients are cleared.

    Args:
        neural_ode: the module whose T moves.
        rule: "feedback": second order, with the response of T to the change of the parameters. "adjoint": gradient
            descent, T <- T - eta Q_T.
        lr: eta; at most 1 is sensible for "feedback".
        penalty: c of the cost (c/2) T^2 on the integration time.
        every: iterations from one update of T to the next.
        reduction: "mean" or "sum": how the loss combines samples.
        max_change: the largest change of T in one update, as a share of the way from the lower to the upper bound; it
            holds where Q_TT is small.

    Raises:
        ProblemError: an argument is wrong, or the horizon is not free.

    Source: Liu, Chen, Theodorou, "Second-order Neural ODE optimizer", arXiv 2109.14158.

    >>> class Clock(torch.nn.Module):
    ...     def forward(self, t, x):
    ...         return torch.ones_like(x)
    >>> ode = NeuralODE(Clock(), FreeHorizon(initial=1.0, lower=0.1, upper=3.0))
    >>> policy = HorizonPolicy(ode, rule="adjoint", lr=0.25)
    >>> x = torch.zeros(1, 1, requires_grad=True)
    >>> ((ode(x) - 2) ** 2 / 2).sum().backward()  # x(T) = T, so dL/dT = T - 2
    >>> policy.step()
    >>> print(f"{float(ode.T):.4f}")
    1.2500
    """

    def __init__(
        self,
        neural_ode: NeuralODE | Any,
        *,
        rule: str = "feedback",
        lr: float,
        penalty: float = 0.0,
        every: int = 1,
        reduction: str = "mean",
        max_change: float = 0.1,
    ) -> None:
        check_choice("rule", rule, ("feedback", "adjoint"))
        check_choice("reduction", reduction, ("mean", "sum"))
        check_number("lr", lr, "a number >= 0")
        check_number("penalty", penalty, "a number >= 0")
        check_number("max_change", max_change, "a number > 0, 0.1 by default", above=1e-12)
        check_count("every", every, default=1)
        self._ode, self._bounds = neural_ode, _free_horizon(neural_ode)
        self.rule, self.lr, self.penalty, self.every = rule, lr, penalty, every
        self._mean, self._max_change, self._count = reduction == "mean", max_change, 0
        self._shares: list[Tensor] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        self._handle: RemovableHandle | None = None
        self._watch()

    @torch.no_grad()
    def step(self) -> None:
        """Count an iteration, and move T if its turn has come.

        Raises:
            ProblemError: no backward pass has been seen, or its gradients are gone.
            NonFiniteError: dL/dT is NaN or infinite; T stays.
        """
        if self._handle is not None:
            self._move()
        self._count += 1
        self._watch()

    def stage(self, input_weight: float, gradient_weight: float) -> AbstractContextManager[None]:
        """The policy needs nothing along the path: see :class:`ocnopt.differential.discrete.Observer`."""
        return nullcontext()

    def terminal(self, x: Tensor, slope: Tensor, costate: Tensor) -> None:
        """Note the share of each sample in dL/dT, and the parameters that it belongs to."""
        products = (slope.double() * costate.double()).reshape(len(x) if x.ndim > 1 else 1, -1).sum(1)
        if self._shares and len(self._shares[-1]) == len(products):
            self._shares[-1] = self._shares[-1] + products  # further solves by the same samples
        else:
            self._shares.append(products)
        if self.rule == "feedback" and not self._before:
            self._before = [(p, p.detach().clone()) for p in self._ode.parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides T, which is saved with the module."""
        return {"count": self._count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned.

        Raises:
            ProblemError: the state is something else.
        """
        if [*state_dict] != ["count"]:
            raise ProblemError(
                f"the state holds {sorted(state_dict)}; expected the 'count' of a HorizonPolicy: load what its "
                "state_dict() returned"
            )
        self._count = state_dict["count"]
        self._watch()

    def _watch(self) -> None:
        """Watch the next iteration if T moves then."""
        if self._handle is not None:
            self._handle.remove()
        self._shares, self._before = [], []
        is_due = (self._count + 1) % self.every == 0
        self._handle = self._ode.observe(self) if is_due else None

    def _move(self) -> None:
        T = self._ode.T
        if not self._shares:
            raise ProblemError(
                "policy.step() met no backward pass through the NeuralODE since the last step; expected "
                "loss.backward(), optimizer.step(), policy.step() in this order"
            )
        s = torch.cat(self._shares).to(T.device)
        Q_T = self.penalty * T + s.sum()
        if self.rule == "adjoint":
            change = self.lr * Q_T
        else:
            Q_TT = self.penalty + s.square().sum() * (len(s) if self._mean else 1)
            change = self.lr * (Q_T + s.sum() * self._loss_change()) / Q_TT.clamp(min=torch.finfo(Q_TT.dtype).tiny)
        if not bool(torch.isfinite(Q_T)) or bool(torch.isnan(change)):
            raise NonFiniteError(
                f"dL/dT is {float(Q_T)} and the change of T {float(change)}; expected finite numbers. T stays at "
                f"{float(T)}: look for NaN or infinity in the loss"
            )
        longest = self._max_change * (self._bounds.upper - self._bounds.lower)
        T.sub_(change.clamp(-longest, longest)).clamp_(self._bounds.lower, self._bounds.upper)

    def _loss_change(self) -> Tensor:
        """Q_p . dp, for the change dp of the Neural ODE's parameters since the backward pass."""
        moved = [(p.grad, p - before) for p, before in self._before if p.grad is not None]
        if self._before and not moved:
            raise ProblemError(
                "policy.step() met parameters without gradients; expected those of the last backward pass: call "
                "optimizer.zero_grad() after policy.step()"
            )
        return sum((grad.double() * dp.double()).sum() for grad, dp in moved) + torch.zeros_like(self._ode.T)


def _free_horizon(neural_ode: object) -> FreeHorizon:
    if not isinstance(neural_ode, NeuralODE):
        raise ProblemError(
            f"neural_ode is {type(neural_ode).__name__}; expected the NeuralODE itself: "
            "HorizonPolicy(model.ode, lr=0.1)"
        )
    if not isinstance(neural_ode.horizon, FreeHorizon):
        raise ProblemError(
            f"the NeuralODE has the horizon {neural_ode.horizon}; expected a free one: "
            "NeuralODE(field, horizon=oc.FreeHorizon(initial=1.0, lower=0.1, upper=2.0))"
        )
    return neural_ode.horizon
