"""A policy for the integration time T of a Neural ODE, learned beside its weights.

T is one more static control. For the cost Phi(x(T)) + (c/2) T^2 with Phi a mean over B samples, s_i = F_i . dPhi/dx_i
at T is what sample i adds to dPhi/dT, and g_i what it adds to dPhi/dp. The minimum over T, after the parameters have
moved by dp, is the feedback rule T <- T - eta (Q_T + Q_Tp . dp) / Q_TT with Q_T = c T + sum_i s_i and

    "gauss_newton"    Q_TT = c + B sum_i s_i^2,    Q_Tp . dp = B sum_i s_i (g_i . dp),
    "published"       Q_TT the same,               Q_Tp . dp = (sum_i s_i) (Q_p . dp), a product of means,
    "exact"           the second derivatives of Phi themselves.

All belong to the parameters of the Neural ODE that dp starts from: the policy notes them during the backward pass,
before the optimiser moves. F and dPhi/dx at T are handed over by that pass itself. The first takes the solves of that
pass again at an update, with cotangents weighed by s_i. The last evaluates the loss once more and differentiates it
twice, which also makes s_i anew: the Neural ODE has its noted parameters for that while, but layers around it are
already where the optimiser has moved them, so that its derivatives are those at their new weights.

Source: Liu, Chen, Theodorou, arXiv 2109.14158.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocnopt.checks import is_number, is_whole
from ocnopt.differential.kronecker import release
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.checks import is_distributed
from ocnopt.optim.policy_checks import (
    check_policy_options,
    check_policy_state,
    check_scaler,
    check_unscaled,
    free_horizon,
)
from ocnopt.optim.ranks import beside, unwrapped
from ocnopt.optim.shares import Pair, Seen, Shares, dot
from ocnopt.optim.stretched import Second, second_derivatives

# What torch's optimisers call the options of a group: they come back with the state.
_OPTIONS = ("rule", "curvature", "lr", "penalty", "every", "averaging", "reduction", "max_change")
_SMALLEST = 1e-300  # of Q_TT
OUTLIER = 100.0  # times the median of Q_TT since the last update, beyond which an iteration does not count


class HorizonPolicy:
    """Moves the integration time of a NeuralODE that was built with ``horizon=oc.FreeHorizon(...)``.

    Call ``policy.step()`` after ``optimizer.step()`` and before the gradients are cleared. Several backward passes
    without ``zero_grad`` in between accumulate: each forward pass that follows a backward pass is one of other samples,
    while all solves within one forward and backward pass are of the same samples.

    A solve with output times counts where the last of them is T, the others being held. Where T is none of them it adds
    nothing, as nothing depends on T, and an update with nothing else raises; where it is one before the last (they
    start from T, or go on) it is refused. With times for each sample those that end at T have shares, the others, held,
    shares of zero.

    With a ``torch.amp.GradScaler`` say ``HorizonPolicy(ode, lr=0.1, scaler=scaler)`` and call, in this order,
    ``scaler.scale(loss).backward()``, ``scaler.step(optimizer)``, ``policy.step()``, ``scaler.update()``. The scale is
    read during the backward pass. Where the scaled gradients overflow, which the scaler skips, T stays and the
    iteration does not count.

    A model with several such blocks takes one policy for each: all see the same backward pass, each moves its own T as
    if the others stayed. Where k blocks do much the same, that is k times too far: divide lr by k.

    Args:
        neural_ode: the module whose T moves.
        rule: "feedback": second order, with the response of T to the change of the parameters. "adjoint": gradient
            descent, T <- T - eta Q_T.
        curvature: of the feedback rule. "published": shares of the samples and a product of means, which costs nothing.
            "gauss_newton": the mean of products of shares and gradients; an update takes the solves of its iteration
            again, forward and backward. It is consistent, but that of a single batch, and swings more. "exact": second
            derivatives of the loss, for which ``policy.step(closure)`` needs a function that computes it again, with
            layers around the Neural ODE as they are by then; an update costs about three iterations.
        lr: eta; at most 1 is sensible for "feedback".
        penalty: c of the cost (c/2) T^2 on the integration time. At zero the steps of "feedback" grow as the shares
            vanish with a loss that is fitted, up to ``max_change``.
        every: iterations from one update of T to the next. The first update is that of the first iteration, before the
            weights have learned to fill the old T.
        averaging: weight of the past in Q_TT, a running mean over updates, as shares have heavy tails. Q_T, also in a
            product of means, is the mean over all iterations since the last update, but for those with a Q_TT of a
            hundred times their median: one step that went wrong, and that an optimiser takes back, would rule T for
            long. At zero both are those of the last iteration, as published, and nothing watches in between.
        reduction: "mean" or "sum": how the loss combines samples.
        max_change: the largest change of T in one update, as a share of T - t0; it holds where Q_TT is small.
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
        curvature: str = "published",
        lr: float = 1.0,
        penalty: float = 0.0,
        every: int = 1,
        averaging: float = 0.9,
        reduction: str = "mean",
        max_change: float = 0.8,
        scaler: torch.amp.GradScaler | Any | None = None,
        process_group: Any | None = None,
    ) -> None:
        self._group = process_group
        if is_distributed() and isinstance(neural_ode, nn.Module):
            neural_ode, self._group = unwrapped(neural_ode, process_group)
        check_scaler(scaler)
        free_horizon(neural_ode)
        self._ode, self._scaler = neural_ode, scaler
        self.rule, self.curvature, self.lr, self.penalty, self.every = rule, curvature, lr, penalty, every
        self.averaging, self.reduction, self.max_change = averaging, reduction, max_change
        check_policy_options(self._options())
        self._count, self._seen, self._past = 0, list[tuple[float, float]](), (0.0, 0.0)
        self._factor = 1  # makes second moments of shares in a mean those of the samples' own losses
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_handles", "_shares", "_group")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _group=None)
        self._start()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Count an iteration, and move T if its turn has come.

        Args:
            closure: computes the loss of the iteration's samples and returns it, without ``backward()``; it is called
                at an update with curvature="exact" alone.

        Raises:
            ProblemError: no backward pass has been seen, its gradients were scaled since, or are gone though the rule
                needs them ("feedback"), or there is no closure where one is needed.
            NonFiniteError: dL/dT is NaN or infinite without a scaler; T stays.
        """
        if not self._handles or self._finish(closure):
            self._count += 1
        self._watch()

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides T, which is saved with the module."""
        return {"count": self._count, "seen": [*self._seen], "past": self._past} | self._options()

    def load_state_dict(self, state_dict: Mapping[str, Any] | Any) -> None:
        """Go on from a state that :meth:`state_dict` returned.

        Raises:
            ProblemError: the state is something else, or numbers in it cannot be right; nothing is loaded then.
        """
        if not isinstance(state_dict, Mapping):
            came = type(state_dict).__name__
            raise ProblemError(
                f"the state is {came}; expected a dict: load what state_dict() of a HorizonPolicy returned"
            )
        check_policy_state(state_dict, _OPTIONS)
        _check_progress(state_dict["count"], state_dict.get("seen", []), state_dict.get("past", (0.0, 0.0)))
        options = {name: state_dict.get(name, value) for name, value in self._options().items()}
        check_policy_options(options)
        self.__dict__.update(options, _count=state_dict["count"], _seen=[*state_dict.get("seen", ())])
        self._past = state_dict.get("past", (0.0, 0.0))
        self._watch()

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}

    def _start(self) -> None:
        """Begin to watch, for as long as this policy is used."""
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, release, self._handles)
        self._watch()

    @property
    def _moves(self) -> bool:
        return self._count % self.every == 0

    def _watch(self) -> None:
        """Watch the next iteration if it counts."""
        release(self._handles)
        keep = self.rule == "feedback" and self._moves
        replay = keep and self.curvature == "gauss_newton"
        self._shares = Shares([*self._ode.parameters()], self._scaler, keep, replay)
        if self._moves or self.averaging:
            self._shares.attach(self._ode, self._handles)

    def _finish(self, closure: Callable[[], Tensor] | None) -> bool:
        """Note what an iteration says of T, and move T; False if it does not count, as its gradients overflowed."""
        samples, count = self._shares.take(), self._count_of_ranks()
        if samples and count == 1 and self._scaler is None and self._shares.witness is not None:
            check_unscaled(*self._shares.witness)  # of several ranks, the mean comes after the pass
        s = torch.cat([each.shares for each in samples if each.shares is not None] or [torch.zeros(0)])
        passes, size, total, squares = self._sum(
            [float(len(samples)), float(len(s)), float(s.sum()), float(s.square().sum())]
        )
        if passes:
            self._factor = int(size) if self.reduction == "mean" else 1
            seen = total / count, squares / count**2 * self._factor
            if not math.isfinite(seen[0]):
                return self._skip(seen[0])
            self._seen.append(seen)
        if not self._moves:
            return True
        if not self._seen:
            raise ProblemError(
                "policy.step() met no backward pass through the NeuralODE since the last step, none that ended at T; "
                "expected loss.backward(), optimizer.step(), policy.step() in this order, and a loss of ode(x), or of "
                "ode(x, times) with times that end at float(ode.T)"
            )
        past = self._past
        change = self._change(samples, closure)
        if math.isnan(change):
            self._seen.pop()
            self._past = past
            return self._skip(change)
        self._seen = []
        T, bounds = self._ode.T, free_horizon(self._ode)
        longest = self.max_change * abs(float(T) - bounds.t0)
        T.sub_(max(-longest, min(longest, change))).clamp_(bounds.lower, bounds.upper)
        return True

    def _change(self, samples: Sequence[Seen], closure: Callable[[], Tensor] | None) -> float:
        """What the rule takes from T."""
        usual = OUTLIER * median(Q_TT for _, Q_TT in self._seen)
        counted = [one for one in self._seen if one[1] <= usual or not usual]
        mean, Q_TT = (sum(column) / len(counted) for column in zip(*counted, strict=True))
        Q_T = mean + self.penalty * float(self._ode.T)
        if self.rule == "adjoint":
            return self.lr * Q_T
        directions = self._directions()
        if self.curvature == "exact":
            second = self._second(closure, directions)
            found = self._sum([float(second.T + second.along), float(second.TT)])
            first, Q_TT = (value / self._count_of_ranks() for value in found)
            Q_T += first - self._seen[-1][0]
        elif self.curvature == "published":
            Q_T += mean * sum(float(dot(p.grad, dp)) for p, dp in directions if p.grad is not None)
        else:
            Q_T += self._response(samples, directions)
        past, weight = (self.averaging * old for old in self._past)
        past, weight = past + (1.0 - self.averaging) * Q_TT, weight + 1.0 - self.averaging
        self._past = past, weight
        return self.lr * Q_T / max(abs(self.penalty + past / weight), _SMALLEST)

    def _count_of_ranks(self) -> int:
        """k, whose mean the loss is, so that a share in the loss of one is k times too large."""
        ranks = beside(self._group) if is_distributed() else None
        return 1 if ranks is None else ranks.count

    def _sum(self, numbers: Sequence[float]) -> Sequence[float]:
        """Sums over the ranks, all of which call this at the same time."""
        ranks = beside(self._group) if is_distributed() else None
        if ranks is None:
            return numbers
        return ranks.sum(torch.tensor(numbers, dtype=torch.float64, device=self._ode.T.device)).tolist()

    def _response(self, samples: Sequence[Seen], directions: Sequence[Pair]) -> float:
        """B sum_i s_i (g_i . dp)."""
        products = [0.0]
        if any(bool(dp.any()) for _, dp in directions):
            with _at(self._shares.before):
                products += [
                    float(solve.product(self._ode, cotangents, each.shares, directions))
                    for each in samples
                    for solve, cotangents in each.solves.items()
                    if each.shares is not None and len(each.shares)
                ]
        return self._factor * self._sum([sum(products)])[0] / self._count_of_ranks() ** 2

    def _second(self, closure: Callable[[], Tensor] | None, directions: Sequence[Pair]) -> Second:
        if closure is None:
            raise ProblemError(
                "policy.step() came without a closure for curvature='exact'; expected policy.step(closure), with a "
                "function that computes the loss of the same samples and returns it, without backward()"
            )
        with _at(self._shares.before):
            return second_derivatives(self._ode, closure, directions)

    def _skip(self, value: float) -> bool:
        """What a number that is not finite means."""
        if self._scaler is not None and self._scaler.is_enabled():
            return False
        raise NonFiniteError(
            f"dL/dT is {value}, or the change of T; expected finite numbers. T stays at {float(self._ode.T)}: look for "
            "NaN or infinity in the loss"
        )

    def _directions(self) -> list[Pair]:
        """The change dp of each of the Neural ODE's parameters since the backward pass."""
        moved = [(p, p - before) for p, before in self._shares.before if p.grad is not None]
        if self._shares.before and not moved:
            raise ProblemError(
                "policy.step() met parameters without gradients; expected those of the last backward pass: call "
                "optimizer.zero_grad() after policy.step()"
            )
        return moved


def _check_progress(count: object, seen: object, past: object) -> None:
    """Refuse what no policy has counted, seen or averaged."""
    cure = "load what the state_dict() of a HorizonPolicy returned"
    if not is_whole(count) or count < 0:
        raise ProblemError(f"the state's 'count' is {count!r}; expected a whole number >= 0: {cure}")
    for name, pairs in (("seen", seen), ("past", [past])):
        if not isinstance(pairs, (list, tuple)) or not all(map(_is_pair, pairs)):
            came = past if name == "past" else seen
            what = "a list of pairs" if name == "seen" else "a pair"
            raise ProblemError(
                f"the state's {name!r} is {came!r}; expected {what} of finite numbers, the second >= 0: {cure}"
            )


def _is_pair(value: Any) -> bool:
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    return is_pair and all(is_number(each) and math.isfinite(each) for each in value) and value[1] >= 0.0


@contextmanager
def _at(values: Sequence[Pair]) -> Iterator[None]:
    """Give parameters other values for a while."""
    now = [parameter.detach().clone() for parameter, _ in values]
    try:
        for parameter, value in values:
            parameter.copy_(value)
        yield
    finally:
        for (parameter, _), value in zip(values, now, strict=True):
            parameter.copy_(value)
