import errno

import pytest
from torch.distributed.checkpoint import CheckpointException

from flowar.base.errors import UserError
from flowar.base.failures import Failure, MachineError, StorageError, failure_of


def caused_by(cause):
    error = UserError("can't go on")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "needed"),
    [
        (UserError("batch_size=7"), Failure.FINAL),
        (ValueError("a bug"), Failure.FINAL),
        (OSError(errno.ENOSPC, "No space left on device"), Failure.FINAL),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Failure.FINAL),
        (ValueError("uncorrectable ECC"), Failure.FINAL),  # not CUDA's
        (OSError(errno.EIO, "Input/output error"), Failure.STORAGE),
        (caused_by(OSError(errno.ESTALE, "Stale file handle")), Failure.STORAGE),
        (CheckpointException("", {3: (OSError(errno.EIO, "Input/output error"), None)}), Failure.STORAGE),
        (StorageError("nothing comes"), Failure.STORAGE),
        (MachineError("7 of 8 GPUs"), Failure.HARDWARE),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors ..."), Failure.HARDWARE),
        (
            caused_by(RuntimeError("Caught RuntimeError in a worker: ... ECC error")),
            Failure.HARDWARE,
        ),
        (RuntimeError("CUDA error: unspecified launch failure"), Failure.HARDWARE),
        (RuntimeError("No CUDA GPUs are available: no CUDA-capable device is detected"), Failure.HARDWARE),
    ],
)
def test_whose_fault_a_failure_is(error, needed):
    assert failure_of(error) == needed
