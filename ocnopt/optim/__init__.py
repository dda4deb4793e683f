"""Optimisers: SNOpt for Neural ODEs, a policy for their integration time, structured descent for any model."""

from ocnopt.optim.backtracking import Backtracking as Backtracking
from ocnopt.optim.horizon_policy import HorizonPolicy as HorizonPolicy
from ocnopt.optim.itoh_abe import ItohAbe as ItohAbe
from ocnopt.optim.mec import MEC as MEC
from ocnopt.optim.momentum import Conformal as Conformal
from ocnopt.optim.momentum import Relativistic as Relativistic
from ocnopt.optim.msa import MSA as MSA
from ocnopt.optim.riemannian import Riemannian as Riemannian
from ocnopt.optim.snopt import SNOpt as SNOpt
