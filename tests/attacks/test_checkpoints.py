"""Checkpoints that were damaged, swapped, or made by somebody else: refused by name, or survived with the same bits."""

import dataclasses
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from flowar import export, train
from flowar.base.distributed import World, broadcast_object, start_world, stop_world, wait_for_all
from flowar.base.errors import UserError
from flowar.base.run_folder import CHECKPOINTS, Progress, find_latest, list_checkpoints
from flowar.config.training import ExportConfig, ParallelConfig
from flowar.models.build import create_model
from flowar.models.folders import load_model
from flowar.training.averages import EMA
from flowar.training.checkpoint import CheckpointContents, Checkpoints, restore_newest, whole_state
from flowar.training.setup import make_engine, plan_run, prepare_run_dir
from tests import processes
from tests.conftest import MORE, flip_bit, training
from tests.flowar.ranks import run_ranks


def attacked_training(shards, run_dir):
    """As `trained` was."""
    return training(shards, run_dir, epochs=2, save_every_steps=2, keep_checkpoints=9)


@pytest.fixture
def at_4(trained, tmp_path):
    """A copy of the run, stopped after step 4."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    return run_dir


def newest(run_dir, name):
    return run_dir / "checkpoints" / "step_00000004" / name


def zero_a_block(run_dir):
    file = newest(run_dir, "__0_0.distcp")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    file.write_bytes(content)


def take_an_older_file(run_dir):
    shutil.copy(run_dir / "checkpoints" / "step_00000002" / "__0_0.distcp", newest(run_dir, "__0_0.distcp"))


def take_an_older_folder(run_dir):
    """All files of step 2, but the state of step 4."""
    state = newest(run_dir, "state.json").read_text()
    shutil.rmtree(newest(run_dir, ""))
    shutil.copytree(run_dir / "checkpoints" / "step_00000002", newest(run_dir, ""))
    newest(run_dir, "state.json").write_text(state)


def set_no_updates(run_dir):
    file = newest(run_dir, "state.json")
    file.write_text(file.read_text().replace('"updates": 4', '"updates": 0'))


ATTACKS = {
    "a bit of the tensors": lambda run_dir: flip_bit(newest(run_dir, "__0_0.distcp"), 50_000),
    "a zeroed block": zero_a_block,
    "a file of an older step": take_an_older_file,
    "a folder of an older step": take_an_older_folder,
    "a truncated file": lambda run_dir: newest(run_dir, "__0_0.distcp").write_bytes(b"short"),
    "a missing file": lambda run_dir: newest(run_dir, "__0_0.distcp").unlink(),
    "a bit of the metadata": lambda run_dir: flip_bit(newest(run_dir, ".metadata"), 500),
    "no metadata": lambda run_dir: newest(run_dir, ".metadata").unlink(),
    "no updates": set_no_updates,
    "no state": lambda run_dir: newest(run_dir, "state.json").unlink(),
    "half a state": lambda run_dir: newest(run_dir, "state.json").write_text('{"step": 4, "upd'),
    "no checksums": lambda run_dir: newest(run_dir, "checksums.json").unlink(),
    "a bit of the checksums": lambda run_dir: flip_bit(newest(run_dir, "checksums.json"), 40),
    "another model": lambda run_dir: newest(run_dir, "config.json").write_text("{}"),
}


def assert_same_end(run_dir, trained):
    for weights in ("raw", "decay_0.9"):
        found, expected = load_model(run_dir, weights).state_dict(), load_model(trained, weights).state_dict()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def make_parts(config, world):
    """Return plan, engine and averages as training makes them."""
    run = plan_run(config, world)
    engine = make_engine(run.engine, create_model(config.model), world)
    return run, engine, EMA(config.ema, engine.local_weights())


@pytest.fixture(scope="module")
def parts(shards, trained, tmp_path_factory):
    """Those of such a run, into which its checkpoints are loaded; and the weights of its step 2."""
    config = attacked_training(shards, tmp_path_factory.mktemp("parts") / "run")
    needed = load_model(trained / "checkpoints" / "step_00000002", "raw").state_dict()
    return *make_parts(config, World(0, 1, torch.device("cpu"), None)), needed


def assert_set_aside(run_dir, printed):
    assert "DAMAGED: " in printed and "step_00000004" in printed
    assert [folder.name for folder in (run_dir / "damaged").iterdir()] == ["checkpoints-step_00000004"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_loaded(parts, at_4, capsys, attack):
    """By what training calls when it begins; what it does from there on is the same for all of them."""
    run, engine, ema, needed = parts
    ATTACKS[attack](at_4)
    for weight in engine.local_weights().values():
        weight.zero_()
    prepare_run_dir(at_4, run.shards.passport)
    progress, folder = restore_newest(engine, ema, at_4)
    assert (progress.step, folder) == (2, at_4 / "checkpoints" / "step_00000002")
    assert_set_aside(at_4, capsys.readouterr().out)
    assert list_checkpoints(at_4) == [folder]
    assert [name for name, found in engine.local_weights().items() if not torch.equal(found, needed[name])] == []


ONE = "a folder of an older step"


@pytest.mark.parametrize("attack", [pytest.param(name, marks=() if name == ONE else MORE) for name in ATTACKS])
def test_training_goes_on_from_the_one_before_to_the_same_end(shards, trained, at_4, capsys, attack):
    ATTACKS[attack](at_4)
    train.main(attacked_training(shards, at_4))
    printed = capsys.readouterr().out
    assert_set_aside(at_4, printed)
    assert f"resuming from {at_4 / 'checkpoints' / 'step_00000002'}" in printed
    assert find_latest(at_4).name == "step_00000006"  # the step isn't blocked
    assert len(list_checkpoints(at_4)) == 3
    assert_same_end(at_4, trained)


def test_a_run_without_a_whole_checkpoint_does_not_start_afresh(shards, at_4):
    for folder in list_checkpoints(at_4):
        flip_bit(folder / "__0_0.distcp", 50_000)
    with pytest.raises(UserError, match="has no whole checkpoint left: .*copy one back from a backup"):
        train.main(attacked_training(shards, at_4))


@pytest.mark.parametrize("attack", ["a file of an older step", "a bit of the metadata", "another model"])
def test_a_damaged_checkpoint_is_not_exported(at_4, tmp_path, attack):
    ATTACKS[attack](at_4)
    with pytest.raises(UserError, match="step_00000004.* is damaged"):
        export.export(ExportConfig(model=str(at_4), out_dir=str(tmp_path / "model"), weights="raw"))
    assert not (tmp_path / "model").exists()


def damage_two(run_dir):
    """Damage files that one of two ranks meets with: of the newest checkpoint and of the one before."""
    for step, name in (("step_00000004", "__1_0.distcp"), ("step_00000006", ".metadata")):
        file = run_dir / "checkpoints" / step / name
        content = bytearray(file.read_bytes())
        some = slice(len(content) // 3, None, len(content) // 50)
        content[some] = b"\0" * len(content[some])
        file.write_bytes(content)


def save_three_and_restore(config):
    """What training does at its saves and when it resumes, without the steps: each weight is the step's number."""
    world, run_dir = start_world(torch.device("cpu"), with_group=True), Path(config.run_dir)
    run, engine, ema = make_parts(config, world)
    owner = broadcast_object(prepare_run_dir(run_dir, run.shards.passport) if world.is_main else None)
    checkpoints = Checkpoints(owner, world, CheckpointContents(config.model, run.shards.passport), CHECKPOINTS)
    for step in (2, 4, 6):
        for weight in engine.local_weights().values():
            weight.fill_(step)
        checkpoints.save(whole_state(engine, ema), Progress(step=step, updates=step, averages=tuple(ema.averages)))
    checkpoints.wait()
    if world.is_main:
        damage_two(run_dir)
    wait_for_all()
    progress, folder = restore_newest(engine, ema, run_dir)
    assert (progress.step, folder.name) == (2, "step_00000002")
    assert all((whole == 2).all() for _, whole in engine.full(engine.local_weights()))
    stop_world()


