"""Optimal control in PyTorch: training a network and steering a rocket are the same problem.

The names are those of :mod:`ocnopt.api`, which imports torch; they are read at their first use (PEP 562), so that the
command line answers ``--help`` at once.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ocnopt.api import *  # noqa: F403 - every name of the interface; a type checker must not see __getattr__
else:

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return __dir__()
        if not name.startswith("__"):
            if find_spec(f"ocnopt.{name}"):
                return import_module(f"ocnopt.{name}")
            globals().update(_interface())
        if name not in globals():
            raise AttributeError(f"module 'ocnopt' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        return globals()[name]


def __dir__() -> list[str]:
    return sorted(_interface())


def _interface() -> dict[str, Any]:
    return {name: value for name, value in vars(import_module("ocnopt.api")).items() if not name.startswith("_")}
