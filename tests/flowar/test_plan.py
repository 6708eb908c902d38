import pytest
import torch

from flowar import plan
from flowar.base.errors import UserError
from flowar.config.models import ARFlowConfig, variant_config
from flowar.config.training import EMAConfig, ParallelConfig, PlanConfig, PlannedDataConfig
from flowar.models.costs import count_training_flops
from tests.conftest import MORE, tiny_config
from tests.processes import fork_context, join, start_ranks


def tiny_plan(**changes):
    settings = {"model": tiny_config(), "batch_size": 8, "nodes": 1, "gpus_per_node": 2, "num_images": 1000}
    return PlanConfig(**(settings | {"ema": EMAConfig(decays=(0.9, 0.99))} | changes))


def measure_rank(config, answers):
    """What one real rank of FSDP2 holds after a step, in bytes."""
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
    planned = plan.memory_of("fsdp", config, 2)
    assert found[0] == (planned.weights, planned.gradients, planned.optimizer, planned.averages)


def test_the_largest_model_on_64_ranks_is_shared_out_evenly():
    config = PlanConfig(model=variant_config("flowar-h"), nodes=8)
    total, _ = plan.count_weights(config)
    memory = plan.memory_of("fsdp", config, 64)
    for found, copies in ((memory.weights, 1), (memory.gradients, 1), (memory.optimizer, 2), (memory.averages, 1)):
        assert found * 64 == pytest.approx(4 * copies * total, rel=0.01)
    assert plan.memory_of("ddp", config, 64).weights == 4 * total


def test_activations_grow_with_the_batch_and_shrink_with_recomputation_and_bfloat16():
    config = tiny_plan(precision="fp32")
    sample, copies = plan.activation_bytes(config)
    assert 0 <= copies < 0.05 * sample  # tables of positions and angles
    assert plan.kept_bytes(config, 5) == pytest.approx(copies + 5 * sample, rel=0.01)
    half, _ = plan.activation_bytes(tiny_plan(precision="bf16"))
    recomputing = ParallelConfig(checkpoint_every_blocks=1)
    recomputed, _ = plan.activation_bytes(tiny_plan(precision="fp32", parallel=recomputing))
    assert 0.4 * sample < half < sample and recomputed < 0.5 * sample


@pytest.mark.parametrize(
    ("model", "memory_gib"),
    [(tiny_config(), 1e-9), pytest.param(variant_config("flowar-h"), 80, marks=(MORE, pytest.mark.slow))],
)
def test_the_table_can_be_read_at_80_columns(capsys, monkeypatch, model, memory_gib):
    monkeypatch.setenv("COLUMNS", "80")
    plan.main(tiny_plan(model=model, nodes=64, batch_size=2048, memory_gib=memory_gib))
    table = [line for line in capsys.readouterr().out.splitlines() if line and line[0] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in table if line[0] == "│"}
    assert tuple(cells) == plan.ROWS and all(len(row) == len(plan.ENGINES) for row in cells.values())
    assert all(cell.strip() and "…" not in cell for row in cells.values() for cell in row)
    assert ("none" in cells["largest micro batch"][0]) == (memory_gib < 1)


def test_the_images_are_those_of_the_dataset_where_it_is_there(shards, tmp_path, capsys):
    here, elsewhere = (PlannedDataConfig(path=str(path)) for path in (shards, tmp_path / "none"))
    assert plan.count_images(tiny_plan(num_images=None, data=here)) == (24, f"data.path={shards}")
    assert plan.count_images(tiny_plan(num_images=7, data=here)) == (7, "num_images")
    assert plan.count_images(PlanConfig())[0] == plan.count_images(PlanConfig(data=elsewhere))[0] == 1_281_167
    with pytest.raises(UserError, match="has no dataset.json"):
        plan.count_images(PlanConfig(data=PlannedDataConfig(path=str(tmp_path))))
    plan.main(tiny_plan(num_images=None, data=here, epochs=10))
    assert "Trained on 24 images (data.path=" in (printed := capsys.readouterr().out) and " 30 steps of" in printed


def test_the_table_names_every_engine_and_says_what_is_assumed(capsys):
    plan.main(tiny_plan(nodes=2))
    found = capsys.readouterr().out
    assert all(engine in found for engine in plan.ENGINES)
    assert "Assumed: 40% of" in found and "No GPU was measured" in found and "Suggested: ddp" in found


def test_the_images_of_a_sample_are_all_computed(capsys):
    model = ARFlowConfig(variant="custom", depth=2, width=64, heads=2, images_per_sample=5)
    batch_size, peak = 1024, 0.01
    plan.main(
        tiny_plan(
            model=model, batch_size=batch_size, memory_gib=500, peak_tflops=peak, assumed_mfu=0.5, gpus_per_node=1
        )
    )
    seconds = count_training_flops(model) * 5 * batch_size / (peak * 1e12 * 0.5)
    assert seconds > 10 and f" steps of {seconds:.2f} s" in capsys.readouterr().out


def test_what_can_not_be_planned_is_one_clear_error():
    with pytest.raises(UserError, match="gpu=Abacus is not in the table: H200.*peak_tflops=71 memory_gib=24"):
        plan.main(tiny_plan(gpu="Abacus"))
    plan.main(tiny_plan(gpu="Abacus", peak_tflops=71))
    with pytest.raises(UserError, match="batch_size=8 is not a multiple of 6 processes; try batch_size=6"):
        plan.main(tiny_plan(gpus_per_node=6))
