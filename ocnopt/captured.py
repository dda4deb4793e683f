"""Captured tensors as inputs of a problem's functions.

A user's function is a closure; the tensors that it captures are seen by nobody. Those named in ``data=`` may change in
place between solves, and a lowered function takes them as arguments. While :func:`substituted` is entered, every torch
operation that is handed such a tensor sees another one in its place.

What a step is given besides (k, x, u, p) is one row of numbers: the problem's own row of ``step_data``, then its data,
flattened. Data whose leading axes are the batch's belong to one problem each, others to all.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ocnopt.checks import shape
from ocnopt.errors import ProblemError


class _Substitution(TorchFunctionMode):
    """Hands other tensors to the operations."""

    def __init__(self, places: dict[int, Tensor]) -> None:
        super().__init__()
        self._places = places

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*self._seen(args), **self._seen(kwargs or {}))

    def _seen(self, value: Any) -> Any:
        # a tree of arguments is walked by hand: torch's own walk costs several times the operation
        if isinstance(value, Tensor):
            return self._places.get(id(value), value)
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(self._seen(part) for part in value)
        if isinstance(value, dict):
            return {key: self._seen(part) for key, part in value.items()}
        return value


class _Watch(TorchFunctionMode):
    """Notes which of some tensors any operation is handed."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.missing = {id(tensor) for tensor in tensors}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.missing:
            self.missing -= {id(leaf) for leaf in tree_leaves((args, kwargs))}
        return function(*args, **(kwargs or {}))


def substituted(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Within it, operations that are handed one of the tensors see the other one in its place.

    >>> mass = torch.tensor(2.0)
    >>> with substituted([mass], [torch.tensor(3.0)]):
    ...     float(mass + 1)
    4.0
    """
    if all(tensor is other for tensor, other in zip(tensors, others, strict=True)):
        return contextlib.nullcontext()
    return _Substitution({id(tensor): other for tensor, other in zip(tensors, others, strict=True)})


@contextlib.contextmanager
def must_be_read(data: Sequence[Tensor]) -> Iterator[None]:
    """Refuse data that no function reads while it is entered.

    Raises:
        ProblemError: naming the first that is not read.
    """
    if not data:
        yield
        return
    with _Watch(data) as watch:
        yield
    for i, tensor in enumerate(data):
        if id(tensor) in watch.missing:
            raise ProblemError(
                f"data[{i}] of shape {shape(tensor)} is read by none of the functions; expected a tensor that they "
                "capture themselves: no view, copy or number made of it outside of them"
            )


@contextlib.contextmanager
def must_not_be_read(data: Sequence[Tensor], name: str) -> Iterator[None]:
    """Refuse a function, called while it is entered, that reads data: what it returns is kept as it is.

    Raises:
        ProblemError: naming the function and the first that it reads.
    """
    with _Watch(data) as watch:
        yield
    for i, tensor in enumerate(data):
        if id(tensor) not in watch.missing:
            raise ProblemError(
                f"{name} reads data[{i}], but bounds are read once and stay; expected bounds that data do not change: "
                "write those as a path_constraint"
            )


def belongs_to_each(tensor: Tensor, batch_shape: Sequence[int]) -> bool:
    """Whether data hold something for each problem of a batch."""
    axes = len(batch_shape)
    return axes > 0 and tuple(tensor.shape[:axes]) == tuple(batch_shape)


def of_problems(data: Sequence[Tensor], batch_shape: Sequence[int], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The data, changed where they belong to each problem."""
    return [change(tensor) if belongs_to_each(tensor, batch_shape) else tensor for tensor in data]


def which_of_each(problem: Any) -> Sequence[bool]:
    """Which of a problem's data belong to one problem of its batch each."""
    known: Sequence[bool] | None = problem.data_of_each
    return [belongs_to_each(tensor, problem.batch_shape) for tensor in problem.data] if known is None else known


def given_rows(problem: Any) -> Tensor:
    """What each step and the end are given: ``(N + 1, lanes, s)``, lanes = 1 where it is the same for all problems."""
    batch = problem.batch_shape
    count, nodes = math.prod(batch), problem.steps + 1
    parts = [problem.initial_state.new_zeros(nodes, 1, 0)]
    if problem.step_data is not None:
        parts.append(problem.step_data.detach().reshape(nodes, count, -1))
    for tensor, own in zip(problem.data, which_of_each(problem), strict=True):
        lanes = count if own else 1
        parts.append(tensor.detach().reshape(1, lanes, -1).expand(nodes, -1, -1))
    lanes = max(part.shape[1] for part in parts)
    return torch.cat([part.expand(-1, lanes, -1) for part in parts], dim=-1)
