"""`flowar status`, `logs` and `cancel`: the state of a run's jobs, from Slurm's queue and the files in their folders.

Read next: job.py for these files.
"""

import argparse
import contextlib
import dataclasses
import itertools
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from cluster.job import ATTEMPTS_FILE, JOB_CONFIG_FILE, RECORD_FILE, Job
from cluster.monitoring import StatusRow, as_json, as_prometheus
from cluster.runs import RunCells, advise, read_run
from flowar.base.errors import UserError
from flowar.cli import VERBS
from flowar.config.load import load_described
from flowar.config.training import TrainConfig
from flowar.training.owner import OWNER_FILE
from flowar.training.run_state import find_trainer, is_run

JOBS = "jobs"
REFRESH_S = 5
TAIL_LINES = "50"
WIDTH = 160  # of the table, without a terminal


def jobs_folder(verb: str, config: object) -> Path:
    """Return the folder for the jobs of a verb: inside the verb's output folder, or beside a dataset or file."""
    row = VERBS[verb]
    folder = Path(next(value for name in row.folder if (value := getattr(config, name)) is not None))
    if row.has_jobs_beside or folder.suffix in (".npz", ".tar"):
        return folder.with_name(f"{folder.name}.{JOBS}")
    return folder / JOBS


def find_jobs(folder: Path) -> list[Job]:
    """Return the jobs that were submitted for a run or dataset (or are in this folder of jobs), oldest first."""
    places = (folder, folder / JOBS, folder.with_name(f"{folder.name}.{JOBS}"))
    jobs = [find_ids(Job.load(file.parent)) for place in places for file in place.glob(f"*/{RECORD_FILE}")]
    return sorted(jobs, key=lambda job: (job.submitted, job.ids))


def find_ids(job: Job) -> Job:
    """Return a job with its ids. If the submission was killed before it recorded them, ask the queue and past starts.

    A job that still has no ids never reached the scheduler.
    """
    if job.ids:
        return job
    if job.cluster.scheduler == "local":
        found = [str(process.pid) for process in psutil.process_iter() if _is_controller(process, job)]
    else:
        seen = queue("--me", "-r")
        found = [job_id for job_id, one in seen.items() if one.comment and Path(one.comment).resolve() == job.folder]
    file = job.folder / ATTEMPTS_FILE
    started = re.findall(r'"job": "([0-9]+(?:_[0-9]+)?)"', file.read_text(errors="replace")) if file.exists() else []
    ids = sorted(dict.fromkeys((*found, *started)), key=lambda job_id: [int(part) for part in job_id.split("_")])
    return dataclasses.replace(job, ids=tuple(ids))


def newest_job(folder: Path) -> Job:
    """Return the job that was submitted last.

    Raises:
        UserError: if there is no job.
    """
    jobs = find_jobs(folder)
    if not jobs:
        raise UserError(f"no job was submitted for {folder}; {_without_jobs(folder)}")
    return jobs[-1]


def _without_jobs(folder: Path) -> str:
    """Return advice for a folder that has no jobs."""
    if is_run(folder):
        return advise(folder, find_trainer(folder))
    return f"its jobs would be in {folder / JOBS}; give the folder that the verb writes"


class Queued(NamedTuple):
    """What the scheduler says about a job."""

    state: str
    nodes: str
    left: str
    comment: str = ""  # the folder of the job


def ask_queue(job: Job) -> dict[str, Queued]:
    """Return the ids of a job that are still queued or running. A local job runs as long as its process."""
    if job.cluster.scheduler == "local":
        alive = (job_id for job_id in job.ids if find_controller(job_id, job))
        return {job_id: Queued("RUNNING", "this machine", "") for job_id in alive}
    numbers = ",".join(dict.fromkeys(job_id.split("_")[0] for job_id in job.ids))
    if not numbers:
        return {}
    return queue("-r", "-j", numbers)


