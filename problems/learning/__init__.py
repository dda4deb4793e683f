"""Learning problems: data, model and loss."""

from ocnopt.problems.learning import digits, flows, latent, photographs, plane, protein, series, tables
from ocnopt.problems.record import LearningRecord

LEARNING_RECORDS: tuple[LearningRecord, ...] = (
    *digits.RECORDS,
    *photographs.RECORDS,
    *flows.RECORDS,
    *series.RECORDS,
    *latent.RECORDS,
    *protein.RECORDS,
    *tables.RECORDS,
    *plane.RECORDS,
)
