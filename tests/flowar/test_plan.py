"""`flowar plan`: what it prints, and whether its memory and collectives agree with the engines."""

import dataclasses

import pytest
import torch

from benchmarks import planning
from benchmarks.counts import COMPILED_FILE
from benchmarks.host import count_collectives, narrow
from flowar import plan, train
from flowar.base.distributed import World
from flowar.base.errors import UserError
from flowar.config.load import load_config
from flowar.config.models import ARFlowConfig, variant_config
from flowar.config.training import EMAConfig, OptimConfig, ParallelConfig, PlanConfig, PlannedDataConfig
from flowar.models.build import create_model
from flowar.models.costs import count_training_flops
from flowar.planning import room, steps
from flowar.planning.engines import Layout, collectives_of, memory_of, seconds_of, sizes_of
from flowar.planning.machines import collective_seconds, find_machine
from flowar.planning.room import device_memory
from flowar.planning.runs import Troubles, expect
from flowar.planning.search import search, way_of
from flowar.planning.steps import PlannedStep, largest_micro, time_step
from flowar.planning.trace import trace_step
from tests.conftest import MORE, tiny_config, training
from tests.processes import fork_context, join, start_ranks

H100 = find_machine("NVIDIA H100 80GB HBM3", 8, 45)


def tiny_plan(**changes):
    settings = {
        "model": tiny_config(), "batch_size": 8, "nodes": 1, "gpus_per_node": 2, "num_images": 1000, "precision": "bf16"
    }  # fmt: skip
    return PlanConfig(**(settings | {"ema": EMAConfig(decays=(0.9, 0.99))} | changes))


@pytest.fixture
def uncompiled(monkeypatch):
    """Plan compiled steps like eager ones, which takes a tenth of the time to trace."""
    monkeypatch.setattr(steps, "trace_step", lambda *settings: trace_step(*settings[:-1], False))


def measure_rank(config, answers):
    """The bytes that one real rank of FSDP2 holds after a step."""
    from flowar.base.distributed import start_world, stop_world
    from flowar.models.build import create_model
    from flowar.training.averages import EMA
    from flowar.training.engine import EngineSettings
    from flowar.training.setup import make_engine

    world = start_world(torch.device("cpu"), with_group=True)
    settings = EngineSettings(config.parallel, config.optim, config.precision, micro_batch_size=4, num_parts=1)
    engine = make_engine(settings, create_model(config.model), world)
    ema = EMA(config.ema, engine.local_weights())
    for parameter in engine.parameters.values():
        parameter.grad = torch.zeros_like(parameter)

    def size(tensors):
        return sum(tensor.to_local().numel() * tensor.element_size() for tensor in tensors)

    parameters = engine.parameters.values()
    states = [moment for moments in engine.optimizer.moments.values() for moment in moments.values()]
    averages = [tensor for average in ema.averages.values() for tensor in average.values()]
    answers.put((world.rank, size(parameters), size(p.grad for p in parameters), size(states), size(averages)))
    stop_world()


@pytest.mark.slow
def test_planned_bytes_are_those_of_a_real_run(tmp_path):
    config = tiny_plan(parallel=ParallelConfig(engine="fsdp"))
    answers = fork_context().SimpleQueue()
    join(start_ranks(measure_rank, config, answers, world_size=2, log=tmp_path / "log"), tmp_path / "log")
    found = {answer[0]: answer[1:] for answer in (answers.get() for _ in range(2))}
    planned = memory_of(Layout(config.parallel, 2, 2), sizes_of(config.model), averages=2, parts=1)
    assert found[0] == (planned.weights, planned.gradients, planned.optimizer, planned.averages)


def test_the_largest_model_on_64_ranks_is_sharded_evenly():
    sizes = sizes_of(variant_config("flowar-h"))
    memory = memory_of(Layout(ParallelConfig(engine="fsdp"), 64, 8), sizes, 1, 1)
    for found, copies in ((memory.weights, 1), (memory.gradients, 1), (memory.optimizer, 2), (memory.averages, 1)):
        assert found * 64 == pytest.approx(4 * copies * sizes.total, rel=0.01)
    assert memory_of(Layout(ParallelConfig(engine="ddp"), 64, 8), sizes, 1, 1).weights == 4 * sizes.total