def test_two_ranks_agree_on_the_newest_whole_checkpoint(shards, tmp_path):
    config = dataclasses.replace(attacked_training(shards, tmp_path / "run"), parallel=ParallelConfig(engine="fsdp"))
    processes.run_ranks(save_three_and_restore, config, world_size=2, log=tmp_path / "log")
    assert (tmp_path / "log").read_text().count("DAMAGED: ") == 2
    assert len(list((tmp_path / "run" / "damaged").iterdir())) == 2


@MORE
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_all_ranks_of_a_training_agree_and_train_to_the_same_end(shards, tmp_path, engine):
    parallel = ParallelConfig(engine="fsdp") if engine == "fsdp" else ParallelConfig(engine="deepspeed", zero_stage=2)
    config = dataclasses.replace(attacked_training(shards, tmp_path / "run"), parallel=parallel)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    run_ranks(config, 2, tmp_path / "log")
    needed = load_model(tmp_path / "run", "raw").state_dict()
    damage_two(tmp_path / "run")
    run_ranks(config, 2, tmp_path / "again")
    printed = (tmp_path / "again").read_text()
    assert printed.count("DAMAGED: ") == 2 and f"resuming from {tmp_path / 'run/checkpoints/step_00000002'}" in printed
    found = load_model(tmp_path / "run", "raw").state_dict()
    assert [name for name in needed if not torch.equal(found[name], needed[name])] == []


class Trap:
    """Code that runs when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("has_checksums", [True, False], ids=["0.2", "0.1"])
def test_code_in_a_checkpoints_metadata_is_not_run(at_4, tmp_path, has_checksums):
    newest(at_4, ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    if not has_checksums:  # as version 0.1 wrote it, or somebody who wants to be believed
        newest(at_4, "checksums.json").unlink()
        state = json.loads(newest(at_4, "state.json").read_text())
        del state["checksums"]
        newest(at_4, "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="is damaged|can't be read: it names"):
        load_model(at_4)
    assert not (tmp_path / "sprung").exists()


NUM_CHANGES = 200


@pytest.mark.slow
@pytest.mark.parametrize("number", [20, pytest.param(NUM_CHANGES, marks=MORE)])
def test_no_single_changed_byte_of_a_checkpoint_passes_in_silence(at_4, number):
    """Either it is refused, or all that is loaded is the same."""
    raw, average = (load_model(at_4, weights).state_dict() for weights in ("raw", "decay_0.9"))
    files = [file for file in newest(at_4, "").iterdir() if file.is_file()]
    assert {".metadata", "checksums.json", "config.json", "dataset.json", "state.json"} < {file.name for file in files}
    rng, refused = random.Random(0), 0
    for _ in range(number):
        file = rng.choice(files)
        content = bytearray(file.read_bytes())
        place = rng.randrange(len(content))
        before = content[place]
        content[place] = rng.choice([value for value in range(256) if value != before])
        file.write_bytes(content)
        try:
            found = [load_model(newest(at_4, ""), weights).state_dict() for weights in ("raw", "decay_0.9")]
        except UserError:
            refused += 1
        else:
            same = [
                torch.equal(found[0][name], raw[name]) and torch.equal(found[1][name], average[name]) for name in raw
            ]
            assert all(same), (file.name, place)
        content[place] = before
        file.write_bytes(content)
    assert refused > number / 2
