"""Devices and their arithmetic."""

import ctypes
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from models import capabilities

from .process import UserError


def pick(wanted: str | None = None) -> torch.device:
    """The device that --device names: cpu, cuda or cuda:N.

    By default the GPU if there is one, that of this process where several share the work, else the
    CPU. Raises UserError where it is not there.
    """
    wanted = wanted or ("cuda" if capabilities.gpu() else "cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    if not capabilities.gpu():
        raise UserError(f"--device {wanted}: PyTorch sees no GPU here: take --device cpu")
    device = torch.device(wanted)
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.index >= torch.cuda.device_count():
        raise UserError(f"--device {wanted}: there are {torch.cuda.device_count()}, from cuda:0")
    torch.cuda.set_device(device)
    return device


def tell_if_slow(device: torch.device, precision: str) -> None:
    """Say that bfloat16 will be slow where the hardware has no instructions for it."""
    has = capabilities.bf16_onednn if device.type == "cpu" else capabilities.bf16_gpu
    if precision == "bf16" and not has():
        what = "processor" if device.type == "cpu" else "GPU"
        text = f"--precision bf16 works, but this {what} has no bfloat16: fp32 is faster"
        print(text, file=sys.stderr)


def set_up(precision: str, deterministic: bool = False) -> None:
    """Make a GPU compute as --precision and --deterministic say, and not as the process happens to
    have been told.
    """
    # not the newer `fp32_precision`: torch.compile asks for these, and fails in 2.15 under those
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    # Every block meets a batch of another size. A search for the fastest algorithm would begin anew
    # at each new size and its results would pile up; cuDNN's own choice costs nothing.
    torch.backends.cudnn.benchmark = False
    if deterministic:  # read when cuBLAS starts; without it torch refuses to multiply matrices
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads any


def fast_precision() -> str:
    """The faster --precision of this machine: bf16 where the hardware multiplies it."""
    has = capabilities.bf16_gpu if capabilities.gpu() else capabilities.bf16_onednn
    return "bf16" if has() else "fp32"


def keep_freed_memory() -> None:
    """Have glibc keep the memory that tensors free, not return it and fault it in again.

    On two CPU cores a training step of ResNet-32 takes about a twentieth less time this way. Blocks
    above 64 MiB do go back: kept as well, they fragment the heap, and a stage-1 step of ResNet-110
    at batch 2048 peaks at 3.9 GB in place of 2.8.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt(3)
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 64 * 2**20)
    libc.mallopt(trim_threshold, 2**31 - 1)


def dtype(precision: str) -> torch.dtype:
    """The dtype of weights and activations where a whole network runs in the chosen precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Context in which convolutions and linear layers run in the chosen precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def wants_pinned(device: torch.device | None) -> bool:
    """Whether what goes there from the host should lie in pinned memory: a GPU then fetches it
    while the host goes on, where it would be waited for otherwise.
    """
    return device is not None and device.type == "cuda"


def send(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A tensor of the host on a device, by way of pinned memory to a GPU; None leaves it here."""
    if device is None:
        return tensor
    if wants_pinned(device):  # contiguous: an expanded tensor cannot be pinned
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def free_memory(device: torch.device) -> int:
    """Bytes that are free; on a CPU without Linux's count of them, no limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            (line,) = (line for line in file if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return sys.maxsize


def timed(call: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds that one of several calls in a row takes, a GPU waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait()
    return (time.perf_counter() - start) / times


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device, its convolutions channels_last."""
    return module.to(device, memory_format=torch.channels_last)
