"""Check whether a training run fits on the GPU that it is about to start on. Read next: steps.py."""

import torch

from flowar.base.distributed import World, broadcast_object
from flowar.base.errors import UserError
from flowar.base.files import GIB
from flowar.config.training import RecipeConfig
from flowar.planning.machines import Machine
from flowar.planning.search import ways_to_fit
from flowar.planning.steps import PlannedStep, fits


def device_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory, or None for a CPU, whose memory is shared."""
    if device.type != "cuda":
        return None
    total: int = torch.cuda.get_device_properties(device).total_memory
    return total


def check_room(config: RecipeConfig, world: World) -> None:
    """Refuse a run that doesn't fit on its GPU, before anything is allocated; all ranks agree.

    Raises:
        UserError: if the run needs more than the whole memory; it suggests settings that would fit.
    """
    memory = device_memory(world.device)
    if memory is None or not config.parallel.check_memory:
        return
    problem = find_problem(config, world.size, memory) if world.is_main else None
    problem = broadcast_object(problem)
    if problem is not None:
        raise UserError(problem)


def find_problem(config: RecipeConfig, ranks: int, memory: int) -> str | None:
    """Return why a run on `ranks` GPUs doesn't fit, and what to do; None if it fits."""
    setting = PlannedStep.of(config, ranks, ranks)
    machine = Machine("", memory, {}, 0, 0, 0, ranks)  # only its memory counts
    if fits(setting, machine, spare=0):
        return None
    need, choices = setting.memory.total / GIB, ", or ".join(ways_to_fit(setting, machine))
    return (
        f"micro_batch_size={setting.micro} needs {need:.1f} GiB on each GPU, as `flowar plan` counts, but the GPU has "
        f"{memory / GIB:.1f}; set {choices}; or parallel.check_memory=false to try it anyway"
    )
