"""The command lines of `flowar submit` and `flowar resume`. Read next: submit.py, follow.py."""

import argparse
import tempfile
from pathlib import Path

from cluster.follow import follow
from cluster.job import JOB_CONFIG_FILE
from cluster.status import find_jobs, is_finished, newest_job
from cluster.submit import (
    PIPELINE,
    SUBMITTED_VERBS,
    PlannedJob,
    plan_job,
    plan_pipeline,
    stamp_of,
    submit,
)
from flowar.base.errors import UserError
from flowar.cli import VERBS, parse_options
from flowar.config.jobs import ClusterConfig
from flowar.config.load import as_word, describe_config, did_you_mean, load_config, load_described


def submit_command(words: list[str]) -> None:
    """Read the command line of `flowar submit` and submit."""
    parser = argparse.ArgumentParser(
        prog="flowar submit",
        usage="flowar submit VERB [CONFIG.yaml] [key=value ...] --cluster FILE [cluster.key=value ...] [--dry-run]",
        description=f"VERB is one of {', '.join(SUBMITTED_VERBS)}, or pipeline: a chain of {', '.join(PIPELINE)}",
        epilog="example:\n  flowar submit train configs/train/flowar_l.yaml run_dir=runs/l data.path=/data/in256 "
        "--cluster configs/cluster/h100.yaml cluster.nodes=4\n\nsettings of a cluster and their defaults:\n\n"
        + "\n".join(f"  {line}" for line in describe_config(ClusterConfig).splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb")
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml, key=value")
    parser.add_argument("--cluster", metavar="FILE", required=True, help="YAML file, see configs/cluster")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the batch script, submit nothing"
    )
    parser.add_argument(
        "--follow", metavar="RUN_DIR", type=Path, help="evaluate each new checkpoint of this training run"
    )
    parser.add_argument("--once", action="store_true", help="with --follow: look once and exit, for cron")
    schema = next((VERBS[word].schema for word in words if word in VERBS), None)
    options = parse_options(parser, words, schema)
    if options.verb == "evaluate" and options.words[:1] == ["make-reference"]:
        options.verb = options.words.pop(0)
    if options.follow is not None:
        if options.verb != "evaluate":
            raise UserError(f"--follow works with `flowar submit evaluate`, not with {options.verb}; use evaluate")
        follow(options.follow, options.words, options.cluster, once=options.once, dry_run=options.dry_run)
    elif options.verb == "pipeline":
        run_dir, jobs = plan_pipeline(options.words, options.cluster)
        submit(jobs, dry_run=options.dry_run, listed_in=run_dir)
    elif options.verb in SUBMITTED_VERBS:
        submit([plan_job(options.verb, options.words, options.cluster)], dry_run=options.dry_run)
    else:
        known = (*SUBMITTED_VERBS, "pipeline")
        raise UserError(f"{options.verb!r} can't be submitted as a job{did_you_mean(options.verb, known)}")


def resume_command(words: list[str]) -> None:
    """Submit a run's latest job again, with the code that it ran; for a pipeline, all unfinished jobs."""
    parser = argparse.ArgumentParser(prog="flowar resume", description=resume_command.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("words", nargs="*", metavar="key=value", help="cluster settings to change, for example nodes=6")
    parser.add_argument("--dry-run", action="store_true")
    options = parse_options(parser, words, ClusterConfig)
    newest = newest_job(options.run_dir)
    chain = [job for job in find_jobs(options.run_dir) if job.folder.name.endswith(stamp_of(newest))]
    unfinished = [job for job in chain if not is_finished(job)]
    if not unfinished:
        more = "; to train longer, submit it again with more epochs" if newest.verb == "train" else ""
        raise UserError(f"{options.run_dir}: {newest.verb} is finished, so there is nothing to resume{more}")
    planned = []
    for before in unfinished:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(describe_config(before.cluster))
            file.flush()
            passed = (as_word(f"environment.{name}", source) for name, source in before.passed.items())
            cluster = load_config(ClusterConfig, file.name, (*passed, *options.words))
        config = load_described(VERBS[before.verb].schema, before.folder / JOB_CONFIG_FILE)
        planned.append(PlannedJob(before.verb, config, cluster, before.folder.parent, again=before))
    submit(planned, dry_run=options.dry_run, listed_in=options.run_dir if len(chain) > 1 else None)
