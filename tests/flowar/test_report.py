import pytest

from flowar.config import WandbConfig
from flowar.report import TrainingReport, read_metrics


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


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
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
    assert all(run_id in folder.name for folder in runs)  # wandb adds a number if both began in one second
