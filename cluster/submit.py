"""`flowar submit VERB ...`: any verb as a Slurm job, with submitit; and `flowar resume`. Knows no model or dataset.

The code is copied into the job's folder, and this copy is what runs, even after a requeue weeks later.
Read next: job.py for what runs, status.py for how to watch it.
"""

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import submitit

import flowar
from cluster.environment import check_passed, first_lines, last_lines, outside_of_jobs, with_variables
from cluster.job import JOB_CONFIG_FILE, RECORD_FILE, Job, run_task
from cluster.status import JOBS, end_job, find_ids, find_jobs, is_live, jobs_folder
from flowar.base.errors import UserError
from flowar.base.files import write_text
from flowar.cli import VERBS, parse_words
from flowar.config.jobs import ClusterConfig, PipelineConfig
from flowar.config.load import (
    FromEnvironment,
    as_literal,
    as_word,
    describe_config,
    load_config,
    save_described,
)
from flowar.config.training import TrainConfig

SUBMITTED_VERBS = tuple(name for name, verb in VERBS.items() if verb.folder)

PIPELINE = ("prepare", "train", "sample", "evaluate")  # in this order

PACKAGES = ("flowar", "cluster", "data_prep")

CODE = "code"
SRUN = ("--kill-on-bad-exit=1", "--wait=0", "--distribution=block:block")
NEVER = 1_000_000  # limit of submitit's own count of time-outs, which we don't use


def stamp_of(job: Job) -> str:
    """Return the time in the name of a job's folder; all jobs of one submission share it."""
    return job.folder.name.split("-", 1)[1]


@dataclasses.dataclass(frozen=True)
class PlannedJob:
    """A job that will be submitted."""

    verb: str
    config: Any  # of the verb's schema
    cluster: ClusterConfig
    jobs: Path  # the folder that gets the job's folder
    again: Job | None = None  # the job to repeat, with its code and settings; None: the installed code

    @property
    def cwd(self) -> str:
        """The folder where relative paths start."""
        return self.again.cwd if self.again else str(Path.cwd())


def without_cluster(words: list[str]) -> list[str]:
    """Return the words of a command line that are not about the cluster."""
    return [word for word in words if not word.startswith("cluster.")]


def read_cluster(file: str, words: list[str]) -> ClusterConfig:
    """Return the settings of the cluster: its YAML file, then the words that start with `cluster.`."""
    settings = (word.removeprefix("cluster.") for word in words if word.startswith("cluster."))
    return load_config(ClusterConfig, file, tuple(settings))


def plan_job(verb: str, words: list[str], cluster_file: str) -> PlannedJob:
    """Return the job that the command line describes.

    Raises:
        UserError: if a setting is wrong.
    """
    config = parse_words(VERBS[verb].schema, without_cluster(words))
    cluster = read_cluster(cluster_file, words)
    return PlannedJob(verb, config, cluster, jobs_folder(verb, config))


def plan_pipeline(words: list[str], cluster_file: str) -> tuple[Path, list[PlannedJob]]:
    """Return the folder of a chain, and its jobs in their order."""
    config = parse_words(PipelineConfig, words)
    unknown = [name for name in config.cluster if name not in PIPELINE]
    if unknown:
        raise UserError(f"cluster.{unknown[0]} is not a step of the pipeline; choose from {', '.join(PIPELINE)}")
    jobs = []
    for verb in PIPELINE:
        if getattr(config, verb) is not None:
            cluster = load_config(ClusterConfig, cluster_file, own_words(config.cluster.get(verb, {})))
            settings = getattr(config, verb)
            jobs.append(PlannedJob(verb, settings, cluster, jobs_folder(verb, settings)))
    if not jobs:
        raise UserError(f"the pipeline has no step; give settings for at least one of {', '.join(PIPELINE)}")
    return Path(config.run_dir), jobs


