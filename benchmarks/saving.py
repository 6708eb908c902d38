"""The cost of planning a save on rank 0, for any number of ranks: torch's own planner with the plans of all ranks.

Planning runs in a thread, and takes the interpreter from the thread that trains. Run `python -m benchmarks.saving`.
"""

import argparse
import pickle
import threading
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from flowar.base.run_folder import average_key, optimizer_key, weight_key
from flowar.config.models import variant_config
from flowar.models.build import create_model
from flowar.training.optim import ADAM_MOMENTS
from flowar.training.shares import share_out


def checkpoint_shapes(model: str) -> dict[str, torch.Size]:
    """Return name -> shape of the tensors of a checkpoint with one average."""
    with torch.device("meta"):
        parameters = dict(create_model(variant_config(model)).named_parameters())
    keys: list[Callable[[str], str]] = [
        weight_key,
        partial(average_key, "decay_0.9999"),
        *(partial(optimizer_key, state=key) for key in ADAM_MOMENTS),
    ]
    return {key(name): parameter.shape for key in keys for name, parameter in parameters.items()}


def plan_of(state: dict[str, Tensor], is_coordinator: bool) -> tuple[DefaultSavePlanner, SavePlan]:
    """Return the plan of a rank with these tensors."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, None, is_coordinator)
    return planner, planner.create_local_plan()


def whole_plans(shapes: dict[str, torch.Size], num_ranks: int) -> tuple[DefaultSavePlanner, list[SavePlan]]:
    """Return rank 0's planner and the plans of all ranks; each tensor belongs to one rank."""
    owners = share_out({name: shape.numel() for name, shape in shapes.items()}, num_ranks)
    states: list[dict[str, Tensor]] = [{} for _ in range(num_ranks)]
    for name, owner in owners.items():
        states[owner][name] = torch.empty(shapes[name])  # never touched
    planners, plans = zip(*(plan_of(state, rank == 0) for rank, state in enumerate(states)), strict=True)
    return planners[0], list(plans)


def count_operations(stop: threading.Event, seconds: float) -> float:
    """Return how many small operations per second this thread does, for a given time or until `stop` is set."""
    vector, count, began = torch.zeros(4), 0, time.perf_counter()
    while not stop.is_set() and time.perf_counter() - began < seconds:
        vector.add_(1)
        count += 1
    return count / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flowar-h")
    parser.add_argument("--ranks", type=int, default=512)
    options = parser.parse_args()
    shapes = checkpoint_shapes(options.model)
    planner, plans = whole_plans(shapes, options.ranks)
    sent = [pickle.dumps(plan) for plan in plans]
    done, took = threading.Event(), [0.0]

    def work() -> None:
        began = time.perf_counter()
        planner.create_global_plan([pickle.loads(plan) for plan in sent])
        took[0] = time.perf_counter() - began
        done.set()

    alone = count_operations(threading.Event(), 1)
    thread = threading.Thread(target=work)
    thread.start()
    beside = count_operations(done, 3600)
    thread.join()
    print(
        f"{options.model}, {options.ranks} ranks: {sum(len(plan.items) for plan in plans):,} pieces, "
        f"{sum(map(len, sent)) / 1e6:.1f} MB of plans; rank 0 plans for {took[0]:.2f} s beside a thread that does "
        f"{beside:,.0f} operations a second then, and {alone:,.0f} alone"
    )


if __name__ == "__main__":
    main()
