import json
import multiprocessing
import os

import pytest
import torch
from PIL import Image

from flowar import sweep
from flowar.base.errors import UserError
from flowar.config.data import VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.config.load import load_config
from flowar.config.measuring import ExtractorConfig, SweepConfig
from flowar.evaluation.digits import DigitClassifier, save_classifier, write_image_folders
from flowar.evaluation.extractors import DEMO_EXTRACTOR
from flowar.evaluation.store import read_features
from flowar.models.build import create_model
from flowar.models.folders import save_model
from tests.conftest import randomise


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Digits, a judge and a model."""
    root = tmp_path_factory.mktemp("sweep")
    write_image_folders(root)
    save_classifier(DigitClassifier().eval(), root / "judge.safetensors")
    model = randomise(create_model("flowar-demo", ar_depth=2, flow_depth=1))
    save_model(model.config, model.state_dict(), root / "model")
    return root


def sweeping(root, out_dir, **changes):
    base = SampleConfig(model="x", out_dir="y", vae=VAEConfig(name="demo"), batch_size=20, chunk_batches=1, seed=3)
    settings = {
        "sample": base,
        "guidance": (1.0, 2.0),
        "interval_ends": (0.5, 1.0),
        "num_steps": (2, 4),
        "num_images": (40, 80),
        "keep": 0.5,
        "interval_groups": 10,
        "extractor": ExtractorConfig(name=DEMO_EXTRACTOR, weights=str(root / "judge.safetensors")),
    }
    paths = {"model": str(root / "model"), "reference": str(root / "held_out"), "out_dir": str(out_dir)}
    return SweepConfig(**paths, **(settings | changes))


def test_half_of_the_settings_go_on_and_the_best_becomes_a_recipe(root, tmp_path, capsys):
    config = sweeping(root, tmp_path)
    sweep.main(config)
    results = json.loads((tmp_path / "sweep.json").read_text())
    rows = {row["name"]: row for row in results["settings"]}
    assert len(rows) == 6  # at guidance 1 the interval makes no difference
    assert sorted(row["num_images"] for row in rows.values()) == [40] * 3 + [80] * 3
    first = {name: json.loads((tmp_path / "settings" / name / "score_40.json").read_text())["fid"] for name in rows}
    assert {name for name, row in rows.items() if row["num_images"] == 80} == set(sorted(first, key=first.get)[:3])
    finalists = [row for row in rows.values() if row["num_images"] == 80]
    best = min(finalists, key=lambda row: row["fid"])
    assert results["winner"] == best["name"] and best["pareto"]
    assert "best: " in capsys.readouterr().out and Image.open(tmp_path / "pareto.png").width > 500

    recipe = load_config(SampleConfig, tmp_path / "recipe.yaml", ("model=a", "out_dir=b"))
    drawn = next(own for own in sweep.list_settings(config) if own.name == results["winner"]).sample
    for name in ("guidance", "guidance_interval", "num_steps", "seed", "vae"):
        assert getattr(recipe, name) == getattr(drawn, name)

    # What was drawn in the first round belongs to the second; running again does nothing anew.
    assert len(read_features(tmp_path / "settings" / best["name"] / "features-demo-classifier", 80)) == 80
    stamp = (tmp_path / "settings" / best["name"] / "score_80.json").stat().st_mtime_ns
    sweep.main(config)
    assert (tmp_path / "settings" / best["name"] / "score_80.json").stat().st_mtime_ns == stamp


def test_cost_grows_with_steps_and_annealing_lowers_it(root, tmp_path):
    config = sweeping(
        root, tmp_path, guidance=(2.0,), interval_ends=(1.0,), num_steps=(4, 8), last_step_shares=(1.0, 0.5),
        num_images=(20,), interval_groups=0,
    )  # fmt: skip
    sweep.main(config)
    rows = {row["name"]: row["gflops"] for row in json.loads((tmp_path / "sweep.json").read_text())["settings"]}
    names = [f"ema_guidance2_to1_steps{steps}" for steps in ("4to2", "4", "8to4", "8")]
    assert [rows[name] for name in names] == sorted(rows.values()) and len(set(rows.values())) == 4


def test_other_settings_in_the_same_folder_are_refused(root, tmp_path):
    config = sweeping(root, tmp_path, guidance=(2.0,), num_steps=(2,), num_images=(20,), interval_ends=(1.0,))
    sweep.main(config)
    with pytest.raises(UserError, match="holds another sweep: guidance was"):
        sweep.main(sweeping(root, tmp_path, guidance=(3.0,), num_steps=(2,), num_images=(20,), interval_ends=(1.0,)))
    for change, message in (
        ({"keep": 1.0}, r"keep=1.0 must lie in \(0, 1\)"),
        ({"num_images": (50, 40)}, r"num_images=\[50, 40\] must grow"),
        ({"guidance": ()}, r"guidance=\[\] is empty"),
        ({"weights": ()}, r"weights=\[\] and ema_stds=\[\] are both empty"),
    ):
        with pytest.raises(UserError, match=message):
            sweeping(root, tmp_path, **change)


def sweep_here(config, log):
    """What one worker does."""
    output = log.open("a", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    sweep.main(config)


@pytest.mark.slow
def test_three_workers_and_a_late_one_find_what_one_finds(root, tmp_path):
    sweep.main(sweeping(root, tmp_path / "alone"))
    config, log = sweeping(root, tmp_path / "together"), tmp_path / "log"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.flowar.test_sweep"])
    workers = [context.Process(target=sweep_here, args=(config, log)) for _ in range(3)]
    for worker in workers:
        worker.start()
    workers[0].join(timeout=4)
    workers[0].kill()
    workers[0] = context.Process(target=sweep_here, args=(config, log))
    workers[0].start()
    for worker in workers:
        worker.join(timeout=200)
    assert [worker.exitcode for worker in workers] == [0] * 3, log.read_text()[-3000:]
    found, needed = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("together", "alone"))
    for mine, theirs in zip(found["settings"], needed["settings"], strict=True):
        assert mine["name"] == theirs["name"] and mine["num_images"] == theirs["num_images"]
        assert mine["fid"] == pytest.approx(theirs["fid"], rel=1e-3, abs=1e-6)
