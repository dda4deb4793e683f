"""What the derivative functions are asked: a problem, a point and tolerances, read and checked once."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ocnopt import checks
from ocnopt.differential.flow import Flow
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, Lifted, lift


class Request(NamedTuple):
    """The problem at p (T counted), and controls ``(*batch, N, m)``: one interval with m = 0 where there are none."""

    flow: Flow
    controls: Tensor


def read_request(problem: Any, parameters: Any, controls: Any, horizon: Any, rtol: Any, atol: Any) -> Request:
    """Read where to differentiate; None stands for the problem's own parameters and end time.

    Steps are held to a tenth of the tolerances, so that the results meet them, but no tighter than the dtype rounds.

    Raises:
        ProblemError: something is missing, superfluous or of a wrong shape.
    """
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
    return Request(Flow(lifted, p, *tenths), _controls(problem, controls))


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
    if not isinstance(value, int | float) or not value > 0:
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
