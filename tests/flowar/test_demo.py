import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

SHORT = ["train.epochs=1", "num_samples=40", "num_steps=4", "train.preview.num_steps=2"]


def demo(run_dir):
    command = [sys.executable, "-m", "flowar", "demo", f"run_dir={run_dir}", *SHORT]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_the_demo_ends_in_a_report_and_runs_again_in_place(tmp_path):
    """One epoch: the way, not the quality. The full demo is measured by hand (README)."""
    first = demo(tmp_path)
    assert first.returncode == 0, first.stderr
    report = tmp_path / "report.html"
    assert f"open {report}" in first.stdout
    page = report.read_text()
    pictures = re.findall(r'src="(.{30})', page)
    assert len(pictures) == 4 and all(source.startswith("data:image/png;base64,") for source in pictures)
    assert not re.search(r'(src|href)="https?:', page)
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert f"{numbers['class_accuracy']:.1%}" in page
    assert numbers["judge_accuracy"] >= 0.98
    assert 0 <= numbers["class_accuracy"] <= 1 and numbers["fid_training"] > 0
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.size == (2 + 4 * 66, 2 + 10 * 66)  # four of each of ten classes

    weights = {file: file.read_bytes() for file in (tmp_path / "train").rglob("model.safetensors")}
    second = demo(tmp_path)
    assert second.returncode == 0, second.stderr
    assert "0 still to draw" in second.stdout
    assert all(file.read_bytes() == content for file, content in weights.items())


def test_the_demo_model_is_small():
    from flowar.config.models import MODEL_VARIANTS
    from flowar.models.flowar.model import FlowAR

    with torch.device("meta"):
        parameters = sum(p.numel() for p in FlowAR(MODEL_VARIANTS["flowar-demo"]).parameters())
    assert 1e6 <= parameters <= 3e6
