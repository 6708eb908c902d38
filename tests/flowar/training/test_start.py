"""A run that starts from weights: what it copies, what it refuses, frozen and slower parts with every engine."""

import dataclasses
import json
import shutil

import pytest
import torch

from flowar.base.errors import UserError
from flowar.base.records import write_record
from flowar.base.run_folder import find_latest, optimizer_key
from flowar.config.load import load_config
from flowar.config.models import FlowARConfig
from flowar.config.starting import InitConfig
from flowar.config.training import OptimConfig, ParallelConfig, TrainConfig
from flowar.latents.schema import read_passport
from flowar.models.build import convert_released, create_model, released_time_grid
from flowar.models.checkpoint_files import CheckedReader
from flowar.models.flowar.generate import sample_latents
from flowar.models.flowar.loss import training_loss
from flowar.models.folders import load_model, save_model
from flowar.models.transfer import check_related, match_grids, plan_transfer, resize_positions, transfer
from flowar.train import main
from flowar.training.report import read_metrics
from flowar.training.setup import keep_recorded_rate
from flowar.training.start import begin, plan_start
from tests.conftest import MORE, arflow_training, load_vectors, randomise, released_state, tiny_config, training
from tests.flowar.ranks import run_ranks

ENGINES = {
    "single": ParallelConfig(engine="single"),
    "ddp": ParallelConfig(engine="ddp"),
    "fsdp": ParallelConfig(engine="fsdp"),
    "zero1": ParallelConfig(engine="deepspeed", zero_stage=1),
    "zero2": ParallelConfig(engine="deepspeed", zero_stage=2),
    "zero3": ParallelConfig(engine="deepspeed", zero_stage=3),
}
TOLERANCE = 2e-5  # of weights after some steps, as ranks add up in another order


@pytest.fixture(scope="module")
def kept_source(shards, tmp_path_factory):
    """A model folder that fits the shards, with random weights."""
    folder = tmp_path_factory.mktemp("kept") / "source"
    model = randomise(create_model(dataclasses.replace(training(shards, folder).model, dropout=0.0)))
    save_model(model.config, model.state_dict(), folder)
    return folder


@pytest.fixture
def source(kept_source, tmp_path):
    """A copy of the model folder."""
    return shutil.copytree(kept_source, tmp_path / "source")


def starting(shards, run_dir, source, **changes):
    """A run of a few steps that starts from a model folder."""
    config = training(shards, run_dir, init=InitConfig(model=str(source)), epochs=1, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))


@pytest.mark.parametrize("name", ["flowar_attn_mlp", "flowar_cross_attn"])
def test_converted_weights_keep_every_vector_before_the_first_step(name, shards, tmp_path):
    """A run's fresh model that starts with converted weights has these weights, and the authors' loss and samples."""
    vectors = load_vectors(name)
    source = convert_released(released_state(vectors))
    save_model(source.config, source.state_dict(), tmp_path / "model")
    init = InitConfig(model=str(tmp_path / "model"))
    config = training(shards, tmp_path / "run", model=source.config, init=init)
    (tmp_path / "run").mkdir()
    torch.manual_seed(1)
    model = create_model(config.model)
    names = [str(number) for number in range(source.config.num_classes)]
    begin(plan_start(config, dataclasses.replace(read_passport(shards), class_names=names)), config, model)
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in model.state_dict().items())
    loss = training_loss(model, vectors["latents"], vectors["labels"], vectors["train.time"].T, vectors["train.noise"])
    torch.testing.assert_close(loss, vectors["train.loss"][0], rtol=2e-6, atol=0)
    settings = {"guidance": 4.3, "guidance_interval": (0.0, 0.9), "noise": vectors["sample.s25.noise"]}
    latents = sample_latents(model, vectors["labels"], time_grid=released_time_grid(25), **settings)
    assert ((latents - vectors["sample.s25.latents"]).norm() / latents.norm()).item() < 1e-5


