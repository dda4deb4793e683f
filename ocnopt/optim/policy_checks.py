"""What a user hands to a HorizonPolicy: read here once, or refused."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.checks import check_choice, check_count, check_number
from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon


def check_policy_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a HorizonPolicy that are out of range, given or loaded."""
    check_choice("rule", options["rule"], ("feedback", "adjoint"))
    check_choice("curvature", options["curvature"], ("gauss_newton", "published", "exact"))
    check_number("lr", options["lr"], "a number >= 0")
    check_number("penalty", options["penalty"], "a number >= 0")
    check_count("every", options["every"], default=1)
    check_number("averaging", options["averaging"], "a number in [0, 1), 0.9 by default", below=1.0)
    check_choice("reduction", options["reduction"], ("mean", "sum"))
    check_number("max_change", options["max_change"], "a number > 0, 0.8 by default", above=1e-12)


def check_times(times: Sequence[float], T: float) -> None:
    """Refuse times with T before the last: the pass hands over the slope and costate of the last alone."""
    if any(math.isclose(t, T, rel_tol=1e-6, abs_tol=1e-9) for t in times[:-1]):
        raise ProblemError(
            f"a HorizonPolicy met times from {times[0]:.6g} to {times[-1]:.6g} with T = {T:.6g} before the last; "
            "expected T as the last, or not at all: solve on from T, or back, by a NeuralODE of its own, or within "
            "torch.no_grad() where no gradient is needed"
        )


def check_policy_state(state: Mapping[str, Any], options: Sequence[str]) -> None:
    """Refuse the state of anything but a HorizonPolicy; earlier versions saved fewer options, or none."""
    if "count" not in state or not set(state) <= {"count", "seen", "past", *options}:
        raise ProblemError(
            f"the state holds {sorted(state)}; expected the 'count' of a HorizonPolicy: load what its "
            "state_dict() returned"
        )


def free_horizon(neural_ode: object) -> FreeHorizon:
    """The horizon of a Neural ODE whose T may move."""
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


def check_scaler(scaler: object) -> None:
    """Refuse what does not scale losses."""
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise ProblemError(
            f"scaler is {type(scaler).__name__}; expected the torch.amp.GradScaler that scales the loss, or None"
        )


def check_unscaled(parameter: Tensor, norm: Tensor) -> None:
    """Refuse a gradient that a GradScaler unscaled after the backward pass: by a power of two, as nothing else does."""
    if parameter.grad is None or not bool(norm.isfinite()) or not bool(norm):
        return
    ratio = float(parameter.grad.norm() / norm)
    if 0.0 < ratio < 0.75 and abs(math.log2(ratio) - round(math.log2(ratio))) < 1e-5:
        raise ProblemError(
            f"the gradients were multiplied by {ratio:.3g} after the backward pass, as a GradScaler does; expected "
            "those of the loss itself: HorizonPolicy(ode, lr=0.1, scaler=scaler), or scale the loss, not its gradients"
        )
