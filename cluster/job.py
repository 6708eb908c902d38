"""What every task of a job does, and how it ends: finished, to be restarted, or failed. Read next: submit.py.

A job has a folder (ID is Slurm's number, N the number of restarts by Slurm):
    job.json, config.yaml     what runs where; `Job`. Only its user can read the folder, as settings may hold secrets
    code/, code.json          the code that runs, also after a requeue; its git commit; diff.patch if it was changed
    environment.json          python and its packages on the node of the first task
    ID_RANK_log.out, .err     what each task printed, over all starts (submitit's names)
    attempts.jsonl            one line per start: when and where
    again_ID.N                the tasks stopped on purpose and a new start resumes; "counted" in it: no progress
    trouble_ID.N              storage or a machine failed: the job restarts, and this counts as a failure
    exclude_ID.N              nodes that the new start avoids
    error_ID.N                why our code can't continue
    nccl_ID.N_rank_*          each rank's recent NCCL calls, written when a rank waited too long
    progress_ID               the newest checkpoint's step when the job started; more steps clear failures_ID
    failures_ID               one line per end without progress; the job stops after max_restarts of them
    cancelled_ID              the job was cancelled with `flowar cancel`
    finished_ID, failed_ID    all work is done; or why the job is not restarted
"""

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from importlib.metadata import distributions
from pathlib import Path
from types import FrameType
from typing import Any

from cluster import environment
from flowar.base.errors import EXIT_AGAIN, STOP_SIGNALS, UserError, exit_with
from flowar.base.failures import Failure, failure_of
from flowar.base.files import write_text
from flowar.base.records import DamagedRecordError, read_record, write_record
from flowar.base.run_folder import checkpoint_step, find_latest
from flowar.cli import VERBS
from flowar.config.jobs import ClusterConfig
from flowar.config.load import did_you_mean, load_described, load_values
from flowar.config.training import TrainConfig

RECORD_FILE, JOB_CONFIG_FILE, ENVIRONMENT_FILE = "job.json", "config.yaml", "environment.json"
ATTEMPTS_FILE = "attempts.jsonl"
CALLS_KEPT = 2000  # of NCCL, for the trace that its watchdog writes
GRACE_S = 20  # to end after a signal, if nothing is saved
LAST_MOMENT_S = 30  # before the end of the job's time, when a hanging process is ended
LOOK_AGAIN_S, ASK_AGAIN_S = 600, 60  # as time limits can change while a job runs; and when squeue didn't answer


@dataclasses.dataclass(frozen=True)
class Job:
    """One submission, as stored in job.json."""

    verb: str
    cluster: ClusterConfig
    folder: Path
    ids: tuple[str, ...] = ()  # from the scheduler: 1234, or 1234_0, 1234_1, ... for an array
    submitted: float = 0  # seconds since 1970
    code: str = ""  # git commit, with "+ changes" if files differed from it
    cwd: str = ""  # relative paths start here
    # Variables of cluster.environment that sbatch takes from the shell, by name: not stored, as they may be secrets
    passed: dict[str, str] = dataclasses.field(default_factory=dict)

    def save(self) -> None:
        """Write job.json."""
        record = dataclasses.asdict(self) | {"folder": str(self.folder)}
        write_record(self.folder / RECORD_FILE, record, private=True)

    @classmethod
    def load(cls, folder: Path) -> "Job":
        """Return the job of a folder. Settings that this version doesn't know are ignored.

        Raises:
            UserError: if its job.json is damaged.
        """
        file = folder / RECORD_FILE
        cure = f"cancel its job (`squeue --me -o '%i %k'` shows the number beside this folder), and remove {folder}"
        record = read_record(file, cure)
        try:
            values = _known(cls, record) | {"cluster": _known(ClusterConfig, record["cluster"]), "folder": "."}
            job = load_values(cls, values)
            if job.verb not in VERBS:
                raise ValueError(f"verb={job.verb} is unknown{did_you_mean(job.verb, VERBS)}")
        except (KeyError, AttributeError, ValueError) as error:
            raise DamagedRecordError(f"{file} is damaged ({error}); {cure}") from error
        return dataclasses.replace(job, folder=folder.resolve())

    def mark(self, kind: str, job_id: str) -> Path:
        """Return the file that marks one of the ids as finished, failed or cancelled, or counts its failures."""
        return self.folder / f"{kind}_{job_id}"


def _known(schema: type[Any], record: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(schema)}
    return {name: value for name, value in record.items() if name in names}


def run_task(folder: str) -> None:
    """Run the job's verb as one of its tasks. submitit calls this in every task, at every start."""
    job = Job.load(Path(folder))
    Task(job, environment.read_task()).run()


