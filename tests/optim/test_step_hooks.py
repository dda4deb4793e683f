"""Hooks of a step and its label in a profile, each once, as with torch's own optimisers."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ocnopt.optim.snopt import SNOpt
from ocnopt.optim.step_hooks import with_hooks

PROFILED = "Optimizer.step#"


def make(optimizer=SNOpt):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model(torch.ones(4, 3)).sum().backward()
    return model, optimizer(model)


class Louder(SNOpt):
    """A subclass with a step of its own, which torch wraps."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [SNOpt, Louder])
def test_all_hooks_are_called_once_around_the_step(kind):
    model, optimizer = make(kind)
    before, seen = model.weight.detach().clone(), []

    def see(name):
        return lambda of, args, kwargs: seen.append((name, of is optimizer, torch.equal(model.weight, before)))

    handles = [
        optimizer.register_step_pre_hook(see("pre")),
        optimizer.register_step_post_hook(see("post")),
        register_optimizer_step_pre_hook(see("pre of all")),
        register_optimizer_step_post_hook(see("post of all")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    names = ["pre of all", "pre", "post", "post of all"]
    assert seen == [(name, True, name.startswith("pre")) for name in names]
    optimizer.step()
    assert len(seen) == 4


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_each_hook_of_all_optimisers_is_enough(register):
    (_, optimizer), seen = make(), []
    handle = register(lambda of, args, kwargs: seen.append(of))
    optimizer.step()
    handle.remove()
    assert seen == [optimizer]


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_each_hook_of_one_optimiser_is_enough(register):
    (_, optimizer), seen = make(), []
    getattr(optimizer, register)(lambda of, args, kwargs: seen.append(args))
    optimizer.step()
    assert seen == [(optimizer,)]


@pytest.mark.parametrize("kind", [SNOpt, Louder])
def test_a_profile_has_one_label_for_each_step(kind):
    _, optimizer = make(kind)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.step()
    labels = [event.name for event in profile.events() if event.name.startswith(PROFILED)]
    assert labels == [f"{PROFILED}{kind.__name__}.step"] * 2


def test_hooks_change_nothing_else():
    (model, optimizer), (other, hooked) = make(), make()
    hooked.register_step_post_hook(lambda of, args, kwargs: None)
    for pair in ((model, optimizer), (other, hooked)):
        assert pair[1].step(lambda: torch.tensor(3.0)).item() == 3.0
        copy.deepcopy(pair)[1].step()
    assert torch.equal(model.weight, other.weight)
    assert SNOpt.step.__doc__.startswith("Move the parameters.")


def test_torch_wraps_no_step_that_has_its_hooks():
    class Counted(torch.optim.SGD):
        calls = 0

        @with_hooks
        def step(self, closure=None):
            self.calls += 1

    optimizer = Counted(nn.Linear(2, 2).parameters())
    step = Counted.step
    Counted(nn.Linear(2, 2).parameters())
    assert Counted.step is step
    optimizer.step()
    assert optimizer.calls == 1
