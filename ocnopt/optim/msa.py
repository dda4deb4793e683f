"""The extended method of successive approximations: Pontryagin's maximum principle for a chain of layers.

Layer t maps the states of B samples, x_{t+1} = g_t(x_t, theta_t). With the costates lambda_t = dJ/dx_t of a forward and
a backward pass, J a mean over samples, every layer minimises on its own

    <lambda_{t+1}, g_t(x_t, theta)> + (gamma/2) |theta|^2
      + (rho/2) [ |g_t(x_t, theta) - x_{t+1}|^2 / B + B |(dg_t/dx)^T lambda_{t+1} - lambda_t|^2 ]

over theta, by L-BFGS: minus the Hamiltonian, augmented by how far the equations of state and costate would be violated,
which bounds the error of changing all layers at once. The gradient at the present theta_t is that of the loss.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ocnopt.checks import check_count, listed
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.optim.descent import NOT_NEGATIVE, Descent, needed


class MSA(Descent):
    """Trains a chain of layers by maximising Hamiltonians, layer by layer, without a learning rate.

    Args:
        chain: an ``nn.Sequential`` of modules that map one tensor to one tensor, first axis samples. A child is a
            layer: ``nn.Sequential(nn.Linear(2, 8), nn.Tanh())`` as a child is one nonlinear layer, its two modules as
            children are two. Each layer with parameters is a group of the optimiser, so that rho and the other options
            may differ; parameters with ``requires_grad=False`` are left alone.
        rho: weight of the augmentation; the larger, the shorter and safer the steps. Layers choose at once, so that rho
            below the number of layers times the loss's curvature may diverge.
        iterations: of L-BFGS in each layer and step.
        weight_decay: gamma of the term (gamma/2) |theta|^2 added to the loss.
        reduction: "mean" or "sum": how the loss combines samples.

    Raises:
        ProblemError: not a chain, layers that share parameters, nothing to train, or an option out of range.

    Source: Li, Chen, Tai, E, "Maximum principle based algorithms for deep learning", arXiv 1710.09513; Li, Hao,
    "An optimal control approach to deep learning", arXiv 1803.01299.

    >>> chain = nn.Sequential(nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.constant_(chain[0].weight, 3.0)
    >>> optimizer = MSA(chain, rho=4.0)
    >>> def closure():
    ...     loss = chain(torch.ones(2, 1)).square().mean() / 2
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> print(f"{chain[0].weight.item():.4f}")  # min 3 w + (4/2) (w - 3)^2
    2.2500
    """

    expected: ClassVar = {
        "rho": NOT_NEGATIVE,
        "iterations": int,
        "weight_decay": NOT_NEGATIVE,
        "reduction": ("mean", "sum"),
    }

    def __init__(
        self,
        chain: nn.Sequential | Any,
        *,
        rho: float | Any = 5.0,
        iterations: int | Any = 20,
        weight_decay: float | Any = 0.0,
        reduction: str = "mean",
    ) -> None:
        self._chain, self._layers = chain, _layers(chain)
        groups = [{"params": [*layer.parameters()], "layer": name} for name, layer in self._layers.items()]
        options = {"rho": rho, "iterations": iterations, "weight_decay": weight_decay, "reduction": reduction}
        super().__init__(groups, options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_chain": self._chain, "_layers": self._layers}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_count("iterations of MSA", group["iterations"], default=20)
        if group.get("layer") not in self._layers:
            raise ProblemError(
                "MSA got a group of parameters after it was made; expected the layers of its chain alone, one group "
                "each: put the layer into the chain and make a new MSA"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Minimise over the parameters of every layer once.

        Args:
            closure: runs the chain once, computes the loss and calls backward; its value is returned.

        Raises:
            ProblemError: the chain has other layers than at first, there is no closure, it runs the chain other than
                once forward and once backward, a layer gives other values when it is evaluated again, or the loss
                depends on parameters not through the chain.
            NonFiniteError: the loss, a state or a costate is NaN or infinite; nothing was changed.
        """
        closure = needed(closure, "runs the chain: it computes the loss, calls backward and returns the loss")
        for group in self.param_groups:
            self._check_group(group)
        _check_chain(self._chain, self._layers)
        self.zero_grad()
        with torch.enable_grad(), _recorded(self._layers) as records:
            loss = closure()
        moves: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            layer = self._layers[group["layer"]]
            if any(parameter.requires_grad for parameter in layer.parameters()):
                hamiltonian = _Hamiltonian(group, layer, records[group["layer"]])
                moves.update(hamiltonian.minimised(group["iterations"]))
        for parameter, value in moves.items():
            parameter.copy_(value)
        return loss


@dataclass
class _Record:
    """What passed through a layer: x_t and x_{t+1}, and lambda_{t+1} on the way back."""

    calls: int = 0
    x: Tensor | None = None
    following: Tensor | None = None
    costates: list[Tensor] = field(default_factory=list)

    def remember(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook; copies, as the next layer may work in place."""
        self.calls += 1
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            self.x = inputs[0].detach().clone().requires_grad_(inputs[0].requires_grad)
            self.following = output.detach().clone()
            if output.requires_grad:
                output.register_hook(self.costates.append)


@contextmanager
def _recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, _Record]]:
    """Records of what passes through the layers meanwhile."""
    records = {name: _Record() for name in layers}
    handles = [layer.register_forward_hook(records[name].remember) for name, layer in layers.items()]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


class _Hamiltonian:
    """What one layer minimises, relative to its value at the present parameters."""

    def __init__(self, group: Mapping[str, Any], layer: nn.Module, record: _Record) -> None:
        self._layer, self._rho, self._gamma = layer, group["rho"], group["weight_decay"]
        self._trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        self._start = {name: p.detach().clone() for name, p in self._trained.items()}
        self._x, self._costate, following = _read(record, group["layer"])
        self._samples = len(self._x) if group["reduction"] == "mean" else 1
        theta = {name: p.clone().requires_grad_() for name, p in self._start.items()}
        with torch.enable_grad():
            y, back = self._evaluate(theta)
            slopes = torch.autograd.grad(y, [*theta.values()], self._costate, allow_unused=True, materialize_grads=True)
        self._following, self._back = y.detach(), back.detach()
        _check_same(self._following, following, group["layer"])
        self._check_slopes(slopes, group["layer"])
        totals = torch._foreach_add(slopes, [*self._start.values()], alpha=self._gamma)
        self._size = float(torch.stack(torch._foreach_norm(totals)).norm())

    def minimised(self, iterations: int) -> dict[Tensor, Tensor]:
        """The best values that L-BFGS visits; of slope 1 at the start, because its thresholds are absolute."""
        if self._size == 0:
            return {}
        steps = [
            torch.zeros_like(p, memory_format=torch.contiguous_format).requires_grad_() for p in self._start.values()
        ]
        lowest, best = 0.0, [z.detach().clone() for z in steps]

        def evaluate() -> Tensor:
            nonlocal lowest, best
            value = self._value(self._moved(steps)) / self._size**2
            slopes = torch.autograd.grad(value, steps, allow_unused=True, materialize_grads=True)
            for z, slope in zip(steps, slopes, strict=True):
                z.grad = slope.contiguous()
            if value.item() < lowest:
                lowest, best = value.item(), [z.detach().clone() for z in steps]
            return value

        torch.optim.LBFGS(
            steps, max_iter=iterations, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
        ).step(evaluate)
        return {self._trained[name]: value for name, value in self._moved(best).items()}

    def _moved(self, steps: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: p + self._size * z for (name, p), z in zip(self._start.items(), steps, strict=True)}

    def _value(self, theta: Mapping[str, Tensor]) -> Tensor:
        y, back = self._evaluate(theta)
        move = y - self._following
        value = (self._costate * move).sum() + self._rho / (2 * self._samples) * move.square().sum()
        value = value + self._rho * self._samples / 2 * (back - self._back).square().sum()
        if self._gamma:
            norms = [((p - old) * (p + old)).sum() for p, old in zip(theta.values(), self._start.values(), strict=True)]
            value = value + self._gamma / 2 * torch.stack(norms).sum()
        return value

    def _evaluate(self, theta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """x_{t+1}, and lambda_t where something before the layer is trained, else 0; the layer's own buffers stay."""
        buffers = {name: buffer.clone() for name, buffer in self._layer.named_buffers()}
        y = functional_call(self._layer, {**theta, **buffers}, (self._x,))
        if not self._x.requires_grad:
            return y, y.new_zeros(())
        (back,) = torch.autograd.grad(y, self._x, self._costate, create_graph=True)
        return y, back

    def _check_slopes(self, slopes: Sequence[Tensor], layer: str) -> None:
        """Refuse a loss whose gradient is not that of the chain."""
        eps = torch.finfo(self._costate.dtype).eps
        for (name, parameter), slope in zip(self._trained.items(), slopes, strict=True):
            gradient = slope.new_zeros(()) if parameter.grad is None else parameter.grad
            rounding = 1e3 * eps * float(self._costate.norm() * (1 + self._x.double().norm()) * (1 + parameter.norm()))
            difference = float((gradient - slope).norm())
            if not difference <= 10 * eps**0.5 * float(gradient.norm() + slope.norm()) + rounding:
                raise ProblemError(
                    f"the gradient of {name!r} in layer {layer!r} is {difference:.3g} away from what comes through the "
                    "chain; expected a loss that depends on parameters through the chain's output alone: use "
                    "weight_decay= for their norm"
                )


def _layers(chain: object) -> dict[str, nn.Module]:
    """The children of a chain that have parameters."""
    if not isinstance(chain, nn.Sequential):
        raise ProblemError(
            f"chain is {type(chain).__name__}; expected an nn.Sequential, whose children are the layers: "
            "MSA(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)))"
        )
    layers = _children(chain)
    owners = Counter(p for layer in layers.values() for p in layer.parameters())
    shared = [name for name, layer in layers.items() if any(owners[p] > 1 for p in layer.parameters())]
    if shared:
        raise ProblemError(
            f"the layers {listed(shared)} share parameters; expected parameters of their own, which each layer can "
            "choose alone: give each its own, or train with a gradient method"
        )
    if not any(p.requires_grad for p in owners):
        raise ProblemError("the chain has no trainable parameter; expected one or more with requires_grad=True")
    return layers


def _children(chain: nn.Sequential) -> dict[str, nn.Module]:
    return {name: layer for name, layer in chain._modules.items() if [*layer.parameters()]}


def _check_chain(chain: nn.Sequential, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a chain whose layers came or went after its optimiser was made."""
    now = _children(chain)
    changed = [name for name in {**layers, **now} if now.get(name) is not layers.get(name)]
    if changed:
        raise ProblemError(
            f"the layers {listed(changed)} of the chain came, went or were replaced after MSA was made; expected those "
            "of the start: make a new MSA"
        )


def _read(record: _Record, layer: str) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, lambda_{t+1}, x_{t+1} of one forward and one backward pass."""
    if record.calls and (record.x is None or record.following is None):
        raise ProblemError(
            f"layer {layer!r} of the chain takes or returns something else than one tensor; expected tensor to tensor: "
            "wrap it into a module that does"
        )
    if record.x is None or record.following is None or record.calls != 1 or len(record.costates) != 1:
        raise ProblemError(
            f"the closure ran layer {layer!r} {record.calls} times forward and {len(record.costates)} times backward; "
            "expected once each: run the chain on one batch, and call backward on the loss"
        )
    for what, value in {"input": record.x, "output": record.following, "costate": record.costates[0]}.items():
        if not bool(value.isfinite().all()):
            raise NonFiniteError(
                f"the {what} of layer {layer!r} holds NaN or infinity; expected finite numbers. Nothing was changed: "
                "skip the batch, or raise rho"
            )
    return record.x, record.costates[0], record.following


def _check_same(y: Tensor, following: Tensor, layer: str) -> None:
    """Refuse a layer that cannot be evaluated again."""
    difference = float((y - following).norm())
    if not difference <= 10 * torch.finfo(y.dtype).eps ** 0.5 * float(following.norm()):
        raise ProblemError(
            f"layer {layer!r} returns other values when it is evaluated again, {difference:.3g} away; expected the "
            "same for the same input: put dropout into eval(), and call step outside of autocast"
        )
