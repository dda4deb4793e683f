"""SNOpt: second-order training of models that contain Neural ODEs, as a drop-in torch optimiser.

On a refresh iteration the backward passes of the Neural ODEs, and of the layers around them, hand over what the Kronecker
factors A, B of each layer are made of (:mod:`ocnopt.differential.kronecker`); no evaluation is added and no path is stored. With
their eigenbases every iteration moves a layer's matrix W, of gradient G, by

    M <- mu M + (1 - mu) G,    s <- beta s + (1 - beta) (U_B^T G U_A)^2,
    W <- W - lr U_B [ U_B^T M U_A / sqrt(s + damping mean(s)) ] U_A^T

where s starts as E_B E_A^T in the units of the first gradient. The square root is deliberate: the empirical Fisher falls with the square
of the gradient, so that a division by s itself grows without bound as the loss falls, while with the root no entry in the eigenbasis
moves by more than about lr / sqrt(1 - beta). All other parameters move by the same rule without a basis.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocnopt.checks import nearest
from ocnopt.differential.kronecker import (
    LAYERS,
    Basis,
    Collector,
    Eigen,
    Layer,
    Samples,
    as_matrix,
    carried_moments,
    eigenbasis,
    first_moments,
    is_layer,
    working_dtype,
)
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE

RANK = 128  # leading eigenvectors of A that are kept: as good as all of them on the image workload
MOMENTS_DECAY = 0.95  # beta
FACTORS_KEEP = 0.5  # share of the old factors in a refresh
FIRST_GAP = 5  # the first refreshes come at 0, 5, 10, 20, 40, ...: the curvature changes fastest at the start
EPSILON = 1e-8  # keeps the first-order update of a parameter without gradients at zero


class Block(NamedTuple):
    """A layer whose live parameters move as one matrix."""

    name: str
    layer: Layer
    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Weight, and bias where it is live."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def matrix(self, of: Mapping[Tensor, Tensor]) -> Tensor:
        """What belongs to the parameters, as one matrix."""
        return as_matrix(self.layer, of[self.weight], None if self.bias is None else of[self.bias])


class SNOpt(torch.optim.Optimizer):
    """Preconditions layers with Kronecker factors gathered in the Neural ODEs' own backward passes.

    Args:
        model: the module that is trained; its Linear and Conv1d/2d/3d layers are preconditioned. NeuralODEs need
            ``adjoint="discrete"`` or ``"continuous"``.
        lr: learning rate; 0.01 is a good start.
        param_groups: parameters to train with options of their own, as in every torch optimiser; all of the model's
            trainable parameters if left out. A layer follows the options of its weight; lr and weight_decay of a bias are its own.
        momentum: mu, of the running mean of gradients.
        weight_decay: gamma of the term (gamma/2) |p|^2 added to the loss.
        damping: relative to the mean of the second moments, which is the trace of the curvature over its size.
        refresh_every: iterations from one refresh of the factors to the next; the first ones come sooner.
        curvature: "empirical": from the gradients of the loss itself.
        reduction: "mean" or "sum": how the loss combines samples, so that batches of different size weigh alike.
        everywhere: whether layers outside of NeuralODEs are preconditioned too.

    Raises:
        ProblemError: an argument is wrong, or a NeuralODE's backward pass cannot be observed.

    Source: Liu, Chen, Theodorou, "Second-order Neural ODE optimizer", arXiv 2109.14158.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> optimizer = SNOpt(model, lr=0.1, damping=0.0)
    >>> model(torch.ones(4, 1)).square().mean().backward()
    >>> optimizer.step()
    >>> print(f"{model.weight.item():.4f}")  # the first step has length lr
    0.9000
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        param_groups: Iterable[dict[str, Any]] | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        refresh_every: int = 100,
        curvature: str = "empirical",
        reduction: str = "mean",
        everywhere: bool = True,
    ) -> None:
        _check_model(model)
        _check_choice("curvature", curvature, ("empirical",))
        _check_choice("reduction", reduction, ("mean", "sum"))
        if isinstance(refresh_every, bool) or not isinstance(refresh_every, int) or refresh_every < 1:
            raise ProblemError(f"refresh_every is {refresh_every!r}; expected a whole number of at least 1, 100 by default")
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._model, self._everywhere, self._mean = model, everywhere, reduction == "mean"
        self._refresh_every, self._step_count = refresh_every, 0
        self._handles: list[RemovableHandle] = []
        self._unseen: set[str] = set()
        self._ready = False
        groups = [*param_groups] if param_groups is not None else [{"params": [*filter(_is_live, model.parameters())]}]
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "damping": damping}
        super().__init__(groups, options)
        self._ready = True
        self._find_blocks()
        self._warn_of_others()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the model.

        Raises:
            ProblemError: an option is out of range, or a parameter is not one of the model's.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_options(group)
        for parameter in group["params"]:
            if parameter not in self._names:
                raise ProblemError(
                    f"param_groups holds a tensor of shape {tuple(parameter.shape)} that is not a parameter of the model; "
                    "expected parameters of the model that SNOpt was given: hand over the module that contains them all"
                )
        if self._ready:
            self._find_blocks()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move the parameters.

        Args:
            closure: computes the loss again and calls backward; its value is returned.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; parameters and state are those before the step.
            ProblemError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        samples = self._collector.take()
        gradients = self._gradients()
        moments = {parameter: self.state[parameter]["momentum"] for parameter in gradients}
        rates = {parameter: group["lr"] for group in self.param_groups for parameter in group["params"]}
        left = dict(gradients)
        for block in self._blocks:
            if all(parameter in gradients for parameter in block.parameters):
                gradient = block.matrix(gradients)
                self._refresh(block, samples.get(block.layer), gradient)
                if "moments" in self.state[block.weight]:
                    self._move(block, gradient, block.matrix(moments), rates)
                    for parameter in block.parameters:
                        del left[parameter]
        self._move_others(left, rates)
        self._step_count += 1
        self._watch()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the parameters: tensors and plain numbers."""
        return {**super().state_dict(), "step_count": self._step_count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned.

        Raises:
            ProblemError: the state is another optimiser's.
        """
        if "step_count" not in state_dict:
            raise ProblemError(
                f"the state holds {sorted(state_dict)}; expected the state of an SNOpt with its 'step_count': load the state of "
                "another optimiser into that optimiser"
            )
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            # torch has cast everything to the parameter's precision; moments of half-precision parameters are finer.
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][key] = value.to(parameter.device, copy=True)
        self._step_count = state_dict["step_count"]
        self._watch()

    def _find_blocks(self) -> None:
        trained = {parameter for group in self.param_groups for parameter in group["params"]}
        odes = [module for module in self._model.modules() if isinstance(module, NeuralODE)]
        timed = {module for ode in odes for module in ode.field.modules()}
        if not (self._everywhere or timed):
            raise ProblemError(
                "everywhere=False met a model without a NeuralODE; expected at least one, as only layers inside of them are "
                "preconditioned then: leave everywhere=True"
            )
        self._blocks = [
            block
            for block in _blocks(self._model, trained)
            if self._everywhere or block.layer in timed
        ]  # fmt: skip
        layers: dict[nn.Module, bool] = {block.layer: block.bias is not None for block in self._blocks}
        self._collector = Collector(self._model, layers, timed & layers.keys(), mean=self._mean)
        self._odes = [ode for ode in odes if not layers.keys().isdisjoint(ode.field.modules())]
        self._watch()

    def _warn_of_others(self) -> None:
        inside = {parameter for block in self._blocks for parameter in block.parameters}
        places = [self._model] if self._everywhere else self._odes
        meant = {parameter for place in places for parameter in _unsupported(place)} - inside
        names = [self._names[p] for group in self.param_groups for p in group["params"] if p in meant and _is_live(p)]
        if names:
            warnings.warn(
                f"SNOpt preconditions the weights of {', '.join(kind.__name__ for kind in LAYERS)}; these parameters are of "
                f"other kinds, or shared by layers, and get the first-order update: {_listed(names)}",
                stacklevel=3,
            )

    def _is_refresh(self) -> bool:
        """Whether the next iteration refreshes the factors."""
        count = self._step_count
        return count % self._refresh_every == 0 or (
            count < self._refresh_every and count % FIRST_GAP == 0 and math.log2(count // FIRST_GAP).is_integer()
        )

    def _watch(self) -> None:
        """Watch the next iteration if it is a refresh, and let go of it otherwise."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._is_refresh():
            self._handles = [*self._collector.attach(), *(ode.observe(self._collector) for ode in self._odes)]

    def _gradients(self) -> dict[Tensor, Tensor]:
        """Gradients with weight decay, in working precision; the momentum moves along."""
        self._require_finite()
        gradients = {}
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            found = [parameter.grad.to(working_dtype(parameter)) for parameter in parameters]
            if group["weight_decay"]:
                found = torch._foreach_add(found, [p.to(g) for p, g in zip(parameters, found, strict=True)], alpha=group["weight_decay"])
            for parameter, gradient in zip(parameters, found, strict=True):
                if "momentum" not in self.state[parameter]:
                    self.state[parameter]["momentum"] = gradient.clone()
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            torch._foreach_lerp_(momenta, found, 1.0 - group["momentum"])
            gradients.update(zip(parameters, found, strict=True))
        return gradients
