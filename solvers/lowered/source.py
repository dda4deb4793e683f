r"""Folds as C: the instructions of one step straight down, the loop over time around them, several problems at once.

A *vector* holds one number of W problems, W being what the machine's registers hold; the compiler makes the same code
from it anywhere, with W = 1 where it knows no vectors. A function is called with the arrays of its fold, each a pointer
with the distance between two steps and between two problems, in numbers: an array that is the same for all steps or
problems has the distance 0, one that is read backwards a negative one. Where problems run out, the last one fills the
vector and is written W times.

Sine and cosine come as a pair from the reduction and the polynomials of fdlibm (Sun Microsystems 1993), within 1 ulp;
everything else that is not arithmetic is libm's, problem by problem.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import casadi

from ocnopt.errors import ProblemError
from ocnopt.solvers.lowered.steps import Fold

_HEAD = r"""
#include <math.h>

#ifndef W
#if defined(__AVX512F__)
#define W 8
#elif defined(__AVX__)
#define W 4
#elif defined(__SSE2__) || defined(__ARM_NEON) || defined(__VSX__)
#define W 2
#else
#define W 1
#endif
#endif

#define EACH_1(M) M(0)
#define EACH_2(M) M(0), M(1)
#define EACH_4(M) M(0), M(1), M(2), M(3)
#define EACH_8(M) M(0), M(1), M(2), M(3), M(4), M(5), M(6), M(7)
#define JOIN(A, B) A##B
#define NAMED(A, B) JOIN(A, B)
#define EACH NAMED(EACH_, W)

typedef double real __attribute__((vector_size(8 * W)));
typedef long long bits __attribute__((vector_size(8 * W)));
typedef struct { double *at; long long step, lane, lanes; } array;

#define ONE_ALL(I) value
static inline __attribute__((always_inline)) real all(double value) { return (real){EACH(ONE_ALL)}; }

#define START(NAME, ARRAY) \
    double *NAME = (ARRAY).at; \
    long long NAME##_of[W]; \
    for (int i = 0; i < W; i++) \
        NAME##_of[i] = ((lane + i < lanes ? lane + i : lanes - 1) % (ARRAY).lanes) * (ARRAY).lane;
#define ONE_READ(I) from[of[I]]
#define ONE_WRITE(I) to[of[I]] = value[I]
static inline __attribute__((always_inline)) real read_at(const double *from, const long long *of) {
    return (real){EACH(ONE_READ)};
}
static inline __attribute__((always_inline)) void write_at(double *to, const long long *of, real value) {
    EACH(ONE_WRITE);
}
#define READ(NAME, J) read_at(NAME + J, NAME##_of)
#define WRITE(NAME, J, VALUE) write_at(NAME + J, NAME##_of, VALUE)

#define TRUTH(MASK) ((real)((bits)all(1.0) & (bits)(MASK)))
#define IF(MASK, X) ((real)((bits)(MASK) & (bits)(X)))
#define CHOOSE(MASK, X, Y) ((real)(((bits)(MASK) & (bits)(X)) | (~(bits)(MASK) & (bits)(Y))))
#define HOLDS(X) ((X) != all(0.0))
#define SIGNED ((bits)all(-0.0))

#define KEEP(ARRAY, OF, FROM, SOURCE, LENGTH, SIZE) \
    for (long long t = 0; t < LENGTH; t++) \
        for (int j = 0; j < SIZE; j++) \
            (ARRAY).at[t * (ARRAY).step + OF[i] + j] = FROM[t * (SOURCE).step + FROM##_of[i] + j];
static int any(bits x) {
    long long found = 0;
    for (int i = 0; i < W; i++) found |= x[i];
    return found != 0;
}

#define ONE(FUNCTION) \
    static real each_##FUNCTION(real x) { \
        for (int i = 0; i < W; i++) x[i] = FUNCTION(x[i]); \
        return x; \
    }
#define TWO(FUNCTION) \
    static real each_##FUNCTION(real x, real y) { \
        for (int i = 0; i < W; i++) x[i] = FUNCTION(x[i], y[i]); \
        return x; \
    }
