r"""Butcher tableaus of Runge-Kutta methods, as data.

Notation: stage i of a step of size h from x at time t sits at t + c_i h, y_i = x + h sum_j a_ij k_j (j < i where the
method is explicit), k_i = F(t + c_i h, y_i); x_next = x + h sum_i b_i k_i. ``b_error`` = b - b_hat estimates the local
error. ``quadrature`` are weights >= 0 on the same nodes c_i, summing to one: b may hold negative weights, and an
integral of outer products must stay positive semi-definite.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ocnopt.checks import nearest
from ocnopt.errors import ProblemError


@dataclass(frozen=True)
class Tableau:
    """Coefficients of one Runge-Kutta method with s stages; rows of ``a`` have s entries where it is implicit."""

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    source: str
    quadrature: tuple[float, ...]
    b_error: tuple[float, ...] | None = None
    first_same_as_last: bool = False


EULER = Tableau(
    name="euler", order=1, c=(0.0,), a=((),), b=(1.0,), quadrature=(1.0,), source="Euler, 1768"
)  # fmt: skip

MIDPOINT = Tableau(
    name="midpoint",
    order=2,
    c=(0.0, 1 / 2),
    a=((), (1 / 2,)),
    b=(0.0, 1.0),
    quadrature=(0.0, 1.0),
    source="Runge, 1895",
)

HEUN = Tableau(
    name="heun",
    order=2,
    c=(0.0, 1.0),
    a=((), (1.0,)),
    b=(1 / 2, 1 / 2),
    quadrature=(1 / 2, 1 / 2),
    source="Heun, 1900; 'improved Euler' of Benning et al., arXiv 1904.05657",
)

KUTTA3 = Tableau(
    name="kutta3",
    order=3,
    c=(0.0, 1 / 2, 1.0),
    a=((), (1 / 2,), (-1.0, 2.0)),
    b=(1 / 6, 2 / 3, 1 / 6),
    quadrature=(1 / 6, 2 / 3, 1 / 6),
    source="Kutta, 1901",
)

RK4 = Tableau(
    name="rk4",
    order=4,
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    quadrature=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    source="Kutta, 1901",
)

BOSH3 = Tableau(
    name="bosh3",
    order=3,
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    b_error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    quadrature=(2 / 9, 1 / 3, 4 / 9, 0.0),
    first_same_as_last=True,
    source="Bogacki and Shampine, Appl. Math. Lett. 2 (1989)",
)

_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
_DOPRI5_B_HAT = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)

DOPRI5 = Tableau(
    name="dopri5",
    order=5,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5_B[:6],
    ),
    b=_DOPRI5_B,
    b_error=tuple(b - b_hat for b, b_hat in zip(_DOPRI5_B, _DOPRI5_B_HAT, strict=True)),
    # b_5 < 0; these weights integrate cubics exactly on the same nodes.
    quadrature=(1 / 12, 0.0, 10 / 21, 5 / 12, 0.0, 1 / 42, 0.0),
    first_same_as_last=True,
    source="Dormand and Prince, J. Comput. Appl. Math. 6 (1980)",
)

IMPLICIT_EULER = Tableau(
    name="implicit_euler", order=1, c=(1.0,), a=((1.0,),), b=(1.0,), quadrature=(1.0,), source="Euler, 1768"
)  # fmt: skip

IMPLICIT_MIDPOINT = Tableau(
    name="implicit_midpoint",
    order=2,
    c=(1 / 2,),
    a=((1 / 2,),),
    b=(1.0,),
    quadrature=(1.0,),
    source="Gauss method of one stage; Hairer and Wanner 1996, IV.5",
)

RADAU2 = Tableau(
    name="radau2",
    order=3,
    c=(1 / 3, 1.0),
    a=((5 / 12, -1 / 12), (3 / 4, 1 / 4)),
    b=(3 / 4, 1 / 4),
    quadrature=(3 / 4, 1 / 4),
    source="Radau IIA of two stages; Hairer and Wanner 1996, IV.5",
)

TABLEAUS: Mapping[str, Tableau] = MappingProxyType(
    {tableau.name: tableau for tableau in (EULER, MIDPOINT, HEUN, KUTTA3, RK4, BOSH3, DOPRI5)}
)

IMPLICIT: Mapping[str, Tableau] = MappingProxyType(
    {tableau.name: tableau for tableau in (IMPLICIT_EULER, IMPLICIT_MIDPOINT, RADAU2)}
)


def get_tableau(name: str) -> Tableau:
    """Return the tableau called ``name``.

    Raises:
        ProblemError: there is none of that name; the nearest one is offered.
    """
    known = {**TABLEAUS, **IMPLICIT}
    if name not in known:
        raise ProblemError(f"integrator {name!r} is unknown; expected one of {', '.join(known)}{nearest(name, known)}")
    return known[name]
