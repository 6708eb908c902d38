"""Submissions that are killed, paths with odd characters, and secrets, on a real Slurm."""

import os
import signal
import stat
import sys

import pytest

from cluster.commands import resume_command
from cluster.commands import submit_command as submit
from cluster.status import cancel, find_jobs, newest_job, status
from flowar.base.errors import UserError
from tests.cluster.conftest import run
from tests.conftest import MORE
from tests.processes import join, start

SECRET, OTHER_SECRET = "not-to-be-seen", "nor-this-one"
KEY = "cluster.environment.KEY=${oc.env:FLOWAR_SECRET}"


def submit_and_die(words):
    """Die from SIGKILL at the first use of a file after sbatch has answered, before its number is recorded."""
    submitted = []

    def die(event, arguments):
        if event == "subprocess.Popen" and arguments[1][0] == "sbatch" and "--test-only" not in arguments[1]:
            submitted.append(True)
        if submitted and event == "os.rename":
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    submit(words)


@pytest.mark.slow
@pytest.mark.parametrize("array", [2, pytest.param(1, marks=MORE)])
def test_a_job_whose_submission_was_killed_is_found_and_cancelled(slurm, image_folder, tmp_path, capsys, array):
    out_dir = tmp_path / "data"
    words = ["prepare", f"images={image_folder}", f"out_dir={out_dir}", "vae.name=demo", "image_size=32"]
    words += ["--cluster", str(slurm.cluster_file), "cluster.nodes=1", f"cluster.array={array}"]
    words += ["cluster.sbatch.begin=now+3600"]
    process = start(submit_and_die, words, log=tmp_path / "log", environment={"SLURM_CONF": os.environ["SLURM_CONF"]})
    join([process], tmp_path / "log", code=-signal.SIGKILL)
    (job,) = find_jobs(out_dir)
    assert len(job.ids) == array and '"ids": []' in (job.folder / "job.json").read_text()
    status([str(out_dir)])
    assert "PENDING" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"is in use by job {job.ids[0]}"):
        submit(words)
    cancel([str(out_dir)])
    assert "cancelled" in capsys.readouterr().out
    slurm.wait_for(lambda: not run("squeue", "-h", "-j", job.ids[0].split("_")[0]), "the end of the job")


@pytest.mark.slow
def test_secrets_are_passed_to_a_job_in_an_odd_folder_and_written_nowhere(slurm, tmp_path, monkeypatch):
    """Its tasks write down the variables that they got, and fail."""
    monkeypatch.setenv("FLOWAR_SECRET", SECRET)
    odd = tmp_path / 'it\'s an $odd #folder; "really"'
    odd.mkdir()
    monkeypatch.chdir(odd)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$KEY $PLAIN" >> {tmp_path}/seen\nexit 1\n')
    python.chmod(0o755)
    words = ["doctor", "run_dir=run", "--cluster", str(slurm.cluster_file), "cluster.nodes=1", "cluster.max_restarts=0"]
    submit([*words, KEY, "cluster.environment.PLAIN='a b'", f"cluster.python={python}"])
    first = newest_job(odd / "run")
    slurm.wait_for(first.mark("failed", first.ids[0]).exists, "the failure")
    assert (tmp_path / "seen").read_text() == f"{SECRET} a b\n"
    monkeypatch.setenv("FLOWAR_SECRET", OTHER_SECRET)
    slurm.wait_for(lambda: not run("squeue", "-h", "-j", first.ids[0]), "the end of the job")
    resume_command([str(odd / "run")])
    second = newest_job(odd / "run")
    assert second.ids != first.ids
    slurm.wait_for(second.mark("failed", second.ids[0]).exists, "the failure")
    assert (tmp_path / "seen").read_text() == f"{SECRET} a b\n{OTHER_SECRET} a b\n"
    for job in (first, second):
        assert "no gain in 1 starts, the last: exit code 1" in job.mark("failed", job.ids[0]).read_text()
        assert (job.folder / f"{job.ids[0]}_0_log.out").exists()  # not scattered
        assert stat.S_IMODE(job.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((job.folder / "job.json").stat().st_mode) == 0o600
    written = [file for file in odd.rglob("*") if file.is_file()]
    assert len(written) > 100
    secrets = (SECRET.encode(), OTHER_SECRET.encode())
    assert [file for file in written if any(secret in file.read_bytes() for secret in secrets)] == []
    monkeypatch.delenv("FLOWAR_SECRET")
    slurm.wait_for(lambda: not run("squeue", "-h", "-j", second.ids[0]), "the end of the job")
    with pytest.raises(UserError, match=r"environment.KEY=\$\{oc.env:FLOWAR_SECRET\} can't be resolved: .* not found"):
        resume_command([str(odd / "run")])


def test_what_slurm_cannot_do_is_refused_before_submission(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWAR_SECRET", SECRET)
    one = ["--cluster", str(slurm.cluster_file), "cluster.nodes=1"]
    for name, sign in (("a%jb", "%"), ("a\\b", r"\\\\"), ("a\nb", r"\\n")):
        with pytest.raises(UserError, match=f"Slurm can't handle '{sign}' in it; give another path"):
            submit(
                ["doctor", f"run_dir='{tmp_path}/{name}'" if sign == "%" else f'run_dir="{tmp_path}/{name!r}"', *one]
            )
    with pytest.raises(UserError, match="environment.KEY is passed .*but cluster.sbatch.export=NONE doesn't pass it"):
        submit(["doctor", f"run_dir={tmp_path}/run", *one, KEY, "cluster.sbatch.export=NONE"])
    with pytest.raises(UserError, match="cluster.environment.a b is not the name of a variable"):
        submit(["doctor", f"run_dir={tmp_path}/run", *one, "cluster.environment.a b=1"])
    assert list(tmp_path.iterdir()) == []
