"""Kronecker-factored curvature of layers whose weights act many times: along a path in time, at the places of an image.

A layer's parameters form one matrix per group, W ``(groups, b, a)``: b outputs, a inputs (a convolution's inputs are
patches), a bias being the weight of an extra input 1. Sample i meets them at times t and locations r, with inputs
z_i(t, r) and gradients g_i(t, r) at the outputs. In the "reduce" form each sample counts once, with

    zbar_i = mean over t and r of z_i,  gbar_i = integral over t, sum over r of g_i,  its gradient ~ gbar_i zbar_i^T,
    A = mean_i zbar_i zbar_i^T  (groups, a, a),  B = mean_i gbar_i gbar_i^T  (groups, b, b),  curvature of W ~ A (X) B,

so A and B are positive semi-definite whatever weights the time integral uses. What follows from them is explained in
``ocnopt.optim.matrices``.

Sources: Liu, Chen, Theodorou, arXiv 2109.14158, eq. 11-13; Grosse, Martens, arXiv 1602.01407 (convolutions);
Eschenhagen et al., arXiv 2311.00636 (reduce form).
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether a module is a layer with Kronecker factors: one of ``LAYERS``, its weight an ordinary parameter."""
    return isinstance(module, LAYERS) and "weight" in dict(module.named_parameters(recurse=False))


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The precision of factors and moments: that of the parameter, at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def as_matrix(weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Weight and bias, or their gradients, as ``(groups, b, a)``."""
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    if bias is not None:
        matrix = torch.cat([matrix, bias.reshape(groups, -1, 1)], dim=2)
    return matrix


def input_samples(layer: Layer, z: Tensor, bias: bool) -> Tensor:
    """Mean of a layer's inputs over locations ``(groups, n, a)``, for z with samples along its leading axis."""
    z = z.detach().to(working_dtype(layer.weight))
    if isinstance(layer, nn.Linear):
        means = z.reshape(len(z) if z.ndim > 1 else 1, -1, layer.in_features).mean(1)
    else:
        spatial = layer.weight.ndim - 2
        means = z.reshape(-1, *z.shape[-1 - spatial :])
        for i in reversed(range(spatial)):
            means = (means @ _patch_means(layer, i, z.shape[i - spatial]).to(z).mT).movedim(-1, 2)
    samples = means.reshape(len(means), _groups(layer), -1).transpose(0, 1)
    return functional.pad(samples, (0, 1), value=1.0) if bias else samples


def gradient_samples(layer: Layer, g: Tensor) -> Tensor:
    """Sum of the gradients at a layer's outputs over locations ``(groups, n, b)``."""
    g = g.detach().to(working_dtype(layer.weight))
    if isinstance(layer, nn.Linear):
        sums = g.reshape(len(g) if g.ndim > 1 else 1, -1, layer.out_features).sum(1)
    else:
        sums = g.reshape(-1, *g.shape[1 - layer.weight.ndim :]).flatten(2).sum(2)
    return sums.reshape(len(sums), _groups(layer), -1).transpose(0, 1)


def _groups(layer: Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _patch_means(layer: Conv, axis: int, size: int) -> Tensor:
    padding = layer.padding
    span = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
    if isinstance(padding, str):
        left = span // 2 if padding == "same" else 0
        ends = (left, span - left if padding == "same" else 0)
    else:
        ends = (padding[axis], padding[axis])
    return _offset_means(size, span + 1, layer.dilation[axis], layer.stride[axis], ends, layer.padding_mode)


@lru_cache(maxsize=256)
def _offset_means(size: int, span: int, dilation: int, stride: int, ends: tuple[int, int], mode: str) -> Tensor:
    """Weights ``(kernel offsets, size)`` of the places of one axis in the mean over outputs, for each kernel offset."""
    # An axis of indices is padded, instead of the image, which covers every padding mode; -1 marks a padded zero.
    places = torch.arange(size, dtype=torch.float64)[None, None]
    mode, fill = ("constant", -1.0) if mode == "zeros" else (mode, None)
    padded = functional.pad(places, ends, mode=mode, value=fill)[0, 0].long()
    met = padded.unfold(0, span, stride)[:, ::dilation]
    return functional.one_hot(met + 1, size + 1)[..., 1:].double().mean(0)


class Samples(NamedTuple):
    """zbar ``(groups, n, a)`` and gbar ``(groups, n, b)`` of n samples at one layer."""

    inputs: Tensor
    gradients: Tensor

    def finite(self) -> "Samples":
        """The samples without NaN and infinity: a batch that was skipped may have left others."""
        keep = torch.cat(self, -1).isfinite().all(-1).all(0)
        return self if bool(keep.all()) else Samples(self.inputs[:, keep], self.gradients[:, keep])


def is_gone(gradient: Tensor | None) -> bool:
    """Whether what was accumulated in a parameter's ``.grad`` has been thrown away since."""
    return gradient is None or not (gradient.is_sparse or bool(gradient.any()))


def present_pass() -> int:
    """The number of the backward pass that runs, -1 where none does; later ones, and ones within it, have higher."""
    return torch._C._current_graph_task_id()


def is_within_backward() -> bool:
    """Whether a backward pass is running, which evaluates modules again (replays, checkpoints)."""
    return present_pass() != -1


def release(handles: list[RemovableHandle]) -> None:
    """Remove hooks, and forget their handles."""
    while handles:
        handles.pop().remove()


class _Sum:
    """Running sums over the uses of a layer by the same samples: inputs with weights, gradients with factors."""

    def __init__(self) -> None:
        self._inputs: Tensor | None = None
        self._gradients: Tensor | None = None
        self._weight = 0.0

    def add(self, inputs: Tensor | None, weight: float, gradients: Tensor, factor: float) -> None:
        """Add one use."""
        sums = self._gradients
        self._gradients = gradients * factor if sums is None else sums.add_(gradients, alpha=factor)
        if inputs is not None:
            means = self._inputs
            self._inputs = inputs * weight if means is None else means.add_(inputs, alpha=weight)
            self._weight += weight

    def join(self, other: "_Sum") -> None:
        """Add the uses that another pass found for the same samples."""
        z, g, weight = other._inputs, other._gradients, other._weight
        if g is not None:
            self.add(None if z is None else z / weight, weight, g, 1.0)

    def samples(self, mean: bool) -> list[Samples]:
        """The samples, if there are any."""
        z, g = self._inputs, self._gradients
        return [] if z is None or g is None else [Samples(z / self._weight, g * g.shape[1] if mean else g)]


class _Uses:
    """What a layer met in one iteration, by the passes that found it, and the samples before.

    Samples count once the pass that found them, or one around it, has reached the weight's ``.grad``, and for as long
    as it is there: what torch.autograd.grad finds belongs to no step.
    """

    def __init__(self, parameter: Tensor, bias: bool, mean: bool) -> None:
        self.parameter, self.bias, self.mean = parameter, bias, mean
        self._before: list[Samples] = []
        self._present: dict[torch.Size, _Sum] = {}
        self._found: dict[tuple[int, torch.Size], _Sum] = {}

    def add(self, found: int, inputs: Tensor | None, weight: float, gradients: Tensor, factor: float) -> None:
        """Add one use, given the pass that found it; see :class:`_Sum`."""
        if (self._before or self._present) and is_gone(self.parameter.grad):
            self._before, self._present = [], {}
        self._found.setdefault((found, gradients.shape), _Sum()).add(inputs, weight, gradients, factor)

    def count(self, _: Tensor) -> None:
        """The present pass has reached ``.grad``: so has what was found since it began."""
        present = present_pass()
        for found, shape in [key for key in self._found if key[0] >= present]:
            total = self._found.pop((found, shape))
            if shape in self._present:
                self._present[shape].join(total)
            else:
                self._present[shape] = total

    def close(self) -> None:
        """What follows are other samples."""
        for total in self._present.values():
            self._before += total.samples(self.mean)
        self._present, self._found = {}, {}

    def take(self) -> list[Samples]:
        """Hand over all samples that count."""
        self.close()
        taken, self._before = self._before, []
        return [] if self.parameter.grad is None else taken


class Collector:
    """Gathers the samples of layers while it is attached, as hooks of layers and as observer of Neural ODEs.

    A layer that is called again once its gradient has arrived meets other samples (accumulated gradients).

    Args:
        layers: the layers, and whether their bias counts as an input.
        timed: those that act inside a Neural ODE; they count in :meth:`stage` alone, the others in every forward pass.
        mean: the loss is a mean over the samples of a batch, not a sum.

    A copy of a watched module is not watched: copying or pickling a collector makes one without layers.
    """

    def __init__(self, layers: Mapping[nn.Module, bool], timed: Collection[nn.Module], *, mean: bool = True) -> None:
        self._timed = frozenset(timed)
        self._uses: dict[nn.Module, _Uses] = {
            layer: _Uses(layer.weight, bias, mean) for layer, bias in layers.items() if is_layer(layer)
        }
        self._stage: tuple[float, float] | None = None

    def attach(self, layers: Collection[nn.Module] | None = None) -> list[RemovableHandle]:
        """Begin with nothing gathered, and watch some of the layers, or all, until the handles are removed."""
        self.take()
        watched = {layer: uses for layer, uses in self._uses.items() if layers is None or layer in layers}
        hooks = [layer.register_forward_hook(self._see, with_kwargs=True) for layer in watched]
        return hooks + [uses.parameter.register_post_accumulate_grad_hook(uses.count) for uses in watched.values()]

    @contextmanager
    def stage(self, input_weight: float, gradient_weight: float) -> Iterator[None]:
        """One stage of a backward pass: see :class:`ocnopt.differential.discrete.Observer`."""
        self._stage = (input_weight, gradient_weight)
        try:
            yield
        finally:
            self._stage = None

    def terminal(self, x: Tensor, slope: Tensor, costate: Tensor) -> None:
        """Factors need nothing from the end of the path."""

    def take(self) -> dict[nn.Module, Samples]:
        """Hand over what was gathered at every layer that was used and received a gradient."""
        taken = {}
        for layer, uses in self._uses.items():
            finite = [kept for kept in map(Samples.finite, uses.take()) if kept.inputs.shape[1]]
            if finite:
                taken[layer] = Samples(*(torch.cat(part, 1) for part in zip(*finite, strict=True)))
        return taken

    def _see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        uses = self._uses.get(layer)
        if uses is not None and not is_within_backward():
            uses.close()
        weights = self._stage if layer in self._timed else (1.0, 1.0)
        z = args[0] if args else kwargs.get("input")
        if uses is None or weights is None or not (isinstance(z, Tensor) and isinstance(output, Tensor)):
            return
        if not (is_layer(layer) and output.requires_grad and _fits(layer, z, output)):
            return
        weight, factor = weights
        pending, means = [z.detach()] if weight > 0.0 else [], []
        replay = present_pass()

        # Counted as its gradient arrives: a forward pass without a backward pass leaves no trace, and until then
        # autograd holds the input anyway. A retained graph may bring further gradients.
        def arrive(g: Tensor) -> None:
            if self._stage is not None and layer in self._timed:
                return  # the field differentiates inside; what counts arrives with the pull, after the stage
            with torch.autocast(g.device.type, enabled=False):
                if pending:
                    means.append(input_samples(layer, pending.pop(), uses.bias))
                # a replayed stage is pulled back in a pass of its own, within that which replays it
                found = replay if layer in self._timed else present_pass()
                uses.add(found, means[0] if means else None, weight, gradient_samples(layer, g), factor)

        output.register_hook(arrive)

    def __reduce__(self) -> tuple[Any, ...]:
        return Collector, ({}, ())


def _fits(layer: Layer, z: Tensor, output: Tensor) -> bool:
    """Whether input and output are those of the layer type; a subclass may take and return other things."""
    if not z.numel():
        return False
    if isinstance(layer, nn.Linear):
        return z.shape[-1:] == (layer.in_features,) and output.shape == (*z.shape[:-1], layer.out_features)
    channel = 1 - layer.weight.ndim
    shapes = z.ndim == output.ndim and -channel <= z.ndim <= 1 - channel
    return shapes and z.shape[channel] == layer.in_channels and output.shape[channel] == layer.out_channels
