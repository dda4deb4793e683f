"""Runge-Kutta networks in the plane: four methods, learned steps, and training as an optimal-control problem.

    python examples/runge_kutta_nets.py                     a quick look, some seconds
    python examples/runge_kutta_nets.py --iterations 2000 --seeds 3 --sweeps 60 --out runs     all of it: half an hour

After Benning, Celledoni, Ehrhardt, Owren and Schoenlieb, "Deep learning as optimal control problems", arXiv 1904.05657.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

import ocnopt as oc
from ocnopt.optim.backtracking import descend
from ocnopt.problems import LearningProblem
from ocnopt.problems.learning import network_control, pictures, plane

TABLEAUS = ("euler", "improved_euler", "kutta3", "kutta4")
NETS = {
    "Net": {"skip": False, "horizon": plane.LAYERS},
    "ResNet": {},
    "ODENet": {"step": "free"},
    "ODENet+simplex": {"step": "simplex"},
}


def train(data: LearningProblem, args: argparse.Namespace, label: str, **options: Any) -> plane.PlaneClassifier:
    """Full-batch gradient descent with backtracking from every seed, a line of the table, and the first model."""
    models, losses = [], []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        model = data.make_model(**options)
        # a step size matters in units of 1/layers, a weight in units of one
        scales = [plane.LAYERS**-2.0 if name.endswith("sizes") else 1.0 for name, _ in model.named_parameters()]
        loss = lambda model=model: data.loss(model(data.train_inputs), data.train_targets)
        losses.append(descend(model.parameters(), loss, args.iterations, scales=scales).losses[-1])
        models.append(model)
    right = [100 * data.evaluate(model)["test_accuracy"] for model in models]
    row = f"  {label:26} loss {sum(losses) / len(losses):.6f} ({min(losses):.6f} to {max(losses):.6f})"
    sizes = [model.net.step_sizes for model in models]
    error = max(abs(float(h.sum()) - model.net.horizon) for h, model in zip(sizes, models, strict=True))
    on = sum(int((h != 0).sum()) for h in sizes) / len(sizes)
    print(
        f"{row}  test {min(right):.1f} to {max(right):.1f} %  |sum h - T| {error:.0e}  layers on {on:.1f}", flush=True
    )
    if args.out:
        shown, name = (data.test_inputs, data.test_targets), label.replace(", ", "_")
        pictures.draw_prediction(models[0], *shown, title=label).savefig(args.out / f"{name}.png")
        pictures.draw_states(models[0], *shown, title=label).savefig(args.out / f"{name}_layers.png")
    return models[0]


def compare_methods(args: argparse.Namespace) -> None:
    print(f"every method on the spiral: {plane.LAYERS} layers, {args.iterations} iterations, {args.seeds} seed(s)")
    data = plane.build("spiral")
    for tableau in TABLEAUS:
        train(data, args, f"spiral, {tableau}", tableau=tableau)


def compare_steps(args: argparse.Namespace) -> None:
    print(f"fixed and learned steps: Euler, {args.iterations} iterations, {args.seeds} seed(s)")
    for name in args.sets:
        data = plane.build(name)
        nets = {net: train(data, args, f"{name}, {net}", **options).net for net, options in NETS.items()}
        if args.out:
            learned = {label: net.step_sizes for label, net in nets.items() if net.skip}
            pictures.draw_step_sizes(learned, title=name).savefig(args.out / f"{name}_steps.png")


def train_as_control(args: argparse.Namespace) -> None:
    print("spiral, 40 points, 10 layers: the same network as a control problem (state 80, controls 6, 3 parameters)")
    data = plane.build("spiral", samples=40)
    points = data.train_inputs, data.train_targets
    loss = lambda model: float(data.loss(model(points[0]), points[1]).detach())

    def fresh(**options: Any) -> plane.PlaneClassifier:
        torch.manual_seed(0)
        return data.make_model(layers=10, **options)

    model = fresh()
    print(f"  start            loss {loss(model):.6f}")
    solution = oc.solve(network_control.as_problem(model, *points), "ddp", max_iterations=args.sweeps)
    network_control.take_solution(model, solution)
    print(f"  DDP              loss {loss(model):.6f}  {int(solution.iterations)} steps", flush=True)
    for method in ("L-BFGS-B", "trust-constr"):
        model = fresh(adjoint="discrete")
        found = network_control.minimise(model, *points, method=method, iterations=args.iterations)
        print(f"  {method:16} loss {loss(model):.6f}  {found.nit} iterations", flush=True)
    model = fresh()
    descend(model.parameters(), lambda: data.loss(model(points[0]), points[1]), args.iterations)
    print(f"  gradient descent loss {loss(model):.6f}  {args.iterations} iterations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=60, help="of gradient descent")
    parser.add_argument("--sweeps", type=int, default=10, help="of DDP")
    parser.add_argument("--seeds", type=int, default=1, help="how many first weights to train from")
    parser.add_argument("--sets", nargs="+", default=[*plane.SETS], choices=[*plane.SETS], help="for learned steps")
    parser.add_argument("--out", type=Path, help="folder for pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    compare_methods(args)
    compare_steps(args)
    train_as_control(args)


if __name__ == "__main__":
    main()
