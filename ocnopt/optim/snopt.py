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
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocnopt.checks import check_choice, check_model
from ocnopt.differential.kronecker import (
    Basis,
    Collector,
    Eigen,
    Samples,
    carried_moments,
    eigenbasis,
    first_moments,
    release,
    working_dtype,
)
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.optim.checks import (
    Block,
    add_group,
    check_fields,
    check_gradients,
    check_groups,
    check_not_parallel,
    check_one_process,
    check_refreshes,
    check_same_shape,
    check_state,
    find_blocks,
    is_live,
    read_groups,
    strangers,
    warn_first_order,
    warn_strangers,
    warn_unseen,
)

RANK = 128  # eigenvectors of A that are kept, at most
MOMENTS_DECAY = 0.95  # beta
FACTORS_KEEP = 0.5  # share of the old factors in a refresh
FIRST_GAP = 5  # the first refreshes come at steps 0, 5, 10, 20, 40, ...: the curvature changes fastest at the start
EPSILON = 1e-8  # keeps the first-order update of a parameter without gradients at zero

# What a state brings back besides the options of the groups; "curvature" has one value so far.
_OPTIONS = ("refresh_every", "reduction", "everywhere")

Groups = Mapping[Tensor, dict[str, Any]]


class SNOpt(torch.optim.Optimizer):
    """Preconditions layers with Kronecker factors gathered in the Neural ODEs' own backward passes.

    Args:
        model: the module that is trained; its Linear and Conv1d/2d/3d layers are preconditioned. NeuralODEs need
            ``adjoint="discrete"`` or ``"continuous"``.
        lr: learning rate; 0.01 is a good start.
        param_groups: parameters to train with options of their own, as in every torch optimiser; all of the model's
            parameters if left out, frozen ones as soon as they are set free. A layer takes its damping from the group
            of its weight.
        momentum: mu, of the running mean of gradients.
        weight_decay: gamma of the term (gamma/2) |p|^2 added to the loss.
        damping: relative to the mean of the second moments, which is the trace of the curvature over its size.
        refresh_every: iterations from one refresh of the factors to the next; the first ones come sooner.
        curvature: "empirical": from the gradients of the loss itself.
        reduction: "mean" or "sum": how the loss of a backward pass combines its samples, so that batches of different
            size weigh alike. Chunks of unequal size whose losses are sums over the size of the whole batch are "sum":
            "mean" takes the size of each chunk for what its loss was divided by.
        everywhere: whether layers outside of NeuralODEs are preconditioned too.

    A ``torch.amp.GradScaler`` is used as with every torch optimiser: only directions and proportions of the samples
    enter, so that the scale of a loss does not matter, and a step that the scaler skips leaves no trace. What enters
    the factors belongs to the gradients that are in ``.grad`` at the step: several backward passes without
    ``zero_grad`` add up, and what ``zero_grad`` threw away is forgotten. Forward passes of equal size that one backward
    pass goes through count as several uses by the same samples: of different samples, give each its backward pass, or
    join them in one batch. Every sample of a batch counts, also one of weight 0 in the loss.

    A copy of the optimiser, by copy or pickle, trains the copy of the model that came with it; an optimiser that is
    dropped lets go of its model.

    Raises:
        ProblemError: an argument is wrong, a NeuralODE's backward pass cannot be observed, or the model is trained by
            several processes (DistributedDataParallel), which is not supported.

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
        param_groups: Iterable[dict[str, Any]] | Any | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        refresh_every: int | Any = 100,
        curvature: str = "empirical",
        reduction: str = "mean",
        everywhere: bool = True,
    ) -> None:
        check_model(model)
        check_not_parallel(model)
        check_choice("curvature", curvature, ("empirical",))
        check_refreshes(refresh_every, reduction)
        self._model, self._step_count = model, 0
        self.refresh_every, self.reduction, self.everywhere = refresh_every, reduction, everywhere
        self._unseen: set[str] = set()
        self._is_whole = param_groups is None
        self._handles: list[RemovableHandle] = []
        self._is_ready = False
        # All parameters: one that is frozen gets no gradient, and takes part once it is set free.
        groups = [{"params": model.parameters()}] if param_groups is None else read_groups(param_groups)
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "damping": damping}
        super().__init__(groups, options)
        check_groups(self.param_groups)
        self._start()
        warn_first_order([model] if everywhere else self._odes, self._blocks, self._trained)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_model", "_step_count", "_unseen", "_is_whole", *_OPTIONS)
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_model" in state:  # a copy; torch also sets a part of the state when it loads one
            self._start()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters of the model.

        Raises:
            ProblemError: an option is out of range, or a parameter is not one of the model's.
        """
        add_group(self, param_group, self._names())
        if self._is_ready:
            self._find_blocks()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters.

        Args:
            closure: computes the loss again and calls backward; its value is returned.

        Raises:
            NonFiniteError: a gradient is NaN or infinite; parameters and state are those before the step.
            ProblemError: a gradient is sparse, or other processes run beside this one.
        """
        check_one_process()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(((name, p) for p, name in self._trained.items() if is_live(p)), self._step_count)
        device = next((parameter.device.type for parameter in self._trained), "cpu")
        with torch.autocast(device, enabled=False):
            self._update()
        self._step_count += 1
        new = strangers(self._model, {*map(id, self._trained)}, whole=self._is_whole)
        if not self._unseen.issuperset(new):
            self._unseen.update(new)
            warn_strangers(new)
        if [*map(is_live, self._trained)] == self._liveness:
            self._watch(self._is_refresh())
        else:  # a parameter was frozen or set free
            self._find_blocks()
            self._watch(True)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the parameters: tensors and plain numbers."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        return {**super().state_dict(), "step_count": self._step_count, **options}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned; its options replace those of the constructor.

        Raises:
            ProblemError: the state is another optimiser's, or an option in it is wrong.
        """
        check_state(state_dict)
        options = {name: state_dict.get(name, getattr(self, name)) for name in _OPTIONS}
        check_refreshes(options["refresh_every"], options["reduction"])
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            # torch has cast everything to the parameter's precision; moments of half-precision parameters are finer.
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][key] = value.to(parameter.device, copy=True)
        self.__dict__.update(options, _step_count=state_dict["step_count"])
        self._find_blocks()

    def _start(self) -> None:
        """Begin to watch, for as long as this optimiser is used."""
        self._handles, self._is_ready = [], True
        weakref.finalize(self, release, self._handles)
        self._find_blocks()

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._model.named_parameters()}

    def _find_blocks(self) -> None:
        names = self._names()
        self._trained = {p: names.get(p, "no longer in the model") for g in self.param_groups for p in g["params"]}
        self._liveness = [*map(is_live, self._trained)]
        self._odes = [module for module in self._model.modules() if isinstance(module, NeuralODE)]
        timed = {module for ode in self._odes for module in ode.field.modules()}
        if not self.everywhere:
            check_fields(self._odes)
        self._blocks = [b for b in find_blocks(self._model, self._trained) if self.everywhere or b.layer in timed]
        layers: dict[nn.Module, bool] = {block.layer: block.bias is not None for block in self._blocks}
        self._collector = Collector(layers, timed & layers.keys(), mean=self.reduction == "mean")
        self._odes = [ode for ode in self._odes if not layers.keys().isdisjoint(ode.field.modules())]
        self._watch(self._is_refresh())

    def _is_refresh(self) -> bool:
        """Whether the next iteration refreshes the factors."""
        count = self._step_count
        return count % self.refresh_every == 0 or (
            count < self.refresh_every and count % FIRST_GAP == 0 and math.log2(count // FIRST_GAP).is_integer()
        )

    def _watch(self, refreshes: bool) -> None:
        """Watch the next iteration if it refreshes the factors, and let go of it otherwise."""
        release(self._handles)
        if refreshes:
            self._handles += [*self._collector.attach(), *(ode.observe(self._collector) for ode in self._odes)]

    def _update(self) -> None:
        """Refresh the factors if it is time, and move all parameters that have gradients."""
        samples = self._collector.take()
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        gradients, momenta = self._gradients()
        left = dict(gradients)
        for block in self._blocks:
            if all(parameter in gradients for parameter in block.parameters):
                gradient = block.matrix(gradients)
                if self._handles:
                    self._refresh(block, samples.get(block.layer), gradient)
                if self._fits(block, gradient):
                    self._move(block, gradient, block.matrix(momenta), groups)
                    for parameter in block.parameters:
                        del left[parameter]
        self._move_others(left, momenta)

    def _gradients(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """Gradients with weight decay, and their running means, in working precision."""
        gradients: dict[Tensor, Tensor] = {}
        momenta: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and is_live(p)]
            found = [parameter.grad.to(working_dtype(parameter)) for parameter in parameters]
            if group["weight_decay"] and parameters:
                weights = [parameter.to(gradient) for parameter, gradient in zip(parameters, found, strict=True)]
                found = [*torch._foreach_add(found, weights, alpha=group["weight_decay"])]
            means = [self._momentum(parameter, gradient) for parameter, gradient in zip(parameters, found, strict=True)]
            if parameters:
                torch._foreach_lerp_(means, found, 1.0 - group["momentum"])
            gradients.update(zip(parameters, found, strict=True))
            momenta.update(zip(parameters, means, strict=True))
        return gradients, momenta

    def _momentum(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The running mean of a parameter's gradients; its state follows where the parameter went (``model.to``)."""
        state = self.state[parameter]
        momentum = state.get("momentum")
        if momentum is None:
            momentum = state["momentum"] = gradient.clone()
        elif momentum.dtype != gradient.dtype or momentum.device != gradient.device:
            for key, value in state.items():
                state[key] = value.to(gradient)
            momentum = state["momentum"]
        check_same_shape(self._trained[parameter], "momentum", momentum.shape, gradient.shape)
        return momentum

    def _refresh(self, block: Block, samples: Samples | None, gradient: Tensor) -> None:
        """A new eigenbasis for a layer, if samples came."""
        state = self.state[block.weight]
        if samples is None:
            received = block.weight.grad is not None and bool(block.weight.grad.any())  # not so for an empty batch
            if "moments" not in state and received and block.name not in self._unseen:
                self._unseen.add(block.name)
                warn_unseen(block.name)
            return
        if self._fits(block, gradient):
            old = _basis(state)
            new = eigenbasis(samples, RANK, old, FACTORS_KEEP)
            state["moments"] = carried_moments(state["moments"], old, new)
        else:
            new = eigenbasis(samples, RANK)
            state["moments"] = first_moments(new, gradient)
        (state["input_vectors"], state["input_values"]), (state["output_vectors"], state["output_values"]) = new

    def _fits(self, block: Block, gradient: Tensor) -> bool:
        """Whether a layer has an eigenbasis for its matrix, which changes as a bias is frozen or set free."""
        vectors = self.state[block.weight].get("input_vectors")
        return vectors is not None and vectors.shape[-2] == gradient.shape[-1]

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
            for parameter, gradient in zip(parameters, found, strict=True):
                if "squares" not in self.state[parameter]:
                    self.state[parameter]["squares"] = gradient.square()
            squares = [self.state[parameter]["squares"] for parameter in parameters]
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
