"""Settings and files of somebody else: their texts are literal, and what came from the environment stays private."""

import dataclasses
import json
import shutil
import stat

import pytest

from flowar import train
from flowar.base.errors import UserError
from flowar.base.files import write_text
from flowar.config.jobs import ClusterConfig
from flowar.config.load import (
    changed_settings,
    describe_changes,
    describe_config,
    has_environment,
    load_config,
    load_described,
)
from flowar.config.training import TrainConfig
from flowar.models.build import config_from_dict, create_model
from flowar.models.folders import load_model, save_model
from tests.conftest import MORE, tiny_config, training, written_by_0_1

SECRET = "not-to-be-seen"
REQUIRED = ("run_dir=a", "data.path=b")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("FLOWAR_SECRET", SECRET)


def change(**settings):
    return lambda config: config | settings


ATTACKS = {
    "a list": lambda config: [],
    "a text": lambda config: "flowar-l",
    "nothing": lambda config: None,
    "a variant of the environment": change(variant="${oc.env:FLOWAR_SECRET}"),
    "a family of the environment": change(family="${oc.env:FLOWAR_SECRET}"),
    "a number of the environment": change(num_classes="${oc.env:FLOWAR_SECRET}"),
    "a reference": change(num_classes="${ar_depth}"),
    "half a reference": change(num_classes="${"),
    "a text for a number": change(num_classes="many"),
    "a list for a number": change(num_classes=[5]),
    "a number for a list": change(scales=5),
    "texts in a list": change(scales=["a"]),
    "an object for a number": change(num_classes={"a": 1}),
    "a list for a family": change(family=["flowar"]),
    "nothing for a number": change(num_classes=None),
    "an unknown setting": change(**{"a.b=c": 1}),
    "no number": change(dropout=float("nan")),
    "a missing one": change(num_classes="???"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_wrong_config_of_a_model_is_refused_and_reads_no_variable(tmp_path, attack):
    model = create_model(tiny_config())
    save_model(model.config, model.state_dict(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(ATTACKS[attack](json.loads(file.read_text()))))
    with pytest.raises(UserError, match="model/config.json") as refused:
        load_model(tmp_path / "model")
    assert SECRET not in str(refused.value) and "\n" not in str(refused.value)


LITERALS = [
    "${oc.env:FLOWAR_SECRET}",
    r"\\${b}",
    "${",
    "null",
    *(pytest.param(text, marks=MORE) for text in (r"\${b}", "a${b}c${d}\\", "$${a}", "[${a}]", "1e-4", "it's")),
]


@pytest.mark.parametrize("text", LITERALS)
def test_a_literal_text_is_written_and_read_back_as_it_is(tmp_path, text):
    before = load_config(TrainConfig, None, REQUIRED)
    config = dataclasses.replace(before, run_dir=text, wandb=dataclasses.replace(before.wandb, entity=text))
    (tmp_path / "config.yaml").write_text(describe_config(config))
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config
    assert load_described(TrainConfig, tmp_path / "config.yaml") == config
    assert changed_settings(before, config) == {"run_dir": ("a", text), "wandb.entity": (None, text)}
    model = dataclasses.replace(config.model, variant=text)
    (tmp_path / "changes.yaml").write_text(describe_changes(before, dataclasses.replace(config, model=model)))
    assert SECRET not in (tmp_path / "changes.yaml").read_text()


def test_the_config_of_somebody_elses_run_reads_no_variable(shards, trained, tmp_path, capsys):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    file = run_dir / "config.yaml"
    text = written_by_0_1(file)
    file.write_text(text.replace("project: flowar", "project: ${oc.env:FLOWAR_SECRET}"))
    assert load_described(TrainConfig, file).wandb.project == "${oc.env:FLOWAR_SECRET}"
    train.main(training(shards, run_dir, epochs=2))
    printed = capsys.readouterr().out
    assert "wandb.project was ${oc.env:FLOWAR_SECRET}, now flowar" in printed and SECRET not in printed


def test_a_models_own_name_is_literal():
    settings = dataclasses.asdict(tiny_config()) | {"variant": "custom"}
    assert config_from_dict(settings) == tiny_config()
    with pytest.raises(UserError, match=r"no model is called '\$\{oc.env:FLOWAR_SECRET\}'"):
        config_from_dict(settings | {"variant": "${oc.env:FLOWAR_SECRET}"})


def test_what_came_from_the_environment_is_known():
    words = ("wandb.entity=${oc.env:FLOWAR_SECRET}", "ema.decays=[0.9]")
    config = load_config(TrainConfig, None, (*REQUIRED, *words))
    assert config.wandb.entity == SECRET and has_environment(config) and has_environment(dataclasses.replace(config))
    assert not has_environment(load_config(TrainConfig, None, REQUIRED))
    cluster = load_config(ClusterConfig, None, ("environment.KEY=${oc.env:FLOWAR_SECRET}", "environment.LITERAL=a"))
    assert cluster.environment == {"KEY": SECRET, "LITERAL": "a"}
    assert [has_environment(cluster.environment[name]) for name in ("KEY", "LITERAL")] == [True, False]
    spaced = load_config(TrainConfig, None, (*REQUIRED, "wandb.entity='${ oc.env:FLOWAR_SECRET }'"))
    assert spaced.wandb.entity == SECRET and has_environment(spaced)
    assert cluster.environment["KEY"].source == "${oc.env:FLOWAR_SECRET}"


@pytest.mark.parametrize(
    ("entity", "mode"), [("${oc.env:FLOWAR_SECRET}", 0o600), pytest.param("me", 0o644, marks=MORE)]
)
def test_a_runs_config_with_a_text_of_the_environment_is_private(shards, tmp_path, entity, mode):
    run_dir, words = tmp_path / "run", tmp_path / "words.yaml"
    words.write_text(describe_config(training(shards, run_dir, epochs=1)))
    train.main(load_config(TrainConfig, words, (f"wandb.entity={entity}",)))
    file = run_dir / "config.yaml"
    write_text(tmp_path / "plain", "")
    plain = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE(file.stat().st_mode) == mode & plain
    leaks = [found for found in run_dir.rglob("*") if found.is_file() and SECRET.encode() in found.read_bytes()]
    assert sorted(leaks) == ([file, run_dir / "history.jsonl"] if entity != "me" else [])
    assert {stat.S_IMODE(leak.stat().st_mode) for leak in leaks} <= {0o600}
