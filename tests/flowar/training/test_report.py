import dataclasses
import json
import time

import pytest
from PIL import Image

from flowar.base.errors import UserError
from flowar.config.data import DataConfig
from flowar.config.load import describe_config
from flowar.config.training import TrainConfig, WandbConfig
from flowar.training.report import TrainingReport, read_metrics, record_evaluation, record_export, take_evaluations
from tests.conftest import read_evaluations


def record(step):
    return {"step": step, "loss": 1.0, "loss/scale_1": 0.5, "images_per_s": 10.0, "remaining_s": 60.0}


def report(run_dir, first_step, **wandb):
    return TrainingReport(run_dir, WandbConfig(**wandb), {}, step=first_step, num_steps=100, is_main=True)


def test_records_past_the_checkpoint_are_dropped_on_resuming(tmp_path):
    with report(tmp_path, 0) as first:
        for step in (10, 20, 30):
            first.log(record(step))
    with report(tmp_path, 20) as second:
        second.log(record(30))
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [10, 20, 30]


def test_a_truncated_line_is_dropped(tmp_path):
    with report(tmp_path, 0) as first:
        first.log(record(10))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    with report(tmp_path, 50):
        pass
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [10]


@pytest.mark.slow
def test_wandb_offline_keeps_its_run_id_over_restarts(tmp_path):
    for first_step in (0, 10):
        with report(tmp_path, first_step, mode="offline") as run:
            run.log(record(first_step + 10))
            assert run.wandb_run.id == (tmp_path / "wandb_id.txt").read_text().strip()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert all(run_id in folder.name for folder in runs)  # wandb adds a number if both started in the same second


BLOCK, RECORD_HEADER, FILE_HEADER = 32768, 7, 7  # of LevelDB's log format, which wandb's offline files have


def offline_records(run_dir):
    """Return the values in wandb's offline files, as `wandb sync` would send them."""
    found = []
    for record in sent_offline(run_dir):
        items = record.history.item
        found.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return found


def sent_offline(run_dir):
    """Return the records in wandb's offline files."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        content, place, message = file.read_bytes(), FILE_HEADER, b""
        while place + RECORD_HEADER <= len(content):
            if BLOCK - place % BLOCK < RECORD_HEADER:
                place += BLOCK - place % BLOCK
            length = int.from_bytes(content[place + 4 : place + 6], "little")
            kind = content[place + 6]  # 1 whole, 2 first, 3 middle, 4 last
            message += content[place + RECORD_HEADER : place + RECORD_HEADER + length]
            place += RECORD_HEADER + length
            if kind in (1, 4):
                found.append(wandb_internal_pb2.Record.FromString(message))
                message = b""
    return found


@pytest.mark.slow
def test_evaluations_reach_wandb_at_the_step_of_their_checkpoint(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path), wandb=WandbConfig(mode="offline"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="none"))
    (tmp_path / "config.yaml").write_text(describe_config(config))
    with report(tmp_path, 0, mode="offline") as training:
        training.log(record(10))
        for step in (5, 10):  # by another process, which only records it
            record_evaluation(tmp_path, {"step": step, "num_samples": 10_000, "fid": 7.5})
        training.log(record(20))
        training.log(record(30))
    record_evaluation(tmp_path, {"step": 20, "num_samples": 10_000, "fid": 6.5})  # training has ended
    record_evaluation(tmp_path, {"step": 20, "num_samples": 10_000, "fid": 6.5})  # the same again is the same
    assert [own["fid"] for own in read_evaluations(tmp_path)] == [7.5, 7.5, 6.5]
    sent = [own for own in offline_records(tmp_path) if "evaluation/fid_10k" in own]
    assert [(own["evaluation/step"], own["evaluation/fid_10k"]) for own in sent] == [(5, 7.5), (10, 7.5), (20, 6.5)]
    assert [own["_step"] for own in offline_records(tmp_path) if "loss" in own] == [10, 20, 30]  # none is lost


@pytest.mark.slow
def test_previews_are_a_table_and_exports_artifacts_of_the_wandb_run(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path), wandb=WandbConfig(mode="offline"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="none"))
    (tmp_path / "config.yaml").write_text(describe_config(config))
    (tmp_path / "previews").mkdir()
    for name in ("step_00000010", "step_00000010_raw"):
        Image.new("RGB", (4, 4)).save(tmp_path / "previews" / f"{name}.png")
    with report(tmp_path, 0, mode="offline") as training:
        training.log(record(10))
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/previews_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "weights", "images"]
    assert [row[:2] for row in content["data"]] == [[10, "averaged"], [10, "raw"]]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    record_export(tmp_path, tmp_path / "model", 10, "ema")
    while sum(sent.HasField("exit") for sent in sent_offline(tmp_path)) < 2:  # wandb's own process writes them
        time.sleep(0.1)
    (artifact,) = (sent.artifact for sent in sent_offline(tmp_path) if sent.artifact.type == "model")
    assert {"step_00000010", "ema"} <= set(artifact.aliases)
    assert [entry.path for entry in artifact.manifest.contents] == ["config.json"]
    summary = {
        "/".join(item.nested_key) or item.key: item.value_json
        for sent in sent_offline(tmp_path)
        for item in sent.summary.update
    }
    assert summary["final/step"] == "10"


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1.0}', "\x00", '{"step": 1, "loss"'])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path, line):
    good = json.dumps(record(5))
    (tmp_path / "metrics.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged in line 2 \(.*; remove that line"):
        read_metrics(tmp_path)


class WandbRun:
    """Records which metrics have their own steps."""

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("evaluation/*", "evaluation/step")


def test_a_damaged_evaluation_is_named_and_does_not_stop_training(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(describe_config(TrainConfig(run_dir="r", data=DataConfig(path="d"))))
    for step in (10, 20):
        record_evaluation(tmp_path, {"step": step, "num_samples": 100, "fid": 7.5})
    first, _ = sorted((tmp_path / "evaluations").glob("step_*.json"))
    first.write_text(first.read_text().replace("7.5", "1.5"))
    sent = take_evaluations(WandbRun(), tmp_path)
    assert [values["evaluation/step"] for values in sent] == [20]
    assert f"not sent to wandb: {first} is damaged" in capsys.readouterr().out