def queue(*words: str) -> dict[str, Queued]:
    """Return squeue's answer by job id; {} if it knows no such job, or isn't installed."""
    try:
        answer = subprocess.run(
            ["squeue", "-h", "-o", "%i|%T|%N|%r|%L|%k", *words], capture_output=True, text=True, timeout=30
        )
    except FileNotFoundError:
        return {}
    except subprocess.TimeoutExpired as error:
        raise UserError(f"squeue didn't answer within {error.timeout:g} s; try again") from error
    found = {}
    for line in answer.stdout.splitlines():
        job_id, state, nodes, reason, left, comment = line.split("|", 5)
        found[job_id] = Queued(state, nodes or (f"({reason})" if reason != "None" else ""), left, comment)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        raise UserError(f"squeue failed: {answer.stderr.strip()}; try again")
    return found


def find_controller(job_id: str, job: Job) -> psutil.Process | None:
    """Return the process of submitit that runs a local job's tasks: the one with this number, or its child."""
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(int(job_id))
        return next((process for process in (first, *first.children()) if _is_controller(process, job)), None)
    return None


def _is_controller(process: psutil.Process, job: Job) -> bool:
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return "submitit.local._local" in command and str(job.folder) in command
    return False


def is_live(job: Job) -> bool:
    """Return whether any of a job's tasks is queued or running."""
    return bool(ask_queue(job))


def state_of(job: Job, job_id: str, queued: dict[str, Queued]) -> str:
    """Return the state of one of a job's ids: the scheduler's word if it has one, otherwise how it ended."""
    if job_id in queued:
        return queued[job_id].state
    for kind in ("finished", "failed", "cancelled"):
        if job.mark(kind, job_id).exists():
            return kind.upper()
    if shutil.which("squeue") is None and job.cluster.scheduler == "slurm":
        return "UNKNOWN"
    # Stopped on purpose, but no longer in Slurm's queue; or ended from outside, by scancel or a time limit.
    return "STOPPED" if any(job.folder.glob(f"again_{job_id}.*")) else "ENDED"


def is_finished(job: Job) -> bool:
    """Return whether all of a job's ids have finished their work."""
    return bool(job.ids) and all(job.mark("finished", job_id).exists() for job_id in job.ids)


def status(words: list[str]) -> None:
    """Show jobs, states, nodes, step, loss, speed, time left, restarts and the age of the last checkpoint."""
    parser = argparse.ArgumentParser(prog="flowar status", description=status.__doc__)
    parser.add_argument("run_dirs", nargs="*", type=Path, help="runs or datasets; default: all your live jobs")
    parser.add_argument("--watch", action="store_true", help=f"refresh every {REFRESH_S} s, until Ctrl-C")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print numbers for other programs")
    forms.add_argument("--prometheus", action="store_true", help="print Prometheus' text format, for dashboards")
    options = parser.parse_args(words)
    if options.json:
        print(as_json(*status_rows(options.run_dirs)))
        return
    if options.prometheus:
        print(as_prometheus(status_rows(options.run_dirs)[0]), end="")
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if not options.watch:
        console.print(status_table(options.run_dirs))
        return
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                live.update(status_table(options.run_dirs), refresh=True)
            except UserError as error:  # Slurm is busy; the table stays
                live.console.print(str(error), highlight=False, markup=False, emoji=False)
            time.sleep(REFRESH_S)


def status_table(run_dirs: list[Path]) -> Table:
    """Return the table of `flowar status`."""
    columns = (
        "run", "job", "verb", "state", "nodes", "step", "loss", "images/s", "left", "logged", "checkpoint", "restarts",
    )  # fmt: skip
    table = Table(*columns, box=None)
    rows, notes = status_rows(run_dirs)
    for row in rows:
        restarts = "" if row.restarts is None else str(row.restarts)
        cells = (row.run, row.job, row.verb, row.state, row.nodes, *row.cells, restarts)
        table.add_row(*map(escape, cells), style="red" if row.state == "FAILED" else None)
    table.caption = escape("\n".join(notes)) or None
    return table