def test_frozen_parameters_take_no_gradients_and_no_optimizer_state():
    config = tiny_plan(optim=OptimConfig(frozen=("ar.*",)))
    model = create_model(config.model)
    trained = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("ar."))
    planned = PlannedStep.of(config, ranks=1, gpus_per_node=8)
    memory = memory_of(planned.layout, sizes_of(config.model), 1, 1, trained=planned.trained)
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)
    assert memory.weights == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, 2),
        ({"fsdp_reshard": False}, 1),
        ({"fsdp_bf16": True}, 2),
        ({"fsdp_sync_once": True}, 2),
        ({"replicas": 8}, 1),
    ],
)
def test_planned_collectives_are_those_of_fsdp(settings, parts):
    model = dataclasses.replace(narrow(variant_config("flowar-h")), ar_depth=4, flow_depth=3)
    parallel = ParallelConfig(engine="fsdp", **settings)
    planned = collectives_of(Layout(parallel, 64, 8), sizes_of(model), parts)
    found = count_collectives(parallel, model, parts=parts)
    names = {"all_gather": "allgather", "reduce_scatter": "reduce_scatter", "all_reduce": "allreduce float32"}
    for kind, word in names.items():
        calls, size = (sum(found[key][place] for key in found if key.startswith(word)) for place in (0, 1))
        ours = [each.size for each in planned if each.kind == kind]
        assert len(ours) == calls
        assert sum(ours) == pytest.approx(size, rel=0.1)  # shards of such narrow tensors are padded


def test_planned_memory_and_speed_are_those_of_one_h100_within_15_percent():
    compared = list(planning.compared())
    assert len(compared) == 7 and sum(gib is not None for *_, gib in compared) == 4
    for name, planned, measured, gib, measured_gib in compared:
        assert planned == pytest.approx(measured, rel=0.15), name
        assert gib is None or gib == pytest.approx(measured_gib, rel=0.15), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=MORE) for name in ("flowar-s", "flowar-l", "flowar-h")])
def test_predicted_kernels_move_as_many_bytes_as_inductors(name):
    """Within 15%: benchmarks/compiled.txt counts attention in the rest of the step as products and softmax."""
    line = next(row for row in COMPILED_FILE.read_text().splitlines() if row.startswith(f"{name}  compiled step bytes"))
    part = trace_step(variant_config(name), "fp32", 0, True).at(8)
    moved = sum(operation.moved for operation in part.forward + part.backward) / 8
    assert moved == pytest.approx(int(line.split()[-1].replace(",", "")), rel=0.15)


def test_memory_grows_with_the_batch_and_shrinks_with_recomputation_and_bfloat16():
    model = tiny_config()
    whole, half, again = (trace_step(model, *settings, False) for settings in (("fp32", 0), ("bf16", 0), ("fp32", 1)))
    sample = whole.peak(9) - whole.peak(8)
    assert 0 <= whole.peak(0) < 0.5 * sample
    assert 0.4 * sample < half.peak(9) - half.peak(8) < sample
    assert again.peak(9) - again.peak(8) < 0.6 * sample
    flops = [sum(each.flops for each in part.forward + part.backward) for part in (whole.at(16), again.at(16))]
    assert 1.2 * flops[0] < flops[1] < 1.4 * flops[0]


def test_the_images_of_a_sample_are_all_computed():
    model = ARFlowConfig(variant="custom", depth=2, width=64, heads=2, images_per_sample=5)
    part = trace_step(model, "fp32", 0, False).at(16)
    flops = sum(operation.flops for operation in part.forward + part.backward)
    assert flops == pytest.approx(count_training_flops(model) * 5 * 16, rel=0.1)  # a kernel of attention does more


