"""A plain function as the field of a Neural ODE: what it depends on is named, and trained where it lives."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ocnopt.errors import ProblemError


class FunctionField(nn.Module):
    """A function ``f(t, x)`` as a module.

    The tensors and modules that it depends on stay the objects that they are: the function goes on reading them, an
    optimiser that moves them here moves them there.

    Args:
        function: any callable ``f(t, x) -> dx/dt``.
        parameters: leaf tensors that require gradients, nn.Parameters and modules, as an iterable or by name; or one of
            these.

    Raises:
        ProblemError: they hold something else, or a tensor that cannot be trained.
    """

    def __init__(self, function: Callable[..., Any], parameters: Any = ()) -> None:
        super().__init__()
        self._function = function
        for name, value in _named(parameters).items():
            if isinstance(value, nn.Module):
                self._modules[name] = value
            else:
                _check_leaf(name, value)
                self._parameters[name] = value
        self._known = tuple(self._parameters.values())

    def forward(self, t: Tensor, x: Any) -> Any:
        """Call the function."""
        if any(now is not was for now, was in zip(self._parameters.values(), self._known, strict=True)):
            raise ProblemError(
                f"the parameters of the function {self._name()} were exchanged (torch.func.functional_call), "
                "which it does not see; expected the tensors that it was made with: "
                "write the field as an nn.Module that holds them"
            )
        return self._function(t, x)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        # assign=True would put others in the place of the tensors that the function reads: they take the new data over
        if local_metadata.get("assign_to_params_buffers"):
            for name, parameter in self._parameters.items():
                value = state_dict.get(prefix + name)
                if parameter is not None and isinstance(value, Tensor) and value.shape == parameter.shape:
                    parameter.data = value.detach()
        local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def extra_repr(self) -> str:
        """The function's name."""
        return self._name()

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = self._function
        while isinstance(base, partial):
            base = base.func
        if isinstance(base, FunctionType) and (self._parameters or self._modules):
            raise ProblemError(
                f"a NeuralODE around the function {self._name()} was to be copied or pickled: the copy's parameters "
                "would be new ones, while the function goes on reading the old; expected a field that is copied with "
                "what it depends on: an nn.Module, or a method of one; state_dict() saves the parameters of any"
            )
        return super().__reduce_ex__(protocol)

    def _name(self) -> str:
        return repr(getattr(self._function, "__qualname__", type(self._function).__name__))


def _named(parameters: Any) -> dict[str, Any]:
    if isinstance(parameters, nn.Module | Tensor):
        parameters = [parameters]
    if isinstance(parameters, Mapping):
        named = dict(parameters)
    elif isinstance(parameters, Iterable):
        named = {str(i): value for i, value in enumerate(parameters)}
    else:
        named = {"": parameters}
    for name, value in named.items():
        if not isinstance(value, nn.Module | Tensor):
            raise ProblemError(
                f"parameters holds {type(value).__name__}; expected tensors, nn.Parameters and modules, as a list or "
                "a dict: parameters=[weight, bias], parameters=net"
            )
        if not isinstance(name, str) or not name or "." in name:
            raise ProblemError(f"parameters has the name {name!r}; expected non-empty strings without dots")
    return named


def _check_leaf(name: str, value: Tensor) -> None:
    if value.grad_fn is not None:
        raise ProblemError(
            f"parameters[{name!r}] was made by {value.grad_fn.name()}, so that it changes as what it is made of is "
            "trained; expected leaf tensors: hand it over as adjoint_params=lambda: [...], made anew within"
        )
    if not isinstance(value, nn.Parameter) and not value.requires_grad:
        raise ProblemError(
            f"parameters[{name!r}], of shape {tuple(value.shape)}, does not require gradients; expected tensors to be "
            "trained: call requires_grad_() on it, or leave out what is constant"
        )


def as_field(field: Any, parameters: Any) -> nn.Module:
    """A module, as it is, or a function as one.

    Raises:
        ProblemError: it is neither, or parameters are given for a module.
    """
    if isinstance(field, nn.Module):
        if parameters is not None:
            raise ProblemError(
                f"parameters= met the field {type(field).__name__}, a module, which has parameters of its own; "
                "expected them for a function alone: adjoint_params=[...] names tensors besides a module's own"
            )
        return field
    if not callable(field) or isinstance(field, type):
        came = f"the class {field.__name__}" if isinstance(field, type) else type(field).__name__
        raise ProblemError(
            f"field is {came}; expected an nn.Module or a function, called as field(t, x), with what a function "
            "depends on as parameters=[...]"
        )
    return FunctionField(field, () if parameters is None else parameters)
