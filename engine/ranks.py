"""The processes of a run started by torchrun; without it there is one, rank 0 of 1."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import capabilities

from .process import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what it sets

# What a process without a GPU has of a batch at least: BatchNorm sees these alone.
IMAGES_A_PROCESS = 32

# The same processes under gloo: for waits that NCCL would end after ten minutes, and for what is on
# the host, which would go to the GPU and back and wait for all that it has to do.
_patient: dist.ProcessGroup | None = None


def start(parallel: bool = False, device: str | None = None, batch_size: int = 0) -> None:
    """Join the other processes that torchrun started, NCCL on GPUs and gloo on CPUs.

    `device` is what --device names; "cpu" keeps GPUs out.
    With `parallel` and without torchrun, start anew with one process for each GPU of this machine,
    or without GPUs for each core, of whose kernels none waits for another process at work there.
    """
    global _patient
    on_gpus = capabilities.gpu() and device != "cpu"
    if device and ":" in device and (parallel or "RANK" in os.environ):
        raise UserError(f"--device {device} is for one process: several take --device cuda")
    if "RANK" in os.environ:
        needed = TORCHRUN + (("LOCAL_RANK",) if on_gpus else ())
        if missing := [name for name in needed if name not in os.environ]:
            raise UserError(f"RANK is set, {missing[0]} is not: start by torchrun, or unset RANK")
        if not dist.is_initialized():
            if on_gpus:
                pick_own_gpu()
            dist.init_process_group("nccl" if on_gpus else "gloo")
            _patient = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    elif parallel and (processes := worth_starting(on_gpus, batch_size)) > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        if not on_gpus:
            os.environ["OMP_NUM_THREADS"] = str(max(1, capabilities.cpus() // processes))
            # DistributedDataParallel's warnings of `drops` in `wrap`
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        sys.stdout.flush()
        os.execv(sys.executable, [*torchrun, f"--nproc_per_node={processes}", *sys.argv])


def worth_starting(on_gpus: bool, batch_size: int) -> int:
    """How many processes to share batches of this size among."""
    if on_gpus:
        return torch.cuda.device_count()
    return min(capabilities.cpus(), batch_size // IMAGES_A_PROCESS)


def refuse_several(script: str) -> None:
    """Raise UserError under torchrun: for a script of one process, whose others would do the same
    work and write the same files.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{script} is of one process: start it without torchrun")


def pick_own_gpu() -> None:
    """A GPU for each process of this machine: NCCL refuses two on one, and they would gain nothing.

    Raises UserError where there are fewer.
    """
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        processes = os.environ.get("LOCAL_WORLD_SIZE", f"at least {local + 1}")
        raise UserError(
            f"{processes} processes want a GPU each and there are {gpus}: take torchrun "
            f"--nproc_per_node={gpus}, or --device cpu"
        )
    torch.cuda.set_device(local)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def was_restarted() -> bool:
    """Whether torchrun restarted this process after another had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextmanager
def main_first() -> Iterator[None]:
    """Have rank 0 do something, however long it takes, before the others do it.

    Where rank 0 dies its connections do, and the others raise RuntimeError.
    """
    if world() > 1 and not is_main():
        dist.barrier(_patient)
    yield
    if world() > 1 and is_main():
        dist.barrier(_patient)


def gather(value: object) -> list:
    """Every rank's value, in order of rank, on every rank."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value, group=_patient)
    return values


def largest(value: int) -> int:
    """The largest of all ranks' values, on every rank."""
    if world() == 1:
        return value
    tensor = torch.tensor(value)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_patient)
    return int(tensor)


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' values, on every rank; gradients flow back to each."""
    return values if world() == 1 else Total.apply(values)


class Total(torch.autograd.Function):
    """The sum over all ranks and, on the way back, that of their gradients: what
    torch.distributed.nn.all_reduce did, which torch 2.15 warns of.
    """

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return Total.forward(ctx, gradient)


def wrap(module: nn.Module, sync_bn: bool = False, drops: bool = False) -> nn.Module:
    """The module with its gradients averaged over all ranks; as it is where there is one.

    drops: whether some step may leave a parameter out, as where no image of a rank keeps a block.
    DistributedDataParallel then looks for such ones at each step, and warns where it finds none.
    Raises UserError for `sync_bn` on CPUs, where torch has no synchronised BatchNorm.
    """
    if world() == 1:
        return module
    device = next(module.parameters()).device
    if sync_bn:
        if device.type != "cuda":
            raise UserError("--sync_bn needs GPUs: torch synchronises BatchNorm only there")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    wrapped = DistributedDataParallel(module, find_unused_parameters=drops)
    wrapped.broadcast_buffers = False  # they are shared once an epoch; the argument is deprecated
    return wrapped


def share_buffers(modules: Sequence[nn.Module]) -> None:
    """Give every rank the mean of all ranks' running statistics."""
    for module in modules if world() > 1 else ():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(world())


def unsynchronised(modules: Sequence[nn.Module]) -> ExitStack:
    """Context in which gradients add up on each rank and are not averaged yet."""
    stack = ExitStack()
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            stack.enter_context(module.no_sync())
    return stack
