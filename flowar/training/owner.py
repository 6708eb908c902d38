"""Which job may write in a run folder: one at a time, and the latest to start. Read next: train.py.

A node whose daemon died may keep running a job that the scheduler has restarted elsewhere. The newer start wins: the
older one checks owner.json before it publishes anything, finds another token there, and stops.
"""

import os
import secrets
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from flowar.base.errors import UserError
from flowar.base.leases import describe_process, is_of_this_machine, process_is_gone
from flowar.base.records import read_record, write_record

OWNER_FILE = "owner.json"
OWNER_KEYS = ("host", "machine", "pid", "started", "token", "job")
OWNER_CURE = "if no process is training there, delete it and run the same command again"


class Owner(NamedTuple):
    """A start of a run: its folder and its token."""

    run_dir: Path
    token: str

    def check(self) -> None:
        """Raise a UserError if another process has taken over the run."""
        try:
            owner = read_record(self.run_dir / OWNER_FILE, OWNER_CURE, OWNER_KEYS)
        except FileNotFoundError:
            raise UserError(
                f"run_dir={self.run_dir} or its {OWNER_FILE} was removed during training; restore it, or give another "
                "run_dir"
            ) from None
        if owner["token"] != self.token:
            raise UserError(
                f"run_dir={self.run_dir} was taken over by process {owner['pid']} on {owner['host']}"
                f"{owner['job'] and ' (job ' + owner['job'] + ')'}; this process stops"
            )


def take_over(run_dir: Path) -> Owner:
    """Make this process the owner of a run folder.

    This process can't check whether a process on another machine is alive, so it takes over, and the other one will
    stop. It also takes over from an earlier start of the same job.

    Raises:
        UserError: if a live process of another job on this machine is training there.
        OSError: if the folder can't be written.
    """
    file = run_dir / OWNER_FILE
    job = os.environ.get("FLOWAR_JOB", "")
    with owner_lock(run_dir):
        if file.exists():
            owner = read_record(file, OWNER_CURE, OWNER_KEYS)
            is_mine = owner["pid"] == os.getpid() or (job and owner["job"] == job)
            if not is_mine and is_of_this_machine(owner) and not process_is_gone(owner):
                raise UserError(
                    f"run_dir={run_dir} is in use by process {owner['pid']} on this machine; stop it first "
                    f"(kill {owner['pid']} makes it save and stop), or give another run_dir"
                )
        token = secrets.token_hex(8)
        write_record(file, describe_process() | {"token": token, "job": job})
    return Owner(run_dir, token)


def owner_lock(run_dir: Path) -> FileLock:
    """Return the lock to hold between checking the owner of a run and writing what depends on it."""
    return FileLock(run_dir / ".owner.lock")
