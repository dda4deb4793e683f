"""The library's studies by name. A study names problems and optimisers; those that do not exist are left out of it."""

from collections.abc import Sequence
from dataclasses import replace

from ocnopt.checks import nearest
from ocnopt.errors import ProblemError
from ocnopt.optim.registry import OPTIMIZERS, optimizer
from ocnopt.problems import names
from ocnopt.training.adjoint_errors import ADJOINTS
from ocnopt.training.memory_depth import MEMORY
from ocnopt.training.regularity import PUBLISHED, REGULARITY
from ocnopt.training.study import SPAN, Method, Study

FIRST_ORDER = ("adam", "sgd-plain", "sgd", "rmsprop")
SECOND_ORDER = ("snopt", "kfac")
LAYERWISE = ("gauss-newton", "ocnopt", "ocnopt-adaptive", "ocnopt-kronecker")
GAMES = ("adam", "sgd-plain", "gauss-newton", "ocnopt-open-loop", "ocnopt-past", "ocnopt")
INGREDIENTS: dict[str, dict[str, object]] = {
    "without adaptation": {"adaptation": 0.0},
    "adaptation 1": {"adaptation": 1.0},
    "power 0.5": {"power": 0.5},
    "power 1": {"power": 1.0},
    "length by division, power 0.5": {"length": "division", "power": 0.5},
    "factors from samples": {"curvature": "costate"},
    "factors of both": {"curvature": "mixed"},
}
TOY_SETS = ("donut1d", "donut2d", "squares", "spiral")
TABLEAUS = {"euler": "Euler", "improved_euler": "improved Euler", "kutta3": "Kutta 3", "kutta4": "Kutta 4"}
STEPS = {"fixed": "fixed", "free": "learned", "simplex": "simplex"}


def _methods(*optimizers: str) -> tuple[Method, ...]:
    return tuple(Method(name) for name in optimizers)


def _net(optimizer: str, tableau: str = "euler", step: str = "fixed") -> Method:
    """A Runge-Kutta network by gradient descent with backtracking, or by Adam."""
    what = f"{TABLEAUS[tableau]}, {STEPS[step]}"
    title = what if optimizer == "backtracking" else f"{what}, Adam"
    return Method(optimizer, model={"tableau": tableau, "step": step}, title=title)


_ALL = (
    Study(
        "neural-ode",
        "Adam, SNOpt, and SNOpt with feedback T on a convolutional Neural ODE",
        ("digits",),
        (Method("adam"), Method("snopt"), Method("snopt", "feedback")),
        seeds=2,
    ),
    Study(
        "optimizers",
        "SNOpt against Adam, SGD, Muon, SOAP, L-BFGS and its published settings, over a factor 30 of learning rates",
        ("digits_ode", "breast_cancer_flow", "circles_flow", "digits", "japanese_vowels"),
        (*_methods("adam", "snopt", "soap", "muon", "sgd", "lbfgs"), PUBLISHED),
        SPAN,
        seeds=3,
    ),
    Study(
        "ingredients",
        "SNOpt's rule with one part of it changed at a time",
        ("digits_ode", "breast_cancer_flow", "circles_flow"),
        (
            *_methods("adam", "snopt"),
            *(Method("snopt", variant=name, settings={"options": options}) for name, options in INGREDIENTS.items()),
        ),
        seeds=3,
    ),
    Study(
        "integration-time",
        "T fixed, by the adjoint baseline, and by the feedback rule",
        ("digits",),
        (
            *_methods("adam", "snopt"),
            Method("snopt", "adjoint", settings={"horizon_lr": 0.03}),
            Method("snopt", "feedback"),
        ),
        seeds=2,
    ),
    Study(
        "digits-feedback",
        "layer-wise feedback against its base methods on digits, over a factor 30 of learning rates",
        ("digits_mlp",),
        _methods(*FIRST_ORDER, *SECOND_ORDER, *LAYERWISE),
        SPAN,
    ),
    Study(
        "tables-feedback",
        "the same on two tables of measurements",
        ("breast_cancer", "wine"),
        _methods(*FIRST_ORDER, *SECOND_ORDER, *LAYERWISE),
        SPAN,
    ),
    Study(
        "vanishing-gradients",
        "the same on ten sigmoid layers",
        ("digits_sigmoid",),
        _methods(*FIRST_ORDER, *SECOND_ORDER, *LAYERWISE),
        SPAN,
    ),
    Study(
        "players",
        "residual and inception blocks on images: open loop against feedback against joint answers",
        ("digits_residual", "digits_inception"),
        _methods(*GAMES),
        SPAN,
    ),
    Study(
        "runge-kutta",
        "Runge-Kutta networks on four sets of the plane: four methods by gradient descent with backtracking, and Adam",
        TOY_SETS,
        (*(_net("backtracking", tableau) for tableau in TABLEAUS), _net("adam")),
        epochs=1000,
    ),
    Study(
        "learned-steps",
        "steps of the Euler method fixed, learned, or learned on a simplex, by backtracking and by Adam",
        TOY_SETS,
        tuple(_net(optimizer, step=step) for optimizer in ("backtracking", "adam") for step in STEPS),
        epochs=1000,
    ),
)


def _known(study: Study) -> Study:
    problems = tuple(name for name in study.problems if name in names("learning"))
    methods = tuple(method for method in study.methods if method.optimizer in OPTIMIZERS)
    lost = [method.optimizer for method in study.methods if method.optimizer not in OPTIMIZERS]
    sentence = (
        f"Left out: {', '.join(lost)}, not installed here: pip install 'ocnopt[peers]' brings it." if lost else ""
    )
    return replace(study, problems=problems, methods=methods, left_out=sentence)


MEASUREMENTS = {measured.name: measured for measured in (ADJOINTS, MEMORY, REGULARITY)}
STUDIES = {study.name: study for study in map(_known, _ALL) if study.problems}


def study(name: str) -> Study:
    """A study by name.

    Args:
        name: of the registry.

    Raises:
        ProblemError: no study has this name; the message offers the nearest.

    Example:
        >>> study("vanishing-gradients").problems
        ('digits_sigmoid',)
    """
    if name not in STUDIES:
        known = (*STUDIES, *MEASUREMENTS)
        raise ProblemError(f"no study is called {name!r}{nearest(name, known)}; expected one of: {', '.join(known)}")
    return STUDIES[name]


def with_methods(study: Study, optimizers: Sequence[str]) -> Study:
    """The study with some of its methods only, and with optimisers that it does not name.

    Args:
        study: of the registry.
        optimizers: names.

    Raises:
        ProblemError: no such optimiser.
    """
    own = {name: [method for method in study.methods if method.optimizer == name] for name in optimizers}
    chosen = tuple(m for name in optimizers for m in own[name] or [_checked(name)])
    return replace(study, methods=chosen, left_out="")


def _checked(name: str) -> Method:
    optimizer(name)
    return Method(name)
