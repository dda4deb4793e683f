"""Dense second derivatives are refused before they exhaust the memory, with sizes and what to use instead."""

import os
import sys
from pathlib import Path

import torch

from ocnopt.differential.flow import Flow
from ocnopt.errors import ProblemError

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(flow: Flow) -> None:
    """Refuse matrices that cannot fit in memory.

    Raises:
        ProblemError: they would not.
    """
    q, columns = flow.p.shape[0], flow.samples * (flow.n + flow.lifted.control_dim)
    size, gib = torch.finfo(flow.p.dtype).bits // 8, 2.0**30
    # Q_pp and its sum with its transpose; the integrator keeps about twenty tensors of the size of Q_pX.
    needed, present = size * (3 * q * q + 20 * q * columns), total_memory(flow.p.device)
    if needed > present:
        raise ProblemError(
            f"dense pp ({q}, {q}) and px ({flow.samples} samples, {q}, {flow.n}) need about {needed / gib:.3g} GiB of "
            f"{present / gib:.3g} GiB; expected less: use representation='low_rank' (Gauss-Newton, about "
            f"{20 * size * q * columns / gib:.3g} GiB, less with rank=) or oc.hvp (the Hessian times a vector, some "
            f"vectors of {size * q / gib:.3g} GiB)"
        )


def total_memory(device: torch.device) -> float:
    """Bytes that a device has, or on the CPU this process may have; infinity where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if sys.platform == "win32":
        return float("inf")
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = _CONTAINER_LIMIT.read_text().strip() if _CONTAINER_LIMIT.exists() else "max"
    return min(total, float(limit)) if limit.isdigit() else total
