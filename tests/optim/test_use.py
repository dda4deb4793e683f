"""The optimisers in a user's hands: dropped, copied, scaled, accumulated."""

import copy
import gc
import pickle
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ocnopt.errors import ProblemError
from ocnopt.optim.horizon_policy import HorizonPolicy
from ocnopt.optim.snopt import SNOpt
from tests.optim.cases import Model, gathering, loss

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def model():
    torch.manual_seed(2)
    return Model()


@pytest.fixture
def x():
    return torch.randn(6, 2, generator=torch.Generator().manual_seed(7))


def is_watched(model):
    hooks = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    return any(hooks) or bool(model.ode._observers) or any(p._post_accumulate_grad_hooks for p in model.parameters())


class Run(NamedTuple):
    model: Model
    optimizer: SNOpt
    policy: HorizonPolicy

    @classmethod
    def start(cls, scaler=None):
        torch.manual_seed(2)
        model = Model()
        return cls(model, gathering(model), HorizonPolicy(model.ode, lr=0.05, penalty=0.2, scaler=scaler))

    def train(self, x, count=1):
        for _ in range(count):
            self.optimizer.zero_grad()
            loss(self.model, x).backward()
            self.optimizer.step()
            self.policy.step()


def steps_agree(one, two):
    """A refresh and a move of T come out alike."""
    for run in (one, two):
        run.optimizer.step()
        run.policy.step()
    for a, b in zip(one.optimizer.state.values(), two.optimizer.state.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(one.model.ode.T, two.model.ode.T, rtol=1e-12, atol=0)


def test_an_optimiser_that_is_dropped_lets_go_of_the_model(model, x):
    optimizer, policy = gathering(model), HorizonPolicy(model.ode, lr=0.1)
    assert is_watched(model)
    dropped = weakref.ref(optimizer), weakref.ref(policy)
    del optimizer, policy
    gc.collect()
    assert [ref() for ref in dropped] == [None, None]
    assert not is_watched(model)
    optimizer, policy = gathering(model), HorizonPolicy(model.ode, lr=0.1)
    loss(model, x).backward()
    optimizer.step()
    policy.step()
    assert "moments" in optimizer.state[model.ode.field.inner.weight]
    assert model.ode.T != 1.0


def threw_away_none(model, x):
    loss(model, 3 * x).backward()
    model.zero_grad()


def threw_away_zeros(model, x):
    loss(model, 3 * x).backward()
    model.zero_grad(set_to_none=False)


def threw_away_the_same_pass(model, x):
    value = loss(model, x)
    value.backward(retain_graph=True)
    model.zero_grad()
    value.backward()


def looked_at_the_input(model, x):
    x = x.clone().requires_grad_()
    torch.autograd.grad(loss(model, 3 * x), x)


def evaluated(model, x):
    with torch.no_grad():
        model(x)
    model(x)


@pytest.mark.parametrize(
    "before", [threw_away_none, threw_away_zeros, looked_at_the_input, evaluated], ids=lambda f: f.__name__
)
def test_only_what_is_in_grad_counts(before, x):
    one, two = Run.start(), Run.start()
    for _ in range(3):
        before(one.model, x)
    for run in (one, two):
        loss(run.model, x).backward()
    assert not any(uses._before for uses in one.optimizer._collector._uses.values())
    steps_agree(one, two)


def test_a_pass_that_is_repeated_after_zero_grad_counts_once(x):
    one, two = Run.start(), Run.start()
    threw_away_the_same_pass(one.model, x)
    loss(two.model, x).backward()
    steps_agree(one, two)


def test_gradients_looked_at_after_the_backward_pass_do_not_count(x):
    one, two = Run.start(), Run.start()
    for run in (one, two):
        loss(run.model, x).backward()
    looked_at_the_input(one.model, x)
    steps_agree(one, two)


@pytest.mark.parametrize("parts", [lambda model, x: model(x), lambda model, x: model.head(model.ode(model.stem(x)))])
def test_equal_micro_batches_are_other_samples(parts, x):
    """Also where the parts of the model are called one by one."""
    one, two = Run.start(), Run.start()
    parts(one.model, x).square().sum(1).mean().backward()
    for part in x.split(2):
        (parts(two.model, part).square().sum(1).mean() / 3).backward()
    steps_agree(one, two)


@pytest.mark.parametrize("reentrant", [True, False])
def test_solves_that_are_evaluated_again_in_the_backward_pass(reentrant, x):
    one, two = Run.start(), Run.start()
    y, z = one.model.stem(x), two.model.stem(x)
    for _ in range(2):
        y, z = one.model.ode(y), checkpoint(two.model.ode, z, use_reentrant=reentrant)
    for run, end in ((one, y), (two, z)):
        run.model.head(end).square().sum(1).mean().backward()
    steps_agree(one, two)


def scaled(run, scaler, x, *, factor=1.0, to_none=True, updates_first=False):
    """One iteration with a scaled loss."""
    run.optimizer.zero_grad(set_to_none=to_none)
    scaler.scale(factor * loss(run.model, x)).backward()
    scaler.step(run.optimizer)
    for call in (scaler.update, run.policy.step) if updates_first else (run.policy.step, scaler.update):
        call()


def models_agree(one, two):
    for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("updates_first", [False, True])
def test_a_scaled_loss_trains_as_an_unscaled_one(updates_first, x):
    """The scale doubles on the way; where the policy's step stands does not matter."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    one, two = Run.start(), Run.start(scaler)
    for _ in range(4):
        one.train(x)
        scaled(two, scaler, x, updates_first=updates_first)
    assert scaler.get_scale() == 4096.0
    models_agree(one, two)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("bad", [0, 1, 5])
def test_a_step_that_the_scaler_skips_leaves_no_trace(to_none, bad, x):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    one, two = Run.start(), Run.start(scaler)
    for k in range(7):
        if k == bad:
            scaled(two, scaler, x, factor=1e308, to_none=to_none)
            models_agree(one, two)
        one.train(x)
        scaled(two, scaler, x, to_none=to_none)
    models_agree(one, two)
    assert two.policy.state_dict() == one.policy.state_dict()


def test_a_forgotten_scaler_is_found_out(x):
    run = Run.start()
    with pytest.raises(ProblemError, match=r"multiplied by 1.53e-05 after .*, as a GradScaler does; .*scaler=scaler"):
        scaled(run, torch.amp.GradScaler("cpu"), x)
    assert run.model.ode.T == 1.0


def test_clipped_gradients_are_none_of_a_scaler(x):
    run = Run.start()
    loss(run.model, x).backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
    run.optimizer.step()
    run.policy.step()
    assert run.model.ode.T != 1.0


def test_a_scaler_is_a_grad_scaler(model):
    with pytest.raises(ProblemError, match=r"scaler is float; expected the torch.amp.GradScaler that scales the loss"):
        HorizonPolicy(model.ode, lr=0.1, scaler=1024.0)


DUPLICATES = pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))],  # noqa: S301
    ids=["deepcopy", "pickle"],
)


@DUPLICATES
@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_copy_of_model_and_optimisers_goes_on_bit_for_bit(duplicate, steps, x):
    run = Run.start()
    run.train(x, steps)
    copied = duplicate(run)
    copied.train(x, 5)
    run.train(x, 5)
    for a, b in zip(run.model.state_dict().values(), copied.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@DUPLICATES
def test_an_optimiser_copied_alone_trains_its_own_model(duplicate, model, x):
    optimizer = gathering(model)
    before = copy.deepcopy(model.state_dict())
    copied = duplicate(optimizer)
    loss(copied._model, x).backward()
    copied.step()
    assert "moments" in copied.state[copied._model.head.weight]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@DUPLICATES
def test_a_model_copied_alone_is_no_longer_watched(duplicate, model, x):
    optimizer, policy = gathering(model), HorizonPolicy(model.ode, lr=0.1)
    copied = duplicate(model)
    loss(copied, x).backward()
    assert not optimizer._collector.take()
    assert not policy._shares.take()
    loss(model, x).backward()
    optimizer.step()
    policy.step()