def test_a_run_has_the_inits_weights_at_step_0_and_resumes_without_it(shards, source, tmp_path, capsys):
    run_dir = tmp_path / "run"
    config = starting(shards, run_dir, source, optim=OptimConfig(lr=1e-3, warmup_epochs=1), save_every_steps=1)
    config = dataclasses.replace(config, keep_checkpoints=9)
    main(config)  # the learning rate of the first step is 0
    before, after = load_model(source).state_dict(), load_model(run_dir / "checkpoints" / "step_00000001", "raw")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.state_dict().items())
    printed = " ".join(capsys.readouterr().out.split())
    assert "starts from" in printed and "2 of 2 classes start with a row of the init, matched by number" in printed
    record = json.loads((run_dir / "init.json").read_text())
    assert sum(counts["loaded"][1] for counts in record["parts"].values()) == sum(t.numel() for t in before.values())
    shutil.copytree(source, tmp_path / "moved")
    shutil.rmtree(source)
    main(dataclasses.replace(config, epochs=2))
    assert read_metrics(run_dir)[-1]["step"] == 6
    words = (f"init={source}", f"run_dir={run_dir}", f"data.path={shards}")
    assert load_config(TrainConfig, None, words).model == config.model  # as the run has it
    main(dataclasses.replace(config, epochs=3, init=InitConfig(model=str(tmp_path / "moved"))))
    assert "which holds the same weights" in capsys.readouterr().out
    other = randomise(create_model(config.model), seed=5)
    save_model(config.model, other.state_dict(), tmp_path / "other")
    with pytest.raises(UserError, match="holds another run: init.model was .*moved, now .*other"):
        main(dataclasses.replace(config, epochs=3, init=InitConfig(model=str(tmp_path / "other"))))
    with pytest.raises(UserError, match="holds another run: init.model was .*moved, now None"):
        main(dataclasses.replace(config, epochs=3, init=InitConfig()))


def test_a_run_killed_before_its_first_checkpoint_restarts_with_the_same_weights_or_not_at_all(
    shards, source, tmp_path
):
    run_dir = tmp_path / "run"
    config = starting(shards, run_dir, source)
    main(config)
    shutil.rmtree(run_dir / "checkpoints")
    main(config)
    shutil.rmtree(run_dir / "checkpoints")
    save_model(config.model, randomise(create_model(config.model), seed=5).state_dict(), source)
    with pytest.raises(UserError, match="started from other weights than init.model"):
        main(config)


def test_the_shape_is_the_inits_fitted_to_the_dataset_unless_it_is_given(shards, tmp_path):
    config = tiny_config(scales=(1, 2, 4), latent_channels=3, num_classes=7)
    save_model(config, create_model(config).state_dict(), tmp_path / "model")
    words = (f"init={tmp_path / 'model'}", f"run_dir={tmp_path / 'run'}", f"data.path={shards}")
    model = load_config(TrainConfig, None, words).model
    assert (model.num_classes, model.latent_channels, model.scales) == (2, 1, (1, 2, 4, 8))
    assert (model.position_span, model.ar_width) == (4, 32)
    given = load_config(TrainConfig, None, (*words, "model.scales=[2,8]", "model.position_span=null")).model
    assert (given.scales, given.position_span, given.num_classes) == ((2, 8), None, 2)
    assert load_config(TrainConfig, None, (*words, "model.variant=flowar-s")).model.ar_width == 768
    (tmp_path / "recipe.yaml").write_text(f"init: {tmp_path / 'model'}\n")
    from_file = load_config(TrainConfig, tmp_path / "recipe.yaml", (*words[1:], "init.weights=raw"))
    assert from_file.model == model and from_file.init == InitConfig(model=str(tmp_path / "model"), weights="raw")
    assert load_config(TrainConfig, None, (*words, "init=null")).model == FlowARConfig()
    (tmp_path / "data").mkdir()
    write_record(tmp_path / "data" / "dataset.json", {"class_names": ["a"], "moments_shape": [2, 6, 6]})
    with pytest.raises(UserError, match=r"latents of side 6 .*set model.scales, for example model.scales=\[1,2,4,6\]"):
        load_config(TrainConfig, None, (*words[:2], f"data.path={tmp_path / 'data'}"))
    with pytest.raises(UserError, match=r"init.model=.*nowhere is not a model \(there is no such folder\)"):
        load_config(TrainConfig, None, ("init=/nowhere", *words[1:]))


