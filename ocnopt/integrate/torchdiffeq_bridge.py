"""Any method of torchdiffeq by name.

torchdiffeq is imported where it is used, so that nothing here loads it before it is needed.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

GRID = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")


def method_names() -> tuple[str, ...]:
    """The methods that the installed torchdiffeq offers."""
    from torchdiffeq._impl.odeint import SOLVERS

    return tuple(SOLVERS)


def integrate(
    field: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    times: Tensor,
    *,
    method: str,
    rtol: float,
    atol: float,
    step_size: float | None = None,
    adjoint_parameters: Sequence[Tensor] | None = None,
    on_gradients: Callable[..., Any] | None = None,
) -> Tensor:
    """Integrate with torchdiffeq from ``times[0]`` through ``times[1:]``.

    Args:
        field: ``field(t, x)`` with t a 0-d tensor, shaped like x.
        x: the state at ``times[0]``, one tensor.
        times: start and outputs, in either direction.
        method: a name that torchdiffeq knows.
        rtol: relative tolerance.
        atol: absolute tolerance.
        step_size: longest step of a method on a fixed grid.
        adjoint_parameters: None back-propagates through the solve; otherwise the continuous adjoint runs and
            differentiates these.
        on_gradients: hears of the gradients that the continuous adjoint has found, and may replace them.

    Returns:
        The states at ``times[1:]``, along a new leading axis.
    """
    from torchdiffeq import odeint, odeint_adjoint

    options: dict[str, Any] = {} if step_size is None or method not in GRID else {"step_size": step_size}
    settings: dict[str, Any] = {"rtol": rtol, "atol": atol, "method": method, "options": options}
    if adjoint_parameters is None:
        return odeint(field, x, times, **settings)[1:]
    states = odeint_adjoint(field, x, times, adjoint_params=tuple(adjoint_parameters), **settings)
    if on_gradients is not None and states.grad_fn is not None:
        states.grad_fn.register_hook(on_gradients)
    return states[1:]
