"""Which VAE decodes: the given one, otherwise the one that the training run or the model names."""

import json
import shutil

import pytest
from PIL import Image

from flowar import evaluate, sample, sweep, train
from flowar.base.errors import UserError
from flowar.base.run_folder import checkpoint_step, find_latest, step_name
from flowar.config.data import ExtractorConfig, VAEConfig
from flowar.config.drawing import SampleConfig
from flowar.config.load import load_config
from flowar.config.measuring import EvaluateConfig, SweepConfig
from flowar.evaluation.extractors import OWN
from flowar.models.folders import export_model
from flowar.sampling.folder import read_hashes
from flowar.sampling.job import choose_vae, open_job
from flowar.sampling.weights import keep_weights
from tests.conftest import save_untrained_judge, training, written_by_0_1


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run of three steps, whose config.yaml names the demo VAE."""
    run_dir = tmp_path_factory.mktemp("named") / "run"
    train.main(training(shards, run_dir, epochs=1))
    return run_dir


def drawing(model, out_dir, **changes):
    settings = {"num_images": 20, "batch_size": 10, "num_steps": 2}
    return SampleConfig(model=str(model), out_dir=str(out_dir), **(settings | changes))


def test_a_runs_own_vae_is_used_and_printed(run, tmp_path, capsys):
    sample.main(drawing(run, tmp_path / "out"))
    assert f"vae.name=demo, as {run / 'config.yaml'} says" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "images").iterdir())) == 20
    assert open_job(drawing(find_latest(run), tmp_path / "b")).vae.name == "demo"


def test_an_exported_models_passport_names_the_vae(run, tmp_path, capsys):
    export_model(run, "ema", tmp_path / "model")
    assert open_job(drawing(tmp_path / "model", tmp_path / "out")).vae.name == "demo"
    assert f"vae.name=demo, as {tmp_path / 'model' / 'dataset.json'} says" in capsys.readouterr().out
    (tmp_path / "model" / "dataset.json").unlink()
    with pytest.raises(UserError, match="vae.name=mar needs the file kl16.ckpt, got vae.weights=None"):
        open_job(drawing(tmp_path / "model", tmp_path / "out"))


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ((), ("mar", "/data/kl16.ckpt")),
        (("vae.name=mar",), ("mar", "/data/kl16.ckpt")),
        (("vae.weights=mine.ckpt",), ("mar", "mine.ckpt")),
        (("vae.name=sd-vae-ft-ema",), ("sd-vae-ft-ema", None)),
    ],
)
def test_a_given_vae_wins_and_the_run_fills_in_what_is_missing(run, tmp_path, given, taken):
    copied = shutil.copytree(run, tmp_path / "run")
    text = written_by_0_1(copied / "config.yaml")
    named = text.replace("name: demo\n  weights: null", "name: mar\n  weights: /data/kl16.ckpt")
    assert named != text
    (copied / "config.yaml").write_text(named)
    config = load_config(SampleConfig, overrides=("model=x", "out_dir=y", *given))
    assert choose_vae(config.vae, find_latest(copied)) == VAEConfig(name=taken[0], weights=taken[1])


@pytest.mark.slow
def test_sweep_and_evaluate_use_it_too(run, image_folder, tmp_path, capsys):
    save_untrained_judge(tmp_path / "judge.safetensors", ("dark", "light"))
    judge = ExtractorConfig(name=OWN, weights=str(tmp_path / "judge.safetensors"))
    common = {"reference": str(reference(image_folder, tmp_path)), "extractor": judge, "interval_groups": 0}
    drawn = drawing(run, tmp_path / "samples")
    evaluate.main(EvaluateConfig(samples=str(tmp_path / "samples"), sample=drawn, **common))
    settings = {"guidance": (1.0,), "interval_ends": (1.0,), "num_steps": (2,), "num_images": (20,)}
    out_dir = str(tmp_path / "sweep")
    sweep.main(SweepConfig(model=str(run), out_dir=out_dir, **settings, **common))
    assert (
        capsys.readouterr().out.count(f"vae.name=demo, as {run / 'config.yaml'} says") == 3
    )  # the ceiling of evaluate needs it too
    recipe = load_config(SampleConfig, tmp_path / "sweep" / "recipe.yaml", ("model=a", "out_dir=b"))
    assert recipe.vae == VAEConfig(name="demo")
    sweep.main(SweepConfig(model=str(run), out_dir=out_dir, **settings, **common))  # it is the same sweep


def reference(image_folder, tmp_path):
    """The fixture's images at 32 px, as the judge needs them."""
    (tmp_path / "real").mkdir()
    for number, file in enumerate(sorted(image_folder.rglob("*.png"))):
        Image.open(file).resize((32, 32)).save(tmp_path / "real" / f"{number}.png")
    return tmp_path / "real"


def test_samples_keep_to_the_step_that_they_were_started_with(run, shards, tmp_path, capsys):
    """A task restarts when the run has a newer checkpoint, and has deleted the one that the task started with."""
    living, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, living)
    begun = drawing(living, out, num_images=20)
    source = keep_weights(begun)  # killed before it drew anything
    assert source.stored == out / "model" and source.step == checkpoint_step(find_latest(living))
    newer = living / "checkpoints" / step_name(source.step + 1)
    shutil.copytree(source.folder, newer)
    state = json.loads((newer / "state.json").read_text())
    (newer / "state.json").write_text(json.dumps(state | {"step": source.step + 1}))
    shutil.rmtree(source.folder)
    sample.main(begun)
    said = f"drawing with step {source.step}, which the samples in {out} were started with; for step"
    assert said in capsys.readouterr().out
    sample.main(drawing(run, tmp_path / "same", num_images=20))
    assert read_hashes(out / "images.xxh64") == read_hashes(tmp_path / "same" / "images.xxh64")
    assert (out / "model").exists() and not (tmp_path / "same" / "model").exists()  # kept only if it is the last copy
    sample.main(drawing(living, out, num_images=30))  # more of the same
    shutil.rmtree(out / "model")
    with pytest.raises(UserError, match=f"holds images of step {source.step}, but {source.folder} no longer exists"):
        sample.main(drawing(living, out, num_images=40))