def status_rows(run_dirs: list[Path]) -> tuple[list[StatusRow], list[str]]:
    """Return what is known of the jobs of runs, or of all live ones, and notes about them."""
    rows: list[StatusRow] = []
    notes: list[str] = []
    submitted = {folder: find_jobs(folder) for folder in run_dirs}
    for folder, jobs in submitted.items():
        found, said = _unscheduled(folder, has_jobs=bool(jobs))
        rows, notes = rows + found, notes + said
    for job in itertools.chain(*submitted.values()) if run_dirs else live_jobs():
        queued = ask_queue(job)
        run = job.folder.parent.parent.name if job.folder.parent.name == JOBS else job.folder.parent.stem
        for state, ids in _grouped(job, queued):
            nodes = ",".join(dict.fromkeys(queued[job_id].nodes for job_id in ids if job_id in queued))
            name = ids[0] if len(ids) == 1 else f"{ids[0]}..{ids[-1].split('_')[-1]}"
            restarts = max(0, sum(attempt_count(job, job_id) for job_id in ids) - len(ids))
            rows.append(StatusRow(run, name, job.verb, state, nodes, _progress(job), restarts, training_folder(job)))
        if not job.ids:
            rows.append(StatusRow(run, "", job.verb, "NOT SUBMITTED", "", RunCells(), None, None))
            notes.append(f"{job.folder}: its submission was interrupted; submit it again")
        for job_id in job.ids:
            if job.mark("failed", job_id).exists():
                notes.append(f"{job_id}: {job.mark('failed', job_id).read_text(errors='replace').strip()}")
    return rows, notes


def _unscheduled(folder: Path, *, has_jobs: bool) -> tuple[list[StatusRow], list[str]]:
    """Return the row of a run that no scheduler started, if it is one, and notes about it."""
    if not is_run(folder):
        if not has_jobs:
            raise UserError(f"no job was submitted for {folder}; {_without_jobs(folder)}")
        return [], []
    if has_jobs and not (folder / OWNER_FILE).exists():  # a job that hasn't started yet
        return [], []
    trainer = find_trainer(folder)
    if has_jobs and (trainer.job or trainer.state != "RUNNING"):
        return [], []
    nodes = "this machine" if trainer.state != "UNKNOWN" else trainer.host
    name = f"process {trainer.pid}"
    row = StatusRow(folder.name, name, "train", trainer.state, nodes, read_run(folder), None, folder)
    return [row], [advise(folder, trainer)]


def _grouped(job: Job, queued: dict[str, Queued]) -> Iterable[tuple[str, list[str]]]:
    """Yield (state, ids) for the ids of an array, grouped by state."""
    by_state = sorted(job.ids, key=lambda job_id: state_of(job, job_id, queued))
    for state, ids in itertools.groupby(by_state, key=lambda job_id: state_of(job, job_id, queued)):
        yield state, list(ids)


def attempt_count(job: Job, job_id: str) -> int:
    """Return how often a job was started."""
    file = job.folder / ATTEMPTS_FILE
    return file.read_text(errors="replace").count(f'"job": "{job_id}"') if file.exists() else 0


def _progress(job: Job) -> RunCells:
    """Return how far a training job is."""
    run_dir = training_folder(job)
    return read_run(run_dir) if run_dir is not None and is_run(run_dir) else RunCells()


def training_folder(job: Job) -> Path | None:
    """Return the run_dir of a training job."""
    if job.verb != "train":
        return None
    return Path(job.cwd) / load_described(TrainConfig, job.folder / JOB_CONFIG_FILE).run_dir