def test_rows_of_the_label_table_follow_names_numbers_or_a_list(shards, source, tmp_path):
    config = starting(shards, tmp_path / "run", source)
    passport = json.loads((shards / "dataset.json").read_text())
    data = read_passport(shards)
    assert plan_start(config, data).rows == [0, 1]  # of a folder without class names
    write_record(source / "dataset.json", passport | {"class_names": ["light", "cat"]})
    plan = plan_start(config, data)
    assert passport["class_names"] == ["dark", "light"] and plan.rows == [None, 0]
    table = next(outcome for outcome in plan.outcomes if outcome.name == "ar.class_embedding.weight")
    assert (table.loaded, table.fresh, table.dropped, table.is_old) == (64, 32, 32, False)
    listed = dataclasses.replace(config, init=InitConfig(model=str(source), classes=("cat", "new")))
    assert plan_start(listed, data).rows == [1, None]
    (tmp_path / "classes.txt").write_text("1\nlight\n")
    filed = dataclasses.replace(config, init=InitConfig(model=str(source), class_file=str(tmp_path / "classes.txt")))
    assert plan_start(filed, data).rows == [1, 0]
    for classes, message in (
        (("cat",), "names 1 classes, but the dataset has 2"),
        (("cat", "7"), "'7' is not a class"),
    ):
        wrong = dataclasses.replace(config, init=InitConfig(model=str(source), classes=classes))
        with pytest.raises(UserError, match=message):
            plan_start(wrong, data)
    model = create_model(config.model)
    fresh, state = model.ar.class_embedding.weight.clone(), load_model(source).state_dict()
    transfer(model, state, config.model, [None, 0])
    rows, old = model.ar.class_embedding.weight, state["ar.class_embedding.weight"]
    assert torch.equal(rows[0], fresh[0]) and torch.equal(rows[1], old[0]) and torch.equal(rows[2], old[2])


def test_a_larger_latent_keeps_known_scales_and_interpolates_new_ones():
    assert match_grids((1, 2, 4), (1, 2, 3, 4, 8)) == [(1, 1), (2, 2), (3, 4), (4, 4), (8, 4)]
    rows = torch.arange(4.0)[:, None].expand(4, 4).flatten()[:, None]  # each position says its row
    table = resize_positions(torch.cat([torch.zeros(1, 1), rows]), (1, 4), (4, 8))
    assert torch.equal(table[:16], rows)
    larger = table[16:].view(8, 8)
    torch.testing.assert_close(larger, larger[:, :1].expand(8, 8))
    torch.testing.assert_close(larger[2:6, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]), rtol=0, atol=0.1)


def test_the_coarse_scales_of_a_larger_model_compute_what_the_smaller_one_does():
    """Same tables, same angles: before any step both give the same semantics."""
    small = randomise(create_model(tiny_config()))
    old = small.config
    large = create_model(dataclasses.replace(old, scales=(1, 2, 4, 8), position_span=4))
    transfer(large, small.state_dict(), old, list(range(5)))
    torch.manual_seed(0)
    inputs, labels = torch.randn(2, 20, 3), torch.tensor([1, 3])
    with torch.no_grad():
        mine, _ = large.ar(inputs, labels, range(3))
        expected, _ = small.ar(inputs, labels, range(3))
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_other_latents_make_the_projections_fresh_and_keep_the_rest():
    old, new = tiny_config(), tiny_config(latent_channels=4)
    outcomes = plan_transfer(old, new, [0, 1, 2, 3, 4])
    fresh = {outcome.name for outcome in outcomes if outcome.fresh}
    projections = ("ar.input_projection", "flow.input_projection", "flow.output_projection")
    assert fresh == {f"{name}.{kind}" for name in projections for kind in ("weight", "bias")}
    assert all(outcome.loaded for outcome in outcomes if outcome.name not in fresh)


