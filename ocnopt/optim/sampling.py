"""Curvature of a model's likelihood instead of its loss: backward passes of targets that the model itself would draw.

For the output z of a sample and its likelihood, H = d^2 (-log p)/dz^2 is sum_c h_c h_c^T, exactly

    categorical   h_c = sqrt(p_c) (e_c - p),  p = softmax(z), c = 1..C       (cross entropy; one label a sample)
    gaussian      h_c = e_c, c over all entries of z                         (half the squared error, unit variance)

and in the mean over draws h h^T with h = e_y - p, y drawn from p, at each place where there are several, or h standard
normal. A backward pass from h gives J^T h, so that its samples make the Gauss-Newton matrix J^T H J, the Fisher
information; the "costate" of the loss makes the empirical Fisher instead, which vanishes with the loss.

Source: Martens, arXiv 1412.1193, section 9; Kunstner, Balles, Hennig, arXiv 1905.12558.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ocnopt.differential.kronecker import Collector, Samples, is_gone


def cotangents(outputs: Tensor, likelihood: str, *, draws: int | None) -> Iterator[Tensor]:
    """The columns h: all of them, scaled so that their mean is H, or some draws.

    Args:
        outputs: ``(B, C)``, with draws ``(B, ..., C)``; a gaussian's ``(B, ...)``.
        likelihood: "categorical" or "gaussian".
        draws: how many; all columns if None.
    """
    z = outputs.detach()
    if likelihood == "categorical":
        p, width = z.softmax(-1), z.shape[-1]
        unit = torch.eye(width, dtype=z.dtype, device=z.device)
        if draws is None:
            yield from ((width * p[..., c, None]).sqrt() * (unit[c] - p) for c in range(width))
        else:
            for _ in range(draws):
                drawn = torch.multinomial(p.flatten(0, -2).float(), 1)
                yield unit[drawn.reshape(p.shape[:-1])] - p
    elif draws is None:
        flat = z.reshape(len(z), -1)
        for c in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, c] = flat.shape[1] ** 0.5
            yield column.reshape(z.shape)
    else:
        yield from (torch.randn_like(z) for _ in range(draws))


def gather(
    collector: Collector,
    outputs: Tensor,
    columns: Iterable[Tensor],
    parameters: Iterable[Tensor],
    reduction: str,
    before: Sequence[dict[nn.Module, Samples]],
) -> list[dict[nn.Module, Samples]]:
    """The samples of a backward pass from each column; gradients are left as they were.

    Args:
        collector: that watches.
        outputs: with their graph, which is kept.
        columns: each of the shape of the outputs.
        parameters: that are trained.
        reduction: "mean" or "sum": what the collector takes a loss for.
        before: gathered for the same step, which counts while a gradient does.
    """
    kept = [(parameter, parameter.grad) for parameter in parameters if parameter.requires_grad]
    found = [] if all(is_gone(gradient) for _, gradient in kept) else [*before]
    try:
        for column in columns:
            for parameter, _ in kept:
                parameter.grad = None
            weighed = column / len(outputs) if reduction == "mean" else column
            outputs.backward(weighed, retain_graph=True, inputs=[parameter for parameter, _ in kept])
            found.append(collector.take())
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
    return found


def joined(found: Sequence[Mapping[nn.Module, Samples]]) -> dict[nn.Module, Samples]:
    """All samples of each layer."""
    layers = {layer: None for each in found for layer in each}
    parts = {layer: [each[layer] for each in found if layer in each] for layer in layers}
    return {layer: Samples(*(torch.cat(pair, 1) for pair in zip(*own, strict=True))) for layer, own in parts.items()}
