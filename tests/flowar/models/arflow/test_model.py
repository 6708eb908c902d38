"""ARFlow's network and what is asked of its family, on a tiny model: facts that hold whatever the weights."""

import dataclasses
import functools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import flowar
from flowar.base.errors import UserError
from flowar.bench import peak_of
from flowar.config.drawing import DrawConfig
from flowar.config.models import MODEL_VARIANTS, ARFlowConfig
from flowar.config.training import RecipeConfig
from flowar.latents.batches import Batch
from flowar.models.arflow import family
from flowar.models.build import compile_blocks, config_from_dict, create_model, family_of, released_time_grid
from flowar.models.costs import count_parameters, count_training_flops
from flowar.models.folders import load_model, save_model
from flowar.models.solvers import uniform_time_grid
from flowar.training.step import StepSettings, draw_training_inputs, drawn_bytes
from tests.conftest import randomise

TINY = {"depth": 2, "width": 16, "heads": 2, "latent_size": 4, "num_classes": 3, "variant": "custom"}
IMAGES = 4
COUNTS = {
    "s/2": 34_643_744, "s/4": 34_699_136, "s/8": 34_920_704, "b/2": 137_467_424, "b/4": 137_578_112, "b/8": 138_020_864,
    "l/2": 483_301_408, "l/4": 483_448_960, "l/8": 484_039_168, "xl/2": 712_445_216, "xl/4": 712_546_688,
    "xl/8": 713_210_624,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomise(create_model(ARFlowConfig(**TINY))).double()


@pytest.fixture
def sequence(model):
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, IMAGES, *model.config.latent_shape, generator=generator).double()
    return noisy, torch.rand(2, IMAGES, generator=generator).double(), torch.tensor([0, 3])


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    assert count_parameters(MODEL_VARIANTS[f"arflow-{name}"])["total"] == COUNTS[name]


@torch.no_grad()
def test_one_call_equals_calls_image_by_image_and_in_pieces(model, sequence):
    noisy, time, labels = sequence
    velocity, state = model(noisy, time, labels)
    for pieces in ([1] * IMAGES, [3, 1], [2, 2]):
        carried, parts, start = None, [], 0
        for size in pieces:
            span = slice(start, start + size)
            part, carried = model(noisy[:, span], time[:, span], labels, carried)
            parts.append(part)
            start += size
        torch.testing.assert_close(torch.cat(parts, dim=1), velocity)
        torch.testing.assert_close(carried.memories, state.memories)


@torch.no_grad()
@pytest.mark.parametrize("changed", range(IMAGES))
def test_an_image_changes_itself_and_later_ones_alone(model, sequence, changed):
    noisy, time, labels = sequence
    velocity, _ = model(noisy, time, labels)
    other = noisy.clone()
    other[:, changed, :, -1, -1] += 1  # the last token of the image
    differs = (model(other, time, labels)[0] - velocity).abs()
    assert (differs[:, :changed] == 0).all()
    assert (differs[:, changed:].amax(dim=(2, 3, 4)) > 0).all()
    assert (differs[:, changed, :, 0, 0] > 0).all()  # its first token sees it: no order inside an image


@torch.no_grad()
def test_a_foreign_state_is_refused(model, sequence):
    noisy, time, labels = sequence
    _, state = model(noisy, time, labels)
    for other in (noisy[:1], torch.cat([noisy, noisy])):
        with pytest.raises(ValueError, match=r"2 memories of shape \(2, 2, 8, 8\).*state=None"):
            model(other, torch.ones(len(other), IMAGES), torch.zeros(len(other), dtype=torch.int64), state)
    with pytest.raises(ValueError, match="num_classes=3, but this one has 5"):
        create_model(model.config, num_classes=5).double()(noisy, time, labels, state)
    with pytest.raises(ValueError, match="noisy has shape"):
        model(noisy[..., :2], time, labels)


