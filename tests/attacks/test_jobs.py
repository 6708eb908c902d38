"""Jobs' records that were damaged or made by somebody else, and runs that no scheduler started."""

import dataclasses
import json
import random
import shutil

import pytest

from cluster.commands import resume_command
from cluster.commands import submit_command as submit
from cluster.job import Job
from cluster.status import cancel, find_jobs, logs, status
from flowar.base.errors import UserError
from flowar.base.records import read_record, write_record
from flowar.base.run_folder import find_latest, list_checkpoints
from flowar.config.jobs import ClusterConfig, DoctorConfig
from flowar.config.load import describe_config
from flowar.training.owner import take_over
from flowar.training.run_state import find_trainer
from tests.conftest import MORE, flip_bit
from tests.processes import PATIENCE_S, fork_context, start, stop, wait_until

SECRET = "not-to-be-seen"
LOCAL = ClusterConfig(scheduler="local", environment={"A": "${oc.env:FLOWAR_SECRET}"})
NUM_CHANGES = 2000


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job that has ended, of a run in a folder of its own."""
    monkeypatch.setenv("FLOWAR_SECRET", SECRET)
    folder = tmp_path / "run" / "jobs" / "doctor-1"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(describe_config(DoctorConfig(run_dir=str(tmp_path / "run"))))
    made = Job("doctor", LOCAL, folder.resolve(), ("7",), 1.5, "no git", str(tmp_path), {"KEY": "${oc.env:KEY}"})
    made.save()
    return made


def edit(**changes):
    """Change values, and leave the hash as it was."""
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_hash(**changes):
    """Change values as somebody would who wants to be believed: without a hash, as version 0.1 wrote it."""

    def attack(file):
        record = {key: value for key, value in json.loads(file.read_text()).items() if key != "xxh3"}
        file.write_text(json.dumps(record | changes))

    return attack


def without(key):
    def attack(file):
        record = json.loads(file.read_text())
        write_record(file, {name: value for name, value in record.items() if name not in (key, "xxh3")})

    return attack


ATTACKS = {
    "half of it": lambda file: file.write_text(file.read_text()[:150]),
    "nothing": lambda file: file.write_text(""),
    "a bit": lambda file: flip_bit(file, 30),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda file: file.write_text("[]"),
    "a number": lambda file: file.write_text("5"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "another number": edit(ids=["8"]),
    "another cluster": edit(cluster={"scheduler": "slurm"}),
    "no verb": without("verb"),
    "no cluster": without("cluster"),
    "an unknown verb": without_hash(verb="doctr"),
    "a verb of another kind": without_hash(verb=["doctor"]),
    "a number for ids": without_hash(ids=7),
    "a list for the cluster": without_hash(cluster=[1]),
    "a wrong cluster": without_hash(cluster={"nodes": "many"}),
    "an impossible cluster": without_hash(cluster={"nodes": 0}),
    "a time of another kind": without_hash(submitted="yesterday"),
}
VERBS_THAT_READ = {
    "status": status,
    "logs": logs,
    "cancel": cancel,
    "resume": resume_command,
    "submit": lambda words: submit(["doctor", f"run_dir={words[0]}", "--cluster", f"{words[0]}.yaml"]),
}


BY_EVERY_VERB = ("half of it", "a list", "another number", "no verb", "a wrong cluster")


@pytest.mark.parametrize(
    ("attack", "verb"),
    [
        pytest.param(attack, verb, marks=() if verb == "status" or attack in BY_EVERY_VERB else MORE)
        for attack in ATTACKS
        for verb in VERBS_THAT_READ
    ],
)
def test_a_damaged_record_of_a_job_is_named_by_every_verb(job, tmp_path, attack, verb):
    (tmp_path / "run.yaml").write_text("scheduler: local\n")
    file = job.folder / "job.json"
    ATTACKS[attack](file)
    with pytest.raises(UserError, match=f"{file} is damaged .*; cancel its job .* remove {job.folder}") as refused:
        VERBS_THAT_READ[verb]([str(tmp_path / "run")])
    assert "\n" not in str(refused.value)


def test_a_record_of_version_0_1_is_read_and_its_texts_are_literal(job):
    file = job.folder / "job.json"
    assert Job.load(job.folder) == job
    record = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("xxh3", "passed")}
    file.write_text(json.dumps(record | {"cluster": record["cluster"] | {"of_another_version": 1}}))
    assert Job.load(job.folder) == dataclasses.replace(job, passed={})
    assert SECRET not in repr(Job.load(job.folder))


@pytest.mark.parametrize("number", [200, pytest.param(NUM_CHANGES, marks=MORE)])
def test_no_single_changed_byte_of_a_record_passes_in_silence(job, number):
    file, rng = job.folder / "job.json", random.Random(0)
    whole, refused = file.read_bytes(), 0
    for _ in range(number):
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        file.write_bytes(content)
        try:
            assert Job.load(job.folder) == job
        except UserError:
            refused += 1
    assert refused > number / 2


def test_a_job_that_the_scheduler_never_got_is_shown_as_such(job, capsys):
    write_record(job.folder / "job.json", read_record(job.folder / "job.json", "") | {"ids": []})
    status([str(job.folder.parents[1])])
    assert "NOT SUBMITTED" in capsys.readouterr().out


def test_a_submission_of_the_same_second_leaves_the_other_ones_job_alone(job, tmp_path, monkeypatch):
    """Both have looked for live jobs before either had one. The clock is held, as no test can hit a second at will."""
    (tmp_path / "local.yaml").write_text("scheduler: local\n")
    monkeypatch.setattr("time.strftime", lambda _: job.folder.name.removeprefix("doctor-"))
    ended = []
    monkeypatch.setattr("cluster.submit.end_job", ended.append)
    with pytest.raises(UserError, match=f"can't write {job.folder}: another submission made it in the same second"):
        submit(["doctor", f"run_dir={tmp_path / 'run'}", "--cluster", str(tmp_path / "local.yaml")])
    assert not ended and Job.load(job.folder) == job


def test_following_a_run_goes_on_where_slurm_is_slow_or_a_disk_is_full(tmp_path, monkeypatch, capsys):
    """The troubles are made up: a Slurm that answers late and a disk that fills at the right look can't be had."""
    (tmp_path / "local.yaml").write_text("scheduler: local\n")
    troubles = [None, UserError("squeue is slow"), OSError(28, "disk full"), OSError(28, "queue full"), None, None]

    def meet(*_):
        if trouble := troubles.pop(0):
            raise trouble
        return not troubles

    monkeypatch.setattr("cluster.follow.look", meet)
    monkeypatch.setattr("cluster.follow.is_over", meet)  # the second, the fourth and the last
    words = ["evaluate", f"evaluate.reference={tmp_path}", "poll_s=0.01", "--follow", str(tmp_path)]
    submit([*words, "--cluster", str(tmp_path / "local.yaml")])
    shown = capsys.readouterr().out
    for trouble in ("squeue is slow", "disk full", "queue full"):
        assert f"{trouble} (looking again in 0.01 s)" in shown