def own_words(settings: dict[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Return a step's cluster settings as words of a command line; passed variables stay as they were written."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            words += own_words(value, f"{prefix}{name}.")
        else:
            written = value.source if isinstance(value, FromEnvironment) else as_literal(value)
            words.append(as_word(f"{prefix}{name}", written))
    return tuple(words)


def submit(planned: list[PlannedJob], *, dry_run: bool, listed_in: Path | None = None) -> None:
    """Check and submit jobs, each waiting for the one before.

    Args:
        planned: in their order.
        dry_run: print what would be submitted instead.
        listed_in: folder of a chain, which gets links to the jobs' folders.

    Raises:
        UserError: if the cluster would refuse a job, or its folder is in use; then nothing is submitted.
    """
    for job in planned:
        check(job, alone=len(planned) == 1)
    if dry_run:
        for job in planned:
            folder = job.jobs / f"{job.verb}-TIME"
            print(f"# {folder / JOB_CONFIG_FILE}\n{describe_config(job.config)}")
            print(f"# batch script\n{batch_script(job, folder.absolute())}\n")
        return
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folders = [job.jobs.absolute() / f"{job.verb}-{stamp}" for job in planned]
    made: list[Path] = []
    done: list[Job] = []
    try:
        for job, folder in zip(planned, folders, strict=True):
            make_folder(folder)
            made.append(folder)
            done.append(submit_one(job, folder, after=done[-1].ids if done else ()))
            if listed_in is not None:
                (listed_in / JOBS).mkdir(parents=True, exist_ok=True)
                link = listed_in / JOBS / folder.name
                if not link.exists():  # the chain's folder may be that of one of its jobs
                    link.symlink_to(folder)
    except BaseException:
        for folder in made:  # the last one's number may not be recorded yet
            if (folder / RECORD_FILE).is_file():
                end_job(find_ids(Job.load(folder)))
        raise
    for own in done:
        what = f"{own.ids[0]} to {own.ids[-1]}" if len(own.ids) > 1 else own.ids[0]
        print(f"submitted {own.verb} as job {what}; its folder: {own.folder}")
    jobs = planned[-1].jobs
    shown = listed_in or (jobs.parent if jobs.name == JOBS else jobs.with_name(jobs.name.removesuffix(f".{JOBS}")))
    print(f"watch it: flowar status {shown} --watch")


def make_folder(folder: Path) -> None:
    """Make a job's folder; from then on it belongs to this submission."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)  # settings, and lines of the batch script, may hold secrets
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.is_dir():
            raise UserError(
                f"can't write {folder}: another submission made it in the same second; `flowar status` shows its job"
            ) from error
        raise UserError(f"can't write {folder}: {error.strerror or error}") from error


def submit_one(job: PlannedJob, folder: Path, after: tuple[str, ...]) -> Job:
    """Fill the job's folder, pass the job to the scheduler, and record its ids."""
    try:
        code = copy_code(job.again, folder)
        if job.again is not None:  # unchanged, as it belongs to the code of that time
            shutil.copy(job.again.folder / JOB_CONFIG_FILE, folder / JOB_CONFIG_FILE)
        else:
            save_described(job.config, folder / JOB_CONFIG_FILE)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror or error}") from error
    passed = passed_variables(job.cluster)
    literal = {name: value for name, value in job.cluster.environment.items() if name not in passed}
    record = Job(
        job.verb,
        dataclasses.replace(job.cluster, environment=literal),
        folder,
        submitted=time.time(),
        code=code,
        cwd=job.cwd,
        passed={name: value.source for name, value in passed.items()},
    )
    record.save()
    try:
        executor = make_executor(job, folder, after)
        with outside_of_jobs(), with_variables(passed):
            if job.cluster.array > 1 and job.cluster.scheduler == "slurm":
                started = executor.map_array(run_task, [str(folder)] * job.cluster.array)
            else:
                started = [executor.submit(run_task, str(folder)) for _ in range(job.cluster.array)]
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        shutil.rmtree(folder)
        raise UserError(f"sbatch refused the job: {last_line(str(error))}") from error
    record = dataclasses.replace(record, ids=tuple(job.job_id for job in started))
    record.save()
    return record


def passed_variables(cluster: ClusterConfig) -> dict[str, FromEnvironment]:
    """Return the variables of a job that come from the environment; sbatch gets them there, no file holds them."""
    return {name: value for name, value in cluster.environment.items() if isinstance(value, FromEnvironment)}


def make_executor(job: PlannedJob, folder: Path, after: tuple[str, ...] = ()) -> submitit.Executor:
    """Return submitit's executor for a job."""
    cluster, passed = job.cluster, passed_variables(job.cluster)
    setup = [
        *cluster.setup,
        f"export PYTHONPATH={shlex.quote(str(folder / CODE))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",  # else code in the current folder would be imported first
        *(f"export {key}={shlex.quote(value)}" for key, value in cluster.environment.items() if key not in passed),
    ]
    if cluster.scheduler == "local":
        local = submitit.LocalExecutor(folder, python=cluster.python)
        local.update_parameters(
            timeout_min=cluster.time_min,
            gpus_per_node=cluster.gpus_per_node,
            tasks_per_node=cluster.tasks,
            setup=setup,
            signal_delay_s=cluster.stop_before_end_s,
        )
        return local
    executor = submitit.SlurmExecutor(folder, max_num_timeout=NEVER, python=cluster.python)
    more = {"requeue": True, "chdir": job.cwd, **cluster.sbatch}
    optional = {name: getattr(cluster, name) for name in ("partition", "account", "qos", "constraint", "exclude")}
    optional |= {"gpus_per_node": cluster.gpus_per_node or None, "exclusive": cluster.exclusive or None}
    if cluster.mem_gb is not None:
        optional["mem"] = f"{int(1024 * cluster.mem_gb)}M" if cluster.mem_gb else "0"
    if after:
        numbers = ":".join(dict.fromkeys(job_id.split("_")[0] for job_id in after))
        optional["dependency"] = f"afterok:{numbers}"
        more["kill-on-invalid-dep"] = "yes"  # else it would wait forever for a job that failed
    executor.update_parameters(
        job_name=f"flowar-{job.verb}",
        comment=str(folder),  # `flowar status` finds the folder of a live job by it
        time=cluster.time_min,
        nodes=cluster.nodes,
        ntasks_per_node=cluster.tasks,
        cpus_per_task=cluster.cpus_per_task,
        signal_delay_s=cluster.stop_before_end_s,
        setup=[*first_lines(folder, passed), *setup],
        # Neighbouring ranks on one socket, near their GPUs; and no task is killed because another one has finished.
        srun_args=[*SRUN, f"--cpus-per-task={cluster.cpus_per_task}", *cluster.srun],
        teardown=last_lines(folder, cluster.max_restarts),
        additional_parameters=more,
        **{key: value for key, value in optional.items() if value is not None},
    )
    return executor


def batch_script(job: PlannedJob, folder: Path) -> str:
    """Return the script that sbatch would get."""
    if job.cluster.scheduler == "local":
        return "none: scheduler=local starts processes on this machine"
    executor = make_executor(job, folder)
    assert isinstance(executor, submitit.SlurmExecutor)
    if job.cluster.array > 1:
        executor.parameters["map_count"] = job.cluster.array
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def check(job: PlannedJob, *, alone: bool) -> None:
    """Raise a UserError if the job can't run: wrong settings, no scheduler, a live job in the same folder."""
    cluster = job.cluster
    if cluster.scheduler == "local":
        if cluster.nodes != 1:
            raise UserError(f"cluster.nodes={cluster.nodes}, but scheduler=local has only this machine; set it to 1")
        if not alone:
            raise UserError("a pipeline needs scheduler=slurm; with scheduler=local run its steps one by one")
    elif shutil.which("sbatch") is None:
        raise UserError(
            "there is no Slurm on this machine (no sbatch on PATH); submit from a login node, or use "
            "--cluster configs/cluster/local.yaml"
        )
    if cluster.array > 1 and not VERBS[job.verb].shares_work:
        sharing = ", ".join(name for name, verb in VERBS.items() if verb.shares_work)
        raise UserError(
            f"cluster.array={cluster.array}, but {job.verb} can't share its work between jobs, only {sharing} can; set "
            "cluster.array=1"
        )
    if job.verb == "check" and cluster.nodes * cluster.tasks > 1:
        raise UserError(
            f"`flowar {job.verb}` runs in one process, not in {cluster.nodes} x {cluster.tasks}; set cluster.nodes=1 "
            "cluster.tasks_per_node=1"
        )
    if cluster.scheduler == "slurm":
        check_passed(passed_variables(cluster), cluster.sbatch)
        check_path(job.jobs.absolute(), "a job's folder", r"%\\")
        check_path(Path(job.cwd), "the folder of submission", r"\\")
    if "time" in cluster.sbatch:
        raise UserError(f"cluster.sbatch.time={cluster.sbatch['time']} is not supported; set cluster.time_min instead")
    for other in find_jobs(job.jobs):
        if other.verb == job.verb and is_live(other):
            raise UserError(
                f"{job.jobs} is in use by job {', '.join(other.ids)} ({other.verb}); wait for it, or cancel it with "
                f"`flowar cancel {job.jobs.parent}`"
            )
    if job.verb == "train":
        try:
            with contextlib.chdir(job.cwd):  # where its relative paths start
                check_training(job.config, cluster.nodes * cluster.tasks, has_data=alone)
        except OSError as error:
            raise UserError(
                f"can't enter the folder of submission {job.cwd}: {error.strerror}; restore it, or submit a new job"
            ) from error
    if cluster.scheduler == "slurm":
        check_by_slurm(job)


def check_path(path: Path, what: str, forbidden: str) -> None:
    """Raise a UserError if Slurm would interpret some characters of a path.

    %j in the name of a log is the job's number, and a backslash is an escape, or is lost.
    """
    found = re.search(rf"[{forbidden}\x00-\x1f]", str(path))
    if found:
        raise UserError(f"{what} would be {str(path)!r}, but Slurm can't handle {found[0]!r} in it; give another path")


def check_training(config: TrainConfig, num_tasks: int, *, has_data: bool) -> None:
    """Check what a training run would refuse at its start, for its number of tasks."""
    import torch  # takes seconds, and other verbs don't need it

    from flowar.base.distributed import World
    from flowar.training.setup import plan_run, split_batch

    if has_data:
        plan_run(config, World(0, num_tasks, torch.device("cpu"), None))
    else:  # the dataset is still to be prepared
        split_batch(config.batch_size, config.micro_batch_size, num_tasks)


def check_by_slurm(job: PlannedJob) -> None:
    """Let Slurm check the batch script without running it, and check the account against the partition's list.

    Slurm itself checks accounts only if it has an accounting database.
    """
    cluster = job.cluster
    if cluster.partition and cluster.account:
        answer = subprocess.run(["scontrol", "show", "partition", cluster.partition], capture_output=True, text=True)
        allowed = re.search(r"AllowAccounts=(\S+)", answer.stdout)
        if allowed and allowed[1] != "ALL" and cluster.account not in allowed[1].split(","):
            raise UserError(
                f"cluster.account={cluster.account} may not use cluster.partition={cluster.partition}; use one of its "
                f"accounts, {allowed[1]}, or another partition"
            )
    script = batch_script(job, job.jobs.absolute() / "dry-run")
    with outside_of_jobs():
        answer = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    if answer.returncode:
        hint = ""
        if "partition" in answer.stderr:
            names = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True).stdout.split()
            hint = f" (cluster.partition={job.cluster.partition}; the partitions are {', '.join(names)})"
        raise UserError(f"Slurm refuses the {job.verb} job: {last_line(answer.stderr)}{hint}")


