"""Three kinds of failure: of the program or its user, of storage for a while, of one machine. Read next: errors.py.

Only the first kind is final. After the others the same command resumes, later or on another node.
"""

import errno
import re
from collections.abc import Iterator
from enum import StrEnum

from flowar.base.errors import UserError


class Failure(StrEnum):
    """Whose fault a failure is."""

    FINAL = "final"  # the program's or its user's
    STORAGE = "storage"  # disks or network that don't answer for a while
    HARDWARE = "hardware"  # of this machine; another may do


class StorageError(UserError):
    """Storage doesn't answer, and has not for as long as was allowed."""


class MachineError(UserError):
    """This machine lacks what it should have."""


# What file systems across a network give while a server restarts. A full disk or a missing right is final.
PASSING = {
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EREMOTEIO", "ENOTCONN", "ECONNRESET", "ECONNREFUSED"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ESHUTDOWN"),
    )
}

# What CUDA and its driver say of a sick GPU. An illegal address, which is a program's own mistake, is not among them.
SICK_GPU = re.compile(
    r"uncorrectable (ECC|NVLink)|ECC error|unspecified launch failure|hardware stack error|fall(en)? off the bus|"
    r"GPU is lost|no CUDA-capable device|devices? (is|are) busy or unavailable|CUDA error: unknown error|"
    r"CUDA unknown error|system not yet initialized|driver shutting down|Unable to determine the device handle",
    re.IGNORECASE,
)


def failure_of(error: BaseException) -> Failure:
    """Return whose fault an error is, by what caused it."""
    for cause in _causes(error):
        if isinstance(cause, MachineError) or (isinstance(cause, RuntimeError) and SICK_GPU.search(str(cause))):
            return Failure.HARDWARE
        if isinstance(cause, StorageError) or is_passing(cause):
            return Failure.STORAGE
    return Failure.FINAL


def is_passing(error: BaseException) -> bool:
    """Return whether an error of the operating system may be gone in a while."""
    return isinstance(error, OSError) and error.errno in PASSING


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from; of torch's distributed checkpoints, what the ranks ran into."""
    seen: list[BaseException] = [error]
    for cause in seen:
        yield cause
        failures = getattr(cause, "failures", None)
        of_ranks = [each[0] for each in failures.values()] if isinstance(failures, dict) else []
        seen += [other for other in (cause.__cause__, *of_ranks) if isinstance(other, BaseException)]
