"""What this processor and this build of PyTorch can do: all that the code would else assume.

Asked at each use, never at import, so that a build without oneDNN or CUDA imports everything.
"""

import os
import select
import signal

import torch


def gpu() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()


def bf16_gpu() -> bool:
    """Whether the GPU multiplies bfloat16, as those since Ampere do; older ones emulate it."""
    return gpu() and torch.cuda.is_bf16_supported(including_emulation=False)


def onednn() -> bool:
    """Whether the build has oneDNN's fused convolutions; macOS and some aarch64 builds do not."""
    names = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def bf16_onednn() -> bool:
    """Whether oneDNN computes in bfloat16 here: it wants AVX-512 (BW, VL, DQ) or AVX-NE-CONVERT."""
    asks = "_is_mkldnn_bf16_supported"
    return onednn() and hasattr(torch.ops.mkldnn, asks) and getattr(torch.ops.mkldnn, asks)()


def fused_convolutions(dtype: torch.dtype) -> bool:
    """Whether a CPU runs convolution, sum and relu in one kernel, in this dtype."""
    return onednn() if dtype == torch.float32 else dtype == torch.bfloat16 and bf16_onednn()


def alarms() -> bool:
    """Whether a process can have itself woken after some seconds; Windows cannot."""
    return hasattr(signal, "SIGALRM")


def polls() -> bool:
    """Whether the ends of pipes can be asked after; on Windows they cannot."""
    return hasattr(select, "poll")


def cpus() -> int:
    """Processors that this process may use; macOS only tells how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
