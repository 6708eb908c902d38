import os
import subprocess
import sys

import pytest

from flowar.base.errors import UserError
from flowar.base.records import read_record, write_record
from flowar.training.owner import OWNER_FILE, take_over


def owned_by(run_dir, **changes):
    """Record another owner in the folder."""
    take_over(run_dir)
    write_record(run_dir / OWNER_FILE, read_record(run_dir / OWNER_FILE, "") | changes)


@pytest.fixture
def living():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate(b"\n")


def described(process):
    import psutil

    return {"pid": process.pid, "started": f"{psutil.Process(process.pid).create_time():.3f}"}


def test_a_run_in_use_on_this_machine_is_refused(tmp_path, living):
    owned_by(tmp_path, **described(living))
    with pytest.raises(UserError, match=f"in use by process {living.pid} on this machine; stop it first"):
        take_over(tmp_path)


def test_a_run_of_a_dead_process_can_be_taken_over(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owned_by(tmp_path, pid=dead.pid, started="0.000")
    take_over(tmp_path).check()


def test_a_restarted_job_takes_over_from_its_earlier_process(tmp_path, living, monkeypatch):
    owned_by(tmp_path, **described(living), job="17")
    monkeypatch.setenv("FLOWAR_JOB", "18")
    with pytest.raises(UserError, match="in use"):
        take_over(tmp_path)
    monkeypatch.setenv("FLOWAR_JOB", "17")
    take_over(tmp_path).check()


def test_a_process_finds_out_that_another_has_taken_over(tmp_path):
    before = take_over(tmp_path)
    owned_by(tmp_path, host="n2", pid=4, machine="n2", job="18")
    with pytest.raises(UserError, match=r"was taken over by process 4 on n2 \(job 18\); this process stops"):
        before.check()
    assert take_over(tmp_path).token != before.token and os.environ.get("FLOWAR_JOB") is None
