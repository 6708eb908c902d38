import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_prep.schema import read_passport
from flowar.checkpoint import load_checkpoint, remove_unfinished, save_checkpoint
from flowar.config import OptimConfig
from flowar.ema import EMA
from flowar.errors import UserError
from flowar.optim import make_optimizer
from flowar.run_folder import find_latest, list_checkpoints
from flowar.weights import create_model, load_model
from tests.conftest import randomise, tiny_config


def make_parts(seed=0, **changes):
    model = randomise(create_model(tiny_config(**changes)), seed)
    ema, optimizer = EMA(model, 0.9), make_optimizer(model, OptimConfig())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    ema.update(model)
    return model, ema, optimizer


def save(run_dir, step, parts, shards, keep=2):
    return save_checkpoint(run_dir, step, *parts, passport=read_passport(shards), keep=keep)


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def test_a_checkpoint_brings_everything_back(run_dir, shards):
    model, ema, optimizer = make_parts()
    folder = save(run_dir, 7, (model, ema, optimizer), shards)
    other = make_parts(seed=1)
    assert load_checkpoint(folder, *other) == 7
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other[0].parameters(), strict=True))
    assert all(torch.equal(ema.averages[name], other[1].averages[name]) for name in ema.averages)
    for mine, theirs in zip(optimizer.state.values(), other[2].state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_both_weights_load_as_models_from_the_run(run_dir, shards):
    model, ema, optimizer = make_parts()
    save(run_dir, 7, (model, ema, optimizer), shards)
    assert torch.equal(load_model(run_dir, "raw").ar.input_norm.weight, model.ar.input_norm.weight)
    assert torch.equal(load_model(run_dir).ar.input_norm.weight, ema.averages["ar.input_norm.weight"])
    assert json.loads((find_latest(run_dir) / "ema" / "dataset.json").read_text())["vae_name"] == "demo"


def test_only_the_newest_are_kept(run_dir, shards):
    parts = make_parts()
    for step in (5, 100, 20):
        save(run_dir, step, parts, shards)
    assert [folder.name for folder in list_checkpoints(run_dir)] == ["step_00000020", "step_00000100"]
    assert find_latest(run_dir).name == "step_00000100"
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_unfinished_checkpoints_are_invisible_and_removed(run_dir, shards):
    save(run_dir, 5, make_parts(), shards)
    unfinished = run_dir / "checkpoints" / ".step_00000009"
    (unfinished / "raw").mkdir(parents=True)
    assert find_latest(run_dir).name == "step_00000005"
    remove_unfinished(run_dir)
    assert not unfinished.exists() and find_latest(run_dir) is not None


def test_a_run_without_checkpoint_says_so(run_dir):
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        load_model(run_dir)


def test_a_checkpoint_of_another_model_is_refused(run_dir, shards):
    folder = save(run_dir, 5, make_parts(), shards)
    with pytest.raises(UserError, match=r"step_00000005 does not hold this model: missing ar\.lower_blocks\.2"):
        load_checkpoint(folder, *make_parts(ar_depth=6))
    with pytest.raises(
        UserError, match=r"holds another model .*ar\.class_embedding\.weight is \(6, 32\), needs \(8, 32\)"
    ):
        load_checkpoint(folder, *make_parts(num_classes=7))


def test_a_full_disk_stops_with_a_message_and_leaves_the_older_checkpoint_whole(run_dir, shards):
    """A real write error: the child may write files of 20 kB at most."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.flowar.test_checkpoint import make_parts, save
save(Path({str(run_dir)!r}), int(sys.argv[1]), make_parts(), Path({str(shards)!r}))
"""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    assert subprocess.run([sys.executable, "-c", code, "5"], capture_output=True).returncode == 0
    failed = subprocess.run([sys.executable, "-c", code, "6"], capture_output=True, text=True, preexec_fn=limit)
    assert failed.returncode != 0
    assert "can't save checkpoint" in failed.stderr and "the older checkpoints are whole" in failed.stderr
    assert find_latest(run_dir).name == "step_00000005"
    assert load_checkpoint(find_latest(run_dir), *make_parts()) == 5
