"""Hashes of files and of weights."""

import hashlib
from pathlib import Path

import xxhash
from torch import Tensor

from flowar.base.files import MIB


def hash_file(file: Path) -> str:
    """Return the hash of a file as the index has it."""
    with file.open("rb") as opened:
        digest = xxhash.xxh64()
        while block := opened.read(MIB):
            digest.update(block)
    return digest.hexdigest()


def hash_weights(state: dict[str, Tensor]) -> str:
    """Return a hash of all weights, independent of their file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
