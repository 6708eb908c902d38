import dataclasses
import json
import re
import shutil

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from flowar import cli
from flowar.base.errors import UserError
from flowar.config.jobs import DEMOS, DemoConfig
from flowar.config.load import load_config
from flowar.demo import main
from flowar.latents.schema import read_passport
from flowar.models.costs import count_parameters
from tests.browser import check_page
from tests.commands import PAGES, ROOT, commands_of, snippets
from tests.conftest import MORE
from tests.processes import join, start

SHORT = ["train.epochs=1", "num_samples=40", "draw.num_steps=4", "train.preview.num_steps=2"]


def demo(run_dir, log, *words):
    """Return what the demo prints."""
    join([start(cli.main, ["demo", f"run_dir={run_dir}", *SHORT, *words], log=log)], log)
    return log.read_text()


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A demo of one epoch: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("short")
    return folder / "demo", demo(folder / "demo", folder / "log")


@pytest.mark.slow
def test_the_demo_ends_in_a_report_and_runs_again_in_place(short, tmp_path):
    """Checks the steps, not the quality."""
    run_dir, printed = short
    report = run_dir / "report.html"
    assert f"open {report}" in printed
    page = report.read_text()
    pictures = re.findall(r'src="(.{30})', page)
    assert len(pictures) == 4 and all(source.startswith("data:image/png;base64,") for source in pictures)
    assert not re.search(r'(src|href)="https?:', page)
    numbers = json.loads((run_dir / "numbers.json").read_text())
    assert f"{numbers['class_accuracy']:.1%}" in page
    assert numbers["judge_accuracy"] >= 0.98
    assert 0 <= numbers["class_accuracy"] <= 1 and numbers["fid_training"] > 0
    with Image.open(run_dir / "contact_sheet.png") as sheet:
        assert sheet.size == (2 + 4 * 66, 2 + 10 * 66)  # four of each of ten classes

    weights = {file: file.read_bytes() for file in (run_dir / "train").rglob("model.safetensors")}
    assert "0 still to draw" in demo(run_dir, tmp_path / "second_log")
    assert all(file.read_bytes() == content for file, content in weights.items())


@pytest.mark.slow
def test_the_demos_pages_open_in_a_browser(short, browser):
    """That of the demo, those of its evaluations by a judge of its own, and that of its training."""
    run_dir, _ = short
    check_page(browser, run_dir / "report.html", names=("flowar-demo on handwritten digits",), num_images=4)
    check_page(browser, run_dir / "evaluation_samples" / "report.html", names=("Classes, by the judge",), num_images=3)
    check_page(browser, run_dir / "evaluation_training" / "report.html", num_images=3)
    cli.main(["watch", str(run_dir / "train"), "--once"])
    check_page(browser, run_dir / "train" / "watch.html", names=("Growing samples",))


@pytest.mark.slow
def test_arflow_goes_through_the_same_steps(short, tmp_path):
    """Uses the data and the judge of the other demo, as existing parts are not made again."""
    run_dir = tmp_path / "demo"
    for name in ("data", "images"):
        shutil.copytree(short[0] / name, run_dir / name)
    shutil.copy(short[0] / "judge.safetensors", run_dir)
    printed = demo(run_dir, tmp_path / "log", "model=arflow", "train.epochs=0.2")
    assert "train arflow-demo on the shards" in printed and f"open {run_dir / 'report.html'}" in printed
    page = (run_dir / "report.html").read_text()
    assert "<h1>arflow-demo on handwritten digits</h1>" in page
    assert len(re.findall(r'src="data:image/png', page)) == 3 and not (run_dir / "growth.png").exists()
    assert json.loads((run_dir / "numbers.json").read_text())["fid_samples"] > 0


@pytest.mark.slow
def test_what_the_docs_do_with_the_demo_works(short, tmp_path, monkeypatch):
    """Commands are run, trainings dry; snippets of Python run as they are."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(short[0])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    of_demo = [command.words for page in PAGES for command in commands_of(page) if "runs/demo" in str(command)]
    shown = [words for words in of_demo if words[0] in ("train", "sample")]
    assert {words[0] for words in shown} == {"train", "sample"}
    for words in shown:
        cli.main([*words, "--dry-run"] if words[0] == "train" else words)
    snippets_of_python = [body for page in PAGES for body in snippets(page, "python")]
    assert len(snippets_of_python) >= 3
    for body in snippets_of_python:
        exec(compile(body, "docs", "exec"), {})
    assert Image.open("three.png").size == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_image_step_by_step", "what_guidance_does"])
def test_the_notebooks_run_on_the_demos_model(short, name, monkeypatch):
    """The committed ones, which were run on a model that was trained for longer; their outputs are small."""
    monkeypatch.setenv("FLOWAR_DEMO", str(short[0] / "train"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the kernel; other tests run beside it
    file = ROOT / "examples" / f"{name}.ipynb"
    assert file.stat().st_size < 150_000
    notebook = nbformat.read(file, as_version=4)
    shown = [len(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    assert sum(shown) >= 5 and "/tmp/" not in str([cell.source for cell in notebook.cells])


@pytest.mark.slow
def test_clothes_get_a_vae_of_their_own(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 300), ("t10k", 60)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = (20 * labels[:, None, None] + random.integers(0, 40, (count, 28, 28))).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            header = bytes((0, 0, 8, array.ndim)) + sizes
            (tmp_path / f"{split}-{name}-ubyte").write_bytes(header + array.tobytes())
    run_dir = tmp_path / "demo"
    printed = demo(run_dir, tmp_path / "log", "data=fashion", f"images={tmp_path}", "vae_steps=2")
    assert "train-vae: a VAE for these images" in printed and (run_dir / "vae" / "vae.json").exists()
    assert read_passport(run_dir / "data").vae_name == str(run_dir / "vae")
    assert "<h1>flowar-xxs on clothes</h1>" in (run_dir / "report.html").read_text()


@MORE
@pytest.mark.slow
@pytest.mark.parametrize("family", ["flowar", "arflow"])
def test_the_whole_demo_learns_the_digits(family, tmp_path):
    config = dataclasses.replace(DEMOS[family], run_dir=str(tmp_path / "demo"))
    main(config)
    numbers = json.loads((tmp_path / "demo" / "numbers.json").read_text())
    assert numbers["class_accuracy"] >= 0.95
    assert numbers["fid_samples"] < 4 * numbers["fid_training"]


@pytest.mark.parametrize("name", DEMOS)
def test_the_demo_models_are_small(name):
    assert 1e6 <= count_parameters(DEMOS[name].train.model)["total"] <= 4e6


def test_a_model_of_another_family_than_the_demos_is_refused():
    with pytest.raises(UserError, match=r"model=flowar, but train.model.family=arflow; give model=arflow, or"):
        load_config(DemoConfig, None, ("train.model.variant=arflow-demo",))
    demo = load_config(DemoConfig, None, ("model=arflow", "train.model.depth=4", "draw.guidance=1"))
    assert demo.train.model == dataclasses.replace(DEMOS["arflow"].train.model, depth=4)
    assert demo.draw == dataclasses.replace(DEMOS["arflow"].draw, guidance=1)