@pytest.mark.slow
def test_compiled_blocks_take_fewer_kernels_less_traffic_and_the_same_arithmetic():
    eager, compiled = (trace_step(tiny_config(), "bf16", 0, is_compiled).at(16) for is_compiled in (False, True))
    one, two = (part.forward + part.backward for part in (eager, compiled))
    assert len(two) < 0.8 * len(one) and any(each.is_fused for each in two)
    assert sum(each.moved for each in two) < 0.9 * sum(each.moved for each in one)
    assert sum(each.flops for each in two) == pytest.approx(sum(each.flops for each in one), rel=0.02)


def test_the_network_cards_of_a_node_share_the_bytes_and_latency_grows_with_the_ranks():
    sizes = 64 * 2**20, 2**30
    seconds = {n: [collective_seconds("all_gather", size, n, 8, H100, 8) for size in sizes] for n in (8, 64, 512)}
    assert seconds[64][1] < 1.2 * seconds[8][1]  # eight cards of 45 GB/s carry as much as NVLink
    assert seconds[512][0] > 3 * seconds[64][0]  # latency
    alone = collective_seconds("all_gather", sizes[1], 8, 1, H100, 1)
    assert alone > 6 * seconds[64][1]  # one GPU a node, one card
    sharded = Layout(ParallelConfig(engine="fsdp", replicas=8), 64, 8)
    inside, between = (
        [each for each in collectives_of(sharded, sizes_of(tiny_config()), 1) if each.of_replicas == of_replicas]
        for of_replicas in (False, True)
    )
    assert {each.kind for each in between} == {"all_reduce"} and len(inside) == 3 * len(between) - 1
    assert sum(each.size for each in between) * 8 <= 4 * sizes_of(tiny_config()).total
    assert all(seconds_of(each, sharded, H100) > 0 for each in between)


def test_failures_and_saves_cost_what_young_and_daly_say():
    calm, rough = (Troubles(8, days, 0, 300, 5e9) for days in (1e9, 10))
    assert expect(86400, 10**9, 1, 64, calm).days == pytest.approx(1, rel=1e-3)
    found = expect(86400, 10**9, 1, 64, rough)
    between = 86400 * 10 / 8
    assert found.save_every_s == pytest.approx((2 * found.save_s * between) ** 0.5)
    lost = found.save_s / found.save_every_s + (found.save_every_s / 2 + found.written_s + 300) / between
    assert found.goodput == pytest.approx(1 - lost) and found.days == pytest.approx(1 / (1 - lost))
    often = expect(86400, 10**9, 1, 64, dataclasses.replace(rough, preemptions_per_day=4))
    assert often.goodput < found.goodput - 4 * 300 / 86400 * 0.9


def test_a_search_lists_the_fastest_first_and_says_what_does_not_fit(uncompiled):
    config = tiny_plan(nodes=2)
    setting = PlannedStep.of(config, 4, 2)
    found, refused = search(setting, H100, 2)
    assert not refused and [way.step.total for way in found] == sorted(way.step.total for way in found)
    assert {way.setting.layout.engine for way in found} == {"ddp", "fsdp", "zero1", "zero2", "zero3"}
    assert any(way.setting.parallel.replicas == 2 for way in found)
    assert time_step(found[0].setting, H100).total == found[0].step.total
    assert "micro_batch_size=" in way_of(found[0].setting)
    nothing, refused = search(setting, dataclasses.replace(H100, memory=1000), 2)
    assert not nothing and len(refused) == 12 and "micro_batch_size=1 needs 0 GiB" in refused[0]
    assert largest_micro(setting, dataclasses.replace(H100, memory=1000)) == 0


@pytest.mark.parametrize("is_tried_anyway", [False, True])
def test_training_refuses_at_once_what_does_not_fit(shards, tmp_path, monkeypatch, is_tried_anyway):
    config = training(shards, tmp_path / "run", epochs=1, micro_batch_size=8)
    config = dataclasses.replace(config, parallel=ParallelConfig(check_memory=not is_tried_anyway))
    need = PlannedStep.of(config, 1, 1).memory.total
    monkeypatch.setattr(room, "device_memory", lambda device: need - 1)
    if is_tried_anyway:
        train.main(config)
    else:
        with pytest.raises(UserError, match="micro_batch_size=8 needs .* GiB on each GPU.*set micro_batch_size=.*or "):
            train.main(config)
        with pytest.raises(UserError, match="parallel.checkpoint_every_blocks=1; or parallel.check_memory=false"):
            train.main(config, dry_run=True)
    assert (tmp_path / "run").exists() == is_tried_anyway
    monkeypatch.setattr(room, "device_memory", lambda device: need)
    room.check_room(config, World(0, 1, torch.device("cpu"), None))
    assert device_memory(torch.device("cpu")) is None


