"""The page of `flowar evaluate`: hostile names, published numbers. The pages of the demo: tests/flowar/test_demo.py."""

import json
import re
import shutil

import pytest

from flowar import evaluate
from flowar.config.measuring import EvaluateConfig, ExtractorConfig
from flowar.evaluation.demo_images import write_image_folders
from flowar.evaluation.expected import EXPECTED, MEASURED_SOURCE, PAPER_SOURCE, show_published
from flowar.evaluation.extractors import OWN
from flowar.evaluation.page import numbers_table
from tests.browser import check_page
from tests.conftest import ROOT, save_untrained_judge

CLASSES = ("<img src=x onerror=alert(1)>", "<script>alert(2)<", "<b>bold<")  # names of folders: without a slash


def test_the_page_opens_in_a_browser_and_hostile_names_stay_text(tmp_path, browser):
    write_image_folders(tmp_path)
    root = tmp_path / "<script>alert(3)<"
    for name, split in (("samples", "train"), ("reference", "held_out")):
        for number, class_name in enumerate(CLASSES):
            (root / name / class_name).mkdir(parents=True)
            for file in sorted((tmp_path / split / str(number)).iterdir())[:8]:
                shutil.copy(file, root / name / class_name)
    save_untrained_judge(tmp_path / "judge.safetensors", CLASSES)
    config = EvaluateConfig(
        samples=str(root / "samples"), reference=str(root / "reference"), out_dir=str(tmp_path / "out"),
        protocol="torch-fidelity", interval_groups=0,
        extractor=ExtractorConfig(name=OWN, weights=str(tmp_path / "judge.safetensors")),
    )  # fmt: skip
    evaluate.main(config)
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert set(record["classes"]["confusion"]) == set(CLASSES)
    names = (str(root / "samples"), *(f"shows {name}" for name in CLASSES))
    check_page(browser, tmp_path / "out" / "report.html", names=names, num_images=3)


@pytest.mark.parametrize("variant", [*EXPECTED, "custom", None])
def test_numbers_stand_beside_the_papers_and_those_that_others_measured(variant):
    metrics = {name: {"value": 0.5} for name in ("fid", "inception_score", "precision", "recall", "kid")}
    sampling = None if variant is None else {"variant": variant}
    table = numbers_table({"sampling": sampling, "metrics": metrics})
    assert (f"{variant}: {PAPER_SOURCE}" in table) == (variant in EXPECTED)
    assert (f"{variant}: {MEASURED_SOURCE}" in table) == (variant in ("flowar-s", "flowar-l", "flowar-h"))
    for source in EXPECTED.get(variant, ()):
        for name in source.metrics:
            assert f"<td>{show_published(name, source)}</td>" in table
    assert table.count("<td>FID</td>") == table.count("<td>KID</td>") == table.count("<td>inception score</td>") == 1
    if variant == "flowar-h":
        assert "<td>1.65</td><td>1.67 to 1.68</td>" in table and "<td>296.5</td><td>274.1 to 276.3</td>" in table
        assert "<td>0.83</td><td>0.80</td>" in table and "<td>0.60</td><td>0.62</td>" in table


@pytest.mark.parametrize(
    "config", sorted((ROOT / "configs").glob("*/flowar_?.yaml")), ids=lambda file: f"{file.parent.name}/{file.name}"
)
def test_the_headers_of_the_recipes_name_the_same_numbers(config):
    paper, *others = EXPECTED[f"flowar-{config.stem[-1]}"]
    header = " ".join(line.lstrip("# ") for line in config.read_text().splitlines() if line.startswith("#"))
    expected = {"train": [paper], "sample": [paper, *others], "sweep": []}[config.parent.name]
    found = re.findall(r"FID (\S+(?: to \S+)?), IS ([\d.]+(?: to [\d.]+)?)[;.]? ", header)
    assert [(fid, score.rstrip(".")) for fid, score in found] == [
        (show_published("fid", source), show_published("inception_score", source)) for source in expected
    ]


def test_the_docs_name_the_same_numbers():
    """Rounded further, or left out, but not others."""
    section = (ROOT / "docs" / "results.md").read_text().split("## Published")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| FlowAR")
    ]
    assert len(rows) == sum(map(len, EXPECTED.values()))
    for model, *cells, by in rows:
        source = EXPECTED[model.lower()]["others" in by]
        for name, cell in zip(("fid", "inception_score", "precision", "recall"), cells, strict=True):
            for shown, exact in zip(cell.split(" to "), show_published(name, source).split(" to "), strict=True):
                decimals = len(shown.partition(".")[2])
                assert not shown or shown == f"{float(exact):.{decimals}f}", (model, name, shown, exact)