"""

_TRIG = r"""
/* n = x 2/pi to the nearest integer, x - n pi/2 = r + rest by pi/2 in two parts of 33 bits and a tail. */
static void trig(real x, real *sine, real *cosine) {
    const real magic = all(0x1.8p52);
    real shifted = x * 0x1.45f306dc9c883p-1 + magic, n = shifted - magic;
    real t = x - n * 0x1.921fb544p+0, w = n * 0x1.0b4611a6p-34, a = t - w;
    w = n * 0x1.3198a2e037073p-69 - ((t - a) - w);
    real r = a - w, rest = (a - r) - w, z = r * r;
    real s = z * (0x1.71de357b1fe7dp-19 + z * (-0x1.ae5e68a2b9cebp-26 + z * 0x1.5d93a5acfd57cp-33));
    s = 0x1.111111110f8a6p-7 + z * (-0x1.a01a019c161d5p-13 + s);
    s = r - ((z * (0.5 * rest - z * r * s) - rest) - z * r * -0x1.5555555555549p-3);
    real c = z * (-0x1.27e4f809c52adp-22 + z * (0x1.1ee9ebdb4b1c4p-29 + z * -0x1.8fae9be8838d4p-37));
    c = z * (0x1.555555555554cp-5 + z * (-0x1.6c16c16c15177p-10 + z * (0x1.a01a019cb159p-16 + c)));
    real half = 0.5 * z, one = 1.0 - half;
    c = one + (((1.0 - one) - half) + (z * c - r * rest));
    bits quarter = (bits)shifted, odd = -(quarter & 1);
    *sine = (real)((bits)CHOOSE(odd, c, s) ^ ((quarter & 2) << 62));
    *cosine = (real)((bits)CHOOSE(odd, s, c) ^ (((quarter + 1) & 2) << 62));
    bits far = ~(bits)((real)((bits)x & ~SIGNED) <= all(0x1p10));
    for (int i = 0; i < W; i++)
        if (far[i]) (*sine)[i] = sin(x[i]), (*cosine)[i] = cos(x[i]);
}
"""

# Winitzki's approximation, then Halley's steps on the smaller one of erf and erfc.
_ERFINV = r"""
static double erfinv(double x) {
    double a = fabs(x), l = log((1 - a) * (1 + a)), b = 4.33075 + 0.5 * l;
    if (!(a < 1)) return a == 1 ? copysign(INFINITY, x) : NAN;
    double y = sqrt(sqrt(b * b - 6.802721 * l) - b);
    for (int i = 0; i < 3; i++) {
        double error = a < 0.5 ? erf(y) - a : (1 - a) - erfc(y), step = error / (M_2_SQRTPI * exp(-y * y));
        y -= step / (1 + y * step);
    }
    return copysign(y, x);
}
"""

# What stands for an operation on vectors x and y.
_OPERATORS: Mapping[int, str] = {
    casadi.OP_ASSIGN: "{x}",
    casadi.OP_ADD: "{x} + {y}",
    casadi.OP_SUB: "{x} - {y}",
    casadi.OP_MUL: "{x} * {y}",
    casadi.OP_DIV: "{x} / {y}",
    casadi.OP_NEG: "-{x}",
    casadi.OP_SQ: "{x} * {x}",
    casadi.OP_TWICE: "{x} + {x}",
    casadi.OP_INV: "1.0 / {x}",
    casadi.OP_LT: "TRUTH({x} < {y})",
    casadi.OP_LE: "TRUTH({x} <= {y})",
    casadi.OP_EQ: "TRUTH({x} == {y})",
    casadi.OP_NE: "TRUTH({x} != {y})",
    casadi.OP_NOT: "TRUTH({x} == all(0.0))",
    casadi.OP_AND: "TRUTH(HOLDS({x}) & HOLDS({y}))",
    casadi.OP_OR: "TRUTH(HOLDS({x}) | HOLDS({y}))",
    casadi.OP_IF_ELSE_ZERO: "IF(HOLDS({x}), {y})",
    casadi.OP_FABS: "(real)((bits){x} & ~SIGNED)",
    casadi.OP_COPYSIGN: "(real)(((bits){x} & ~SIGNED) | ((bits){y} & SIGNED))",
    casadi.OP_SIGN: "CHOOSE({x} != {x}, {x}, TRUTH({x} > all(0.0)) - TRUTH({x} < all(0.0)))",
    # as C's fmin and fmax: a NaN only where both are
    casadi.OP_FMIN: "CHOOSE(({x} < {y}) | ({y} != {y}), {x}, {y})",
    casadi.OP_FMAX: "CHOOSE(({x} > {y}) | ({y} != {y}), {x}, {y})",
}
_UNARY: Mapping[int, str] = {
    casadi.OP_SQRT: "sqrt",
    casadi.OP_EXP: "exp",
    casadi.OP_LOG: "log",
    casadi.OP_TAN: "tan",
    casadi.OP_ASIN: "asin",
    casadi.OP_ACOS: "acos",
    casadi.OP_ATAN: "atan",
    casadi.OP_FLOOR: "floor",
    casadi.OP_CEIL: "ceil",
    casadi.OP_ERF: "erf",
    casadi.OP_ERFINV: "erfinv",
    casadi.OP_SINH: "sinh",
    casadi.OP_COSH: "cosh",
    casadi.OP_TANH: "tanh",
    casadi.OP_ASINH: "asinh",
    casadi.OP_ACOSH: "acosh",
    casadi.OP_ATANH: "atanh",
    casadi.OP_LOG1P: "log1p",
    casadi.OP_EXPM1: "expm1",
}
_BINARY: Mapping[int, str] = {
    casadi.OP_POW: "pow",
    casadi.OP_CONSTPOW: "pow",
    casadi.OP_FMOD: "fmod",
    casadi.OP_ATAN2: "atan2",
    casadi.OP_HYPOT: "hypot",
}


class Line(NamedTuple):
    """What a search over step sizes needs: the rollout, its argument that is the step size, and the end.

    The rollout carries the state and the cost; the end is a function of the last state, and of what it is given.
    """

    walk: Fold
    end: Fold
    alpha: int


# How number j of argument i is read, and where number j of result i goes.
_Read = Callable[[int, int], str]
_Write = Callable[[int, int, str], list[str]]

_LANES = "for (long long lane = 0; lane < lanes; lane += W) {"
_ACCEPT = """sum = now1_0 + phi;
const real gain = (READ(own, 0) - sum) + alpha * READ(own, 1), fall = READ(own, 2);
bits good = (bits)(gain >= alpha * READ(own, 3)) | (bits)(gain >= alpha * fall - READ(own, 4));
good &= (bits)(fall >= all(0.0)) & (bits)(wild + 0.0 * sum == all(0.0)) & open;
step = CHOOSE(good, alpha, step);
open &= ~good;"""


def write_source(folds: Iterable[Fold], search: Line) -> str:
    """One C file with a function for each fold, named as the fold is, and ``search`` over step sizes.

    Args:
        folds: what to write.
        search: what to search with.

    Raises:
        ProblemError: an operation has no form in C.
    """
    functions = [*(_function(fold) for fold in folds), _search(*search)]
    text = "\n".join(functions)
    calls = [f"ONE({name})" for name in sorted({*_UNARY.values()}) if f"each_{name}(" in text]
    calls += [f"TWO({name})" for name in sorted({*_BINARY.values()}) if f"each_{name}(" in text]
    return "\n".join([_HEAD, _TRIG, _ERFINV, *calls, text])


def _function(fold: Fold) -> str:
    """``name(length, lanes, arrays)``; arrays: carried and given ones, last ones, kept ones."""
    count, kept = fold.function.n_in(), {i: f"kept{i}" for i in fold.kept}
    given, last = [f"given{i}" for i in range(count)], [f"last{i}" for i in range(fold.carried)]
    places = {name: f"arrays[{number}]" for number, name in enumerate([*given, *last, *kept.values()])}
    carried = _carried(fold)
    lines = [f"void {fold.name}(long long length, long long lanes, const array *arrays) {{", _LANES]
    lines += [f"START({name}, {place})" for name, place in places.items()]
    lines += [f"real now{i}_{j} = READ(given{i}, {j}), next{i}_{j} = all(0.0);" for i, j in carried]
    moving = {name: f"{places[name]}.step" for name in [*given[fold.carried :], *kept.values()]}
    lines += _steps(fold, moving, lambda i, j: f"READ(given{i}, {j})", [])
    lines += [f"WRITE(last{i}, {j}, now{i}_{j});" for i, j in carried]
    return "\n".join([*lines, "}", "}", ""])


def _search(walk: Fold, end: Fold, alpha: int) -> str:
    """Each problem takes the first step size that gains enough; a problem that has taken one is rolled out as before.

    Arrays: where to start, its shift for a step of size one, and six numbers (cost, penalty of the gaps, slope, the
    least slope, slack, whether to search at all); the path before; what rollout and end are given besides; the step
    taken, the cost, the path.
    """
    sizes = {i: int(walk.function.nnz_out(i)) for i in walk.kept}
    own = ["start", "shift", "own"]
    before, kept = [f"before{i}" for i in walk.kept], [f"kept{i}" for i in walk.kept]
    given = [f"given{i}" for i in range(walk.carried, walk.function.n_in()) if i != alpha]
    last = [f"last{i}" for i in range(1, end.function.n_in())]
    names = [*own, *before, *given, *last, "taken", "total", *kept]
    places = {name: f"arrays[{number}]" for number, name in enumerate(names)}
    head = "long long length, long long lanes, const array *arrays, long long count, const double *alphas"
    lines = [f"void search({head}) {{", _LANES]
    lines += [f"START({name}, {place})" for name, place in places.items()]
    lines += ["real step = all(0.0), sum = all(0.0); bits open = (bits)HOLDS(READ(own, 5));"]
    lines += ["for (long long a = 0; a < count && any(open); a++) {"]
    lines += ["const real alpha = CHOOSE(open, all(alphas[a]), step);"]
    lines += [f"{name} = {places[name]}.at;" for name in (*given, *kept)]
    lines += [f"real now0_{j} = READ(start, {j}) + alpha * READ(shift, {j});" for j in range(sizes[0])]
    lines += ["real now1_0 = all(0.0), wild = all(0.0);"]
    lines += [f"real next{i}_{j} = all(0.0);" for i, j in _carried(walk)]
    moving = {name: f"{places[name]}.step" for name in (*given, *kept)}
    checks = [f"wild += 0.0 * now0_{j};" for j in range(sizes[0])]
    lines += _steps(walk, moving, lambda i, j: "alpha" if i == alpha else f"READ(given{i}, {j})", checks)
    lines += ["real phi = all(0.0);"]
    ending = lambda i, j: f"READ(last{i}, {j})" if i else f"now0_{j}"  # noqa: E731
    lines += ["{", *_instructions(end, ending, lambda i, j, value: [f"phi = {value};"]), "}"]
    lines += [_ACCEPT, "}", "WRITE(taken, 0, step);", "WRITE(total, 0, CHOOSE(HOLDS(step), sum, READ(own, 0)));"]
    lines += ["for (int i = 0; i < W; i++) if (step[i] == 0) {"]
    for number, (i, size) in enumerate(sizes.items()):
        lines += [f"KEEP({places[kept[number]]}, kept{i}_of, before{i}, {places[f'before{i}']}, "]
        lines[-1] += f"length + {int(i < walk.carried)}, {size})"
    return "\n".join([*lines, "}", "}", "}", ""])


def _carried(fold: Fold) -> list[tuple[int, int]]:
    """All numbers that go from step to step."""
    return [(i, j) for i in range(fold.carried) for j in range(int(fold.function.nnz_in(i)))]


def _steps(fold: Fold, moving: Mapping[str, str], given: _Read, checks: Sequence[str]) -> list[str]:
    """The loop over time: from ``now`` to ``now``, with what is kept written, the start included."""
    carried = _carried(fold)
    written = [f"WRITE(kept{i}, {j}, now{i}_{j});" for i, j in carried if i in fold.kept]
    first = [f"kept{i} += {moving[f'kept{i}']};" for i in range(fold.carried) if i in fold.kept]

    def read(i: int, j: int) -> str:
        return f"now{i}_{j}" if i < fold.carried else given(i, j)

    def write(i: int, j: int, value: str) -> list[str]:
        if i < fold.carried:
            return [f"next{i}_{j} = {value};"]
        return [f"WRITE(kept{i}, {j}, {value});"] if i in fold.kept else []

    return [
        *(*written, *first, *checks, "for (long long t = 0; t < length; t++) {"),
        *_instructions(fold, read, write),
        *(f"now{i}_{j} = next{i}_{j};" for i, j in carried),
        *(*written, *checks),
        *(f"{name} += {step};" for name, step in moving.items()),
        "}",
    ]


def _instructions(fold: Fold, given: _Read, write_to: _Write) -> list[str]:
    """The instructions of one step, every result a variable of its own."""
    function, lines = fold.function, []
    # What a register holds by now, and which variables have their sine and cosine.
    held: dict[int, str] = {}
    turned: set[str] = set()
    for i in range(function.n_instructions()):
        operation, read, write = (
            function.instruction_id(i),
            function.instruction_input(i),
            function.instruction_output(i),
        )
        if operation == casadi.OP_OUTPUT:
            lines += write_to(write[0], write[1], held[read[0]])
            continue
        name = f"v{i}"
        if operation in (casadi.OP_SIN, casadi.OP_COS):
            x = held[read[0]]
            name = f"{'sin' if operation == casadi.OP_SIN else 'cos'}_{x}"
            if x not in turned:
                lines += [f"real sin_{x}, cos_{x}; trig({x}, &sin_{x}, &cos_{x});"]
                turned.add(x)
        elif operation == casadi.OP_CONST:
            lines += [f"const real {name} = all({_number(function.instruction_constant(i))});"]
        elif operation == casadi.OP_INPUT:
            lines += [f"const real {name} = {given(read[0], read[1])};"]
        else:
            lines += [f"const real {name} = {_expression(operation, *(held[register] for register in read))};"]
        held[write[0]] = name
    return lines


def _expression(operation: int, x: str, y: str = "") -> str:
    """An operation on variables."""
    if operation in _OPERATORS:
        return _OPERATORS[operation].format(x=x, y=y)
    if operation in _UNARY:
        return f"each_{_UNARY[operation]}({x})"
    if operation in _BINARY:
        return f"each_{_BINARY[operation]}({x}, {y})"
    raise ProblemError(
        f"the compiled kernel has no form of CasADi's operation {operation}; expected a problem without it: use "
        "compile=False"
    )


def _number(value: float) -> str:
    """A constant in C, to the last bit."""
    if value != value:
        return "NAN"
    return value.hex() if abs(value) != float("inf") else "INFINITY" if value > 0 else "-INFINITY"
