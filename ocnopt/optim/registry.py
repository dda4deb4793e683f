"""Every optimiser by name: what it is called, where its learning rate starts, and how it is built for a model.

An entry imports its class when it builds, and is listed only where the module of the class exists.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ocnopt.checks import nearest
from ocnopt.errors import ProblemError

LARGEST = 5000  # numbers that Itoh-Abe moves one by one, each by three to ten losses
Arguments = Callable[[nn.Module, float], dict[str, Any]]


def _parameters(model: nn.Module, lr: float) -> dict[str, Any]:
    return {"params": model.parameters(), "lr": lr}


def _module(model: nn.Module, lr: float) -> dict[str, Any]:
    return {"model": model, "lr": lr}


def _chain(model: nn.Module, lr: float) -> dict[str, Any]:
    return {"chain": model, "rho": 1 / lr}


def _few(model: nn.Module, lr: float) -> dict[str, Any]:
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if count > LARGEST:
        raise ProblemError(
            f"itoh-abe met {count} trained numbers in {type(model).__name__}, each of which takes three to ten "
            f"losses a step; expected at most {LARGEST}: take a smaller model, as that of the problem spiral or wine, "
            "or an optimiser that takes gradients"
        )
    return _parameters(model, lr)


def _matrices(model: nn.Module, lr: float) -> dict[str, Any]:
    """The square weights of linear layers, kept orthogonal, and all others, which give the outputs their scale."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = {w: None for w in weights if w.requires_grad and w.shape[0] == w.shape[1] > 1}
    if not matrices:
        raise ProblemError(
            f"a Riemannian method met a {type(model).__name__} without a linear layer of as many outputs as inputs; "
            "expected one at least, whose weight is kept orthogonal: take a model of layers of one width, as that of "
            "the problem digits_mlp, or an optimiser without manifolds"
        )
    others = [parameter for parameter in model.parameters() if parameter not in matrices]
    return {"params": [{"params": [*matrices]}, {"params": others, "manifold": "euclidean"}], "lr": lr}


