import json
import resource
import signal
import subprocess
import sys
import threading

import pytest
import torch

from flowar.base.distributed import World
from flowar.base.errors import UserError
from flowar.base.files import publish_folder
from flowar.base.run_folder import CHECKPOINTS, Progress, find_latest, list_checkpoints
from flowar.config.data import DataConfig
from flowar.config.training import EMAConfig, ParallelConfig, TrainConfig
from flowar.latents.schema import read_passport
from flowar.models.build import create_model
from flowar.models.folders import load_model
from flowar.training.averages import EMA
from flowar.training.checkpoint import (
    CheckpointContents,
    Checkpoints,
    Kept,
    remove_unfinished,
    restore,
    whole_state,
)
from flowar.training.engine import EngineSettings
from flowar.training.owner import take_over
from flowar.training.setup import make_engine
from tests.conftest import randomise, tiny_config
from tests.processes import PATIENCE_S, join, start

ALONE = World(0, 1, torch.device("cpu"), None)


def make_parts(seed=0, steps=1, **changes):
    """An engine and averages after some steps."""
    config = TrainConfig(
        run_dir="none",
        data=DataConfig(path="none"),
        model=tiny_config(**changes),
        ema=EMAConfig(decays=(0.9,), stds=(0.1,)),
        parallel=ParallelConfig(engine="single"),
    )
    settings = EngineSettings(config.parallel, config.optim, config.precision, micro_batch_size=1, num_parts=1)
    engine = make_engine(settings, randomise(create_model(config.model), seed), ALONE)
    ema = EMA(config.ema, engine.local_weights())
    for step in range(1, steps + 1):
        for parameter in engine.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        norm = engine.norm_share().sqrt()
        engine.clip(norm)
        engine.step(1e-3, norm.item())
        ema.update(engine.local_weights(), step)
    return engine, ema


def save(run_dir, step, parts, shards, keep=2, keep_every_steps=0):
    engine, ema = parts
    contents = CheckpointContents(engine.model.config, read_passport(shards))
    checkpoints = Checkpoints(take_over(run_dir), ALONE, contents, CHECKPOINTS, Kept(keep, keep_every_steps))
    checkpoints.save(whole_state(engine, ema), Progress(step=step, updates=step, averages=tuple(ema.averages)))
    checkpoints.wait()
    return find_latest(run_dir)


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def test_a_checkpoint_brings_everything_back(run_dir, shards):
    engine, ema = make_parts(steps=3)
    folder = save(run_dir, 7, (engine, ema), shards)
    other, other_ema = make_parts(seed=1)
    assert restore(other, other_ema, folder) == Progress(step=7, updates=7, averages=("decay_0.9", "std_0.1"))
    for name, parameter in engine.parameters.items():
        assert torch.equal(parameter, other.parameters[name])
        mine, theirs = engine.optimizer.moments[name], other.optimizer.moments[name]
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"]) and torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])
    assert other.optimizer.steps == 7
    for name, average in ema.averages.items():
        assert all(torch.equal(average[key], other_ema.averages[name][key]) for key in average)


def test_saving_does_not_wait_and_keeps_the_values_of_its_moment(run_dir, shards):
    engine, ema = make_parts()
    contents = CheckpointContents(engine.model.config, read_passport(shards))
    checkpoints = Checkpoints(take_over(run_dir), ALONE, contents, CHECKPOINTS)
    needed = engine.model.ar.input_norm.weight.detach().clone()
    checkpoints.save(whole_state(engine, ema), Progress(step=1, averages=tuple(ema.averages)))
    assert find_latest(run_dir) is None
    with torch.no_grad():
        engine.model.ar.input_norm.weight.add_(1)
    checkpoints.wait()
    assert torch.equal(load_model(run_dir, "raw").ar.input_norm.weight, needed)


