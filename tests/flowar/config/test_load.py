import dataclasses
from pathlib import Path

import pytest

from flowar.base.errors import UserError
from flowar.base.records import write_record
from flowar.config.data import PrepareConfig
from flowar.config.drawing import PRESETS, InfoConfig, SampleConfig
from flowar.config.jobs import ClusterConfig, DemoConfig, PipelineConfig
from flowar.config.load import changed_settings, describe_config, load_config, load_described
from flowar.config.models import MODEL_VARIANTS, FlowARConfig
from flowar.config.training import TrainConfig

CONFIGS = Path(__file__).parents[3] / "configs"
REQUIRED = ("run_dir=a", "data.path=b")


@pytest.mark.parametrize("schema", [FlowARConfig, DemoConfig])
def test_a_saved_config_loads_to_the_same_value(schema, tmp_path):
    (tmp_path / "config.yaml").write_text(describe_config(schema()))
    assert load_config(schema, tmp_path / "config.yaml") == schema()


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("run_dir: x\ndata: {path: y}\nbatch_size: 7\nseed: 7\n")
    config = load_config(TrainConfig, tmp_path / "a.yaml", ("seed=8",))
    assert (config.run_dir, config.batch_size, config.seed, config.epochs) == ("x", 7, 8, 400)


def test_a_variant_sets_the_whole_model_and_single_settings_come_on_top():
    config = load_config(TrainConfig, None, (*REQUIRED, "model.variant=flowar-h", "model.dropout=0.2"))
    assert config.model.ar_depth == 30
    assert config.model.dropout == 0.2
    demo = load_config(DemoConfig, None, ("train.model.variant=flowar-s",))
    assert demo.train.model == MODEL_VARIANTS["flowar-s"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optim.lrr=1",), "optim.lrr is not a setting; did you mean optim.lr?"),
        (("optm.lr=1",), "optm is not a setting; did you mean optim?"),
        (("lr=1",), "lr is not a setting; did you mean optim.lr?"),
        (("optim.lr=fast",), "^optim.lr=fast is wrong: it must be a number, or null; for example optim.lr=0.5$"),
        (("batch_size=2.5",), "^batch_size=2.5 is wrong: it must be a whole number; for example batch_size=2048$"),
        (
            ("precision=fp16",),
            "^precision=fp16 is wrong: it must be one of fp32, tf32, bf16; for example precision=tf32$",
        ),
        (("model.scales=[4,2]",), r"model.scales=\[4, 2\] must grow"),
        (("model.ar_depth=3",), "model.ar_depth=3 must be even"),
        (("model.ar_width=100",), "model.ar_width=100 must be a multiple of 4 x model.ar_heads=16"),
        (("model.variant=flowar-xl",), "no model is called 'flowar-xl'; did you mean flowar-l"),
        (("label_dropout=1.5",), r"label_dropout=1.5 must lie in \[0, 1\)"),
        (("attention=flash",), "attention=flash needs precision=bf16"),
        (("preview.guidance_interval=[0.9,0]",), r"preview.guidance_interval=\[0.9, 0.0\] must be"),
        (("preview.num_steps=1",), "preview.num_steps=1 must be at least 2"),
        (("optim.lr=-1",), "optim.lr=-1.0 must be above 0"),
        (("epochs=0",), "epochs=0.0 must be above 0"),
        (
            ("preview.preset=quick",),
            "^preview.preset=quick is wrong: it must be one of quality, balanced, fast, or null",
        ),
        (("preview.preset=${nowhere}",), r"^preview.preset=\$\{nowhere\} can't be resolved: .*'nowhere' not found"),
        (("batch_size",), "neither a file nor a setting"),
        (("seed=[",), "can't read the setting 'seed=\\['"),
        (("run_dir=${",), r"^run_dir=\$\{ can't be resolved: .*a plain \$\{ is written \\\$\{"),
        (("data.path=${oc.env:NO_SUCH}",), r"^data.path=\$\{oc.env:NO_SUCH\} can't be resolved: .*'NO_SUCH' not found"),
        (("optim=5",), "^optim=5 is wrong: .* a section with settings among base_lr, .*example optim.base_lr=5.0e-05$"),
        (("profile_steps=3",), r"be a list of 2 whole numbers, or null; for example profile_steps=\[1,2\]$"),
        (("wandb=[1]",), "it must be a section .*; for example wandb.mode=disabled$"),
        (("model.family=[x]",), "model.family=.*is unknown"),
        (("a.b=1",), "a is not a setting; there are: model, init, vae, [^.]*$"),
    ],
)
def test_bad_settings_are_one_clear_line(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(TrainConfig, None, (*REQUIRED, *overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "words", "message"),
    [
        (SampleConfig, "classes=[{a: 1}]", r"classes holds {'a': 1}; give numbers or names, such as "
         r"classes=\[3,sneaker\]"),
        (SampleConfig, "classes=[0.5]", r"classes=\[0.5\] is wrong: it must be a list of values, each .*"),
        (SampleConfig, "classes=5", r"classes=5 is wrong: it must be a list of .*whole number.*classes=\[1\]"),
        (SampleConfig, "also=png", r"also=png is wrong: it must be a list of values, each one of npz, tar, mds; for "
         r"example also=\[npz\]"),
        (ClusterConfig, "environment=[1]", r"environment=\[1\] is wrong: it must be a section of names and values; for "
         r"example environment=\{name: value\}"),
        (PipelineConfig, "train=5", "train=5 is wrong: it must be a section .*; for example train.epochs=400"),
    ],
)  # fmt: skip
def test_a_wrong_kind_is_named_with_an_example(schema, words, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        load_config(schema, None, (words, *(("model=a", "out_dir=b") if schema is SampleConfig else ())))


def test_a_preset_lies_below_what_is_given_beside_it_and_above_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("num_steps: 50\nguidance: 3.0\n")
    plain = load_config(InfoConfig, file)
    assert (plain.num_steps, plain.solver, plain.guidance) == (50, "euler", 3.0)
    fast = load_config(InfoConfig, file, ("preset=fast",))
    assert {key: getattr(fast, key) for key in PRESETS["fast"]} == PRESETS["fast"] and fast.guidance == 3.0
    file.write_text("num_steps: 50\npreset: fast\n")
    own = load_config(InfoConfig, file, ("solver=heun",))
    assert (own.num_steps, own.solver, own.time_grid) == (50, "heun", PRESETS["fast"]["time_grid"])
    quality = load_config(InfoConfig, file, ("preset=quality", "num_steps=25"))
    assert quality == InfoConfig(**PRESETS["quality"] | {"num_steps": 25}, preset="quality")
    assert load_config(InfoConfig, file, ("preset=null",)) == InfoConfig(num_steps=50)


def test_a_preset_of_a_section_leaves_its_other_defaults():
    draw = load_config(DemoConfig, None, ("draw.preset=fast",)).draw
    assert (draw.guidance, draw.solver) == (DemoConfig().draw.guidance, PRESETS["fast"]["solver"])


def test_required_settings_are_named():
    with pytest.raises(UserError, match="data.path is required"):
        load_config(TrainConfig, None, ("run_dir=a",))
    with pytest.raises(UserError, match="images is required"):
        load_config(PrepareConfig, None, ("out_dir=a",))


def test_bad_files_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="there is no config file .*give the path of a YAML file"):
        load_config(TrainConfig, tmp_path / "none.yaml")
    with pytest.raises(UserError, match="there is no config file .*did you mean .*/flowar_s.yaml"):
        load_config(TrainConfig, CONFIGS / "train" / "flowar_x.yaml")
    (tmp_path / "a.yaml").write_text("a: [1\nb: }")
    with pytest.raises(UserError, match="is not a YAML config"):
        load_config(TrainConfig, tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="holds a list"):
        load_config(TrainConfig, tmp_path / "b.yaml")


DAMAGED_CONFIGS = [
    "5", "text", "1: 2", "null: 1", "? [1]\n: 2", "a: &x [*x]", "!!python/name:os.system", "\0", "seed: ${",
    "model: {variant: '${'}", "a: 1\na: 2", "optim: 5", "optim: {lr: fast}",
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED_CONFIGS)
def test_a_damaged_config_of_a_run_is_named(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as by_user:
        load_config(TrainConfig, file, REQUIRED)
    with pytest.raises(UserError, match=f"^{file}") as of_run:
        load_described(TrainConfig, file)
    assert "\n" not in str(by_user.value) + str(of_run.value)


def test_changed_settings_are_found_by_key():
    before = load_config(TrainConfig, None, REQUIRED)
    after = load_config(TrainConfig, None, (*REQUIRED, "optim.lr=1", "model.scales=[1,2]"))
    assert changed_settings(before, after) == {"optim.lr": (None, 1.0), "model.scales": ((1, 2, 4, 8, 16), (1, 2))}


@pytest.mark.parametrize("file", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_training_recipe_loads(file, tmp_path):
    words = REQUIRED
    if "\ninit:" in file.read_text():  # the model that it starts from isn't here
        write_record(tmp_path / "config.json", dataclasses.asdict(MODEL_VARIANTS["flowar-l"]))
        words = (*words, f"init={tmp_path}")
    config = load_config(TrainConfig, file, words)
    assert config.model.variant in MODEL_VARIANTS


@pytest.mark.parametrize("file", sorted((CONFIGS / "sample").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_sampling_recipe_loads(file):
    assert load_config(SampleConfig, file, ("model=a", "out_dir=b")).num_images == 50_000
