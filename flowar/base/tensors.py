"""Tensors in .safetensors files, each with its hash beside it; and those in PyTorch's checkpoints of others."""

import argparse
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowar.base.errors import UserError
from flowar.base.records import parse_record, record_line

HASHES = "xxh3"  # key of the file's metadata: the hash of each tensor, as JSON
ABOUT_KEY = "about"  # key of the file's metadata: what else is to be known of the tensors, a record


def save_tensors(tensors: Mapping[str, Tensor], file: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write tensors by name, with their hashes, and further information about them."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    hashes = {name: hash_tensor(tensor) for name, tensor in plain.items()}
    record = {} if about is None else {ABOUT_KEY: record_line(about)}
    save_file(plain, file, metadata={HASHES: json.dumps(hashes), **record})


def read_about(file: Path, cure: str) -> dict[str, Any]:
    """Return what `save_tensors` wrote about the tensors of a file; nothing if that was nothing.

    Args:
        file: that exists.
        cure: what to do about a damaged one; it ends the error's sentence.

    Raises:
        UserError: if it is not what was written.
    """
    try:
        with safe_open(file, "pt") as opened:
            return parse_record((opened.metadata() or {}).get(ABOUT_KEY, "{}"))
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({' '.join(str(error).split())}); {cure}") from error


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


def load_plain_checkpoint(source: Path) -> dict[str, Any]:
    """Return what a PyTorch checkpoint of somebody else holds; no code in it is run.

    Raises:
        UserError: if it is not one, or not what was written: torch itself doesn't look at the checksums in the file.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            damaged = archive.testzip()
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain attributes; trainers keep their options so
            state_dict = torch.load(source, map_location="cpu", weights_only=True, mmap=True) if damaged is None else {}
    except PermissionError as error:
        raise UserError(f"{source} can't be read: {error.strerror}; ask its owner for read permission") from error
    except Exception as error:  # anything that a damaged or hostile pickle makes torch raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source} is not a readable PyTorch checkpoint of tensors: {reason}; download it again"
        ) from error
    if damaged is not None:
        raise UserError(f"{source} is damaged: {damaged} in it doesn't have its checksum; download it again")
    if not isinstance(state_dict, dict):
        raise UserError(f"{source} holds a {type(state_dict).__name__}, but a state dict is needed")
    return state_dict


def hash_tensor(tensor: Tensor) -> str:
    """Return the hash of a tensor's type, shape and bytes."""
    digest = xxhash.xxh3_64(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
