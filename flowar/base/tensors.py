"""Tensors in .safetensors files, each with its hash beside it."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowar.base.errors import UserError

HASHES = "xxh3"  # key of the file's metadata: the hash of each tensor, as JSON


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors by name, with their hashes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    hashes = {name: hash_tensor(tensor) for name, tensor in plain.items()}
    save_file(plain, file, metadata={HASHES: json.dumps(hashes)})


def load_tensors(file: Path, cure: str) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file; those that `save_tensors` wrote are checked, others have no hashes.

    Args:
        file: that exists.
        cure: what to do about a damaged one; it ends the error's sentence.

    Raises:
        UserError: if one of them is not what was written.
    """
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            hashes = json.loads((opened.metadata() or {}).get(HASHES, "{}"))
        if not isinstance(hashes, dict):
            raise TypeError(f"its hashes are a {type(hashes).__name__}")
        wrong = [name for name in hashes if name not in tensors or hash_tensor(tensors[name]) != hashes[name]]
        if wrong:
            raise ValueError(f"{wrong[0]} is not what was written")
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())}); {cure}") from error
    return tensors


def hash_tensor(tensor: Tensor) -> str:
    """Return the hash of a tensor's type, shape and bytes."""
    digest = xxhash.xxh3_64(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
