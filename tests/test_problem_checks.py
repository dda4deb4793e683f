"""What the checks of a problem's numbers and functions find out when they call them, and how they say it."""

import inspect
import math
import warnings

import numpy as np
import pytest
import torch

from ocnopt import checks
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon, Horizon
from tests.oracles.compare import assert_close


def drift(t, x, u):
    return -x + u.sum(-1, keepdim=True)


def make(dynamics=drift, running_cost=None, terminal_cost=None, **options):
    settings = {"initial_state": [1.0, 2.0], "control_dim": 1, "horizon": 1.0} | options
    return OCP(dynamics, running_cost, terminal_cost, **settings)


class TestNothingIsShared:
    def test_the_users_tensors_stay_theirs(self):
        x0, p, upper = torch.ones(2).double(), torch.ones(1).double(), torch.ones(1).double()
        options = {"parameters": p, "control_bounds": (-upper, upper), "parameter_bounds": (-3 * upper, 3 * upper)}
        problem = make(lambda t, x, u, p: -x + u + p, initial_state=x0, **options)
        for tensor in (x0, p, upper):
            tensor += 1.0
        assert_close(problem.initial_state, [1.0, 1.0])
        assert_close(problem.parameters, [1.0])
        assert_close(problem.control_bounds[1], [1.0])

    def test_a_numpy_start_stays_the_users(self):
        x0 = np.ones(2)
        problem = make(initial_state=x0)
        x0 += 1
        assert_close(problem.initial_state, [1.0, 1.0])

    @pytest.mark.parametrize("letter", ["x", "u", "p", "t"])
    def test_a_function_that_writes_into_its_arguments(self, letter):
        def dynamics(t, x, u, p):
            {"t": t, "x": x, "u": u, "p": p}[letter].mul_(1.0)
            return -x + u + p

        message = f"dynamics writes into its argument {letter}; expected a function that leaves its arguments as they"
        with pytest.raises(ProblemError, match=message):
            make(dynamics, parameters=[1.0])


class TestNumbers:
    def test_numpy_numbers(self):
        # unwrap: the tests' type checker would refuse what annotations do not name
        problem, free = object.__new__(OCP), _horizon(np.int64(2))
        inspect.unwrap(OCP.__init__)(
            problem, drift, initial_state=[1.0], horizon=np.float32(2), control_dim=np.int64(1)
        )
        assert problem.horizon == Horizon(0.0, 2.0)
        assert (type(problem.horizon.t1), type(problem.control_dim)) == (float, int)
        checks.as_floats(free)
        assert free == FreeHorizon(1.0, 0.5, 2.0)
        assert type(free.upper) is float

    def test_a_numpy_pair_of_bounds(self):
        for pair in (np.array([-1.0, 2.0]), np.array([[-1.0], [2.0]])):
            assert_close(torch.stack(make(control_bounds=pair).control_bounds), [[-1.0], [2.0]])

    def test_a_cost_of_a_numpy_number(self):
        make(drift, lambda t, x, u: np.float32(1.0))

    @pytest.mark.parametrize("value", [(None, 1.0), ([None], 1.0), (0.0, None)])
    def test_none_is_no_bound(self, value):
        with pytest.raises(
            ProblemError, match=r"is (\[None\]|None); expected numbers: float\('inf'\) or -float\('inf'\)"
        ):
            make(control_bounds=value)

    @pytest.mark.parametrize("value", ["1", True, torch.tensor(1.0)])
    def test_ends_that_are_no_numbers(self, value):
        with pytest.raises(ProblemError, match=r"upper of FreeHorizon is .*; expected a number: use float\(..\) for a"):
            checks.as_floats(_horizon(value))

    def test_parameters_outside_their_bounds(self):
        message = r"parameters\[1\] is 5.0, outside its bounds \[-1.0, 1.0\]; expected a start within parameter_bounds"
        with pytest.raises(ProblemError, match=message):
            make(lambda t, x, u, p: x + p, parameters=[0.0, 5.0], parameter_bounds=(-1.0, 1.0))


def _horizon(upper):
    free = object.__new__(FreeHorizon)
    for name, value in {"initial": 1.0, "lower": 0.5, "upper": upper, "t0": 0.0}.items():
        object.__setattr__(free, name, value)
    return free