def test_a_config_of_somebody_elses_job_reads_no_variable(job, tmp_path, capsys):
    """Its training folder is looked for when the job is shown."""
    write_record(job.folder / "job.json", read_record(job.folder / "job.json", "") | {"verb": "train"})
    (job.folder / "config.yaml").write_text("run_dir: ${oc.env:FLOWAR_SECRET}\ndata: {path: a}\n")
    run_dir = tmp_path / SECRET
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    (run_dir / "metrics.jsonl").write_text('{"step": 77, "loss": 1, "images_per_s": 1, "remaining_s": 1}\n')
    status([str(job.folder.parents[1])])
    assert " 77 " not in capsys.readouterr().out


@pytest.fixture
def run_dir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def shown(run_dir, capsys):
    capsys.readouterr()
    status([str(run_dir)])
    return " ".join(capsys.readouterr().out.split())


def own_and_wait(run_dir, go):
    take_over(run_dir)
    go.wait(PATIENCE_S)


def test_status_of_a_run_without_a_scheduler_shows_the_run(run_dir, tmp_path, capsys):
    """It has ended; another process takes it over, lives, and dies."""
    text = shown(run_dir, capsys)
    assert "train FINISHED this machine 6 of 6 " in text and "6, 0:0" in text
    assert "draws with its checkpoint of step 6" in text
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    (run_dir / "owner.json").unlink()  # this process's, which lives
    go = fork_context().Event()
    process = start(own_and_wait, run_dir, go, log=tmp_path / "log")
    try:
        wait_until((run_dir / "owner.json").exists, [process], tmp_path / "log")
        assert f"process {process.pid} train RUNNING" in shown(run_dir, capsys)
        with pytest.raises(
            UserError, match=f"no job was submitted for .*; process {process.pid} is training .* save and"
        ):
            resume_command([str(run_dir)])
        cancel([str(run_dir)])
        assert f"`kill {process.pid}` makes it save and stop" in capsys.readouterr().out
    finally:
        stop([process])
    assert f"process {process.pid} train STOPPED" in shown(run_dir, capsys)
    with pytest.raises(UserError, match="no job was submitted for .*; .* the same `flowar train` command resumes"):
        resume_command([str(run_dir)])
    owner = read_record(run_dir / "owner.json", "")
    write_record(run_dir / "owner.json", owner | {"machine": "another one", "host": "far"})
    assert f"process {process.pid} train UNKNOWN far" in shown(run_dir, capsys)


