import pytest
import torch
from torch import nn

import ocnopt as oc


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.skip = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 4)
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x):
        x = self.stem(x)
        return self.drop(self.norm(self.b(torch.tanh(self.a(x))) + self.skip(x)))


def named(graph):
    return {known["label"]: known for _, known in graph.nodes(data=True)}


def test_the_graph_of_a_residual_block():
    torch.manual_seed(0)
    model = Residual()
    buffers = [b.clone() for b in model.buffers()]
    graph = oc.layer_graph(model, torch.randn(6, 3))
    labels = dict(graph.nodes(data="label"))
    edges = {(labels[a], labels[b]) for a, b in graph.edges}
    assert edges == {
        *(("input", "stem"), ("stem", "a"), ("a", "tanh"), ("tanh", "b"), ("stem", "skip"), ("b", "add")),
        *(("skip", "add"), ("add", "norm"), ("norm", "dropout")),
    }
    generations = {label: known["generation"] for label, known in named(graph).items() if known["is_player"]}
    assert generations == {"stem": 1, "a": 2, "skip": 2, "b": 3, "norm": 4}
    assert all(known["shape"] == (6, 4) for a, _, known in graph.edges(data=True) if labels[a] == "stem")
    assert all(torch.equal(now, was) for now, was in zip(model.buffers(), buffers, strict=True))


def test_the_random_state_is_left_alone():
    model, x = Residual(), torch.randn(6, 3)
    before = torch.get_rng_state()
    oc.layer_graph(model, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_gains_come_from_the_answers_of_a_step_and_are_drawn(tmp_path):
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(6, 3)
    optimizer = oc.OCNOpt(model, 0.5, terminal="gradient")
    model(x).square().mean().backward()
    optimizer.step()
    graph = oc.layer_graph(model, x, answers=optimizer.answers)
    gains = {label: known["gain"] for label, known in named(graph).items() if "gain" in known}
    assert gains.keys() == {"stem", "a", "b", "skip", "norm"}
    v, w = optimizer.answers["b.weight"]
    assert gains["b"] == pytest.approx(float((w - v).square().mean().sqrt()))
    assert gains["stem"] == 0.0 < gains["b"]
    assert oc.draw_layer_graph(graph, tmp_path / "graph.png").stat().st_size > 5000


def test_a_model_without_a_path_from_its_parameters_is_refused():
    with pytest.raises(oc.ProblemError, match="no trainable parameter; expected one or more"):
        oc.layer_graph(nn.Tanh(), torch.ones(2, 3))
    with pytest.raises(oc.ProblemError, match=r"no operation of Unused leads .* expected a model with parameters"):
        oc.layer_graph(type("Unused", (nn.Linear,), {"forward": lambda self, x: x})(2, 2), torch.ones(2, 2))
    with pytest.raises(oc.ProblemError, match="model is str"):
        oc.layer_graph("model")


class Skip(nn.Module):
    """A layer of a weight that is made, and its own input beside it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, x):
        return torch.tanh(self.layer(x)) + x


def test_edges_from_the_input_go_to_all_that_reads_it():
    graph = oc.layer_graph(Skip(), torch.ones(4, 3))
    labels = dict(graph.nodes(data="label"))
    assert {labels[node] for node in graph.successors(-1)} == {"layer", "add"}
    (made,) = (node for node in graph if node >= 0 and not graph.in_degree(node))
    assert labels[made].startswith("layer.parametrizations")
