"""Learning problems: data, model and loss."""

from ocnopt.problems.learning import digits, flows, plane, protein, series, tables
from ocnopt.problems.record import LearningRecord

LEARNING_RECORDS: tuple[LearningRecord, ...] = (
    *digits.RECORDS,
    *flows.RECORDS,
    *series.RECORDS,
    *protein.RECORDS,
    *tables.RECORDS,
    *plane.RECORDS,
)
