"""What is gathered at layers: against explicit patches, per-sample gradients and a fine-grid integral."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from ocnopt.differential.kronecker import (
    Samples,
    as_matrix,
    gradient_samples,
    input_samples,
)
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import Horizon
from tests.optim.cases import factors, gather

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Field(nn.Module):
    """A tanh network that sees the time."""

    def __init__(self, n=2, hidden=3):
        super().__init__()
        self.first = nn.Linear(n + 1, hidden)
        self.second = nn.Linear(hidden, n, bias=False)

    def forward(self, t, x):
        return self.second(torch.tanh(self.first(torch.cat([x, t.expand(len(x), 1)], 1))))


@st.composite
def convolutions(draw):
    """A convolution of any kind and an input that it takes."""
    kind = draw(st.sampled_from(CONVOLUTIONS))
    spatial = CONVOLUTIONS.index(kind) + 1
    axes = st.tuples(*[st.integers(1, 3)] * spatial)
    groups, kernel = draw(st.integers(1, 2)), draw(axes)
    stride, dilation = draw(axes), draw(st.tuples(*[st.integers(1, 2)] * spatial))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(*[st.integers(0, 2)] * spatial)))
    if padding == "same":
        stride = 1
    layer = kind(
        2 * groups,
        3 * groups,
        kernel,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        mode,
        dtype=torch.float64,
    )
    sizes = [draw(st.integers(5, 7)) for _ in range(spatial)]
    return layer, torch.randn(draw(st.integers(1, 3)), 2 * groups, *sizes)


@given(convolutions())
def test_inputs_of_a_convolution_are_the_mean_of_its_patches(case):
    layer, x = case
    samples = input_samples(layer, x, bias=layer.bias is not None)
    for i in range(len(x)):
        outputs = layer(x[i : i + 1]).flatten(2).mean(2)[0]
        rows = as_matrix(*_sum_of_gradients(outputs, layer), layer.groups).sum(1) / (layer.out_channels // layer.groups)
        torch.testing.assert_close(samples[:, i], rows)


def _sum_of_gradients(outputs, layer):
    """The derivative of the outputs' mean over places by the parameters is the mean patch, and 1 for the bias."""
    parameters = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    gradients = torch.autograd.grad(outputs.sum(), parameters)
    return (*gradients, None) if layer.bias is None else gradients


def test_inputs_of_a_convolution_match_unfold():
    layer = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False)
    x = torch.randn(5, 3, 6, 7)
    patches = functional.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 2), stride=(2, 1))
    torch.testing.assert_close(input_samples(layer, x, bias=False)[0], patches.mean(2))


@given(convolutions())
def test_factors_of_every_convolution_are_positive_semi_definite(case):
    layer, x = case
    model = nn.Sequential(layer)
    (samples,) = gather(model, lambda: model(x).square().mean().backward()).values()
    for factor in factors(samples):
        values = torch.linalg.eigvalsh(factor)
        assert values.min() >= -1e-12 * values.max().clamp(min=1.0)
    assert samples.inputs.shape == (layer.groups, len(x), as_matrix(layer.weight, layer.bias, layer.groups).shape[2])