@torch.no_grad()
def test_a_step_costs_the_same_however_many_there_were(model, sequence):
    model.to("meta")  # where FLOPs of attention are counted
    noisy, time, labels = (tensor.to("meta") for tensor in sequence)
    state, flops, sizes = None, [], []
    for _ in range(6):
        with FlopCounterMode(display=False) as counter:
            _, state = model(noisy[:, :1], time[:, :1], labels, state)
        flops.append(counter.get_total_flops())
        sizes.append(sum(memory.nbytes for memory in state.memories))
    assert len(set(flops[1:])) == 1 and len(set(sizes)) == 1
    assert (flops[0] / 2, flops[1] / 2) == family.count_step_flops(model.config)  # of a batch of 2
    how = DrawConfig(num_steps=6, guidance=1.5, solver="euler-maruyama")
    assert family.sampling_flops(model.config, how) == sum(flops)  # both halves of one image


def test_sampling_in_any_number_of_steps_needs_as_much_memory():
    model, labels = randomise(create_model(ARFlowConfig(**TINY))), torch.tensor([0, 1])
    peaks = []
    for num_steps in (50, 250):
        grid = released_time_grid(num_steps, family="arflow")
        draw = functools.partial(flowar.sample_latents, model, labels, time_grid=grid, guidance=1.5)
        peaks.append(peak_of(draw, torch.device("cpu")))
    assert peaks[0] == peaks[1] > 0


def test_compiled_blocks_draw_the_same_in_unbroken_graphs_that_later_batches_reuse(monkeypatch):
    model, labels = randomise(create_model(ARFlowConfig(**TINY))), torch.tensor([0, 1])
    noise = torch.randn(2, *model.config.latent_shape)
    settings = {"time_grid": uniform_time_grid(3), "guidance": 2.0, "solver": "euler", "noise": noise}
    eager = flowar.sample_latents(model, labels, **settings)
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    compile_blocks(model)
    torch._dynamo.utils.counters.clear()
    compiled = flowar.sample_latents(model, labels, **settings)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # with a memory, and without one
    again = flowar.sample_latents(model, labels, **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, compiled)


@pytest.mark.parametrize(("solver", "guidance"), [("euler-maruyama", 1.5), ("euler", 1.0), ("heun", 1.5)])
def test_public_sampling_equals_the_familys(solver, guidance):
    model = randomise(create_model(ARFlowConfig(**TINY)))
    labels, noise = torch.tensor([0, 1]), torch.randn(2, *model.config.latent_shape)
    how = DrawConfig(num_steps=4, solver=solver, guidance=guidance, guidance_interval=(0.0, 1.0))
    drawn = []

    def draw_noise(shape):
        drawn.append(shape)
        return torch.ones(2, *shape)

    grid = released_time_grid(4, family="arflow")
    assert grid.tolist() == pytest.approx([1, 0.68, 0.36, 0.04, 0]) and len(released_time_grid(250, "arflow")) == 251
    (expected,) = family_of(model.config).generate(model, labels, noise, how, draw_noise)
    assert drawn == ([model.config.latent_shape] * 3 if solver == "euler-maruyama" else [])
    settings = {"time_grid": grid, "guidance": guidance, "solver": solver, "noise": noise, "draw_noise": draw_noise}
    assert torch.equal(flowar.sample_latents(model, labels, **settings), expected)
    if guidance > 1:
        assert not torch.equal(flowar.sample_latents(model, labels, **settings, guided_channels=4), expected)
        repaired = create_model(model.config, guided_channels=None)
        repaired.load_state_dict(model.state_dict())
        every = flowar.sample_latents(repaired, labels, **settings)
        assert torch.equal(flowar.sample_latents(model, labels, **settings, guided_channels=4), every)


def test_an_unguided_channel_is_the_conditional_one_and_guidance_at_no_time_is_off():
    model = randomise(create_model(ARFlowConfig(**TINY)))
    settings = {"time_grid": released_time_grid(2, "arflow"), "noise": torch.randn(1, *model.config.latent_shape)}
    label, zeros = torch.tensor([0]), lambda shape: torch.zeros(1, *shape)
    plain = flowar.sample_latents(model, label, **settings, draw_noise=zeros)
    never = flowar.sample_latents(model, label, **settings, draw_noise=zeros, guidance=2, guidance_interval=(0.5, 0.6))
    assert torch.equal(plain, never)
    with pytest.raises(ValueError, match="guidance=0.5 is below 1"):
        flowar.sample_latents(model, label, **settings, guidance=0.5)


