"""Runs whose folder was changed, which are run again with other settings, or end in other ways than by finishing."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest

from flowar import train
from flowar.base.distributed import StopSignals
from flowar.base.errors import EXIT_AGAIN, EXIT_INTERRUPTED, UserError
from flowar.base.run_folder import find_latest
from flowar.config.load import load_described
from flowar.config.training import OptimConfig, ParallelConfig, TrainConfig
from flowar.models import folders
from flowar.models.build import create_model
from flowar.training.report import read_metrics
from tests.conftest import MORE, flip_bit, tiny_config, training
from tests.processes import PATIENCE_S, fork_context, join, start


@pytest.fixture
def finished(trained, tmp_path):
    """The settings of a run of 6 steps, in a folder of its own."""
    config = load_described(TrainConfig, trained / "config.yaml")
    return dataclasses.replace(config, run_dir=str(shutil.copytree(trained, tmp_path / "run")))


def history(config):
    return [json.loads(line) for line in (Path(config.run_dir) / "history.jsonl").read_text().splitlines()]


def test_a_finished_run_keeps_the_settings_that_it_was_trained_with(finished):
    before = (Path(finished.run_dir) / "config.yaml").read_text()
    train.main(dataclasses.replace(finished, optim=OptimConfig(lr=5e-4, warmup_epochs=1)))
    assert (Path(finished.run_dir) / "config.yaml").read_text() == before
    assert [(start["after_step"], start["settings"]["optim"]["lr"]) for start in history(finished)] == [(0, 1e-3)]


def test_a_run_is_trained_on_along_a_longer_schedule(finished, capsys):
    longer = dataclasses.replace(finished, epochs=4, optim=OptimConfig(lr=5e-4, warmup_epochs=1), log_every_steps=1)
    train.main(longer)
    printed = capsys.readouterr().out
    said = r"epochs was 2(\.0)?, now 4(\.0)?: 6 steps become 12; the cosine of the learning rate now ends there"
    assert re.search(said, printed)
    assert "after step 6 the rate is 0.000378, not 1e-05" in printed
    assert [(start["after_step"], start["settings"]["optim"]["lr"]) for start in history(finished)] == [
        (0, 1e-3),
        (6, 5e-4),
    ]
    assert load_described(TrainConfig, Path(finished.run_dir) / "config.yaml") == longer
    by_step = {record["step"]: record["lr"] for record in read_metrics(finished.run_dir)}
    third = 1e-5 + (5e-4 - 1e-5) * 0.75  # of the cosine: 3 of the 9 steps after the warm-up are done
    assert by_step[7] == pytest.approx(third) and find_latest(finished.run_dir).name == "step_00000012"


def test_a_run_is_not_cut_to_fewer_steps_than_it_has(finished):
    with pytest.raises(UserError, match=r"epochs=1 is 3 steps, but run_dir=.* has trained 6; give at least epochs=2"):
        train.main(dataclasses.replace(finished, epochs=1))


def test_a_run_whose_settings_are_lost_is_not_resumed_with_others(finished):
    (Path(finished.run_dir) / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"has step_00000006, but no config.yaml with the settings it was trained with"):
        train.main(dataclasses.replace(finished, seed=7, epochs=4))


def test_a_config_that_is_cut_anywhere_is_not_taken_for_one_of_0_1(finished):
    file = Path(finished.run_dir) / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    for number in range(1, len(lines)):
        file.write_text("".join(lines[:number]))
        with pytest.raises(UserError, match="config.yaml is damaged"):
            load_described(TrainConfig, file)


def test_a_checkpoint_that_cant_be_set_aside_is_named(finished):
    flip_bit(Path(finished.run_dir) / "checkpoints" / "step_00000006" / "__0_0.distcp", 5_000)
    (Path(finished.run_dir) / "damaged").write_text("a file")
    with pytest.raises(UserError, match=r"step_00000006 is damaged and can't be moved"):
        train.main(dataclasses.replace(finished, epochs=4))


def test_a_step_beyond_all_numbers_is_damage(finished):
    file = Path(finished.run_dir) / "checkpoints" / "step_00000006" / "state.json"
    file.write_text(file.read_text().replace('"step": 6', '"step": 1e345'))
    assert find_latest(finished.run_dir).name == "step_00000004"


@pytest.mark.parametrize(
    "content",
    ["{}", '{"token": "a"', *(pytest.param(text, marks=MORE) for text in ("", "[]", '{"token": "a", "xxh3": "0"}'))],
)
def test_a_damaged_owner_is_named(finished, content):
    (Path(finished.run_dir) / "owner.json").write_text(content)
    with pytest.raises(UserError, match=r"owner.json is damaged .*if no process is training there, delete it"):
        train.main(dataclasses.replace(finished, epochs=3))


def test_a_damaged_line_of_metrics_is_named(finished):
    file = Path(finished.run_dir) / "metrics.jsonl"
    file.write_text('{"step": 5, "lo\n' + file.read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged in line 1 \(.*\); remove that line"):
        train.main(dataclasses.replace(finished, epochs=3))


def train_and_interrupt(config, step, times):
    """Train; press Ctrl-C so often while a step is computed."""
    accumulate = train.accumulate

    def accumulate_and_press(engine, inputs, settings):
        if inputs.number == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return accumulate(engine, inputs, settings)

    train.accumulate = accumulate_and_press
    train.main(config)


@pytest.mark.parametrize(
    ("times", "code", "latest", "said"),
    [
        (1, EXIT_AGAIN, "step_00000007", "stopped by SIGINT after step 7, saved; run the same command to resume"),
        (2, EXIT_INTERRUPTED, "step_00000006", "stopped without saving; the same command resumes from"),
    ],
)
def test_ctrl_c_saves_and_a_second_one_ends_at_once(finished, tmp_path, times, code, latest, said):
    config = dataclasses.replace(finished, epochs=4, save_every_steps=1000)
    (Path(finished.run_dir) / "owner.json").unlink()  # this process, which lives
    log = tmp_path / "log"
    join([start(train_and_interrupt, config, 7, times, log=log)], log, code=code)
    assert find_latest(config.run_dir).name == latest
    assert said in log.read_text() and "Ctrl-C again ends at once, without saving" in log.read_text()


def test_ctrl_c_that_torchrun_hands_on_too_is_one(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with StopSignals() as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.asked == signal.SIGINT


def train_where_files_stay_small(config, most_bytes):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    train.main(config)


def test_a_full_disk_is_told_in_the_words_of_the_system(shards, tmp_path):
    """A real write error, under FSDP, whose writer has an error of its own for it."""
    config = training(shards, tmp_path / "run", parallel=ParallelConfig(engine="fsdp"))
    log = tmp_path / "log"
    join([start(train_where_files_stay_small, config, 20_000, log=log)], log, code=1)
    assert "can't save checkpoint" in log.read_text() and "File too large" in log.read_text()


def test_a_full_disk_stops_the_report_with_a_message(shards, tmp_path):
    config = training(shards, tmp_path / "run", log_every_steps=1, save_every_steps=1000)
    log = tmp_path / "log"
    join([start(train_where_files_stay_small, config, 3_000, log=log)], log, code=1)
    assert "UserError: can't write to" in log.read_text() and "metrics.jsonl: File too large" in log.read_text()


@pytest.mark.slow
def test_of_two_runs_begun_in_one_folder_one_goes_on_and_it_has_its_own_settings(shards, tmp_path):
    configs = [training(shards, tmp_path / "run", seed=seed, epochs=3, log_every_steps=1) for seed in (1, 2)]
    logs = [tmp_path / f"log{seed}" for seed in (1, 2)]
    both = [start(train.main, config, log=log) for config, log in zip(configs, logs, strict=True)]
    for process in both:
        process.join()
    assert sorted(process.exitcode for process in both) == [0, 1]
    winner, loser = (0, 1) if both[0].exitcode == 0 else (1, 0)
    assert load_described(TrainConfig, tmp_path / "run" / "config.yaml") == configs[winner]
    assert {start["settings"]["seed"] for start in history(configs[winner])} == {configs[winner].seed}
    said = logs[loser].read_text()
    assert "is in use by process" in said or "was taken over by process" in said or "holds another run" in said


def save_and_wait(folder, written, go):
    """Write a model folder, and wait in the middle."""
    save_model = folders.save_model

    def save_model_and_wait(*arguments):
        save_model(*arguments)
        written.set()
        go.wait(PATIENCE_S)

    folders.save_model = save_model_and_wait
    folders.save_model_whole(tiny_config(), create_model(tiny_config()).state_dict(), folder)


def test_two_exports_to_one_folder_do_not_mix(tmp_path):
    written, go = fork_context().Event(), fork_context().Event()
    first = start(save_and_wait, tmp_path / "model", written, go, log=tmp_path / "log")
    assert written.wait(PATIENCE_S)
    try:
        with pytest.raises(UserError, match="another process is writing"):
            folders.save_model_whole(tiny_config(), create_model(tiny_config()).state_dict(), tmp_path / "model")
    finally:
        go.set()
    join([first], tmp_path / "log")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"README.md", "config.json", "model.safetensors"}
