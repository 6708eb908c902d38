import json
import re

import pytest
import torch
from PIL import Image

from flowar import cli
from tests.processes import join, start

SHORT = ["train.epochs=1", "num_samples=40", "draw.num_steps=4", "train.preview.num_steps=2"]


def demo(run_dir, log):
    """Return what the demo prints."""
    join([start(cli.main, ["demo", f"run_dir={run_dir}", *SHORT], log=log)], log)
    return log.read_text()


@pytest.mark.slow
def test_the_demo_ends_in_a_report_and_runs_again_in_place(tmp_path):
    """One epoch: the way, not the quality. The full demo is measured by hand (README)."""
    printed = demo(tmp_path / "demo", tmp_path / "log")
    run_dir = tmp_path / "demo"
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


def test_the_demo_model_is_small():
    from flowar.config.models import MODEL_VARIANTS
    from flowar.models.flowar.model import FlowAR

    with torch.device("meta"):
        parameters = sum(p.numel() for p in FlowAR(MODEL_VARIANTS["flowar-demo"]).parameters())
    assert 1e6 <= parameters <= 3e6
