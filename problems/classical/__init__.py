"""Classical control problems, one file each: plain torch functions, the known cost and its source."""

from ocnopt.problems.classical import (
    brachistochrone,
    car_parking_tassa,
    cartpole_swing_up_soft,
    double_integrator_min_energy,
    double_integrator_min_time,
    mimo_lqr_two_masses,
    pendulum_swing_up,
    scalar_lqr,
)
from ocnopt.problems.record import ControlRecord

CONTROL_RECORDS: tuple[ControlRecord, ...] = (
    scalar_lqr.RECORD,
    mimo_lqr_two_masses.RECORD,
    double_integrator_min_energy.RECORD,
    double_integrator_min_time.RECORD,
    pendulum_swing_up.RECORD,
    pendulum_swing_up.RECORD_U5,
    cartpole_swing_up_soft.RECORD,
    car_parking_tassa.RECORD,
    brachistochrone.RECORD,
)