def test_what_cannot_start_from_an_init_is_refused_with_what_to_change(shards, source, tmp_path):
    with pytest.raises(
        UserError, match=r"another size: model.ar_width=64 \(init: 32\); set model.ar_width=32, or leave"
    ):
        check_related(tiny_config(), tiny_config(ar_width=64))
    config = dataclasses.replace(arflow_training(shards, tmp_path / "run"), init=InitConfig(model=str(source)))
    with pytest.raises(
        UserError, match="init.model is of the family flowar, but model.family=arflow; give another init"
    ):
        main(config)
    flowar = starting(shards, tmp_path / "run", source)
    with pytest.raises(UserError, match="init.weights=raw chooses among the weights of a run"):
        main(dataclasses.replace(flowar, init=InitConfig(model=str(source), weights="raw")))
    content = bytearray((source / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (source / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors is damaged .*; export or convert it again"):
        main(flowar)
    (source / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        main(flowar)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("ar",), r"optim.frozen=ar matches no parameter; .*for example, ar\.\*"),
        (("nothing*",), r"optim.frozen=nothing\* matches no parameter"),
        (("*",), r"optim.frozen=\['\*'\] leaves nothing to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused_at_once(shards, tmp_path, frozen, message):
    with pytest.raises(UserError, match=message):
        main(training(shards, tmp_path / "run", optim=OptimConfig(lr=1e-3, frozen=frozen)), dry_run=True)
    assert not (tmp_path / "run").exists()


OPTIM = OptimConfig(lr=1e-2, warmup_epochs=0.1, frozen=("ar.lower_blocks.*", "*.bias"), init_lr_factor=0.01)


def tuning(shards, run_dir, source, engine, **changes):
    """A run with frozen parts, and a fresh row in the label table, which alone learns at the full rate."""
    init = InitConfig(model=str(source), classes=("1", "new"))
    settings = {"optim": OPTIM, "parallel": ENGINES[engine], "log_every_steps": 1, "init": init, "epochs": 2}
    return dataclasses.replace(starting(shards, run_dir, source), **(settings | changes))


@pytest.fixture(scope="module")
def alone(shards, kept_source, tmp_path_factory):
    """Such a run on one process, resumed halfway."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    main(tuning(shards, run_dir, kept_source, "single", epochs=1))
    main(tuning(shards, run_dir, kept_source, "single"))
    return run_dir


def test_frozen_parts_do_not_change_and_have_no_state_and_old_parts_learn_slowly(kept_source, alone):
    before, after = load_model(kept_source).state_dict(), load_model(alone, "raw").state_dict()
    average = load_model(alone).state_dict()
    keys = CheckedReader(find_latest(alone)).read_metadata().state_dict_metadata
    for name in before:
        is_frozen = name.startswith("ar.lower_blocks.") or name.endswith(".bias")
        assert (optimizer_key(name, "exp_avg") in keys) != is_frozen, name
        if name != "ar.class_embedding.weight":
            assert torch.equal(before[name], after[name]) == is_frozen, name
            assert (after[name] - before[name]).abs().max() <= 1.1 * 6 * 1e-2 * 0.01 * (not is_frozen), name
        if is_frozen:
            assert torch.equal(average[name], after[name])
    table, old = after["ar.class_embedding.weight"], before["ar.class_embedding.weight"]
    assert (table[0] - old[1]).abs().max() > 1e-3  # a table with a fresh row learns like a fresh one


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        "fsdp",
        "zero3",
        pytest.param("zero2", marks=MORE),
        pytest.param("ddp", marks=MORE),
        pytest.param("zero1", marks=MORE),
    ],
)
def test_all_engines_freeze_and_slow_the_same_parts_and_resume(shards, kept_source, alone, tmp_path, engine):
    """Started and resumed with one engine on two processes; then one process reads its checkpoint."""
    run_dir, longer, log = tmp_path / engine, tmp_path / "longer", tmp_path / "log"
    run_ranks(tuning(shards, run_dir, kept_source, engine, epochs=1), 2, log)
    run_ranks(tuning(shards, run_dir, kept_source, engine), 2, log)
    assert_same_weights(run_dir, alone, "raw", "ema")
    shutil.copytree(alone, longer)
    for folder in (run_dir, longer):
        main(tuning(shards, folder, kept_source, "single", epochs=3))
    assert_same_weights(run_dir, longer, "raw", "ema")


def assert_same_weights(run_dir, needed, *kinds):
    for weights in kinds:
        found, expected = load_model(run_dir, weights).state_dict(), load_model(needed, weights).state_dict()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=TOLERANCE, msg=f"{weights} {name}")


def test_the_learning_rate_follows_from_the_batch_unless_it_is_given(shards, tmp_path, capsys):
    words = (f"run_dir={tmp_path / 'run'}", f"data.path={shards}")
    assert load_config(TrainConfig, None, words).optim.peak_lr(2048) == pytest.approx(4e-4)
    assert OptimConfig(lr=1e-3).peak_lr(8) == 1e-3
    main(training(shards, tmp_path / "run", optim=OptimConfig(base_lr=1e-2), batch_size=24), dry_run=True)
    assert "learning rate 0.0009375 = optim.base_lr 0.01 x batch_size 24 / 256" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"the learning rate 1.5625e-06 = .* is below optim.min_lr=1e-05"):
        main(training(shards, tmp_path / "run", optim=OptimConfig()), dry_run=True)


def test_a_run_of_version_0_1_keeps_its_learning_rate(shards, tmp_path):
    config = training(shards, tmp_path)
    now = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=None))
    file = tmp_path / "config.yaml"
    file.write_text(f"run_dir: {tmp_path}\ndata: {{path: {shards}}}\noptim: {{lr: 0.0004}}\nbatch_size: 8\n")
    assert keep_recorded_rate(now).optim.lr == 4e-4
    file.write_text(file.read_text() + "# base_lr:\n")
    assert keep_recorded_rate(now).optim.lr is None