def test_times_of_a_sequence_fall_and_the_familys_loss_is_the_public_one():
    config = ARFlowConfig(**TINY)
    model = randomise(create_model(config))
    draws = [family.draw(config, torch.Generator().manual_seed(seed)) for seed in range(3)]
    stacked = {name: torch.stack([each[name] for each in draws]) for name in draws[0]}
    assert stacked["time"].shape == (3, 5) and (stacked["time"].diff(dim=1) <= 0).all()
    latents, labels = torch.randn(3, 5, *config.latent_shape), torch.tensor([0, 1, 3])
    public = flowar.training_loss(model, latents, labels, stacked["time"], stacked["noise"])
    assert torch.equal(family.losses(model, config, latents.flatten(0, 1), labels, stacked), public[None])
    with pytest.raises(ValueError, match="latents has shape"):
        family.losses(model, config, latents[:, 0], labels, stacked)
    with pytest.raises(ValueError, match="latents has shape"):
        flowar.training_loss(model, latents[:, 0], labels)
    assert flowar.training_loss(model, latents, labels).isfinite()


def test_fresh_model_predicts_zero_and_bfloat16_keeps_the_memory_in_float32(sequence):
    fresh = create_model(ARFlowConfig(**TINY))
    noisy, time, labels = (tensor.float() if tensor.is_floating_point() else tensor for tensor in sequence)
    velocity, _ = fresh(noisy, time, labels)
    assert (velocity == 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        _, state = randomise(fresh)(noisy, time, labels)
    assert {memory.dtype for memory in state.memories} == {torch.float32}


def test_flops_are_of_one_image():
    config = ARFlowConfig(**TINY)
    one = count_training_flops(dataclasses.replace(config, images_per_sample=1))
    assert one <= count_training_flops(config) < 1.2 * one  # reading the memory comes on top


def test_it_is_stored_with_its_family_and_files_without_one_are_flowars(tmp_path):
    model = randomise(create_model("arflow-s/8", depth=1, num_classes=3))
    save_model(model.config, model.state_dict(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["family"] == "arflow"
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert config_from_dict({"num_classes": 7}).family == "flowar"
    assert config_from_dict({"family": "arflow", "variant": "custom", "depth": 3}).depth == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "model.width=16 must be a multiple of model.heads=3"),
        ({"patch_size": 3}, "model.latent_size=4 must be a multiple of model.patch_size=3"),
        ({"guided_channels": 5}, "model.guided_channels=5 must lie in 1 to model.latent_channels=4"),
        ({"depth": 0}, "model.depth=0 must be at least 1"),
        ({"width": 18}, "model.width=18 must be a multiple of 4"),
        ({"ar_depth": 2}, "ar_depth"),
    ],
)
def test_wrong_settings_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        create_model(ARFlowConfig(**TINY), **changes)


def test_a_step_of_training_takes_grouped_images():
    recipe = RecipeConfig(model=ARFlowConfig(**TINY, images_per_sample=3))
    settings = StepSettings.of(recipe, 1, latent_scale=1.0)
    moments = torch.randn(6, 8, 4, 4)
    moments[:, 4:] = -30.0  # log-variance: the means alone
    inputs = draw_training_inputs(Batch(moments, torch.tensor([0, 1]), torch.arange(6)), 1, settings)
    torch.testing.assert_close(inputs.latents, moments[:, :4], atol=1e-5, rtol=1e-5)
    latents, labels, draws = inputs.part(slice(1, 2), torch.device("cpu"))
    assert torch.equal(latents, inputs.latents[3:]) and labels == inputs.labels[1]
    assert draws["noise"].shape == (1, 3, 4, 4, 4)
    assert drawn_bytes(settings) > 2 * latents.nbytes
    with pytest.raises(ValueError, match="2 samples holds 2 images, but model.images_per_sample=3 needs 6"):
        draw_training_inputs(Batch(moments[:2], torch.tensor([0, 1]), torch.arange(2)), 1, settings)
