"""A batch on a CPU in parts: a thread each, whose kernels have that thread alone.

A kernel that all threads share ends when the last of them has come. Where another process takes a
core, each of a network's hundreds of kernels waits for a thread that is not running; parts wait
for one another once a batch. Whatever can belongs inside a part: after a kernel of all threads
OpenMP's others wait for the next by spinning, on cores that parts then lack for milliseconds.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")


class Pools:
    """Threads that last, by how many they are: starting one a batch would cost as much as it saves.

    They end with the process; a forked child begins without any.
    """

    def __init__(self):
        self.made: dict[int, ThreadPoolExecutor] = {}
        self.lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.made, self.lock = {}, threading.Lock()

    def get(self, threads: int) -> ThreadPoolExecutor:
        with self.lock:
            if threads not in self.made:
                self.made[threads] = self.start(threads)
            return self.made[threads]

    def start(self, threads: int) -> ThreadPoolExecutor:
        """A pool whose threads are all there, each with kernels of one thread."""
        pool = ThreadPoolExecutor(threads, thread_name_prefix="part")
        all_there = threading.Barrier(threads)

        def begin() -> None:
            torch.get_num_threads()  # else the number is set anew by the first kernel
            torch.set_num_threads(1)
            all_there.wait()

        before = torch.get_num_threads()
        wait([pool.submit(begin) for _ in range(threads)])
        torch.set_num_threads(before)  # what threads begin with that the program starts later
        return pool


POOLS = Pools()


def count(x: Tensor) -> int:
    """Into how many parts images (B, C, H, W) go.

    One on a GPU, and where what is switched on in this thread would not follow into others: a
    profiler, or a mode such as torch's FLOP counter.
    """
    watched = torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled()
    if x.device.type != "cpu" or watched:
        return 1
    return max(1, min(len(x), torch.get_num_threads()))


def run(calls: Sequence[Callable[[], Found]]) -> list[Found]:
    """What each call gives, each in a thread of its own; for inference. The first error is raised
    when all have ended.
    """
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def inside(call: Callable[[], Found]) -> Found:
        enabled, dtype = autocast
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled):
            return call()

    futures = [POOLS.get(torch.get_num_threads()).submit(inside, call) for call in calls]
    wait(futures)
    return [future.result() for future in futures]


def evenly(call: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    """What `call` makes of the images (B, C, H, W), in parts of as many: a row each an image."""
    number = count(x)
    if number == 1:
        return call(x)
    found = run([partial(call, part) for part in x.tensor_split(number)])
    return tuple(torch.cat(rows) for rows in zip(*found, strict=True))


def balanced(cost: Tensor, parts: int) -> list[Tensor]:
    """The rows of each part, from each image's cost (B,): those in falling order are dealt out
    forwards and backwards in turn, so that parts cost alike and costs fall within each.
    """
    order = cost.argsort(descending=True, stable=True)
    place = torch.arange(len(cost), device=cost.device) % (2 * parts)
    place = torch.minimum(place, 2 * parts - 1 - place)
    return [order[place == part] for part in range(parts)]
