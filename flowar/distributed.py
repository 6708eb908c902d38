"""Which device this process uses, and that it is the only one. Read next: train.py."""

import os

import torch

from flowar.errors import UserError


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the GPU if there is one, else the CPU.

    Raises:
        UserError: if `name` is no device, or CUDA is asked for and not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


def refuse_many_processes(verb: str) -> None:
    """Stop where a launcher started several processes: each would do the whole work and write the same files."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise UserError(
            f"`flowar {verb}` runs in one process in this version, but WORLD_SIZE={world_size}; start it once"
        )