def _scaled(model: nn.Module, lr: float) -> dict[str, Any]:
    """Groups of parameters that differ in units: learned step sizes matter in units of horizon/layers."""
    from ocnopt.neural.runge_kutta_net import RungeKuttaNet

    nets = [net for net in model.modules() if isinstance(net, RungeKuttaNet) and net.step != "fixed"]
    own = [{"params": [net.sizes], "lr": lr * (net.horizon / net.layers) ** 2} for net in nets]
    sizes = {net.sizes for net in nets}
    return {"params": [{"params": [p for p in model.parameters() if p not in sizes]}, *own], "lr": lr}


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
        arguments: ``arguments(model, lr)`` are those that its constructor takes of a model; it refuses models that do
            not fit.
        wants_loss: whether the closure of a step returns the loss alone, without backward.
        wants_batch: whether a step takes its samples themselves, not the mean gradient alone.
        wants_all: whether its batches are the whole training part unless others are asked for.
    """

    name: str
    label: str
    summary: str
    lr: float
    module: str
    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Arguments = _parameters
    wants_loss: bool = False
    wants_batch: bool = False
    wants_all: bool = False

    def build(self, model: nn.Module, lr: float) -> Optimizer:
        """The optimiser of a model.

        Args:
            model: to be trained.
            lr: learning rate.

        Raises:
            ProblemError: the optimiser cannot train such a model.

        Example:
            >>> optimizer("sgd").build(nn.Linear(1, 1), 0.5).param_groups[0]["momentum"]
            0.9
        """
        kind = getattr(import_module(self.module), self.class_name)
        return kind(**self.arguments(model, lr), **self.options)


def _torch(name: str, label: str, summary: str, lr: float, class_name: str, **options: Any) -> OptimizerRecord:
    return OptimizerRecord(name, label, summary, lr, "torch.optim", class_name, options)


def _momentum(name: str, label: str, summary: str, lr: float, class_name: str, **options: Any) -> OptimizerRecord:
    return OptimizerRecord(name, label, summary, lr, "ocnopt.optim.momentum", class_name, options)


def _layerwise(name: str, label: str, summary: str, lr: float, **options: Any) -> OptimizerRecord:
    return OptimizerRecord(
        name, label, summary, lr, "ocnopt.optim.ocnopt", "OCNOpt", options, _module, wants_batch=True
    )


_KNOWN = (
    _torch("adam", "Adam", "first order with running moments (torch)", 0.01, "Adam"),
    _torch("sgd", "SGD", "gradient descent with momentum 0.9 (torch)", 0.1, "SGD", momentum=0.9),
    _torch("sgd-plain", "SGD plain", "gradient descent without momentum (torch)", 1.0, "SGD"),
    _torch("rmsprop", "RMSprop", "gradients over their running root mean square (torch)", 0.003, "RMSprop"),
    OptimizerRecord(
        "snopt",
        "SNOpt",
        "second order in the eigenbases of Kronecker factors, lr that adapts",
        0.01,
        "ocnopt.optim.snopt",
        "SNOpt",
        arguments=_module,
    ),
    OptimizerRecord(
        "muon",
        "Muon",
        "orthogonalised momentum for matrices (torch), Adam for the rest",
        0.03,
        "ocnopt.optim.muon",
        "Muon",
    ),
    OptimizerRecord(
        "soap",
        "SOAP",
        "Adam in the eigenbases of Shampoo's factors (the package pytorch-optimizer)",
        0.01,
        "pytorch_optimizer",
        "SOAP",
        {"weight_decay": 0.0},
    ),
    OptimizerRecord(
        "lbfgs",
        "L-BFGS",
        "quasi-Newton with a line search, on whole data sets (torch)",
        1.0,
        "torch.optim",
        "LBFGS",
        {"line_search_fn": "strong_wolfe", "max_iter": 1, "max_eval": 20, "history_size": 20},
        wants_all=True,
    ),
    _momentum("conformal", "Conformal", "a heavy ball whose volumes contract at a constant rate", 0.1, "Conformal"),
    _momentum("nesterov", "Nesterov", "momentum with the gradient ahead", 0.1, "Conformal", nesterov=True),
    _momentum("relativistic", "Relativistic", "momentum whose steps have a greatest length", 0.1, "Relativistic"),
    OptimizerRecord(
        "backtracking",
        "Backtracking",
        "gradient descent that finds its step length, for whole data sets",
        1.0,
        "ocnopt.optim.backtracking",
        "Backtracking",
        arguments=_scaled,
        wants_loss=True,
    ),
    OptimizerRecord(
        "itoh-abe",
        "Itoh-Abe",
        "coordinate after coordinate, without gradients, for small models",
        1.0,
        "ocnopt.optim.itoh_abe",
        "ItohAbe",
        arguments=_few,
        wants_loss=True,
    ),
    OptimizerRecord(
        "riemannian",
        "Riemannian",
        "momentum that keeps square weights of linear layers orthogonal",
        0.1,
        "ocnopt.optim.riemannian",
        "Riemannian",
        {"momentum": 0.9},
        _matrices,
    ),
    OptimizerRecord(
        "mec",
        "MEC",
        "the same weights as a rigid body in a viscous fluid",
        0.3,
        "ocnopt.optim.mec",
        "MEC",
        arguments=_matrices,
    ),
    OptimizerRecord(
        "msa",
        "MSA",
        "Pontryagin's principle layer by layer, for chains of layers; lr is 1/rho",
        0.02,
        "ocnopt.optim.msa",
        "MSA",
        arguments=_chain,
        wants_batch=True,
    ),
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
        ProblemError: no optimiser has this name, and the message offers the nearest; or its package is missing.
    """
    if name not in OPTIMIZERS:
        for record in _KNOWN:
            if record.name == name:
                raise ProblemError(
                    f"optimizer is {name!r}, whose package {record.module} is not installed; expected to find it: "
                    "pip install 'ocnopt[peers]', or take another optimiser"
                )
        known = ", ".join(OPTIMIZERS)
        raise ProblemError(f"optimizer is {name!r}; expected one of {known}{nearest(name, OPTIMIZERS)}")
    return OPTIMIZERS[name]
