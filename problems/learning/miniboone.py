"""MiniBooNE: measurements of electron neutrinos, the smallest of the tables on which flows are compared.

UCI "MiniBooNE particle identification" (B. Roe, 2010, CC BY 4.0), in the preprocessing of Papamakarios et al. (MAF,
arXiv 1705.07057): of the 36,499 signal events those with a measurement below -100 are left out, and of the 50 columns
those whose smallest value comes more than five times; what is left must be 36,488 x 43. The last tenth is for testing,
and of the rest the last tenth, their validation part, is only used with the training part for mean and standard
deviation.

Shapes: rows ``(N, 43)`` float32.
"""

from torch import Tensor

from ocnopt.errors import DataError
from ocnopt.problems.learning.files import find, read_table

FILE, SIGNAL, SIZE = "MiniBooNE_PID.txt", 36_499, (36_488, 43)
EVENTS = (130_064, 50)  # signal, then background
SOURCE = "UCI MiniBooNE particle identification (CC BY 4.0), from the data folder"


def load() -> tuple[Tensor, Tensor]:
    """Training and test rows, ``(29556, 43)`` and ``(3648, 43)``.

    Raises:
        DataError: the file is missing or broken, or the preprocessing leaves another table.
    """
    path = find(f"miniboone/{FILE}", dataset="miniboone", source="https://archive.ics.uci.edu/dataset/199")
    rows = read_table(path, EVENTS, header=1, delimiter=None)[:SIGNAL]
    rows = rows[rows[:, 0] >= -100]
    rows = rows[:, (rows == rows.amin(dim=0)).sum(dim=0) <= 5]
    if rows.shape != SIZE:
        raise DataError(
            f"{path} has {tuple(rows.shape)} numbers after the preprocessing; expected {SIZE}: fetch it again"
        )
    kept = len(rows) - len(rows) // 10
    rows = (rows - rows[:kept].mean(dim=0)) / rows[:kept].std(dim=0, correction=0)
    return rows[: kept - kept // 10].float(), rows[kept:].float()
