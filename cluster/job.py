"""What every task of a job does, and how it ends: finished, to be started again, or failed. Read next: submit.py.

A job has a folder:
    job.json, config.yaml     what runs where; `Job`
    code/, code.json          the code that runs, also after a requeue; its git commit; diff.patch where it was changed
    environment.json          python and its packages
    ID_RANK_log.out, .err     what each task printed, over all attempts (submitit's names)
    attempts.jsonl            one line per start: when and where
    again_ID                  the tasks saved and stopped on purpose: the batch script requeues the job
    failed_ID                 our code said why it can't go on: the job is not started again
    failures_ID               one line per unplanned end, to stop after max_restarts of them
    finished_ID               all is done
"""

import dataclasses
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType

from cluster import environment
from flowar.cli import VERBS
from flowar.config import ClusterConfig, load_config
from flowar.errors import EXIT_AGAIN, STOP_SIGNALS, UserError
from flowar.files import write_text

RECORD_FILE, CONFIG_FILE = "job.json", "config.yaml"
ATTEMPTS_FILE = "attempts.jsonl"
GRACE_S = 20  # to end after a signal, where nothing is saved
LOOK_AGAIN_S = 600  # time limits can be changed while a job runs


@dataclasses.dataclass(frozen=True)
class Job:
    """One submission, as job.json keeps it."""

    verb: str
    cluster: ClusterConfig
    folder: Path
    ids: tuple[str, ...] = ()  # of the scheduler: 1234, or 1234_0, 1234_1, ... of an array
    submitted: float = 0  # seconds since 1970
    code: str = ""  # git commit, with "+ changes" where files differed from it

    def save(self) -> None:
        """Write job.json."""
        record = dataclasses.asdict(self) | {"folder": str(self.folder)}
        write_text(self.folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Job":
        """Return the job of a folder."""
        record = json.loads((folder / RECORD_FILE).read_text())
        cluster = ClusterConfig(**record.pop("cluster"))
        return cls(**record | {"cluster": cluster, "ids": tuple(record["ids"]), "folder": folder})

    def mark(self, kind: str, job_id: str) -> Path:
        """Return the file that says how a job ended: kind is again, failed, failures or finished."""
        return self.folder / f"{kind}_{job_id}"


def run_task(folder: str) -> None:
    """Run the job's verb as one of its tasks. submitit calls this on every task, at every start."""
    job = Job.load(Path(folder))
    task = environment.read_task()
    stop_on_signals(job, task.job_id)
    environment.export_for_torch()
    if task.rank == 0:
        code = str(Path(__file__).parents[1])  # the copy
        attempt = {
            "job": task.job_id,
            "restarts": task.restarts,
            "started": time.time(),
            "hosts": task.hosts,
            "code": code,
        }
        with (job.folder / ATTEMPTS_FILE).open("a") as file:
            file.write(json.dumps(attempt | {"code": code}) + "\n")
    stop_before_the_end(job.cluster.stop_before_end_s)
    verb = VERBS[job.verb]
    try:
        environment.check_resources(task, job.cluster)
        config = load_config(verb.schema, job.folder / CONFIG_FILE)
        importlib.import_module(verb.module).main(config)
        if job.cluster.scheduler == "local" and task.rank == 0:
            job.mark("finished", task.job_id).touch()  # on Slurm the batch script does, when all tasks have ended
    except SystemExit as stop:
        if stop.code != EXIT_AGAIN:
            raise
        job.mark("again", task.job_id).touch()
    except UserError as error:
        fail(job, task, f"flowar {job.verb}: {error}")
    except Exception as error:
        from flowar.distributed import has_lost_ranks  # torch, which is there already

        traceback.print_exc()
        if has_lost_ranks(error):
            sys.exit(1)  # no fault of ours: another task died
        fail(job, task, f"{type(error).__name__}: {error}")


def fail(job: Job, task: environment.Task, reason: str) -> None:
    """Note why the job can't go on, and end."""
    where = f"task {task.rank} on {socket.gethostname()}: {' '.join(reason.split())}"
    write_text(job.mark("failed", task.job_id), where + "\n")
    sys.exit(where)


def stop_on_signals(job: Job, job_id: str) -> None:
    """Have the stop signals end this process so that the job is started again.

    This replaces submitit's handlers, which requeue from inside rank 0's handler and leave the others alone. Training
    replaces it in turn while its loop runs: there all ranks agree on a step, and save.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        job.mark("again", job_id).touch()
        threading.Timer(GRACE_S, os._exit, [0]).start()  # should something swallow the exception, or wait for peers
        raise SystemExit(EXIT_AGAIN)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)


def stop_before_the_end(margin_s: float) -> None:
    """Send this process SIGUSR2 when the job's time is nearly over, should Slurm's own signal not come."""
    if environment.seconds_left() is None:
        return

    def watch() -> None:
        while (left := environment.seconds_left()) is not None and left > margin_s:
            time.sleep(min(left - margin_s, LOOK_AGAIN_S))
        if left is not None:
            os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=watch, daemon=True).start()