@given(convolutions())
def test_gradients_of_a_convolution_are_summed_over_places(case):
    layer, x = case
    g = torch.randn_like(layer(x))
    sums = g.reshape(len(x), layer.groups, layer.out_channels // layer.groups, -1).sum(3)
    torch.testing.assert_close(gradient_samples(layer, g), sums.transpose(0, 1))


@pytest.mark.parametrize("method", ["dopri5", "rk4", "bosh3", "heun"])
@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_factors_are_positive_semi_definite_for_every_tableau(method, adjoint):
    ode = NeuralODE(Field(), method=method, adjoint=adjoint, steps=3)
    taken = gather(ode, lambda: ode(torch.randn(2, 2)).square().mean().backward())
    assert len(taken) == 2
    for samples in taken.values():
        for factor in factors(samples):
            assert torch.linalg.eigvalsh(factor).min() >= -1e-14


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
@pytest.mark.parametrize("horizon", [Horizon(0.0, 1.5), Horizon(1.0, -0.5)])
def test_factors_against_a_fine_grid(adjoint, horizon):
    field, x = Field(), torch.randn(4, 2)
    ode = NeuralODE(field, horizon, rtol=1e-5, atol=1e-5, adjoint=adjoint)
    taken = gather(ode, lambda: ode(x).square().sum(1).mean().backward())
    for layer, (inputs, gradients) in _fine_grid(field, x, horizon).items():
        for factor, reference in zip(
            factors(taken[layer]), factors(Samples(inputs[None], gradients[None])), strict=True
        ):
            assert torch.linalg.matrix_norm(factor - reference) <= 1e-3 * torch.linalg.matrix_norm(reference)


def _fine_grid(field, x, horizon, steps=400):
    """Time means of inputs and time integrals of per-sample gradients at the outputs, by midpoint sums."""
    h = (horizon.t1 - horizon.t0) / steps
    states = [x.requires_grad_()]
    for k in range(steps):
        t = torch.tensor(horizon.t0 + (k + 0.5) * h)
        middle = states[-1] + h / 2 * field(t - h / 2, states[-1])
        states.append(states[-1] + h * field(t, middle))
    costates = torch.autograd.grad(states[-1].square().sum(), states)  # of the sum: one sample's own loss
    sums = {field.first: [0.0, 0.0], field.second: [0.0, 0.0]}
    for k in range(steps):
        t = torch.tensor(horizon.t0 + (k + 0.5) * h)
        y, a = (states[k] + states[k + 1]).detach() / 2, (costates[k] + costates[k + 1]) / 2
        z = torch.cat([y, t.expand(len(y), 1)], 1)
        hidden = torch.tanh(field.first(z)).detach()
        g = (a @ field.second.weight.detach()) * (1 - hidden**2)
        ones = torch.ones(len(y), 1)
        for layer, (i, o) in {field.first: (torch.cat([z, ones], 1), g), field.second: (hidden, a)}.items():
            sums[layer][0] += i / steps
            sums[layer][1] += o * h
    return sums


class Gated(nn.Module):
    """A field whose layer has an input that does not change with time."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs, self.layer = inputs, nn.Linear(inputs.shape[1], 2)

    def forward(self, t, x):
        return torch.tanh(self.layer(self.inputs)) * x * torch.cos(t)


@pytest.mark.parametrize("solves", [1, 3])
@pytest.mark.parametrize(("adjoint", "rtol"), [("discrete", 1e-12), ("continuous", 1e-3)])
def test_products_are_per_sample_gradients_where_the_input_is_constant_in_time(solves, adjoint, rtol):
    field, x = Gated(torch.randn(4, 3)), torch.randn(4, 2)
    ode = NeuralODE(field, rtol=1e-6, atol=1e-6, adjoint=adjoint)

    def losses():
        y = x
        for _ in range(solves):
            y = ode(y)
        return y.square().sum(1)

    (samples,) = gather(ode, lambda: losses().mean().backward()).values()
    for i in range(4):
        field.zero_grad()
        losses()[i].backward()
        product = samples.gradients[0, i, :, None] * samples.inputs[0, i]
        expected = as_matrix(field.layer.weight.grad, field.layer.bias.grad, 1)[0]
        torch.testing.assert_close(product, expected, rtol=rtol, atol=rtol)


def test_a_linear_layer_meets_samples_at_several_places():
    layer, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    (samples,) = gather(layer, lambda: layer(x).square().sum().backward(), mean=False).values()
    torch.testing.assert_close(samples.inputs[0, :, :3], x.mean(1))
    torch.testing.assert_close(samples.gradients[0], 2 * layer(x).sum(1))


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(3, 2), (3,)), (nn.Conv2d(2, 3, 3), (2, 4, 5))], ids=["linear", "convolution"]
)
def test_one_sample_without_a_batch_axis(layer, shape):
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    (alone,) = gather(layer, lambda: layer(x).sum().backward()).values()
    (batch,) = gather(layer, lambda: layer(input=x[None]).sum().backward()).values()
    torch.testing.assert_close(alone, batch)


def test_the_mean_over_a_batch_is_undone():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    (mean,) = gather(layer, lambda: layer(x).square().sum(1).mean().backward()).values()
    (total,) = gather(layer, lambda: layer(x).square().sum(1).sum().backward(), mean=False).values()
    torch.testing.assert_close(mean, total)


def test_a_forward_pass_without_a_backward_pass_leaves_no_trace():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)

    def run():
        layer(torch.randn(7, 3))
        with torch.no_grad():
            layer(torch.randn(4, 3))
        layer(x).sum().backward()

    (samples,) = gather(layer, run).values()
    torch.testing.assert_close(samples.inputs[0, :, :3], x)


def test_accumulated_gradients_are_of_other_samples():
    layer, x = nn.Linear(3, 2), torch.randn(6, 3)

    def run():
        for part in x.split([2, 2, 1, 1]):
            layer(part).sum().backward()

    (samples,) = gather(layer, run).values()
    torch.testing.assert_close(samples.inputs[0, :, :3], x)


def test_uses_by_the_same_samples_add_up_and_other_sizes_count_apart():
    inner = nn.Linear(3, 3, bias=False)
    model, x = nn.Sequential(inner, inner), torch.randn(2, 3)
    (samples,) = gather(model, lambda: model(x).sum().backward(), mean=False).values()
    torch.testing.assert_close(samples.inputs[0], (x + inner(x)) / 2)
    (samples,) = gather(inner, lambda: (inner(x).sum() + inner(x[:1]).sum()).backward()).values()
    assert samples.inputs.shape == (1, 3, 3)


def test_chunks_of_unequal_size_make_a_batch_where_losses_are_sums():
    """Each chunk's loss is divided by the size of the batch: only "sum" does not undo it by the size of the chunk."""
    layer, x = nn.Linear(3, 2), torch.randn(6, 3)

    def run(*sizes):
        for part in x.split(sizes):
            (layer(part).square().sum() / 6).backward()

    for mean in (False, True):
        (whole,), (chunks,) = (gather(layer, lambda: run(*s), mean=mean).values() for s in ([6], [4, 2]))  # noqa: B023
        assert torch.allclose(chunks.gradients, whole.gradients) is not mean


def test_samples_of_no_weight_still_are_samples():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]
    (samples,) = gather(layer, lambda: (weights * layer(x)).sum().backward()).values()
    torch.testing.assert_close(samples.inputs[0, :, :3], x)
    assert not samples.gradients[0, 1].any()