def test_publishing_a_checkpoint_and_deleting_old_ones_do_not_stall_training(run_dir, shards, monkeypatch):
    engine, ema = make_parts()
    save(run_dir, 1, (engine, ema), shards)
    contents = CheckpointContents(engine.model.config, read_passport(shards))
    checkpoints = Checkpoints(take_over(run_dir), ALONE, contents, CHECKPOINTS, Kept(1))
    begun, may_end = threading.Event(), threading.Event()

    def publish_slowly(hidden, folder):
        begun.set()
        assert may_end.wait(PATIENCE_S)
        publish_folder(hidden, folder)

    monkeypatch.setattr("flowar.training.checkpoint.publish_folder", publish_slowly)
    checkpoints.save(whole_state(engine, ema), Progress(step=2, averages=tuple(ema.averages)))
    assert begun.wait(PATIENCE_S)
    checkpoints.check()
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000001"]
    may_end.set()
    checkpoints.wait()
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000002"]


def test_all_weights_load_as_models_from_the_run(run_dir, shards):
    engine, ema = make_parts()
    folder = save(run_dir, 7, (engine, ema), shards)
    name = "ar.input_norm.weight"
    assert torch.equal(load_model(run_dir, "raw").ar.input_norm.weight, engine.parameters[name])
    assert torch.equal(load_model(run_dir).ar.input_norm.weight, ema.averages["decay_0.9"][name])
    assert torch.equal(load_model(folder, "std_0.1").ar.input_norm.weight, ema.averages["std_0.1"][name])
    assert json.loads((folder / "dataset.json").read_text())["vae_name"] == "demo"
    with pytest.raises(UserError, match=r"has no weights=decay_0.5; it has raw, decay_0.9, std_0.1"):
        load_model(run_dir, "decay_0.5")


def test_torchs_own_tool_reads_a_checkpoint(run_dir, shards, tmp_path):
    engine, ema = make_parts()
    folder = save(run_dir, 7, (engine, ema), shards)
    command = ["-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", str(folder), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, parameter in engine.parameters.items():
        assert torch.equal(found[f"model.{name}"], parameter)


def test_only_the_newest_are_kept_and_some_for_good(run_dir, shards):
    parts = make_parts()
    for step in (5, 10, 15, 20, 25, 30):
        save(run_dir, step, parts, shards, keep_every_steps=10)
    kept = [folder.name for folder in list_checkpoints(run_dir)]
    assert kept == ["step_00000010", "step_00000020", "step_00000025", "step_00000030"]
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_the_newest_is_found_by_what_it_holds_and_not_by_its_name(run_dir, shards):
    save(run_dir, 5, make_parts(), shards)
    save(run_dir, 20, make_parts(), shards)
    folder = run_dir / "checkpoints"
    (folder / "step_00000020").rename(folder / "best so far")
    (folder / "step_00000099").mkdir()  # holds nothing
    assert find_latest(run_dir).name == "best so far"


def test_unfinished_checkpoints_are_invisible_and_removed(run_dir, shards):
    save(run_dir, 5, make_parts(), shards)
    unfinished = run_dir / "checkpoints" / ".step_00000009"
    unfinished.mkdir()
    for name in ("state.json", ".metadata"):
        (unfinished / name).write_text("{}")
    assert find_latest(run_dir).name == "step_00000005"
    remove_unfinished(run_dir)
    assert not unfinished.exists() and find_latest(run_dir) is not None


def test_a_run_without_checkpoint_says_so(run_dir):
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        load_model(run_dir)


def test_a_damaged_checkpoint_is_an_error_that_names_it(run_dir, shards):
    folder = save(run_dir, 5, make_parts(), shards)
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoint .*step_00000005 is damaged: bytes .* of __0_0.distcp are not"):
        load_model(run_dir)


def save_where_files_stay_small(run_dir, step, shards, most_bytes):
    if most_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    save(run_dir, step, make_parts(), shards)


@pytest.mark.slow
def test_a_full_disk_stops_with_a_message_and_leaves_the_older_checkpoint_intact(run_dir, shards):
    """A real write error: the second process may write files of 20 kB at most."""
    for step, most_bytes, code in ((5, 0, 0), (6, 20_000, 1)):
        log = run_dir / f"log{step}"
        join([start(save_where_files_stay_small, run_dir, step, shards, most_bytes, log=log)], log, code=code)
    found = log.read_text()
    assert "can't save checkpoint" in found and "older checkpoints are intact" in found
    assert find_latest(run_dir).name == "step_00000005"
    assert restore(*make_parts(), find_latest(run_dir)).step == 5
