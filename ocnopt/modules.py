r"""A network as a problem: the weights of ``field(t, x)`` become the static control p.

dx/dt = field(t, x; p), with p the trainable parameters one after the other, each flattened; the rest of the module
(frozen parameters, buffers) stays as it is. The field sees what networks expect: t a 0-d tensor, x ``(samples, n)``.

Shapes: x ``(..., n)``, p ``(q,)`` or with leading axes, ``(..., q)``: then each sample has weights of its own.
"""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ocnopt import checks
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon, Function, Horizon


@dataclass(frozen=True)
class WeightLayout:
    """Names and shapes of a module's trainable parameters, in the order of p."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, module: nn.Module) -> "WeightLayout":
        """Read a module; frozen parameters are left out."""
        return cls(tuple((name, tuple(w.shape)) for name, w in module.named_parameters() if w.requires_grad))

    def unflatten(self, p: Tensor) -> dict[str, Tensor]:
        """p ``(..., q)`` as named tensors ``(..., *shape)``, views of it."""
        sizes = [torch.Size(shape).numel() for _, shape in self.shapes]
        if p.ndim == 0 or p.shape[-1] != sum(sizes):
            raise ProblemError(
                f"p has shape {checks.shape(p)}; expected (..., {sum(sizes)}), one entry for each trainable weight"
            )
        parts = p.split(sizes, dim=-1)
        return {
            name: part.reshape(*p.shape[:-1], *shape) for (name, shape), part in zip(self.shapes, parts, strict=True)
        }


@dataclass(frozen=True, eq=False)
class ModuleDynamics:
    """``dynamics(t, x, u, p)`` of a module."""

    reads_samples_alike: ClassVar[bool] = True
    field: nn.Module
    layout: WeightLayout

    def __call__(self, t: Tensor, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        """Call the field with the weights p: once for all samples, or, where t or p differ among them, for each."""
        n = x.shape[-1]
        if t.ndim == 0 and p.ndim == 1:
            return self._call(t, x.reshape(-1, n), p).reshape(x.shape)
        lead = x.shape[:-1]
        each_p = p.expand(*lead, p.shape[-1]).reshape(-1, p.shape[-1])
        return torch.vmap(self._call)(t.expand(lead).reshape(-1), x.reshape(-1, 1, n), each_p).reshape(x.shape)

    def _call(self, t: Tensor, x: Tensor, p: Tensor) -> Tensor:
        slope = functional_call(self.field, self.layout.unflatten(p), (t, x))
        if not isinstance(slope, Tensor) or slope.shape != x.shape:
            came = f"shape {checks.shape(slope)}" if isinstance(slope, Tensor) else type(slope).__name__
            raise ProblemError(
                f"field(t, x) returned {came} for x of shape {checks.shape(x)}; expected dx/dt, a tensor shaped like x"
            )
        return slope


def from_module(
    field: nn.Module,
    terminal_cost: Function,
    *,
    initial_state: Any,
    horizon: float | Horizon | FreeHorizon,
    running_cost: Function | None = None,
) -> OCP:
    """Make a problem of a network: its trainable weights become p, in the module's dtype and on its device.

    p is an unknown of ``solve``: the module's own weights are where it starts, and ``differentiable=True`` gives
    gradients to the initial state, not to them. For gradients in what costs capture write an OCP with ``data``.

    Args:
        field: any module ``field(t, x)``, t a 0-d tensor, x ``(samples, n)``, that returns dx/dt shaped like x.
        terminal_cost: ``Phi(t, x)`` or ``Phi(t, x, p)``.
        initial_state: x(t0), ``(*batch, n)``.
        horizon: T, :class:`Horizon` or :class:`FreeHorizon`.
        running_cost: ``l(t, x, u)`` or ``l(t, x, u, p)``, u having size 0.

    Raises:
        ProblemError: no module, nothing to train in it, several dtypes, a cost with other arguments, or whatever
            :class:`OCP` refuses.

    Example:
        >>> class Decay(nn.Linear):
        ...     def forward(self, t, x):
        ...         return super().forward(x)
        >>> problem = from_module(Decay(2, 2), lambda t, x: x[..., 0] ** 2, initial_state=[1.0, 0.0], horizon=1.0)
        >>> {name: tuple(w.shape) for name, w in unflatten(problem, problem.parameters).items()}
        {'weight': (2, 2), 'bias': (2,)}
    """
    weights = trainable_weights(field)
    _check_field(field)
    x0 = checks.float_tensor("initial_state", initial_state, weights[0].dtype, weights[0].device)
    graph = checks.traced(initial_state, x0.dtype)
    return OCP(
        ModuleDynamics(field, WeightLayout.of(field)),
        None if running_cost is None else _with_p("running_cost", running_cost, ("t", "x", "u")),
        _with_p("terminal_cost", terminal_cost, ("t", "x")),
        initial_state=x0 if graph is None else graph.to(x0.device),
        horizon=horizon,
        parameters=torch.cat([w.detach().reshape(-1) for w in weights]),
        dtype=weights[0].dtype,
    )


def trainable_weights(field: Any) -> list[nn.Parameter]:
    """The weights that become p.

    Raises:
        ProblemError: no module, nothing to train in it, or several dtypes.
    """
    if not isinstance(field, nn.Module):
        raise ProblemError(
            f"field is {type(field).__name__}; expected a torch.nn.Module: for a function use oc.OCP with parameters="
        )
    weights = [w for w in field.parameters() if w.requires_grad]
    if not weights:
        raise ProblemError(
            "field has no trainable weights; expected some: call requires_grad_(True) on those that are to become p"
        )
    dtypes = {w.dtype for w in weights}
    if len(dtypes) > 1:
        raise ProblemError(
            f"the weights of field have dtypes {sorted(map(str, dtypes))}; expected one: use field.to(torch.float64)"
        )
    return weights


def _check_field(field: nn.Module) -> None:
    """Refuse a module whose forward does not take (t, x)."""
    try:
        signature = inspect.signature(field.forward)
    except (TypeError, ValueError):
        return
    if not _fits(signature, 2):
        raise ProblemError(
            f"field takes {signature}; expected forward(t, x), t a 0-d tensor: wrap it in a module whose "
            "forward(self, t, x) calls it, and leave t aside where dx/dt does not depend on time"
        )


def unflatten(source: OCP | nn.Module, p: Tensor) -> dict[str, Tensor]:
    """Name the weights in p.

    Args:
        source: a problem made by :func:`from_module`, or the module.
        p: ``(..., q)``: parameters, a gradient, columns of a Hessian.

    Returns:
        Views of p by the parameters' names, each ``(..., *shape)``; fit for ``load_state_dict(..., strict=False)``.

    Raises:
        ProblemError: the problem was not made from a module, or p has another size.
    """
    if isinstance(source, nn.Module):
        return WeightLayout.of(source).unflatten(p)
    if isinstance(source.dynamics, ModuleDynamics):
        return source.dynamics.layout.unflatten(p)
    raise ProblemError(
        "the problem's parameters have no names; expected a problem made by oc.from_module, or the module itself"
    )


def _with_p(name: str, function: Any, arguments: tuple[str, ...]) -> Function:
    """The cost as a function that takes p too."""
    checks.callable_or_none(name, function, required=True)
    short = ", ".join(arguments)
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return lambda *given: function(*given[:-1])
    if _fits(signature, len(arguments) + 1) and _reads_p(signature, len(arguments)):
        return function
    if _fits(signature, len(arguments)):
        return lambda *given: function(*given[:-1])
    raise ProblemError(f"{name} takes {signature}; expected ({short}) or ({short}, p)")


def _fits(signature: inspect.Signature, count: int) -> bool:
    """Whether ``count`` positional arguments make a call."""
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _reads_p(signature: inspect.Signature, position: int) -> bool:
    """Whether the argument there is meant for p: required, or called p; others with defaults carry captured data."""
    parameters = list(signature.parameters.values())
    if position >= len(parameters) or parameters[position].kind is inspect.Parameter.VAR_POSITIONAL:
        return False
    return parameters[position].default is inspect.Parameter.empty or parameters[position].name == "p"
