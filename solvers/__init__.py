"""Solvers of optimal-control problems: ``solve``, ``compare``, the solver objects and their results."""

if __name__ != "ocnopt.solvers":
    raise ImportError(f"import ocnopt.solvers, not {__name__}: the bare name would make a second copy of every class")

from ocnopt.solvers.audit import Violation as Violation
from ocnopt.solvers.compare import Comparison as Comparison
from ocnopt.solvers.compare import Row as Row
from ocnopt.solvers.compare import compare as compare
from ocnopt.solvers.ddp import DDP as DDP
from ocnopt.solvers.direct.casadi_solver import CasADi as CasADi
from ocnopt.solvers.indirect import Indirect as Indirect
from ocnopt.solvers.mpc import MPC as MPC
from ocnopt.solvers.mpc import ClosedLoop as ClosedLoop
from ocnopt.solvers.shooting import Shooting as Shooting
from ocnopt.solvers.solution import Gains as Gains
from ocnopt.solvers.solution import Solution as Solution
from ocnopt.solvers.solution import load_solution as load_solution
from ocnopt.solvers.solve import Prepared as Prepared
from ocnopt.solvers.solve import Solver as Solver
from ocnopt.solvers.solve import prepare as prepare
from ocnopt.solvers.solve import solve as solve
