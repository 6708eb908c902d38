import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from flowar.cli import VERBS, main


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "flowar", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_and_its_settings(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert re.search(f"flowar (evaluate )?{verb} ", text.split("example:")[1])
    assert "settings and their defaults" in text


def test_help_lists_every_verb():
    result = run("--help")
    assert result.returncode == 0
    assert all(re.search(rf"^  {verb} ", result.stdout, re.M) for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "'trian' is not a verb; did you mean train?"),
        (["train", "run_dir=a", "data.pth=b"], "data.pth is not a setting; did you mean data.path?"),
        (["train", "none.yaml"], "there is no config file none.yaml"),
        (["train", "a.yaml", "b.yaml"], "got 2 config files, a.yaml, b.yaml; give one"),
        (["train", "somewhere"], "'somewhere' is neither a .yaml file nor a setting"),
        (["train", "--lr", "1e-3"], "--lr is not an option; options are: --help, --dry-run. Settings are written "
         "without dashes, for example optim.lr=..."),
        (["info", "flowar-hh"], "no model is called 'flowar-hh'; did you mean flowar-h?"),
        pytest.param(
            ["prepare", "images=/none", "out_dir=/tmp/none"], "images=/none does not exist", marks=pytest.mark.slow
        ),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line_and_no_traceback(arguments, message):
    result = run(*arguments)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[0]
    assert "Traceback" not in result.stderr


ROOT = Path(__file__).parents[2]
PROGRAMS = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for package in ("benchmarks", "cluster", "data_prep")
    for file in sorted((ROOT / package).rglob("*.py"))
    if "__main__" in file.read_text()
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_every_program_prints_help_and_starts_nothing(program, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(program, run_name="__main__")
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out


def test_the_demo_vae_is_not_trained_into_an_existing_folder(tmp_path, capsys, monkeypatch):
    for words, message in (([str(tmp_path)], "exists already; give a new folder"), ([], "required: out_dir")):
        monkeypatch.setattr(sys, "argv", ["train_demo_vae", *words])
        with pytest.raises(SystemExit):
            runpy.run_module("data_prep.train_demo_vae", run_name="__main__")
        assert message in capsys.readouterr().err


def test_dry_run_prints_the_resolved_config_and_writes_nothing(shards, tmp_path, capsys):
    settings = [f"run_dir={tmp_path / 'run'}", f"data.path={shards}", "model.variant=flowar-demo", "vae.name=demo"]
    main(["train", *settings, "model.num_classes=2", "--dry-run"])
    printed = capsys.readouterr().out
    assert "learning rate 0.0004 = optim.base_lr 5e-05 x batch_size 2048 / 256" in printed
    assert "base_lr: 5.0e-05" in printed and "M parameters; dry run" in printed
    assert "24 images / batch of 2,048" in printed
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_dry_run_is_printed_alone(capsys):
    with pytest.raises(SystemExit, match="data.path=/nowhere does not exist"):
        main(["train", "run_dir=a", "data.path=/nowhere", "--dry-run"])
    assert capsys.readouterr().out == ""


def test_info_prints_parameters_tokens_and_flops(capsys):
    main(["info", "flowar-demo", "num_steps=4"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("flow: blocks", "total", "4 x 4", "GFLOPs per image"))
