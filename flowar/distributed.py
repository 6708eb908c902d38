"""Which of the processes that a launcher started this is, and which device it uses. Read next: train.py."""

import os

import torch

from flowar.errors import UserError


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is this process's GPU if there are any, else the CPU.

    Raises:
        UserError: if `name` is no device, CUDA is asked for and not there, or a GPU would have two processes.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{local_rank()}"
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank()}, but there are {torch.cuda.device_count()} GPUs; start as many processes"
            )
    elif name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is no device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name} was asked for, but torch {torch.__version__} sees no GPU here; use device=cpu")
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"device={name} was asked for, but there are {torch.cuda.device_count()} GPUs, counted from 0"
            )
        torch.cuda.set_device(device)  # for libraries that use the current one
    return device


def local_rank() -> int:
    """Return the number of this process among those of its machine, as torchrun gives it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def refuse_many_processes(verb: str) -> None:
    """Stop where a launcher started several processes: each would do the whole work and write the same files."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise UserError(
            f"`flowar {verb}` runs in one process in this version, but WORLD_SIZE={world_size}; start it once"
        )