def last_line(text: str) -> str:
    """Return Slurm's complaint without its prefixes."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"^(sbatch|allocation failure|error)\W+(error:)?\s*", "", lines[-1] if lines else "no reason given")


def copy_code(again: Job | None, folder: Path) -> str:
    """Copy the code that will run into the job's folder; return its git commit, or version.

    The copy is the code that this process runs, with all uncommitted changes; these are also kept as diff.patch.
    """
    root = again.folder / CODE if again else Path(flowar.__file__).parents[1]
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for package in PACKAGES:
        shutil.copytree(root / package, folder / CODE / package, ignore=ignore)
    if again is not None:
        for name in ("code.json", "diff.patch"):
            if (again.folder / name).is_file():
                shutil.copy(again.folder / name, folder / name)
        return again.code
    commit = git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    changes = git(root, "diff", "HEAD", "--", *PACKAGES) if commit else None
    untracked = git(root, "ls-files", "--others", "--exclude-standard", "--", *PACKAGES) if commit else None
    code = f"{commit.strip()[:12]}{' + changes' if changes or untracked else ''}" if commit else "no git"
    if changes:
        write_text(folder / "diff.patch", changes)
    record = {
        "code": code,
        "commit": commit and commit.strip(),
        "untracked": (untracked or "").split(),
        "from": str(root),
    }
    write_text(folder / "code.json", json.dumps(record, indent=2) + "\n")
    return code


def git(root: Path, *words: str) -> str | None:
    """Return git's answer, or None if git fails or isn't installed."""
    try:
        answer = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return answer.stdout if answer.returncode == 0 else None
