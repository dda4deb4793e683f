"""First-order methods as metrics: M, in whose units a layer's step is measured, and the update that it makes.

Each update is that of a well-known optimiser, to the last bit: ``identity`` stochastic gradient descent with momentum,
``adaptive`` Adam with betas (momentum, decay), so RMSprop with bias correction for momentum 0. ``kronecker`` is KFAC
in the reduce form of :mod:`ocnopt.differential.kronecker`, for linear layers and convolutions: running means A of
inputs and B of output gradients, step lr B^-1 G A^-1; every other parameter moves as under ``identity``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ocnopt.differential.kronecker import Layer, gradient_samples, input_samples, working_dtype
from ocnopt.differential.layers import Diagonal, Factored, Metric, Scaled
from ocnopt.errors import ProblemError

Options = dict[str, Any]
SHARED = ("lr", "decay", "eps", "damping")  # options that M is made of
REFRESH = 10  # steps from one inverse of the Kronecker factors to the next


@dataclass
class Block:
    """Parameters that move together, weight first, with the state and the options of each; ``SHARED`` are equal.

    ``seen`` are a layer and its inputs and costates, of one sample's loss each, for those who ask for factors.
    """

    name: str
    parameters: Sequence[Tensor]
    states: Sequence[dict[str, Any]]
    options: Sequence[Options]
    gradients: Sequence[Tensor]
    seen: tuple[Layer, Tensor, Tensor] | None = None


@runtime_checkable
class Base(Protocol):
    """A first-order method, split into what it learns from gradients and what it does with those of a step."""

    def observe(self, block: Block) -> None:
        """Take what the block saw into the statistics."""

    def metric(self, block: Block) -> Metric:
        """M of the block, learning rate included."""

    def move(self, block: Block, gradients: Sequence[Tensor]) -> None:
        """Update the parameters."""


class Identity:
    """``torch.optim.SGD``."""

    def observe(self, block: Block) -> None:
        """Nothing to learn."""

    def metric(self, block: Block) -> Metric:
        """M = I / lr."""
        return Scaled(float(block.options[0]["lr"]))

    def move(self, block: Block, gradients: Sequence[Tensor]) -> None:
        """v <- momentum v + g, x <- x - lr v."""
        gradients = _accumulated(block, gradients)
        torch._foreach_add_([*block.parameters], [*gradients], alpha=-float(block.options[0]["lr"]))


class Adaptive:
    """``torch.optim.Adam``."""

    def observe(self, block: Block) -> None:
        """The running mean of squares."""
        rows = zip(block.parameters, block.states, block.options, block.gradients, strict=True)
        for parameter, state, options, gradient in rows:
            decay = options["decay"]
            if "step" not in state:
                state["step"] = 0
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            seen = _decayed(parameter, gradient, options)
            state["exp_avg_sq"].mul_(decay).addcmul_(seen, seen, value=1 - decay)

    def metric(self, block: Block) -> Metric:
        """M = diag(sqrt(E[g^2])) / lr."""
        lr = float(block.options[0]["lr"])
        sizes = [self._size(*pair) for pair in zip(block.states, block.options, strict=True)]
        return Diagonal([lr / size.to(working_dtype(size)) for size in sizes])

    def move(self, block: Block, gradients: Sequence[Tensor]) -> None:
        """x <- x - lr E[g] / sqrt(E[g^2])."""
        rows = zip(block.parameters, block.states, block.options, gradients, strict=True)
        for parameter, state, options, gradient in rows:
            momentum, lr = options["momentum"], float(options["lr"])
            state["exp_avg"].lerp_(_decayed(parameter, gradient, options), 1 - momentum)
            size = self._size(state, options)
            parameter.addcdiv_(state["exp_avg"], size, value=-lr / (1 - momentum ** state["step"]))

    def _size(self, state: dict[str, Any], options: Options) -> Tensor:
        correction = (1 - options["decay"] ** state["step"]) ** 0.5
        return (state["exp_avg_sq"].sqrt() / correction).add_(options["eps"])


class Kronecker:
    """KFAC with factors A + sqrt(damping) I, B + sqrt(damping) I."""

    def observe(self, block: Block) -> None:
        """The running means of the factors, and from time to time their inverses."""
        if block.seen is None:
            return
        (layer, z, g), state, options = block.seen, block.states[0], block.options[0]
        inputs, outputs = input_samples(layer, z, bias=len(block.parameters) > 1), gradient_samples(layer, g)
        means = [samples.mT @ samples / samples.shape[1] for samples in (inputs, outputs)]
        count = state["count"] = state.get("count", 0) + 1
        decay = min(1 - 1 / count, options["decay"])
        for name, mean in zip(("inputs", "outputs"), means, strict=True):
            state[name] = state[name].lerp_(mean, 1 - decay) if name in state else mean
        if count % REFRESH == 1:
            for name in ("inputs", "outputs"):
                state[f"{name}_inverse"] = _inverse(state[name], options["damping"])

    def metric(self, block: Block) -> Metric:
        """M = B (X) A / lr, damped."""
        state = block.states[0]
        if "inputs_inverse" not in state:
            return Scaled(float(block.options[0]["lr"]))
        return Factored(float(block.options[0]["lr"]), state["inputs_inverse"], state["outputs_inverse"])

    def move(self, block: Block, gradients: Sequence[Tensor]) -> None:
        """v <- momentum v + G, W <- W - lr B^-1 v A^-1."""
        lr, state = float(block.options[0]["lr"]), block.states[0]
        if "inputs_inverse" not in state:
            return Identity().move(block, gradients)
        found = _accumulated(block, gradients)
        groups, inputs = len(state["inputs"]), block.parameters[0][0].numel()
        matrix = found[0].reshape(groups, -1, inputs)
        if len(found) > 1:
            matrix = torch.cat([matrix, found[1].reshape(groups, -1, 1)], dim=-1)
        step = state["outputs_inverse"] @ matrix.to(working_dtype(matrix)) @ state["inputs_inverse"]
        parts = (step[..., :inputs], step[..., inputs:])
        for parameter, part in zip(block.parameters, parts, strict=False):
            parameter.add_(part.reshape(parameter.shape).to(parameter.dtype), alpha=-lr)
        return None


BASES: dict[str, type[Base]] = {"identity": Identity, "adaptive": Adaptive, "kronecker": Kronecker}


def restore(states: Any, groups: Sequence[Options], saved: Mapping[str, Any]) -> None:
    """Put back what torch, loading a state, has cast to its parameter's precision: Kronecker factors are finer."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                states[parameter][key] = value.to(parameter.device, copy=True)


def _decayed(parameter: Tensor, gradient: Tensor, options: Options) -> Tensor:
    return gradient.add(parameter, alpha=options["weight_decay"]) if options["weight_decay"] else gradient


def _accumulated(block: Block, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """v <- momentum v + g."""
    found = []
    for parameter, state, options, gradient in zip(
        block.parameters, block.states, block.options, gradients, strict=True
    ):
        velocity = _decayed(parameter, gradient, options)
        if options["momentum"] and "momentum_buffer" in state:
            velocity = state["momentum_buffer"].mul_(options["momentum"]).add_(velocity)
        elif options["momentum"]:
            velocity = state["momentum_buffer"] = velocity.clone()
        found.append(velocity)
    return found


def _inverse(factor: Tensor, damping: float) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    root, failed = torch.linalg.cholesky_ex(factor + damping**0.5 * eye)
    if bool(failed.any()):
        raise ProblemError(
            f"damping is {damping}, with which a Kronecker factor of {factor.shape[-1]} rows has no inverse; "
            "expected enough to make it regular: raise damping, 0.01 by default"
        )
    return torch.cholesky_inverse(root)