class TestTorchOnly:
    """What leaves torch is named with its cure, at construction."""

    @pytest.mark.parametrize(
        ("dynamics", "hint"),
        [
            (lambda t, x, u: x if x[..., 0] > 0 else -x, "it branches or loops on the value of a tensor .*torch.where"),
            (lambda t, x, u: x * x[..., 0].item(), r"it turns a tensor into Python numbers .*use torch.sin\(x\)"),
            (lambda t, x, u: x * math.sin(x[..., 0]), r"it turns a tensor into Python numbers .*use torch.sin\(x\)"),
            (lambda t, x, u: torch.tensor([x[..., 1], x[..., 0]]), r"torch.stack\(\[x\[..., 0\], ..\], dim=-1\)"),
            (lambda t, x, u: torch.as_tensor(np.asarray(x) * 2.0), "it leaves torch for numpy: write it in torch"),
        ],
    )
    def test_what_fails(self, dynamics, hint):
        with pytest.raises(ProblemError, match=f"dynamics.* failed when called .*{hint}"):
            make(dynamics)

    @pytest.mark.parametrize(
        ("dynamics", "hint"),
        [
            (lambda t, x, u: x if (x > 0).any() else -x, "it branches or loops on the value of a tensor"),
            (lambda t, x, u: torch.as_tensor(2 * x.detach().numpy()), "it leaves torch for numpy"),
            (lambda t, x, u: x * float((x[..., :1] > 0).all()), "it turns a tensor into Python numbers"),
            (lambda t, x, u: x.detach() + u, r"detach\(\), .data and torch.no_grad\(\) cut it off"),
            (lambda t, x, u: x.data + u, r"detach\(\), .data and torch.no_grad\(\) cut it off"),
            (torch.no_grad()(lambda t, x, u: x + u), r"detach\(\), .data and torch.no_grad\(\) cut it off"),
        ],
    )
    def test_what_is_frozen(self, dynamics, hint):
        with pytest.warns(UserWarning, match=f"dynamics hides part of itself from derivatives: {hint}.*as a constant"):
            make(dynamics)

    def test_numbers_of_its_own_are_fine(self):
        scale, table = torch.tensor(2.0).double(), torch.arange(3).double()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(
                lambda t, x, u: (
                    x * float(scale) * (1.0 if scale > 1 else 2.0) + torch.tensor(table.tolist()[1]).double()
                )
            )
            make(lambda t, x, u: torch.where(x > 0, x, -x) * x.shape[-1] + torch.zeros_like(x))

    def test_no_derivative(self):
        class Opaque(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, slope):
                raise RuntimeError("none here")

        with pytest.raises(ProblemError, match=r"dynamics cannot be differentiated \(none here\); expected torch code"):
            make(lambda t, x, u: Opaque.apply(x))


class TestDerivativesAtTheStart:
    def test_a_root_at_zero(self):
        with pytest.warns(
            UserWarning, match=r"the derivative of running_cost in x is nan at entry \(0,\).* sqrt or a n"
        ):
            make(drift, lambda t, x, u: torch.sqrt((x**2).sum(-1)), initial_state=[0.0, 0.0])

    def test_the_trap_of_where(self):
        def cost(t, x):
            return torch.where(x[..., 0] > 0, torch.log(x[..., 0]), 0.0)

        with pytest.warns(
            UserWarning, match="derivative of terminal_cost in x is nan .*whose other branch is not finite"
        ):
            make(drift, None, cost, initial_state=[-0.0, 1.0])


def test_a_captured_tensor_of_inference_mode():
    with torch.inference_mode():
        rate = torch.tensor([0.5, 0.5], dtype=torch.float64)
    with pytest.raises(ProblemError, match=r"captures was made under torch.inference_mode\(\): make it outside"):
        make(lambda t, x, u: rate * x + u)
    assert make(lambda t, x, u: rate.clone() * x + u, initial_state=rate).state_dim == 2


@pytest.mark.parametrize("seed", range(4))
def test_a_float32_network_rounds_stacked_rows_differently(seed):
    torch.manual_seed(seed)
    weights = [torch.randn(64, 512) / 8, 30 * torch.randn(512, 512) / 22, torch.randn(512, 64) / 22]

    def dynamics(t, x, u):
        for w in weights[:-1]:
            x = torch.tanh(x @ w)
        return x @ weights[-1]

    problem = make(dynamics, control_dim=0, initial_state=torch.randn(3, 64), dtype=torch.float32)
    assert problem.state_dim == 64