def live_jobs() -> list[Job]:
    """Return this user's jobs that are queued or running, found by the comment that `flowar submit` sets."""
    if shutil.which("squeue") is None:
        raise UserError("there is no Slurm on this machine (no squeue on PATH); name a run: flowar status RUN_DIR")
    answer = subprocess.run(["squeue", "-h", "--me", "-o", "%k"], capture_output=True, text=True)
    folders = dict.fromkeys(line for line in answer.stdout.splitlines() if (Path(line) / RECORD_FILE).is_file())
    return [Job.load(Path(folder)) for folder in folders]


def logs(words: list[str]) -> None:
    """Show what a task of the latest job printed."""
    parser = argparse.ArgumentParser(prog="flowar logs", description=logs.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--rank", type=int, default=0, help="number of the task")
    parser.add_argument("--array", type=int, default=0, help="number of the job in an array")
    parser.add_argument("--verb", help="show the latest job of this verb")
    parser.add_argument("-f", "--follow", action="store_true", help="keep printing new lines, until Ctrl-C")
    options = parser.parse_args(words)
    jobs = [job for job in find_jobs(options.run_dir) if options.verb in (None, job.verb)]
    if not jobs:
        which = f"no job of verb {options.verb}" if options.verb else "no job"
        raise UserError(f"{which} was submitted for {options.run_dir}; {_without_jobs(options.run_dir)}")
    job_id = jobs[-1].ids[options.array] if options.array < len(jobs[-1].ids) else None
    files = [jobs[-1].folder / f"{job_id}_{options.rank}_log.{end}" for end in ("out", "err")]
    files = [file for file in files if file.exists()]
    if not files:
        there = ", ".join(sorted(file.name for file in jobs[-1].folder.glob("*_log.*")))
        there = f"choose one of {there}" if there else "check with `flowar status` that it has started"
        raise UserError(f"{jobs[-1].folder} has no log of rank {options.rank}; {there}")
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run(["tail", "-n", TAIL_LINES, *(["-F"] if options.follow else []), *map(str, files)])


def cancel(words: list[str]) -> None:
    """Cancel a run's jobs for good. Running jobs are asked to save and stop, and killed if they don't in time."""
    parser = argparse.ArgumentParser(prog="flowar cancel", description=cancel.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--now", action="store_true", help="don't wait for running jobs to save")
    options = parser.parse_args(words)
    ended = []
    for job in reversed(find_jobs(options.run_dir)):  # first those that wait for others
        queued = ask_queue(job)
        ended += list(queued)
        running = [job_id for job_id, seen in queued.items() if seen.state == "RUNNING"]
        if job.cluster.scheduler == "slurm":
            for job_id in running:
                job.mark("cancelled", job_id).touch()
            if running and not options.now:
                print(f"asking {', '.join(running)} to save and stop, for at most {job.cluster.stop_before_end_s} s")
                _scancel("--signal=USR2", *running)
                deadline = time.monotonic() + job.cluster.stop_before_end_s
                while time.monotonic() < deadline and any(seen.state == "RUNNING" for seen in ask_queue(job).values()):
                    time.sleep(1)
        end_job(job)
    print(f"cancelled {', '.join(ended)}" if ended else f"no job of {options.run_dir} is queued or running")
    if not ended and is_run(options.run_dir) and (options.run_dir / OWNER_FILE).exists():
        print(advise(options.run_dir, find_trainer(options.run_dir)))


def end_job(job: Job) -> None:
    """End all of a job that is queued or running, at once; tasks of a local job may save first."""
    left = list(ask_queue(job))
    if job.cluster.scheduler == "local":
        for job_id in left:
            if (controller := find_controller(job_id, job)) is not None:
                controller.terminate()  # it passes the signal on to the tasks
    elif left:
        _scancel(*left)


def _scancel(*words: str) -> None:
    answer = subprocess.run(["scancel", *words], capture_output=True, text=True)
    if answer.returncode and "already completing" not in answer.stderr and "Invalid job id" not in answer.stderr:
        raise UserError(f"scancel failed: {answer.stderr.strip()}; try again")
