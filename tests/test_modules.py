"""A network as a problem: names, shapes, what the field sees, and every message."""

import pytest
import torch
from torch import nn

from ocnopt.differential.differentiate import differentiate
from ocnopt.errors import ProblemError
from ocnopt.modules import from_module, trainable_weights, unflatten
from ocnopt.ocp import FreeHorizon, Horizon
from tests.differential.cases import Field, case
from tests.oracles.compare import assert_close, relative_error

NO_CONTROL = torch.zeros(0)


def square(t, x):
    return (x**2).sum(-1)


def make(field=None, cost=square, x0=((1.0, 0.5), (0.2, -1.0), (0.0, 0.3)), **options):
    return from_module(field or Field(2, 3), cost, initial_state=x0, **{"horizon": 1.0, **options})


def test_weights_become_parameters_with_their_names():
    field = Field(2, 3)
    problem = make(field)
    assert torch.equal(problem.parameters, torch.nn.utils.parameters_to_vector(field.parameters()))
    named = unflatten(problem, problem.parameters)
    assert list(named) == [name for name, _ in field.named_parameters()]
    assert all(torch.equal(named[name], weight) for name, weight in field.named_parameters())
    assert problem.parameters_broadcast
    assert (problem.batch_shape, problem.control_dim, problem.dtype) == ((3,), 0, torch.float64)


def test_a_gradient_is_the_gradient_of_each_weight():
    field = Field(2, 3)
    problem = make(field)
    gradient = unflatten(field, differentiate(problem, curvature="gauss_newton").p)
    x, h = problem.initial_state, 1 / 40
    for i in range(40):
        t = torch.tensor(i * h)
        k1 = field(t, x)
        k2 = field(t + h / 2, x + h / 2 * k1)
        k3 = field(t + h / 2, x + h / 2 * k2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(t + h, x + h * k3))
    square(0, x).mean().backward()
    for name, weight in field.named_parameters():
        assert relative_error(gradient[name], weight.grad) <= 1e-6


def test_leading_axes_of_p_t_and_x():
    problem, q = make(), make().parameter_dim
    x, p = torch.randn(4, 3, 2).double(), torch.randn(4, 3, q).double()
    t, u = torch.randn(4, 1).double(), torch.zeros(4, 3, 0).double()
    together = problem.dynamics(t, x, u, p)
    for i in range(4):
        for j in range(3):
            assert_close(together[i, j], problem.dynamics(t[i, 0], x[i, j], u[i, j], p[i, j]), rtol=1e-12)
    assert_close(problem.dynamics(t, x, u, p[0, 0]), problem.dynamics(t, x, u, p[:1, :1].expand(4, 3, q)), rtol=1e-12)
    assert {k: tuple(v.shape) for k, v in unflatten(problem, p).items()}["net.0.weight"] == (4, 3, 3, 3)


def test_the_field_sees_samples_and_a_time():
    seen = []

    class Spy(nn.Linear):
        def forward(self, t, x):
            seen.append((t.ndim, x.shape))
            return super().forward(x)

    problem = from_module(Spy(2, 2), square, initial_state=torch.ones(2, 3, 2), horizon=1.0)
    seen.clear()
    assert problem.dynamics(torch.tensor(0.0), problem.initial_state, NO_CONTROL, problem.parameters).shape == (2, 3, 2)
    assert seen == [(0, (6, 2))]


def test_frozen_weights_stay_and_are_no_parameters():
    field = Field(2, 3)
    field.net[0].weight.requires_grad_(False)
    problem = make(field)
    assert "net.0.weight" not in unflatten(problem, problem.parameters)
    before = problem.dynamics(torch.tensor(0.0).double(), problem.initial_state, NO_CONTROL, problem.parameters)
    with torch.no_grad():
        field.net[0].weight.mul_(2)
        field.net[2].weight.mul_(2)
    after = problem.dynamics(torch.tensor(0.0).double(), problem.initial_state, NO_CONTROL, problem.parameters)
    assert not torch.equal(before, after)
    field.net[0].weight.data.div_(2)
    assert torch.equal(
        before, problem.dynamics(torch.tensor(0.0).double(), problem.initial_state, NO_CONTROL, problem.parameters)
    )


