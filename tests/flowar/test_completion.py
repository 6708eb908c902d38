"""Completion in a real bash, as the Tab key asks for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flowar.completion import SCRIPTS, complete

TAB = r"""
flowar() { "$PYTHON" -m flowar "$@"; }
compopt() { :; }  # only works while bash itself completes
source <(flowar completion bash)
COMP_LINE=$1 COMP_POINT=${#1}
COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2))
_flowar
printf '%s\n' "${COMPREPLY[@]}"
"""


def press_tab(folder, line, *words):
    """Return what bash offers at the end of a line that it has cut into words."""
    result = subprocess.run(
        ["bash", "-c", TAB, "bash", line, *words], cwd=folder, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    return result.stdout.split()


def test_bash_completes_verbs_settings_values_and_files(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "other.txt").touch()
    assert press_tab(tmp_path, "flowar tra", "flowar", "tra") == ["train-vae", "train"]
    found = press_tab(tmp_path, "flowar train optim.l", "flowar", "train", "optim.l")
    assert found == ["optim.lr="]
    assert "recipe.yaml" in press_tab(tmp_path, "flowar train re", "flowar", "train", "re")
    # bash cuts words at "=" and wants only what comes after it
    found = press_tab(tmp_path, "flowar sample solver=e", "flowar", "sample", "solver", "=", "e")
    assert found == ["euler", "euler-maruyama"]


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        ("flowar train model.variant=flowar-x", ["model.variant=flowar-xs", "model.variant=flowar-xxs"]),
        ("flowar train parallel.compile=", ["parallel.compile=true", "parallel.compile=false"]),
        ("flowar help optim.min", ["optim.min_lr"]),
        ("flowar submit sam", ["sample"]),
        ("flowar submit train configs/x.yaml cluster.no", ["cluster.nodes="]),
        ("flowar evaluate make", ["make-reference"]),
        ("flowar completion f", ["fish"]),
        ("flowar nothing x", []),
    ],
)
def test_what_may_stand_at_the_end_of_a_line(line, needed):
    assert complete(line) == needed


@pytest.mark.parametrize("shell", [shell for shell in SCRIPTS if shutil.which(shell)])
def test_the_script_is_one_of_its_shell(shell):
    subprocess.run([shell, "-n"], input=SCRIPTS[shell], text=True, check=True)
