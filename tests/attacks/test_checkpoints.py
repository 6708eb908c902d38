"""Checkpoints that were damaged, swapped, or made by somebody else: refused by name, or survived with the same bits."""

import dataclasses
import json
import pickle
import random
import shutil

import pytest
import torch

from flowar import export, train
from flowar.base.errors import UserError
from flowar.base.run_folder import find_latest, list_checkpoints
from flowar.config.training import ExportConfig, ParallelConfig
from flowar.models.folders import load_model
from tests.conftest import MORE, flip_bit, training
from tests.flowar.ranks import run_ranks


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A run of 30 steps with all checkpoints, every ten steps."""
    run_dir = tmp_path_factory.mktemp("attacked") / "run"
    train.main(attacked_training(shards, run_dir))
    return run_dir


def attacked_training(shards, run_dir):
    return training(shards, run_dir, save_every_steps=10, keep_checkpoints=9)


@pytest.fixture
def at_20(finished, tmp_path):
    """A copy of the run, stopped after step 20."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000030")
    return run_dir


def newest(run_dir, name):
    return run_dir / "checkpoints" / "step_00000020" / name


def zero_a_block(run_dir):
    file = newest(run_dir, "__0_0.distcp")
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    file.write_bytes(content)


def take_an_older_file(run_dir):
    shutil.copy(run_dir / "checkpoints" / "step_00000010" / "__0_0.distcp", newest(run_dir, "__0_0.distcp"))


def take_an_older_folder(run_dir):
    """All files of step 10, but the state of step 20."""
    state = newest(run_dir, "state.json").read_text()
    shutil.rmtree(newest(run_dir, ""))
    shutil.copytree(run_dir / "checkpoints" / "step_00000010", newest(run_dir, ""))
    newest(run_dir, "state.json").write_text(state)


def set_no_updates(run_dir):
    file = newest(run_dir, "state.json")
    file.write_text(file.read_text().replace('"updates": 20', '"updates": 0'))


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
    "half a state": lambda run_dir: newest(run_dir, "state.json").write_text('{"step": 20, "upd'),
    "no checksums": lambda run_dir: newest(run_dir, "checksums.json").unlink(),
    "a bit of the checksums": lambda run_dir: flip_bit(newest(run_dir, "checksums.json"), 40),
    "another model": lambda run_dir: newest(run_dir, "config.json").write_text("{}"),
}


def assert_same_end(run_dir, finished):
    for weights in ("raw", "decay_0.9"):
        found, expected = load_model(run_dir, weights).state_dict(), load_model(finished, weights).state_dict()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("attack", ATTACKS)
def test_training_names_a_damaged_checkpoint_and_resumes_from_the_one_before(shards, finished, at_20, capsys, attack):
    ATTACKS[attack](at_20)
    train.main(attacked_training(shards, at_20))
    printed = capsys.readouterr().out
    assert "DAMAGED: " in printed and "step_00000020" in printed
    assert f"resuming from {at_20 / 'checkpoints' / 'step_00000010'}" in printed
    assert [folder.name for folder in (at_20 / "damaged").iterdir()] == ["checkpoints-step_00000020"]
    assert find_latest(at_20).name == "step_00000030"  # the step isn't blocked
    assert len(list_checkpoints(at_20)) == 3
    assert_same_end(at_20, finished)


def test_a_run_without_a_whole_checkpoint_does_not_start_afresh(shards, at_20):
    for folder in list_checkpoints(at_20):
        flip_bit(folder / "__0_0.distcp", 50_000)
    with pytest.raises(UserError, match="has no whole checkpoint left: .*copy one back from a backup"):
        train.main(attacked_training(shards, at_20))


@pytest.mark.parametrize("attack", ["a file of an older step", "a bit of the metadata", "another model"])
def test_a_damaged_checkpoint_is_not_exported(at_20, tmp_path, attack):
    ATTACKS[attack](at_20)
    with pytest.raises(UserError, match="step_00000020.* is damaged"):
        export.export(ExportConfig(model=str(at_20), out_dir=str(tmp_path / "model"), weights="raw"))
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero2", marks=MORE)])
def test_all_ranks_agree_on_the_newest_whole_checkpoint(shards, tmp_path, engine):
    """The damage is in files that one of two ranks meets with: of the newest checkpoint and of the one before."""
    parallel = ParallelConfig(engine="fsdp") if engine == "fsdp" else ParallelConfig(engine="deepspeed", zero_stage=2)
    config = dataclasses.replace(attacked_training(shards, tmp_path / "run"), parallel=parallel)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    run_ranks(config, 2, tmp_path / "log")
    needed = load_model(tmp_path / "run", "raw").state_dict()
    for step, name in (("step_00000020", "__1_0.distcp"), ("step_00000030", ".metadata")):
        file = tmp_path / "run" / "checkpoints" / step / name
        content = bytearray(file.read_bytes())
        some = slice(len(content) // 3, None, len(content) // 50)
        content[some] = b"\0" * len(content[some])
        file.write_bytes(content)
    run_ranks(config, 2, tmp_path / "again")
    printed = (tmp_path / "again").read_text()
    assert printed.count("DAMAGED: ") == 2 and f"resuming from {tmp_path / 'run/checkpoints/step_00000010'}" in printed
    found = load_model(tmp_path / "run", "raw").state_dict()
    assert [name for name in needed if not torch.equal(found[name], needed[name])] == []


class Trap:
    """Code that runs when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.mark.parametrize("has_checksums", [True, False], ids=["0.2", "0.1"])
def test_code_in_a_checkpoints_metadata_is_not_run(at_20, tmp_path, has_checksums):
    newest(at_20, ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    if not has_checksums:  # as version 0.1 wrote it, or somebody who wants to be believed
        newest(at_20, "checksums.json").unlink()
        state = json.loads(newest(at_20, "state.json").read_text())
        del state["checksums"]
        newest(at_20, "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="is damaged|can't be read: it names"):
        load_model(at_20)
    assert not (tmp_path / "sprung").exists()


NUM_CHANGES = 200


@pytest.mark.slow
@pytest.mark.parametrize("number", [20, pytest.param(NUM_CHANGES, marks=MORE)])
def test_no_single_changed_byte_of_a_checkpoint_passes_in_silence(at_20, number):
    """Either it is refused, or all that is loaded is the same."""
    raw, average = (load_model(at_20, weights).state_dict() for weights in ("raw", "decay_0.9"))
    files = [file for file in newest(at_20, "").iterdir() if file.is_file()]
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
            found = [load_model(newest(at_20, ""), weights).state_dict() for weights in ("raw", "decay_0.9")]
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
