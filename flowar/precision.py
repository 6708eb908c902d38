"""In which precision a GPU computes where nothing is trained: convolutions, and drawing. Read next: vae.py."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def convolution_precision(precision: str) -> Iterator[None]:
    """Have convolutions on a GPU run in float32 or TF32 (cuDNN's own default), by the same algorithm each time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=precision == "tf32"):
        yield


@contextlib.contextmanager
def drawing_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Have a model draw in float32, in TF32 on GPUs that have it, or in bfloat16; `decoding_precision` is the VAE's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def decoding_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Have a VAE decode in float32, or (also where the model draws in bfloat16) in TF32."""
    with torch.autocast(device.type, enabled=False), convolution_precision("fp32" if precision == "fp32" else "tf32"):
        yield
