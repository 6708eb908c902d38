"""The runner for GPU machines, tested without a GPU: every part at toy size."""

import json

import pytest

from benchmarks import gpu
from tests.conftest import ALL

OTHER_SIZES = ("256", "tf32")  # the same code as the parts of 64 images in bfloat16


def test_without_a_gpu_it_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^no GPU found: run this on a machine with a GPU, or check"):
        gpu.main(["--out", str(tmp_path / "gpu.json")])


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path, capfd):
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--out", str(out)]
    gpu.main([*words, "--parts", "limits"])  # in its own process
    before = json.loads(out.read_text())["parts"]["limits"]
    chosen = [name for name in gpu.PARTS if ALL or not any(size in name for size in OTHER_SIZES)]
    gpu.main([*words, "--timeout-s", "0", "--parts", *chosen])
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == chosen
    assert {name: part["error"] for name, part in parts.items() if "error" in part} == {}
    assert parts["limits"] == before  # what is done is kept
    assert parts["train-bf16"]["baseline"]["images_per_s"] > 0
    assert parts["syncs"]["train"]["reads"] == parts["syncs"]["sample"]["reads"] == 0
    assert parts["syncs"]["reads_per_step_of_flowar_train"] <= 3


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_killed_and_repeated_on_request(tmp_path, capfd):
    out = tmp_path / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--out", str(out), "--parts", "limits"]
    gpu.main([*words, "--timeout-s", "0.01"])
    assert json.loads(out.read_text())["parts"]["limits"] == {"error": "took more than 0.01 s"}
    gpu.main([*words, "--timeout-s", "0"])
    assert "error" in json.loads(out.read_text())["parts"]["limits"]
    gpu.main([*words, "--timeout-s", "0", "--again"])
    assert json.loads(out.read_text())["parts"]["limits"]["fp32"]["tflops"] > 0


def test_figures_of_two_machines_are_not_mixed(tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"machine": {"device": "another"}, "parts": {}}))
    with pytest.raises(SystemExit, match="another.*give another --out"):
        gpu.main(["--device", "cpu", "--tiny", "--out", str(out)])


def test_pauses_are_the_gaps_between_work_in_the_second_half():
    # microseconds: updates end at 0, 1000 and 2000; from 1000 on 300 of work, a pause of 600, 100 of work
    found = gpu.pauses([(0, 1000), (1000, 1300), (1100, 1200), (1900, 2000)], updates=[0, 1000, 2000])
    assert found == {"busy_share": 0.4, "longest_pauses_ms": [0.6]}