class Task:
    """This process's part in one start of a job."""

    def __init__(self, job: Job, place: environment.TaskEnvironment) -> None:
        self.job = job
        self.place = place
        self.is_stopping = False

    def run(self) -> None:
        """Set up, run the verb, and record how it ended."""
        self._handle_signals()
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # NCCL's watchdog
        environment.export_for_torch()
        os.environ |= {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": str(CALLS_KEPT)}
        for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # the latter before torch 2.12
            os.environ[name] = f"{self._mark('nccl')}_rank_"
        if self.place.rank == 0:
            self._describe_start()
        self._stop_before_the_end()
        verb = VERBS[self.job.verb]
        try:
            self._change_folder()
            environment.check_resources(self.place, self.job.cluster)
            config = load_described(verb.schema, self.job.folder / JOB_CONFIG_FILE)
            if self.place.rank == 0 and isinstance(config, TrainConfig):
                self._note_progress(config.run_dir)
            verb.load()(config)
            if self.job.cluster.scheduler == "local" and self.place.rank == 0:
                self.job.mark("finished", self.place.job_id).touch()  # on Slurm the batch script does, after all tasks
        except SystemExit as stop:
            if stop.code != EXIT_AGAIN:
                raise
            if not self.is_stopping:  # the verb stopped by itself, and saved
                self._mark("again").touch()
        except Exception as error:
            reason = f"flowar {self.job.verb}: {error}"
            if not isinstance(error, UserError):
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
            self._fail(reason, error)

    def _mark(self, kind: str) -> Path:
        """Return the file that says how this start ended: again or error."""
        return self.job.folder / f"{kind}_{self.place.job_id}.{self.place.restarts}"

    def _fail(self, reason: str, error: Exception) -> None:
        """Record why this start failed, and whether the job may restart, here or on other nodes; then exit."""
        from flowar.base.distributed import has_lost_ranks  # imports torch, which is already loaded

        node = environment.scheduler_node_name()
        where = f"task {self.place.rank} on {node}: {' '.join(reason.split())}"
        is_local, kind = self.job.cluster.scheduler == "local", failure_of(error)
        goes_on = not is_local and self.job.verb != "doctor"
        if goes_on and kind == Failure.HARDWARE:
            with self._mark("exclude").open("a") as file:
                file.write(node + "\n")
        if self.is_stopping:
            pass  # already recorded
        elif goes_on and kind != Failure.FINAL:
            write_text(self._mark("trouble"), f"{kind} failed, {where}\n")
        elif self.job.verb == "doctor" or not has_lost_ranks(error):  # else another task died
            write_text(self.job.mark("failed", self.place.job_id) if is_local else self._mark("error"), where + "\n")
        exit_with(where)

    def _describe_start(self) -> None:
        code = str(Path(__file__).parents[1])  # the copy
        start = {"job": self.place.job_id, "restarts": self.place.restarts, "started": time.time()}
        with (self.job.folder / ATTEMPTS_FILE).open("a") as file:
            file.write(json.dumps(start | {"hosts": self.place.hosts, "code": code}) + "\n")
        packages = {package.metadata["Name"]: package.version for package in distributions()}
        found = {"python": sys.version, "executable": sys.executable, "packages": dict(sorted(packages.items()))}
        write_text(self.job.folder / ENVIRONMENT_FILE, json.dumps(found, indent=2) + "\n")

    def _note_progress(self, run_dir: str) -> None:
        """Forget earlier failures if the run has a newer checkpoint than when the job started last."""
        latest, file = find_latest(run_dir), self.job.mark("progress", self.place.job_id)
        step = checkpoint_step(latest) if latest is not None else 0
        before = file.read_text().strip() if file.exists() else ""
        if before.isdecimal() and step > int(before):
            self.job.mark("failures", self.place.job_id).unlink(missing_ok=True)
        write_text(file, f"{step}\n")

    def _change_folder(self) -> None:
        """Change to the folder of submission, where relative paths start; containers start elsewhere."""
        try:
            os.chdir(self.job.cwd)
        except OSError as error:
            raise UserError(
                f"can't enter the folder of submission {self.job.cwd} ({error.strerror}); mount it on all nodes and in "
                "containers, or submit from a folder that is mounted there"
            ) from error

    def _handle_signals(self) -> None:
        """Make the stop signals end this process in such a way that the job is restarted.

        This replaces submitit's handlers, which requeue from inside rank 0's handler and leave the other ranks alone.
        Training replaces it in turn while its loop runs, where all ranks agree on a step and save.
        """

        def stop(number: int, frame: FrameType | None) -> None:
            self.is_stopping = True
            for other in STOP_SIGNALS:
                signal.signal(other, signal.SIG_IGN)
            timer = threading.Timer(
                GRACE_S, os._exit, [EXIT_AGAIN]
            )  # in case something waits for peers, or swallows this
            timer.daemon = True
            timer.start()
            self._mark("again").write_text("" if VERBS[self.job.verb].shares_work else "counted")
            raise SystemExit(EXIT_AGAIN)

        for number in STOP_SIGNALS:
            signal.signal(number, stop)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _stop_before_the_end(self) -> None:
        """Send this process SIGUSR2 when the job's time is nearly over, in case Slurm's own signal doesn't arrive.

        In training all ranks agree, so only rank 0 checks; in other verbs each rank does. A process that still hangs
        shortly before the end is killed.
        """
        if self.job.cluster.scheduler == "local" or (self.job.verb == "train" and self.place.rank > 0):
            return

        def watch() -> None:
            has_asked = False
            time.sleep(random.uniform(0, min(self.place.rank, ASK_AGAIN_S / 2)))  # spread a thousand tasks
            while True:
                try:
                    left = environment.seconds_left()
                except (OSError, subprocess.SubprocessError) as error:
                    print(f"squeue doesn't answer ({error}); asking again in {ASK_AGAIN_S} s", file=sys.stderr)
                    time.sleep(ASK_AGAIN_S)
                    continue
                if left is None:
                    return
                if left <= LAST_MOMENT_S and has_asked:
                    self._mark("again").touch()
                    os._exit(EXIT_AGAIN)
                if left <= self.job.cluster.stop_before_end_s and not has_asked:
                    has_asked = True
                    os.kill(os.getpid(), signal.SIGUSR2)
                until = LAST_MOMENT_S if has_asked else self.job.cluster.stop_before_end_s
                time.sleep(max(1, min(left - until, LOOK_AGAIN_S)))

        threading.Thread(target=watch, daemon=True).start()
