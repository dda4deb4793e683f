"""The layer graph of a module, as OCNOpt sees it: a networkx DAG, and a picture of it with the size of each gain."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ocnopt.checks import check_model
from ocnopt.errors import ProblemError
from ocnopt.neural.evaluation import Surroundings
from ocnopt.neural.players import plan
from ocnopt.neural.tape import Recorder, Tape
from ocnopt.neural.trees import tensors

if TYPE_CHECKING:
    import networkx as nx

Answers = Mapping[str, tuple[Tensor, Tensor]]


def layer_graph(model: nn.Module | Any, *inputs: Any, answers: Answers | None = None) -> "nx.DiGraph":
    """Run the model once and read its graph.

    Args:
        model: any module; its random state and buffers are left as they were.
        inputs: of its forward pass.
        answers: ``optimizer.answers`` of an :class:`~ocnopt.optim.ocnopt.OCNOpt`, for the gains.

    Returns:
        A DAG with one node for each operation, numbered as they ran, -1 for what the model was given. Nodes have
        ``label``, ``generation``, ``is_player`` and, where it is known, ``gain``: the root mean square over the samples
        of the feedback's share in their weights. Edges have the ``shape`` of the state.

    Raises:
        ProblemError: the model is no module, or no operation of it leads from a trained parameter to its output.

    >>> graph = layer_graph(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), torch.ones(4, 2))
    >>> [graph.nodes[node]["label"] for node in sorted(graph)]
    ['input', '0', 'tanh', '2']
    """
    import networkx as nx

    check_model(model, "layer_graph(model, inputs)")
    names = {id(p): name for name, p in model.named_parameters()}
    tape = _recorded(model, inputs, {id(p): p for p in model.parameters() if p.requires_grad})
    if not tape.calls:
        raise ProblemError(
            f"no operation of {type(model).__name__} leads from a trained parameter to its output; expected a model "
            "with parameters that require gradients"
        )
    read = plan(tape)
    players = {player.call: player for player in read.players}
    own_tensors = {id(x) for x in (*model.parameters(), *model.buffers())}
    graph = nx.DiGraph()
    graph.add_node(-1, label="input", generation=0, is_player=False)
    for place, call in enumerate(tape.calls):
        own = [names[id(p)] for p in call.parameters if id(p) in names]
        label = own[0].rpartition(".")[0] if own else call.name.strip("_")
        before = [graph.nodes[tape.maker[slot]]["generation"] for slot in call.inputs]
        generation = max(before, default=0) + (place in players)
        graph.add_node(place, label=label or call.name, generation=generation, is_player=place in players)
        if answers and own and own[0] in answers:
            v, w = answers[own[0]]
            graph.nodes[place]["gain"] = float((w - v).square().mean().sqrt())
        for slot in call.inputs:
            graph.add_edge(tape.maker[slot], place, shape=tuple(tape.shapes[slot]))
        if call.has_samples and any(id(x) not in own_tensors for x in tensors((call.args, call.kwargs))):
            graph.add_edge(-1, place)
    return graph


def draw_layer_graph(graph: "nx.DiGraph", path: str | Path) -> Path:
    """Draw a layer graph, its players as large as their gains, and write it to a file.

    Args:
        graph: of :func:`layer_graph`.
        path: of a picture: .png, .pdf or .svg.

    Returns:
        The path.
    """
    import networkx as nx
    from matplotlib.figure import Figure

    for column, nodes in enumerate(nx.topological_generations(graph)):
        for node in nodes:
            graph.nodes[node]["column"] = column
    places = nx.multipartite_layout(graph, subset_key="column", align="vertical")
    players = [node for node, known in graph.nodes(data=True) if known["is_player"]]
    gains = [graph.nodes[node].get("gain", 0.0) for node in players]
    largest = max(gains, default=0.0) or 1.0
    columns = 1 + max(known["column"] for _, known in graph.nodes(data=True))
    figure = Figure(figsize=(max(6.0, 1.1 * columns), 4.0), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    nx.draw_networkx_edges(graph, places, ax=axes, edge_color="0.6", node_size=500)
    others = [node for node in graph if node not in set(players)]
    nx.draw_networkx_nodes(graph, places, others, ax=axes, node_color="0.88", node_size=250)
    sizes = [300 + 900 * gain / largest for gain in gains]
    shown = nx.draw_networkx_nodes(
        graph, places, players, ax=axes, node_color=gains, node_size=sizes, cmap="viridis", vmin=0.0, vmax=largest
    )
    for node, label in graph.nodes(data="label"):
        axes.annotate(label, places[node], (0, -20), textcoords="offset points", ha="center", va="top", fontsize=8)
    axes.margins(0.08, 0.25)
    if any(gains):
        figure.colorbar(shown, ax=axes, shrink=0.7, label="gain")
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path


def _recorded(model: nn.Module, inputs: tuple[Any, ...], parameters: dict[int, Tensor]) -> Tape:
    """One forward pass on a tape, everything else as before."""
    device = next((x.device for x in inputs if isinstance(x, Tensor)), torch.device("cpu"))
    surroundings = Surroundings(model, device)
    surroundings.note_buffers()
    tape = Tape(surroundings)
    recorder = Recorder(tape, parameters, lambda tape: None)
    with torch.enable_grad(), surroundings.restored():
        recorder.begin(inputs)
        with recorder:
            output = model.forward(*inputs)  # no hooks: they may record too
        recorder.end(output)
    return tape