@pytest.mark.parametrize("name", ["l", "h"])
def test_the_shipped_recipes_are_for_64_gpus_and_fit(name):
    config = load_config(PlanConfig, planning.RECIPES[name])
    setting = PlannedStep.of(config, 64, 8)
    assert (setting.micro, setting.parts, setting.precision, setting.parallel.compile) == (32, 1, "bf16", True)
    header = planning.RECIPES[name].read_text()
    assert setting.layout.engine == {"l": "ddp", "h": "fsdp"}[name] and "search=true" in header


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("h", marks=MORE)])
def test_the_recipe_of_h_scales_weakly_from_64_to_512_gpus(name):
    few, many = (planning.spread(name, gpus, weak=True) for gpus in (64, 512))
    seconds = [time_step(setting, planning.H100).total for setting in (few, many)]
    assert few.micro == many.micro == 32 and seconds[0] / seconds[1] > 0.9


@pytest.mark.parametrize("memory_gib", [1e-9, 80])
def test_the_table_can_be_read_at_80_columns(capsys, monkeypatch, memory_gib):
    monkeypatch.setenv("COLUMNS", "80")
    plan.main(tiny_plan(nodes=64, batch_size=2048, memory_gib=memory_gib))
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line and line[0] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in table if line[0] == "│"}
    assert tuple(cells) == plan.ROWS and all(len(row) == len(plan.ENGINES) for row in cells.values())
    assert all(cell.strip() and "…" not in cell for row in cells.values() for cell in row)
    assert ("too big" in cells["micro batch"][0]) == ("That does not fit: set" in printed) == (memory_gib < 1)


def test_the_number_of_images_is_the_datasets_if_it_exists(shards, tmp_path, capsys):
    here, elsewhere = (PlannedDataConfig(path=str(path)) for path in (shards, tmp_path / "none"))
    assert plan.count_images(tiny_plan(num_images=None, data=here)) == (24, f"data.path={shards}")
    assert plan.count_images(tiny_plan(num_images=7, data=here)) == (7, "num_images")
    assert plan.count_images(PlanConfig())[0] == plan.count_images(PlanConfig(data=elsewhere))[0] == 1_281_167
    with pytest.raises(UserError, match="has no dataset.json"):
        plan.count_images(PlanConfig(data=PlannedDataConfig(path=str(tmp_path))))
    plan.main(tiny_plan(num_images=None, data=here, epochs=10))
    assert "Trained on 24 images (data.path=" in (printed := capsys.readouterr().out) and "\n30 steps of" in printed


def test_the_plan_has_every_engine_says_it_is_simulated_and_when_more_gpus_do_not_pay_off(capsys, uncompiled):
    plan.main(tiny_plan(nodes=2, search=True))
    found = capsys.readouterr().out
    assert all(engine in found for engine in plan.ENGINES) and "The fastest ways that fit" in found
    assert "Simulated, precision=bf16" in found and "twice the GPUs don't pay off, use nodes=1" in found
    plan.main(tiny_plan(gpus_per_node=1))
    assert "single" in capsys.readouterr().out


def test_what_cannot_be_planned_is_one_clear_error():
    with pytest.raises(UserError, match="gpu=Abacus is not in the table: H200.*peak_tflops=71.*memory_gib=24"):
        plan.main(tiny_plan(gpu="Abacus"))
    plan.main(tiny_plan(gpu="Abacus", peak_tflops=71, memory_gib=24, memory_gb_per_s=768))
    with pytest.raises(UserError, match="batch_size=8 is not a multiple of 6 processes; try batch_size=6"):
        plan.main(tiny_plan(gpus_per_node=6))
