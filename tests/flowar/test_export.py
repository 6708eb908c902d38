import pytest
import torch
from huggingface_hub import DatasetCard, ModelCard

from flowar import export
from flowar.base.errors import UserError
from flowar.base.run_folder import checkpoint_step, find_latest
from flowar.config.training import AverageConfig, EMAConfig, ExportConfig
from flowar.models.build import create_model
from flowar.models.cards import as_code
from flowar.models.checkpoint_files import write_checksums
from flowar.models.folders import load_model
from flowar.train import main
from flowar.training.report import record_evaluation
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


def test_an_export_has_a_card_of_what_it_is_and_names_stay_text(run_dir, tmp_path):
    step = checkpoint_step(find_latest(run_dir))
    record_evaluation(
        run_dir,
        {
            "step": step, "num_samples": 50_000, "protocol": "adm", "samples": "/home/me/samples", "reference": "in256",
            "fid": 1.875, "intervals": {"fid": (1.8, 1.95)},
        },
    )  # fmt: skip
    export.export(ExportConfig(model=str(run_dir), out_dir=str(tmp_path / "model")))
    text = (tmp_path / "model" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "flowar" and card.data.license == "apache-2.0" and "flowar" in card.data.tags
    for said in (
        f"Step {step}, weights `ema`",
        "| images | 24 |",
        "`dark`, `light`",
        "fid 1.875 (95%: 1.8 to 1.95)",
        "lr: 0.0",
    ):
        assert said in text, said
    assert "/home/me" not in text and str(run_dir) not in text
    assert as_code("a`|\r\n<script>\rb") == "`a'/ <script> b`"


def test_a_model_and_a_dataset_have_cards(shards, tmp_path):
    create_model("flowar-demo").save_pretrained(tmp_path / "model")
    assert ModelCard.load(tmp_path / "model" / "README.md").data.library_name == "flowar"
    card = DatasetCard.load(shards / "README.md")
    assert "mds" in card.data.tags and "| classes | 2: `dark`, `light` |" in card.text
