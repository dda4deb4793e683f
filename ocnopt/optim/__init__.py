"""Optimisers for models with Neural ODEs: SNOpt for the weights, a policy for the integration time."""

from ocnopt.optim.horizon_policy import HorizonPolicy as HorizonPolicy
from ocnopt.optim.snopt import SNOpt as SNOpt