def test_a_shared_weight_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = self.a

        def forward(self, t, x):
            return self.b(torch.tanh(self.a(x)))

    problem = from_module(Tied(), square, initial_state=[1.0, 2.0], horizon=1.0)
    assert problem.parameter_dim == 6


def test_the_dtype_is_the_modules():
    problem = make(Field(2, 3).float())
    assert problem.dtype == problem.initial_state.dtype == problem.parameters.dtype == torch.float32


@pytest.mark.parametrize(
    ("cost", "running"),
    [
        (square, None),
        (lambda t, x, p: square(t, x) + p[..., 0], lambda t, x, u, p: x[..., 0] * p[..., 1]),
        (lambda t, x, scale=2.0: scale * square(t, x), lambda t, x, u: x[..., 0]),
        (lambda t, x, p=None: square(t, x) + p[..., 0], lambda *given: given[1][..., 0]),
    ],
)
def test_costs_with_and_without_p(cost, running):
    problem = make(cost=cost, running_cost=running, horizon=Horizon(0.0, 0.5))
    x, p = problem.initial_state, problem.parameters
    assert problem.terminal_cost(0.5, x, p).shape == (3,)
    if running is not None:
        assert problem.running_cost(0.5, x, x[..., :0], p).shape == (3,)


def test_a_module_as_terminal_cost():
    class Head(nn.Linear):
        def forward(self, t, x):
            return super().forward(x)[..., 0] ** 2

    problem = make(cost=Head(2, 1).double(), horizon=FreeHorizon(1.0, 0.5, 2.0))
    assert problem.terminal_cost(1.0, problem.initial_state, problem.parameters).shape == (3,)


class Wrong(nn.Linear):
    """Returns what the test wants."""

    def __init__(self, output):
        super().__init__(2, 2)
        self.output = output

    def forward(self, t, x):
        return self.output(super().forward(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"field": nn.Identity()}, "field has no trainable weights; expected some: call requires_grad_"),
        (
            {"field": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())},
            r"the weights of field have dtypes \['torch.float32', 'torch.float64'\]; expected one: use field.to",
        ),
        (
            {"field": Wrong(lambda y: y[..., :1])},
            r"field\(t, x\) returned shape \(3, 1\) for x of shape \(3, 2\); expected dx/dt",
        ),
        ({"field": Wrong(lambda y: (y, y))}, r"field\(t, x\) returned tuple"),
        ({"cost": lambda x: x}, r"terminal_cost takes \(x\); expected \(t, x\) or \(t, x, p\)"),
        ({"running_cost": lambda t, x: x}, r"running_cost takes \(t, x\); expected \(t, x, u\) or \(t, x, u, p\)"),
        ({"x0": "start"}, "initial_state is str; expected numbers"),
        (
            {"field": nn.Linear(2, 2)},
            r"field takes \(input.*\).*; expected forward\(t, x\).*: wrap it in a module whose f",
        ),
        ({"field": nn.Sequential(Field(2, 3))}, r"field takes \(input.*\); expected forward\(t, x\), t a 0-d tensor"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ProblemError, match=message):
        make(**arguments)


def test_a_function_is_no_module():
    with pytest.raises(ProblemError, match="field is function; expected a torch.nn.Module: for a function use oc.OCP"):
        trainable_weights(square)


def test_unflatten_refuses_other_problems_and_sizes():
    with pytest.raises(
        ProblemError, match="the problem's parameters have no names; expected a problem made by oc.from_module"
    ):
        unflatten(case("parameters_only").problem, torch.ones(2))
    with pytest.raises(
        ProblemError, match=r"p has shape \(3,\); expected \(\.\.\., 20\), one entry for each trainable weight"
    ):
        unflatten(Field(2, 3), torch.ones(3))
