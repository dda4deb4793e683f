r"""Butcher tableaus of Runge-Kutta methods, as data.

Notation: stage i of a step of size h from x at time t sits at t + c_i h, y_i = x + h sum_j a_ij k_j (j < i where the
method is explicit), k_i = F(t + c_i h, y_i); x_next = x + h sum_i b_i k_i. ``b_error`` = b - b_hat estimates the local
error. ``quadrature`` are weights >= 0 on the same nodes c_i, summing to one: b may hold negative weights, and an
integral of outer products must stay positive semi-definite.

Within a step x(t + theta h) = x + h sum_i b_i(theta) k_i, where k_s+1 = F(t + h, x_next) joins the slopes if the last
stage is not that already. ``dense`` holds, for every i, the coefficients of theta^4 and higher powers in the polynomial
b_i(theta); the others follow from values and slopes at both ends. Without it all are zero: the cubic of Hermite.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import MappingProxyType

from ocnopt.checks import nearest
from ocnopt.errors import ProblemError

# Weights, each with the first and the other stages that have it.
Groups = tuple[tuple[float, int, tuple[int, ...]], ...]


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
    dense: tuple[tuple[float, ...], ...] | None = None
    # The rows of a, then b, each as its distinct weights but zero and the stages that have them.
    groups: tuple[Groups, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = [{w: [j for j, other in enumerate(row) if other == w] for w in row if w} for row in (*self.a, self.b)]
        groups = tuple(tuple((w, j, tuple(others)) for w, (j, *others) in row.items()) for row in rows)
        object.__setattr__(self, "groups", groups)

    @property
    def is_solved_in_turn(self) -> bool:
        """Whether each stage but the first is an equation of its own: see :mod:`ocnopt.integrate.stiff`."""
        return len(self.a[0]) > 0 and not any(self.a[0])


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

ADAPTIVE_HEUN = replace(HEUN, name="adaptive_heun", b_error=(-1 / 2, 1 / 2), source="Heun, 1900, with Euler inside")

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
    dense=(
        (-12715105075 / 11282082432,),
        (0.0,),
        (87487479700 / 32700410799,),
        (-10690763975 / 1880347072,),
        (701980252875 / 199316789632,),
        (-1453857185 / 822651844,),
        (69997945 / 29380423,),
    ),
    source="Dormand and Prince, J. Comput. Appl. Math. 6 (1980); dense: Shampine, Math. Comp. 46 (1986)",
)

_TSIT5_B = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
    0.0,
)

TSIT5 = Tableau(
    name="tsit5",
    order=5,
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.897153057105493, -6.359448489975075, 4.362295432869581),
        (5.325864828439257, -11.74888356406283, 7.495539342889836, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5_B[:6],
    ),
    b=_TSIT5_B,
    b_error=(
        0.0017800110522257771,
        0.0008164344596567469,
        -0.007880878010261995,
        0.1447110071732629,
        -0.5823571654525552,
        0.45808210592918697,
        -1 / 66,
    ),
    # Weights >= 0 on these nodes, which leave a gap, integrate no more than quadratic functions.
    quadrature=(
        1 - (0.9 / 2 - 1 / 3) / (0.327 * 0.573) - (1 / 3 - 0.327 / 2) / (0.9 * 0.573),
        0.0,
        (0.9 / 2 - 1 / 3) / (0.327 * 0.573),
        (1 / 3 - 0.327 / 2) / (0.9 * 0.573),
        0.0,
        0.0,
        0.0,
    ),
    first_same_as_last=True,
    dense=(
        (-1.0530884977290216,),
        (0.1017,),
        (2.490627285651253,),
        (-16.54810288924490,),
        (47.37952196281928,),
        (-34.87065786149661,),
        (2.5,),
    ),
    source="Tsitouras, Comput. Math. Appl. 62 (2011)",
)

# fmt: off
_DOPRI8_B = (14005451 / 335480064, 0.0, 0.0, 0.0, 0.0, -59238493 / 1068277825, 181606767 / 758867731,
    561292985 / 797845732, -1041891430 / 1371343529, 760417239 / 1151165299, 118820643 / 751138087,
    -528747749 / 2220607170, 1 / 4)
_DOPRI8_B_HAT = (13451932 / 455176623, 0.0, 0.0, 0.0, 0.0, -808719846 / 976000145, 1757004468 / 5645159321,
    656045339 / 265891186, -3867574721 / 1518517206, 465885868 / 322736535, 53011238 / 667516719, 2 / 45, 0.0)

DOPRI8 = Tableau(
    name="dopri8",
    order=8,
    c=(0.0, 1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200, 5490023248 / 9719169821, 13 / 20,
       1201146811 / 1299019798, 1.0, 1.0),
    a=(
        (),
        (1 / 18,),
        (1 / 48, 1 / 16),
        (1 / 32, 0.0, 3 / 32),
        (5 / 16, 0.0, -75 / 64, 75 / 64),
        (3 / 80, 0.0, 0.0, 3 / 16, 3 / 20),
        (29443841 / 614563906, 0.0, 0.0, 77736538 / 692538347, -28693883 / 1125000000, 23124283 / 1800000000),
        (16016141 / 946692911, 0.0, 0.0,
         61564180 / 158732637, 22789713 / 633445777, 545815736 / 2771057229, -180193667 / 1043307555),
        (39632708 / 573591083, 0.0, 0.0, -433636366 / 683701615, -421739975 / 2616292301,
         100302831 / 723423059, 790204164 / 839813087, 800635310 / 3783071287),
        (246121993 / 1340847787, 0.0, 0.0, -37695042795 / 15268766246, -309121744 / 1061227803,
         -12992083 / 490766935, 6005943493 / 2108947869, 393006217 / 1396673457, 123872331 / 1001029789),
        (-1028468189 / 846180014, 0.0, 0.0, 8478235783 / 508512852, 1311729495 / 1432422823,
         -10304129995 / 1701304382, -48777925059 / 3047939560, 15336726248 / 1032824649,
         -45442868181 / 3398467696, 3065993473 / 597172653),
        (185892177 / 718116043, 0.0, 0.0, -3185094517 / 667107341, -477755414 / 1098053517,
         -703635378 / 230739211, 5731566787 / 1027545527, 5232866602 / 850066563,
         -4093664535 / 808688257, 3962137247 / 1805957418, 65686358 / 487910083),
        (403863854 / 491063109, 0.0, 0.0, -5068492393 / 434740067, -411421997 / 543043805,
         652783627 / 914296604, 11173962825 / 925320556, -13158990841 / 6184727034,
         3936647629 / 1978049680, -160528059 / 685178525, 248638103 / 1413531060, 0.0),
    ),
    b=_DOPRI8_B,
    b_error=tuple(b - b_hat for b, b_hat in zip(_DOPRI8_B, _DOPRI8_B_HAT, strict=True)),
    # They integrate polynomials of degree 5.
    quadrature=(0.0, 0.1351256430585603, 0.0, 0.0, 0.30187465182218887, 0.0, 0.03761394145839787,
         0.0, 0.00536601219529949, 0.33227519357638224, 0.18774455788917124, 0.0, 0.0),
    dense=(
        (-30.0610568289666450593, 22.1396504998094068976, -6.3448349392860401388),
        (0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0),
        (-121.4999627731334642623, 116.4422149550342161651, -39.6107919852202505218),
        (83.1721004639847717481, -67.1451318825957197185, 20.3761213808791436958),
        (9.5724507555993664382, -16.5672243527496524646, 7.3347098826795362023),
        (87.8406057677205645007, -89.9916014847245016028, 32.8801774352459155182),
        (-17.4152107770762969005, 22.6237489648532849093, -10.1588990526426760954),
        (-28.5903289514790976966, 32.2362340167355370113, -12.5401268098782561200),
        (81.6630950584341412934, -82.1020315488359848644, 29.5553001484516038033),
        (-114.9375291377009418170, 116.2662185791119533462, -41.7923486424390588923),
        (50.2558364226176017553, -53.9020777466385396792, 20.3006925822100825485),
    ),
    source="Prince and Dormand, J. Comput. Appl. Math. 7 (1981); dense: torchdiffeq's coefficients, of order 5",
)
# fmt: on

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

_KVAERNO5_A = (
    (0.0,),
    (0.26, 0.26),
    (0.13, 0.84033320996790809, 0.26),
    (0.22371961478320505, 0.47675532319799699, -0.06470895363112615, 0.26),
    (0.16648564323248321, 0.10450018841591720, 0.03631482272098715, -0.13090704451073998, 0.26),
    (0.13855640231268224, 0.0, -0.04245337201752043, 0.02446657898003141, 0.61943039072480676, 0.26),
    (0.13659751177640291, 0.0, -0.05496908796538376, -0.04118626728321046, 0.62993304899016403, 0.06962479448202728,
     0.26),
)  # fmt: skip

# One implicit equation of the size of the state per stage but the first, which the last of the step before has solved.
KVAERNO5 = Tableau(
    name="kvaerno5",
    order=5,
    c=(0.0, 0.52, 1.230333209967908, 0.8957659843500759, 0.43639360985864756, 1.0, 1.0),
    a=tuple((*row, *(0.0,) * (7 - len(row))) for row in _KVAERNO5_A),
    b=_KVAERNO5_A[6],
    # The stages at 0, 0.436 and 1: exact for parabolas.
    quadrature=(0.1180817892346046, 0.0, 0.0, 0.0, 0.6776328612413538, 0.0, 0.2042853495240416),
    b_error=tuple(b - low for b, low in zip(_KVAERNO5_A[6], (*_KVAERNO5_A[5], 0.0), strict=True)),
    first_same_as_last=True,
    source="Kvaerno, Singly diagonally implicit Runge-Kutta methods with an explicit first stage, BIT 2004",
)

TABLEAUS: Mapping[str, Tableau] = MappingProxyType(
    {
        tableau.name: tableau
        for tableau in (EULER, MIDPOINT, HEUN, KUTTA3, RK4, ADAPTIVE_HEUN, BOSH3, DOPRI5, TSIT5, DOPRI8)
    }
)

IMPLICIT: Mapping[str, Tableau] = MappingProxyType(
    {tableau.name: tableau for tableau in (IMPLICIT_EULER, IMPLICIT_MIDPOINT, RADAU2)}
)

STIFF: Mapping[str, Tableau] = MappingProxyType({KVAERNO5.name: KVAERNO5})

# What walks along the path of a Neural ODE.
WALKING: Mapping[str, Tableau] = MappingProxyType({**TABLEAUS, **STIFF})


@cache
def error_constant(tableau: Tableau) -> float:
    """C of the estimated error C |h rate|^order |x| of a short step on dx/dt = rate x."""
    powers = [1.0] * len(tableau.c)
    for _ in range(tableau.order - 1):
        powers = [sum(map(operator.mul, row, powers)) for row in tableau.a]
    return abs(sum(map(operator.mul, tableau.b_error or (), powers)))


def get_tableau(name: str) -> Tableau:
    """Return the tableau called ``name``.

    Raises:
        ProblemError: there is none of that name; the nearest one is offered.
    """
    known = {**TABLEAUS, **IMPLICIT}
    if name not in known:
        raise ProblemError(f"integrator {name!r} is unknown; expected one of {', '.join(known)}{nearest(name, known)}")
    return known[name]