@pytest.mark.parametrize("older", [1, 0])
def test_a_checkpoint_that_is_deleted_while_status_looks_at_it_does_not_count(run_dir, capsys, monkeypatch, older):
    """It is really deleted, just after it was found: the patch is only there to do it at that moment."""
    *others, newest = list_checkpoints(run_dir)
    for checkpoint in others[: len(others) - older]:
        shutil.rmtree(checkpoint)

    def find_and_delete(folder):
        latest = find_latest(folder)
        if latest == newest:
            shutil.rmtree(newest)
        return latest

    monkeypatch.setattr("flowar.training.run_state.find_latest", find_and_delete)
    text = shown(run_dir, capsys)
    assert "train RUNNING this machine" in text
    assert ("its checkpoint of step 4" if older else "no complete checkpoint yet") in text


OWNER_ATTACKS = {
    "half of it": lambda file: file.write_text(file.read_text()[:50]),
    "a list": lambda file: file.write_text("[]"),
    "no machine": without("machine"),
    "no process": without_hash(pid=None),
    "a process of another kind": without_hash(pid="me"),
    "no process's number": without_hash(pid=-5),
    "a start of another kind": without_hash(started="yesterday"),
    "no job": without("job"),
}


@pytest.mark.parametrize(
    "attack", [*list(OWNER_ATTACKS)[:4], *(pytest.param(name, marks=MORE) for name in list(OWNER_ATTACKS)[4:])]
)
def test_a_damaged_owner_of_a_run_is_named(run_dir, attack):
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    OWNER_ATTACKS[attack](run_dir / "owner.json")
    with pytest.raises(UserError, match="owner.json is damaged .*; if no process is training there, delete it"):
        status([str(run_dir)])
    with pytest.raises(UserError, match="owner.json"):
        find_trainer(run_dir)


def test_a_folder_without_jobs_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="no job was submitted for .*; its jobs would be in .*; give the folder"):
        status([str(tmp_path)])
    assert find_jobs(tmp_path) == []


METRICS_ATTACKS = {
    "half a line": '{"step": 5, \n',
    "a list": "[]\n",
    "no loss": '{"step": 5, "images_per_s": 1, "remaining_s": 1}\n',
    "a text for a number": '{"step": 5, "loss": "low", "images_per_s": 1, "remaining_s": 1}\n',
    "for ever": '{"step": 5, "loss": 1, "images_per_s": 1, "remaining_s": Infinity}\n',
    "no text": "\udcff\n",
}


@pytest.mark.parametrize("attack", METRICS_ATTACKS)
def test_damaged_metrics_of_a_run_are_named(run_dir, attack):
    with (run_dir / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(METRICS_ATTACKS[attack])
    with pytest.raises(UserError, match="metrics.jsonl is damaged .*; remove (that line|all other lines)"):
        status([str(run_dir)])


def test_damaged_notes_of_a_job_are_shown_as_they_are(job, capsys):
    """They are for people, and decide nothing."""
    (job.folder / "attempts.jsonl").write_bytes(b'{"job": "7"\xff')
    (job.folder / "failed_7").write_bytes(b"disk \xff full [/x]")
    status([str(job.folder.parents[1])])
    assert "full [/x]" in capsys.readouterr().out
