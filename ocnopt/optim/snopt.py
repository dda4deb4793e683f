"""SNOpt: second-order training of models that contain Neural ODEs, as a drop-in torch optimiser.

On a refresh iteration the backward passes of the Neural ODEs, and of the layers around them, hand over what the
Kronecker factors A, B of each layer are made of (:mod:`ocnopt.differential.kronecker`); no path is stored. With their
eigenbases every iteration moves a layer's matrix W, of gradient G, by

    M <- mu M + (1 - mu) G,    s <- beta s + (1 - beta) (U_B^T G U_A)^2,
    W <- W - lr U_B [ U_B^T M U_A / sqrt(s + damping mean(s)) ] U_A^T

where s starts as E_B E_A^T in the units of the first gradient. The square root is deliberate: the empirical Fisher
falls with the square of the gradient, so a division by s itself grows without bound as the loss falls, while with the
root no entry in the eigenbasis moves by more than about lr / sqrt(1 - beta) whatever the scale of the loss. All other
parameters move by the same rule without a basis.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocnopt.checks import check_choice, check_count, check_model, check_options, listed
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

RANK = 128  # eigenvectors of A that are kept, at most
WIDEST = 2048  # outputs of a layer (in a group) up to which B and its eigenbasis are affordable
MOMENTS_DECAY = 0.95  # beta
FACTORS_KEEP = 0.5  # share of the old factors in a refresh
FIRST_GAP = 5  # the first refreshes come at steps 0, 5, 10, 20, 40, ...: the curvature changes fastest at the start
EPSILON = 1e-8  # keeps the first-order update of a parameter without gradients at zero

Groups = Mapping[Tensor, dict[str, Any]]


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
            trainable parameters if left out. A layer takes its damping from the group of its weight.
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
        model: nn.Module | Any,
        lr: float | Any,
        *,
        param_groups: Iterable[dict[str, Any]] | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        refresh_every: int | Any = 100,
        curvature: str = "empirical",
        reduction: str = "mean",
        everywhere: bool = True,
    ) -> None:
        check_model(model)
        check_choice("curvature", curvature, ("empirical",))
        check_choice("reduction", reduction, ("mean", "sum"))
        check_count("refresh_every", refresh_every, default=100)
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
        check_options(group)
        for parameter in group["params"]:
            if parameter not in self._names:
                raise ProblemError(
                    f"param_groups holds a tensor of shape {tuple(parameter.shape)} that is no parameter of the model; "
                    "expected parameters of the model that SNOpt was given: give it the module that contains them all"
                )
        if self._ready:
            self._find_blocks()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        self._require_finite()
        samples = self._collector.take()
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        gradients, momenta = self._gradients()
        left = dict(gradients)
        for block in self._blocks:
            if all(parameter in gradients for parameter in block.parameters):
                gradient = block.matrix(gradients)
                if self._handles:
                    self._refresh(block, samples.get(block.layer), gradient)
                if "moments" in self.state[block.weight]:
                    self._move(block, gradient, block.matrix(momenta), groups)
                    for parameter in block.parameters:
                        del left[parameter]
        self._move_others(left, momenta)
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
                f"the state holds {sorted(state_dict)}; expected the state of an SNOpt, with its 'step_count': "
                "load the state of another optimiser into that one"
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
                "everywhere=False met a model without a NeuralODE; expected at least one, as only layers inside of "
                "them are preconditioned then: leave everywhere=True"
            )
        blocks = _blocks(self._model, trained)
        self._blocks = blocks if self._everywhere else [block for block in blocks if block.layer in timed]
        layers: dict[nn.Module, bool] = {block.layer: block.bias is not None for block in self._blocks}
        self._collector = Collector(self._model, layers, timed & layers.keys(), mean=self._mean)
        self._odes = [ode for ode in odes if not layers.keys().isdisjoint(ode.field.modules())]
        self._watch()

    def _warn_of_others(self) -> None:
        inside = {parameter for block in self._blocks for parameter in block.parameters}
        places = [self._model] if self._everywhere else self._odes
        alone = {m.bias for m in self._model.modules() if is_layer(m) and not _is_live(m.weight)}  # of frozen weights
        meant = {parameter for place in places for parameter in place.parameters()} - inside - alone
        names = [self._names[p] for group in self.param_groups for p in group["params"] if p in meant and _is_live(p)]
        if names:
            warnings.warn(
                f"SNOpt preconditions the weights of {', '.join(kind.__name__ for kind in LAYERS)}; these parameters "
                f"are of other kinds, shared by several modules or of more than {WIDEST} outputs, and get the "
                f"first-order update: {listed(names)}",
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

    def _gradients(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """Gradients with weight decay, and their running means, in working precision."""
        gradients: dict[Tensor, Tensor] = {}
        momenta: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            found = [parameter.grad.to(working_dtype(parameter)) for parameter in parameters]
            if group["weight_decay"] and parameters:
                weights = [parameter.to(gradient) for parameter, gradient in zip(parameters, found, strict=True)]
                found = [*torch._foreach_add(found, weights, alpha=group["weight_decay"])]
            means = [
                self._entry(parameter, "momentum", gradient)
                for parameter, gradient in zip(parameters, found, strict=True)
            ]
            if parameters:
                torch._foreach_lerp_(means, found, 1.0 - group["momentum"])
            gradients.update(zip(parameters, found, strict=True))
            momenta.update(zip(parameters, means, strict=True))
        return gradients, momenta

    def _entry(self, parameter: Tensor, key: str, first: Tensor) -> Tensor:
        """An entry of a parameter's state, which starts as a copy of ``first``."""
        state = self.state[parameter]
        if key not in state:
            state[key] = first.clone()
        return state[key]

    def _require_finite(self) -> None:
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        sparse = [self._names[parameter] for parameter in found if parameter.grad.is_sparse]
        if sparse:
            raise ProblemError(
                f"the gradients of {listed(sparse)} are sparse; expected dense ones: build the layer with sparse=False"
            )
        sizes = torch._foreach_norm([parameter.grad for parameter in found], math.inf) if found else ()
        if found and not bool(torch.stack([size.to(sizes[0]) for size in sizes]).isfinite().all()):
            names = [self._names[p] for p, size in zip(found, sizes, strict=True) if not bool(size.isfinite())]
            raise NonFiniteError(
                f"the gradients of {listed(names)} hold NaN or infinity at step {self._step_count}; expected finite "
                "numbers. Parameters and state are as before this step: catch this error to skip the batch; if it "
                "comes again, lower lr or raise damping"
            )

    def _refresh(self, block: Block, samples: Samples | None, gradient: Tensor) -> None:
        """A new eigenbasis for a layer, if samples came."""
        state = self.state[block.weight]
        if samples is None:
            self._warn_unseen(block)
            return
        if "moments" in state:
            old = _basis(state)
            new = eigenbasis(samples, RANK, old, FACTORS_KEEP)
            state["moments"] = carried_moments(state["moments"], old, new)
        else:
            new = eigenbasis(samples, RANK)
            state["moments"] = first_moments(new, gradient)
        (state["input_vectors"], state["input_values"]), (state["output_vectors"], state["output_values"]) = new

    def _warn_unseen(self, block: Block) -> None:
        """Say once that a layer has gradients but was never seen at work."""
        if "moments" not in self.state[block.weight] and block.name not in self._unseen:
            self._unseen.add(block.name)
            warnings.warn(
                f"the layer {block.name!r} received a gradient without a forward pass that SNOpt could see: its "
                "weights are used without calling it, or its inputs are not those of its type; expected the layer "
                "itself to be called; it gets the first-order update",
                stacklevel=4,
            )

    def _move(self, block: Block, gradient: Tensor, momentum: Tensor, groups: Groups) -> None:
        """The preconditioned step of a layer."""
        state, group = self.state[block.weight], groups[block.weight]
        basis, moments = _basis(state), state["moments"]
        turned, leading = basis.turn(torch.stack((gradient, momentum)))
        moments.lerp_(basis.squares(turned[0], leading[0]), 1.0 - MOMENTS_DECAY)
        step = basis.precondition(turned[1], leading[1], moments, group["damping"], power=0.5)
        if block.bias is not None:
            block.bias.sub_(step[..., -1].reshape(block.bias.shape), alpha=groups[block.bias]["lr"])
            step = step[..., :-1]
        block.weight.sub_(step.reshape(block.weight.shape), alpha=group["lr"])

    def _move_others(self, gradients: Mapping[Tensor, Tensor], momenta: Mapping[Tensor, Tensor]) -> None:
        """The first-order step: the same rule without a basis."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter in gradients]
            if not parameters:
                continue
            found = [gradients[parameter] for parameter in parameters]
            squares = [
                self._entry(parameter, "squares", gradient.square())
                for parameter, gradient in zip(parameters, found, strict=True)
            ]
            torch._foreach_mul_(squares, MOMENTS_DECAY)
            torch._foreach_addcmul_(squares, found, found, value=1.0 - MOMENTS_DECAY)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_add_(roots, EPSILON)
            steps = torch._foreach_div([momenta[parameter] for parameter in parameters], roots)
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.sub_(step, alpha=group["lr"])


def _basis(state: Mapping[str, Tensor]) -> Basis:
    return Basis(
        Eigen(state["input_vectors"], state["input_values"]), Eigen(state["output_vectors"], state["output_values"])
    )


def _is_live(parameter: Tensor) -> bool:
    return parameter.requires_grad


def _blocks(model: nn.Module, trained: Collection[Tensor]) -> list[Block]:
    """The layers whose weight is trained, theirs alone and not too wide, with their bias if it is trained too."""
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    owners: Counter[Tensor] = Counter(p for module in model.modules() for p in module.parameters(recurse=False))

    def is_own(parameter: Tensor | None) -> TypeGuard[nn.Parameter]:
        return parameter is not None and parameter.requires_grad and parameter in trained and owners[parameter] == 1

    return [
        Block(name, layer, layer.weight, layer.bias if is_own(layer.bias) else None)
        for name, layer in layers.items()
        if is_own(layer.weight) and as_matrix(layer, layer.weight, None).shape[1] <= WIDEST
    ]
