"""In which precision a GPU computes where nothing is trained: convolutions, and drawing. Read next: latents/vae.py."""

import contextlib
import os
import resource
import statistics
import time
from collections.abc import Iterator

import torch

from flowar.base.errors import UserError


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is this process's GPU if there are any, else the CPU.

    Raises:
        UserError: if `name` is not a device, CUDA is requested but not available, or a GPU would have two processes.
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
        raise UserError(f"device={name} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name} was requested, but torch {torch.__version__} sees no GPU here; use device=cpu")
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"device={name} was requested, but there are {torch.cuda.device_count()} GPUs, counted from 0"
            )
        torch.cuda.set_device(device)  # for libraries that use the current one
    return device


def local_rank() -> int:
    """Return the number of this process among those of its machine, as torchrun gives it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def convolution_precision(precision: str) -> Iterator[None]:
    """Have convolutions on a GPU run in float32 or TF32 (cuDNN's own default), by the same algorithm each time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=precision == "tf32"):
        yield


@contextlib.contextmanager
def drawing_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Have a model draw in float32, TF32 (on GPUs that have it), bfloat16 or float16; not for the VAE."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        with torch.autocast(device.type, dtype, enabled=precision in ("bf16", "fp16")):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def decoding_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Have a VAE decode in float32, or (also where the model draws in 16 bits) in TF32."""
    with torch.autocast(device.type, enabled=False), convolution_precision("fp32" if precision == "fp32" else "tf32"):
        yield


MEASURED_SIDE, MEASURED_SIDE_CUDA, MEASURED_TIMES = 1024, 8192, 5  # of the matrix product that tells a device's rate

# Dense TFLOP/s by precision (fp16: as bf16), from the makers' data sheets; the first name in the device's name counts.
PEAK_TFLOPS = (
    ("H200", {"bf16": 989, "tf32": 495, "fp32": 67}),
    ("H100 PCIe", {"bf16": 756, "tf32": 378, "fp32": 51}),
    ("H100", {"bf16": 989, "tf32": 495, "fp32": 67}),
    ("A100", {"bf16": 312, "tf32": 156, "fp32": 19.5}),
    ("L40S", {"bf16": 362, "tf32": 183, "fp32": 91.6}),
    ("A40", {"bf16": 150, "tf32": 75, "fp32": 37.4}),
    ("V100", {"bf16": 15.7, "tf32": 15.7, "fp32": 15.7}),
    ("A10G", {"bf16": 70, "tf32": 35, "fp32": 35}),
    ("A10", {"bf16": 125, "tf32": 62.5, "fp32": 31.2}),
    # NVIDIA's white papers of the Ada and GA102 architectures, accumulated in float32
    ("RTX 4090", {"bf16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    ("RTX 3090", {"bf16": 71, "tf32": 35.6, "fp32": 35.6}),
)


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Return the TFLOP/s that matrix products reach at most: from the table for GPUs, measured on a CPU.

    None for a GPU that is not in the table.
    """
    if device.type != "cuda":
        return measure_tflops()
    return table_tflops(torch.cuda.get_device_name(device), precision)


def table_tflops(name: str, precision: str) -> float | None:
    """Return the peak rate of a GPU by its name, or None if the table doesn't have it."""
    return next(
        (rates["bf16" if precision == "fp16" else precision] for known, rates in PEAK_TFLOPS if known in name), None
    )


def measure_tflops(device: torch.device | None = None) -> float:
    """Return the TFLOP/s of a float32 matrix product on a device, the CPU if None; median of several."""
    side = MEASURED_SIDE_CUDA if device is not None and device.type == "cuda" else MEASURED_SIDE
    a = torch.randn(side, side, device=device)
    seconds = []
    for _ in range(MEASURED_TIMES):
        began = time.perf_counter()
        a @ a
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds) / 1e12


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that this process has had: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
