"""Tensors in nested lists, tuples and dicts."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor


def like(value: Any, items: list[Any]) -> Any:
    """The items as a list or (named) tuple of the kind that ``value`` is."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same lists, tuples and dicts of changed tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        changed = copy.copy(value)
        changed.update({key: mapped(item, change) for key, item in value.items()})
        return changed
    if isinstance(value, (list, tuple)):
        return like(value, [mapped(item, change) for item in value])
    return value


def tensors(value: object) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return []