def test_samples_with_nan_are_left_out():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    x[1, 2] = torch.nan
    (samples,) = gather(layer, lambda: layer(x).sum().backward()).values()
    torch.testing.assert_close(samples.inputs[0, :, :3], x[[0, 2, 3]])
    assert not gather(layer, lambda: layer(x[1:2]).sum().backward())


def test_layers_of_a_field_count_in_stages_alone():
    ode = NeuralODE(Field(), method="rk4", steps=1)
    assert not gather(ode, lambda: ode.field(torch.tensor(0.5), torch.randn(2, 2)).sum().backward())


def test_other_inputs_than_the_type_takes_are_not_read():
    class Scaled(nn.Linear):
        def forward(self, scale, x):
            return scale * super().forward(x)

    class Pair(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y, y

    scaled, pair = Scaled(3, 2), Pair(3, 2)
    assert not gather(scaled, lambda: scaled(torch.tensor(2.0), torch.randn(4, 3)).sum().backward())
    assert not gather(pair, lambda: pair(torch.randn(4, 3))[0].sum().backward())
    layer = nn.Linear(3, 2)
    assert not gather(layer, lambda: layer(torch.randn(0, 3)).sum().backward())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_of_a_watched_model_is_not_watched(duplicate):
    model = nn.Sequential(nn.Linear(3, 2))
    copies = []

    def run():
        copies.append(duplicate(model))
        copies[0](torch.randn(4, 3)).sum().backward()

    assert not gather(model, run)


class Gradients(nn.Module):
    """A field that differentiates a layer inside: the gradient of a potential."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, t, x):
        return self._gradient(x, 1e6) / 1e6

    def _gradient(self, x, scale):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            # The scale cancels in the field, and must not reach the factors through the gradient taken here.
            return torch.autograd.grad(scale * torch.sin(self.layer(x)).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("adjoint", ["discrete", "continuous"])
def test_gradients_that_a_field_takes_inside_do_not_count(adjoint):
    field, x = Gradients(), torch.randn(4, 2)
    ode = NeuralODE(field, method="rk4", steps=4, adjoint=adjoint)
    (samples,) = gather(ode, lambda: ode(x).square().sum(1).mean().backward()).values()
    field.zero_grad()
    field._gradient = lambda x, scale: torch.cos(field.layer(x)) @ field.layer.weight * scale
    (expected,) = gather(ode, lambda: ode(x).square().sum(1).mean().backward()).values()
    torch.testing.assert_close(samples.inputs, expected.inputs)
    torch.testing.assert_close(samples.gradients, expected.gradients)
