import pytest
import torch

from flowar import export
from flowar.base.errors import UserError
from flowar.base.run_folder import find_latest
from flowar.config.training import AverageConfig, EMAConfig, ExportConfig
from flowar.models.checkpoint_files import write_checksums
from flowar.models.folders import load_model
from flowar.train import main
from tests.conftest import training


@pytest.fixture(scope="module")
def run_dir(shards, tmp_path_factory):
    """A run that keeps averages, and also tracks the one of std 0.15 for comparison."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    ema = EMAConfig(decays=(0.9,), stds=(0.1, 0.15, 0.2), keep_every_steps=3)
    main(training(shards, run_dir, ema=ema, keep_checkpoints=1, save_every_steps=15))
    return run_dir


@pytest.mark.parametrize("weights", ["ema", "raw", "std_0.15"])
def test_exported_weights_are_those_of_the_run(run_dir, tmp_path, weights):
    export.export(ExportConfig(model=str(run_dir), out_dir=str(tmp_path / "model"), weights=weights))
    needed = load_model(run_dir, weights).state_dict()
    found = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], needed[name]) for name in needed)
    with pytest.raises(UserError, match="already exists"):
        export.export(ExportConfig(model=str(find_latest(run_dir)), out_dir=str(tmp_path / "model")))


def test_a_combined_average_is_near_the_one_that_was_tracked(run_dir, tmp_path):
    for folder in (run_dir / "averages").iterdir():  # without the wanted one
        state = folder / "state.json"
        state.write_text(state.read_text().replace('"std_0.15",', ""))
        (folder / "checksums.json").unlink()
        write_checksums(folder)
    export.average(AverageConfig(run_dir=str(run_dir), out_dir=str(tmp_path / "model"), std=0.15))
    found, truth = load_model(tmp_path / "model").state_dict(), load_model(run_dir, "std_0.15").state_dict()
    others = [load_model(run_dir, name).state_dict() for name in ("std_0.1", "std_0.2")]

    def distance(a, b):
        return sum((a[name] - b[name]).square().sum() for name in a).sqrt()

    assert distance(found, truth) < 0.2 * min(distance(other, truth) for other in others)


def test_a_step_that_was_not_kept_is_one_clear_error(run_dir, tmp_path):
    out = str(tmp_path / "model")
    with pytest.raises(UserError, match="kept no averages; train with ema.stds"):
        export.average(AverageConfig(run_dir=str(tmp_path), out_dir=out, std=0.1))
    with pytest.raises(UserError, match=r"kept no averages at step=5; the kept steps are in"):
        export.average(AverageConfig(run_dir=str(run_dir), out_dir=out, std=0.1, step=5))
    with pytest.raises(UserError, match=r"std=0.5 must lie in \(0, 0.28\)"):
        AverageConfig(run_dir="", out_dir="", std=0.5)
