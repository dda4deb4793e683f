"""Every optimiser by name: what it is called, where its learning rate starts, and how it is built for a model.

An entry imports its class when it builds, and is listed only where the module of the class exists.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ocnopt.checks import nearest
from ocnopt.errors import ProblemError


@dataclass(frozen=True)
class OptimizerRecord:
    """An optimiser as it is compared with others.

    Args:
        name: in the registry.
        label: in tables and legends.
        summary: one line for a table.
        lr: a learning rate to start from, where a problem knows no better one.
        module: that holds the class.
        class_name: of a ``torch.optim.Optimizer``.
        options: of its constructor.
        takes_model: whether the constructor is given the module itself, and not only its parameters.
    """

    name: str
    label: str
    summary: str
    lr: float
    module: str
    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    takes_model: bool = False

    def build(self, model: nn.Module, lr: float) -> Optimizer:
        """The optimiser of a model.

        Args:
            model: to be trained.
            lr: learning rate.

        Example:
            >>> optimizer("sgd").build(nn.Linear(1, 1), 0.5).param_groups[0]["momentum"]
            0.9
        """
        kind = getattr(import_module(self.module), self.class_name)
        return kind(model if self.takes_model else model.parameters(), lr=lr, **self.options)


def _torch(name: str, label: str, summary: str, lr: float, class_name: str, **options: Any) -> OptimizerRecord:
    return OptimizerRecord(name, label, summary, lr, "torch.optim", class_name, options)


def _momentum(name: str, label: str, summary: str, lr: float, class_name: str, **options: Any) -> OptimizerRecord:
    return OptimizerRecord(name, label, summary, lr, "ocnopt.optim.momentum", class_name, options)


def _layerwise(name: str, label: str, summary: str, lr: float, **options: Any) -> OptimizerRecord:
    return OptimizerRecord(name, label, summary, lr, "ocnopt.optim.ocnopt", "OCNOpt", options, takes_model=True)


_KNOWN = (
    _torch("adam", "Adam", "first order with running moments (torch)", 0.01, "Adam"),
    _torch("sgd", "SGD", "gradient descent with momentum 0.9 (torch)", 0.1, "SGD", momentum=0.9),
    _torch("sgd-plain", "SGD plain", "gradient descent without momentum (torch)", 1.0, "SGD"),
    _torch("rmsprop", "RMSprop", "gradients over their running root mean square (torch)", 0.003, "RMSprop"),
    OptimizerRecord(
        "snopt",
        "SNOpt",
        "Kronecker-factored second order; in Neural ODEs from the adjoint pass itself",
        0.01,
        "ocnopt.optim.snopt",
        "SNOpt",
        takes_model=True,
    ),
    _momentum("nesterov", "Nesterov", "momentum with the gradient ahead", 0.1, "Conformal", nesterov=True),
    _momentum("relativistic", "Relativistic", "momentum whose steps have a greatest length", 0.1, "Relativistic"),
    _layerwise("ocnopt", "OCNOpt", "layer-wise feedback around SGD, exact over the batch", 1.0),
    _layerwise("ocnopt-adaptive", "OCNOpt Adam", "the same around Adam", 0.01, curvature="adaptive"),
    _layerwise("ocnopt-kronecker", "OCNOpt KFAC", "the same around KFAC", 0.1, curvature="kronecker"),
    _layerwise(
        "ocnopt-published",
        "OCNOpt published",
        "as published: sample by sample",
        1.0,
        form="sample",
        terminal="gradient",
    ),
    _layerwise("ocnopt-past", "OCNOpt past", "parallel branches answer to the past alone", 1.0, game="feedback"),
    _layerwise("ocnopt-open-loop", "OCNOpt open loop", "nothing is fed back", 1.0, game="open_loop"),
    _layerwise("gauss-newton", "Gauss-Newton", "the joint step of all layers in open loop", 1.0, form="gauss_newton"),
    _layerwise("kfac", "KFAC", "Kronecker factors alone", 0.1, curvature="kronecker", feedback=False),
)
OPTIMIZERS: Mapping[str, OptimizerRecord] = MappingProxyType(
    {record.name: record for record in _KNOWN if find_spec(record.module) is not None}
)


def optimizer(name: str) -> OptimizerRecord:
    """The record of an optimiser.

    Args:
        name: of the registry.

    Raises:
        ProblemError: no optimiser has this name; the message offers the nearest.
    """
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ProblemError(f"optimizer is {name!r}; expected one of {known}{nearest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name]
