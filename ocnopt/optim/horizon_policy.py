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

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocnopt.differential.kronecker import is_gone, is_within_backward, release
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.checks import (
    check_policy_options,
    check_policy_state,
    check_scaler,
    check_times,
    check_unscaled,
    free_horizon,
    is_distributed,
)
from ocnopt.optim.ranks import beside, unwrapped

# What torch's optimisers call the options of a group: they come back with the state.
_OPTIONS = ("rule", "lr", "penalty", "every", "reduction", "max_change")


class _Shares:
    """The share s_i of each sample in dL/dT, and the parameters that it belongs to: observer of one Neural ODE.

    Shares count once a gradient has reached ``.grad``, and for as long as it is there. Further solves in the same pass
    are of the same samples; a new forward pass, after a backward pass, is of others.
    """

    def __init__(self, parameters: list[nn.Parameter], scaler: torch.amp.GradScaler | None, keep: bool) -> None:
        self._parameters, self._scaler, self._keep = parameters, scaler, keep
        self._handles: list[RemovableHandle] = []
        self._hooked: set[Tensor] = set()
        self.before: list[tuple[Tensor, Tensor]] = []
        self._closed: list[Tensor] = []
        self._present: list[Tensor] = []
        self._arrived = False
        self.witness: tuple[Tensor, Tensor] | None = None  # a parameter, and the norm of its gradient as it arrived

    def attach(self, neural_ode: NeuralODE, handles: list[RemovableHandle]) -> None:
        """Watch until the handles, which are added to a list, are removed."""
        self._handles = handles
        handles += [neural_ode.observe(self), neural_ode.register_forward_pre_hook(self._begin, with_kwargs=True)]

    def stage(self, input_weight: float, gradient_weight: float) -> AbstractContextManager[None]:
        """The policy needs nothing along the path: see :class:`ocnopt.differential.discrete.Observer`."""
        return nullcontext()

    def terminal(self, x: Tensor, slope: Tensor, costate: Tensor) -> None:
        """Note the shares, and the parameters before they move."""
        products = slope.double() * costate.double()
        products = products.flatten(1).sum(1) if x.ndim > 1 else products.sum()[None]
        if self._scaler is not None:
            products = products / self._scaler.scale(products.new_ones(()))
        live = self._live()
        if live and (self._closed or self._arrived) and all(is_gone(parameter.grad) for parameter in live):
            self._closed, self._present, self.before = [], [], []
        if self._present and len(self._present[-1]) == len(products):
            self._present[-1] = self._present[-1] + products
        else:
            self._present.append(products)
        if self._keep and not self.before:
            self.before = [(parameter, parameter.detach().clone()) for parameter in live]

    def take(self) -> list[Tensor]:
        """The shares that count."""
        if self._arrived or not self._live():
            self._closed += self._present
        if not self._closed:
            self.before = []
        self._present, self._arrived = [], False
        return self._closed

    def _live(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    def _arrive(self, parameter: Tensor) -> None:
        self._arrived = True
        gradient = parameter.grad
        if gradient is not None and (self.witness is None or self.witness[0] is parameter):
            self.witness = parameter, gradient.norm()

    def _begin(self, neural_ode: NeuralODE, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_within_backward():
            return
        times = kwargs.get("times", args[1] if len(args) > 1 else None)
        if times is not None and torch.is_grad_enabled():
            check_times(neural_ode._read_times(times)[0], float(neural_ode.T))
        self.take()
        new = [parameter for parameter in self._live() if parameter not in self._hooked]
        self._handles += [parameter.register_post_accumulate_grad_hook(self._arrive) for parameter in new]
        self._hooked.update(new)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shares, ([], None, False)  # a copy of a watched module is not watched


class HorizonPolicy:
    """Moves the integration time of a NeuralODE that was built with ``horizon=oc.FreeHorizon(...)``.

    Call ``policy.step()`` after ``optimizer.step()`` and before the gradients are cleared. Several backward passes
    without ``zero_grad`` in between accumulate: each forward pass that follows a backward pass is one of other samples,
    while all solves within one forward and backward pass are of the same samples.

    A solve with output times counts where the last of them is T, the others being held. Where T is none of them it adds
    nothing, as nothing depends on T; where it is one before the last (they start from T, or go on) it is refused.

    With a ``torch.amp.GradScaler`` say ``HorizonPolicy(ode, lr=0.1, scaler=scaler)`` and call, in this order,
    ``scaler.scale(loss).backward()``, ``scaler.step(optimizer)``, ``policy.step()``, ``scaler.update()``. The scale is
    read during the backward pass. Where the scaled gradients overflow, which the scaler skips, T stays and the
    iteration does not count.

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
        scaler: the GradScaler that scales the loss, if there is one.
        process_group: the processes that train the model together; all if left out. See :mod:`ocnopt.optim.ranks`.

    Raises:
        ProblemError: an argument is wrong, or the horizon is not free.

    Source: Liu, Chen, Theodorou, "Second-order Neural ODE optimizer", arXiv 2109.14158.

    >>> from ocnopt.ocp import FreeHorizon
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
        scaler: torch.amp.GradScaler | Any | None = None,
        process_group: Any | None = None,
    ) -> None:
        self._group = process_group
        if is_distributed() and isinstance(neural_ode, nn.Module):
            neural_ode, self._group = unwrapped(neural_ode, process_group)
        check_scaler(scaler)
        options = {"rule": rule, "lr": lr, "penalty": penalty, "every": every}
        options |= {"reduction": reduction, "max_change": max_change}
        check_policy_options(options)
        self._ode, self._bounds, self._scaler = neural_ode, free_horizon(neural_ode), scaler
        self.rule, self.lr, self.penalty, self.every = rule, lr, penalty, every
        self.reduction, self.max_change, self._count = reduction, max_change, 0
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_handles", "_shares", "_group")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _group=None)
        self._start()

    @torch.no_grad()
    def step(self) -> None:
        """Count an iteration, and move T if its turn has come.

        Raises:
            ProblemError: no backward pass has been seen, its gradients were scaled since, or are gone though the rule
                needs them ("feedback").
            NonFiniteError: dL/dT is NaN or infinite without a scaler; T stays.
        """
        if not self._handles or self._move():
            self._count += 1
        self._watch()

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides T, which is saved with the module."""
        return {"count": self._count} | {name: getattr(self, name) for name in _OPTIONS}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned.

        Raises:
            ProblemError: the state is something else.
        """
        check_policy_state(state_dict, _OPTIONS)
        options = {name: state_dict.get(name, getattr(self, name)) for name in _OPTIONS}
        check_policy_options(options)
        self.__dict__.update(options, _count=state_dict["count"])
        self._watch()

    def _start(self) -> None:
        """Begin to watch, for as long as this policy is used."""
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, release, self._handles)
        self._watch()

    def _watch(self) -> None:
        """Watch the next iteration if T moves then."""
        release(self._handles)
        self._shares = _Shares([*self._ode.parameters()], self._scaler, keep=self.rule == "feedback")
        if (self._count + 1) % self.every == 0:
            self._shares.attach(self._ode, self._handles)

    def _move(self) -> bool:
        """Move T, unless the scaled gradients overflowed."""
        T, shares = self._ode.T, self._shares.take()
        ranks = beside(self._group) if is_distributed() else None
        if ranks is not None:
            shares = ranks.shares(shares, T.device)
        if not shares:
            raise ProblemError(
                "policy.step() met no backward pass through the NeuralODE since the last step, none that ended at T; "
                "expected loss.backward(), optimizer.step(), policy.step() in this order, and a loss of ode(x), or of "
                "ode(x, times) with times that end at float(ode.T)"
            )
        if self._scaler is None and self._shares.witness is not None and ranks is None:  # else its mean came after
            check_unscaled(*self._shares.witness)
        s = torch.cat(shares).to(T.device)
        Q_T = self.penalty * T + s.sum()
        if self.rule == "adjoint":
            change = self.lr * Q_T
        else:
            Q_TT = self.penalty + s.square().sum() * (len(s) if self.reduction == "mean" else 1)
            change = self.lr * (Q_T + s.sum() * self._loss_change()) / Q_TT.clamp(min=torch.finfo(Q_TT.dtype).tiny)
        if not bool(torch.isfinite(Q_T)) or bool(torch.isnan(change)):
            if self._scaler is not None and self._scaler.is_enabled():
                return False
            raise NonFiniteError(
                f"dL/dT is {float(Q_T)} and the change of T {float(change)}; expected finite numbers. T stays at "
                f"{float(T)}: look for NaN or infinity in the loss"
            )
        longest = self.max_change * (self._bounds.upper - self._bounds.lower)
        T.sub_(change.clamp(-longest, longest)).clamp_(self._bounds.lower, self._bounds.upper)
        return True

    def _loss_change(self) -> Tensor:
        """Q_p . dp, for the change dp of the Neural ODE's parameters since the backward pass."""
        moved = [(p.grad, p - before) for p, before in self._shares.before if p.grad is not None]
        if self._shares.before and not moved:
            raise ProblemError(
                "policy.step() met parameters without gradients; expected those of the last backward pass: call "
                "optimizer.zero_grad() after policy.step()"
            )
        return sum((grad.double() * dp.double()).sum() for grad, dp in moved) + torch.zeros_like(self._ode.T)
