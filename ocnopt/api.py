"""What `import ocnopt as oc` offers; :mod:`ocnopt` reads it from here at the first use of a name."""

import ocnopt.optim as optim  # noqa: F401
import ocnopt.problems as problems  # noqa: F401
import ocnopt.solvers as solvers  # noqa: F401
from ocnopt.differential.differentiate import Expansion as Expansion
from ocnopt.differential.differentiate import differentiate as differentiate
from ocnopt.differential.hvp import hvp as hvp
from ocnopt.errors import ConvergenceError as ConvergenceError
from ocnopt.errors import DataError as DataError
from ocnopt.errors import NonFiniteError as NonFiniteError
from ocnopt.errors import OcnoptError as OcnoptError
from ocnopt.errors import ProblemError as ProblemError
from ocnopt.grids import transcribe as transcribe
from ocnopt.modules import from_module as from_module
from ocnopt.modules import unflatten as unflatten
from ocnopt.neural.cnf import CNF as CNF
from ocnopt.neural.layer_graph import draw_layer_graph as draw_layer_graph
from ocnopt.neural.layer_graph import layer_graph as layer_graph
from ocnopt.neural.neural_ode import NeuralODE as NeuralODE
from ocnopt.neural.runge_kutta_net import RungeKuttaNet as RungeKuttaNet
from ocnopt.ocp import OCP as OCP
from ocnopt.ocp import FreeHorizon as FreeHorizon
from ocnopt.ocp import Horizon as Horizon
from ocnopt.optim.horizon_policy import HorizonPolicy as HorizonPolicy
from ocnopt.optim.ocnopt import OCNOpt as OCNOpt
from ocnopt.optim.snopt import SNOpt as SNOpt
from ocnopt.rates import limit_rates as limit_rates
from ocnopt.solvers import MPC as MPC
from ocnopt.solvers import ClosedLoop as ClosedLoop
from ocnopt.solvers import Comparison as Comparison
from ocnopt.solvers import Prepared as Prepared
from ocnopt.solvers import Solution as Solution
from ocnopt.solvers import compare as compare
from ocnopt.solvers import load_solution as load_solution
from ocnopt.solvers import prepare as prepare
from ocnopt.solvers import solve as solve
from ocnopt.staged import Stage as Stage
from ocnopt.staged import StagedOCP as StagedOCP
