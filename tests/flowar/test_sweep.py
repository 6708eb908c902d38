import contextlib
import io
import json

import pytest
from PIL import Image

from flowar import sweep
from flowar.base.errors import UserError
from flowar.base.records import read_record, write_record
from flowar.config.data import VAEConfig
from flowar.config.drawing import SampleConfig, SamplingConfig
from flowar.config.load import load_config
from flowar.config.measuring import ExtractorConfig, SweepConfig
from flowar.evaluation.demo_images import write_image_folders
from flowar.evaluation.extractors import OWN
from flowar.evaluation.store import read_features
from flowar.evaluation.sweep_page import write_sweep_page
from flowar.models.build import create_model
from flowar.models.folders import save_model
from tests.browser import check_page
from tests.conftest import randomise, save_untrained_judge
from tests.processes import draw_deaths, run_with_deaths


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Digits, a judge and a model."""
    root = tmp_path_factory.mktemp("sweep")
    write_image_folders(root)
    save_untrained_judge(root / "judge.safetensors")
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
        "extractor": ExtractorConfig(name=OWN, weights=str(root / "judge.safetensors")),
    }
    paths = {"model": str(root / "model"), "reference": str(root / "held_out"), "out_dir": str(out_dir)}
    return SweepConfig(**paths, **(settings | changes))


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """The sweep of one process: its folder, and what it printed."""
    out_dir = tmp_path_factory.mktemp("alone")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        sweep.main(sweeping(root, out_dir))
    return out_dir, output.getvalue()


@pytest.mark.slow
def test_half_of_the_settings_reach_the_next_round_and_the_best_becomes_a_recipe(root, alone):
    out_dir, printed = alone
    config = sweeping(root, out_dir)
    results = json.loads((out_dir / "sweep.json").read_text())
    rows = {row["name"]: row for row in results["settings"]}
    assert len(rows) == 6  # at guidance 1 the interval makes no difference
    assert sorted(row["num_images"] for row in rows.values()) == [40] * 3 + [80] * 3
    first = {name: json.loads((out_dir / "settings" / name / "score_40.json").read_text())["fid"] for name in rows}
    assert {name for name, row in rows.items() if row["num_images"] == 80} == set(sorted(first, key=first.get)[:3])
    finalists = [row for row in rows.values() if row["num_images"] == 80]
    best = min(finalists, key=lambda row: row["fid"])
    assert results["winner"] == best["name"] and best["pareto"]
    assert "best: " in printed and Image.open(out_dir / "pareto.png").width > 500

    recipe = load_config(SampleConfig, out_dir / "recipe.yaml", ("model=a", "out_dir=b"))
    drawn = next(own for own in sweep.list_settings(config) if own.name == results["winner"]).sample
    for name in ("guidance", "guidance_interval", "num_steps", "seed", "vae"):
        assert getattr(recipe, name) == getattr(drawn, name)

    # The second round reuses the images of the first; running again changes nothing.
    assert len(read_features(out_dir / "settings" / best["name"] / "features-own", 80)) == 80
    stamp = (out_dir / "settings" / best["name"] / "score_80.json").stat().st_mtime_ns
    sweep.main(config)
    assert (out_dir / "settings" / best["name"] / "score_80.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_the_page_of_a_sweep_opens_in_a_browser(alone, browser):
    rows = json.loads((alone[0] / "sweep.json").read_text())["settings"]
    check_page(browser, alone[0] / "report.html", names=tuple(row["name"] for row in rows), num_images=1)


def test_hostile_names_stay_text_on_the_page_of_a_sweep(tmp_path, browser):
    Image.new("RGB", (900, 600), "white").save(tmp_path / "pareto.png")
    (tmp_path / "recipe.yaml").write_text("# <script>alert(2)</script>\n")
    row = {
        "name": "<b onclick=alert(3)>x",
        "num_images": 4,
        "fid": 1.0,
        "interval": None,
        "gflops": 2.0,
        "pareto": True,
    }
    write_sweep_page(
        tmp_path, model="<img src=x onerror=alert(1)>", reference="<script>", rows=[row],
        picture=tmp_path / "pareto.png", recipe=tmp_path / "recipe.yaml",
    )  # fmt: skip
    names = ("<img src=x onerror=alert(1)>", "<script>alert(2)</script>", "<b onclick=alert(3)>x")
    check_page(browser, tmp_path / "report.html", names=names, num_images=1)


@pytest.mark.slow
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
        ({"sample": SamplingConfig(preset="fast")}, "sample.preset=fast stands for numbers of steps, which are swept"),
    ):
        with pytest.raises(UserError, match=message):
            sweeping(root, tmp_path, **change)


def test_a_sweep_with_rounded_steps_of_version_0_1_is_not_continued(root, tmp_path):
    config = sweeping(root, tmp_path, last_step_shares=(1.0, 0.5))
    settings = sweep.list_settings(config)
    sweep.check_same_sweep(tmp_path, config, settings)
    record = read_record(tmp_path / "config.json", "")
    assert record.pop("annealing") == "floor"
    write_record(tmp_path / "config.json", record)
    with pytest.raises(UserError, match="holds another sweep: annealing was None, now floor"):
        sweep.check_same_sweep(tmp_path, config, settings)


@pytest.mark.slow
def test_workers_that_die_join_late_or_restart_find_the_same_as_one_process(root, alone, tmp_path):
    config, log = sweeping(root, tmp_path), tmp_path / "log"
    run_with_deaths(sweep.main, config, num_workers=3, deaths=draw_deaths(5, 40, tmp_path / "settings"), log=log)
    found, needed = (json.loads((out_dir / "sweep.json").read_text()) for out_dir in (tmp_path, alone[0]))
    for mine, theirs in zip(found["settings"], needed["settings"], strict=True):
        assert mine["name"] == theirs["name"] and mine["num_images"] == theirs["num_images"]
        assert mine["fid"] == pytest.approx(theirs["fid"], rel=1e-3, abs=1e-6)
