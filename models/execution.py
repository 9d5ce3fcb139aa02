"""How a batch passes through residual blocks under a policy.

A unit is one block as (residual branch, shortcut). `sparse` computes a branch only for the images
that keep it; `masked` computes it for all and throws results away, which is what the released code
did and what the tests compare with.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

Unit = tuple[nn.Module, nn.Module]


def writable(branch: nn.Module, x: Tensor) -> Tensor:
    """branch(x), which may be written over: a copy, unless nobody else can have the tensor."""
    branched = branch(x)
    hooks = branch._forward_hooks or branch._backward_hooks or branch._backward_pre_hooks
    if hooks or _has_any_global_hook() or not type(branch).__dict__.get("gives_away"):
        return branched.clone()
    return branched


def block(branch: nn.Module, shortcut: nn.Module, x: Tensor) -> Tensor:
    """One block, kept by every image of x."""
    # in place: what BatchNorm needs of its output in the backward pass is nothing
    return F.relu(writable(branch, x).add_(shortcut(x)), inplace=True)


def full(units: Sequence[Unit], x: Tensor) -> Tensor:
    """All blocks, kept by every image."""
    for branch, shortcut in units:
        x = block(branch, shortcut, x)
    return x


def check(policy: Tensor, num_images: int, num_blocks: int) -> None:
    """Raise ValueError for a policy of another shape than (B, K) or (P, B, K), or one that a
    gradient is expected for, which it would never get.
    """
    if policy.shape[-2:] != (num_images, num_blocks) or policy.ndim > 3:
        raise ValueError(
            f"policy has shape {tuple(policy.shape)}, not {(num_images, num_blocks)}: "
            "one row an image, one column a block"
        )
    if policy.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "the policy has a gradient, and blocks give it none: they are kept or dropped. "
            "detach() it, or gate blocks as GatedResNet does"
        )


def refuse_tracing() -> None:
    """Raise RuntimeError under torch.jit.trace, as FLOP counters use it: what it records would be
    right for the policies of the example alone.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(
            "blocks that depend on the image cannot be traced: the trace would be wrong for every "
            "other policy. export.py writes ONNX; test.py and utils.block_flops count FLOPs"
        )


def kept_counts(policy: Tensor) -> list[int]:
    """How many images keep each of the K blocks, of (B, K) or (P, B, K) policies.

    This is where a forward pass waits for a GPU, once for the whole network and not once a block:
    everything else that depends on the policy follows from these K numbers or stays on the device.
    """
    refuse_tracing()
    return policy.bool().flatten(0, -2).sum(0).tolist()


def shared_prefix(counts: Sequence[int], images: int) -> int:
    """How many leading blocks all images keep, by `kept_counts` of so many images."""
    return next((k for k, count in enumerate(counts) if count < images), len(counts))


def kept_rows(policy: Tensor, counts: list[int] | None = None, multiple: int = 1) -> list[Tensor]:
    """For each of the K blocks the indices of the images that keep it, from a (B, K) policy.

    counts: those of `kept_counts`, where they are known. multiple: see `padded`.
    """
    counts = kept_counts(policy) if counts is None else counts
    by_block = policy.bool().t()
    if multiple == 1:
        return list(torch.nonzero_static(by_block, size=sum(counts))[:, 1].split(counts))
    # without knowing a number: first those that keep a block, then the first of them again
    order = by_block.byte().argsort(dim=1, descending=True, stable=True)
    place = torch.arange(len(policy), device=policy.device)
    order = torch.where(place < by_block.sum(1, keepdim=True), order, order[:, :1])
    sizes = [padded(count, len(policy), multiple) for count in counts]
    return [rows[:size] for rows, size in zip(order, sizes, strict=True)]


def kept_spans(policy: Tensor, counts: list[int]) -> list[range | None]:
    """For each of the K blocks the rows that keep it, where they lie together; policy: (B, K).

    Such rows are read and written where they are, without gathering. counts: see `kept_counts`.
    """
    kept, place = policy.bool(), torch.arange(len(policy), device=policy.device)[:, None]
    first = torch.where(kept, place, len(policy)).amin(0).tolist()
    stop = torch.where(kept, place + 1, 0).amax(0).tolist()
    limits = zip(first, stop, counts, strict=True)
    return [range(i, j) if j - i == count else None for i, j, count in limits]


def neighbours(rows: Sequence[int]) -> list[slice]:
    """Rising rows, as slices of those that follow one another."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    stops = [*starts[1:], len(rows)]
    return [slice(rows[i], rows[j - 1] + 1) for i, j in zip(starts, stops, strict=True)]


def nested_order(policy: Tensor) -> Tensor | None:
    """An order of the images (B,) in which those that keep a block come first; policy: (B, K).

    None where it is so for less than half of the blocks that some keep and some drop, or where
    there are no such blocks.
    """
    order = policy.sum(1).argsort(descending=True, stable=True)
    kept = policy[order].byte()
    shared = kept.amin(0) < kept.amax(0)
    leading = (kept.cummin(0).values == kept).all(0)
    is_nested = 2 * (leading & shared).sum() >= max(shared.sum(), 1)
    return order if is_nested else None


def padded(count: int, images: int, multiple: int) -> int:
    """The number of rows to compute where `count` of the images keep a block.

    cuDNN chooses anew for every batch size that it meets; multiples of a number are few. A row that
    is computed twice gives the same result twice. Never all images, unless they all keep the block.
    """
    if count in (0, images):
        return count
    return min(-(-count // multiple) * multiple, images - 1)


def open_rows(gate: Tensor, multiple: int = 1) -> Tensor:
    """The indices of the images whose gate (B,) is open; one wait for a GPU."""
    refuse_tracing()
    rows = gate.nonzero()[:, 0]
    more = padded(len(rows), len(gate), multiple) - len(rows)
    return torch.cat([rows, rows[:1].expand(more)]) if more else rows


def as_rows(x: Tensor) -> Tensor:
    """A (B, C, H, W) tensor, channels_last, seen as a matrix with one row an image.

    The elements are 16 bytes wide where that fits: indexing moves them one at a time, and fewer
    wide ones take a fifth of the time of many narrow ones. Their values mean nothing.
    """
    rows = x.permute(0, 2, 3, 1).flatten(1)
    wide = 16 // x.element_size()
    return rows.view(torch.complex128) if rows.shape[1] % wide == 0 else rows


def as_images(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_rows`: (n, C, H, W), channels_last, with dtype and sizes of `like`."""
    _, channels, height, width = like.shape
    return rows.view(like.dtype).view(-1, height, width, channels).permute(0, 3, 1, 2)


def gather(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], channels_last: `index_select` on x itself would lose that layout, and every
    convolution after it would convert its input.
    """
    return as_images(as_rows(x).index_select(0, rows), x)


def scatter_(x: Tensor, rows: Tensor, kept: Tensor) -> Tensor:
    """x[rows] = kept, in place."""
    kept = kept.to(x.dtype)
    if not x.is_contiguous(memory_format=torch.channels_last):
        return x.index_copy_(0, rows, kept)  # as_rows would be a copy of x
    as_rows(x).index_put_((rows,), as_rows(kept))
    return x


class GatherRows(torch.autograd.Function):
    """x -> (x, x[rows]), the way into a block that only `rows` of the batch keep.

    Only `ScatterRows`, or nothing, may consume the first output, with the same rows: its gradient's
    `rows` are then void and are overwritten here, which spares a zero-filled tensor and an addition
    a block. A gradient that is to be differentiated again is not written into.
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return x.view_as(x), gather(x, rows)

    @staticmethod
    def backward(ctx, grad_rest: Tensor, grad_kept: Tensor):
        (rows,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad_rest.index_copy(0, rows, grad_kept.to(grad_rest.dtype)), None
        return scatter_(
            grad_rest.contiguous(memory_format=torch.channels_last), rows, grad_kept
        ), None


class ScatterRows(torch.autograd.Function):
    """(rest, rows, kept) -> rest with its `rows` replaced by `kept`, the way out of a block."""

    @staticmethod
    def forward(ctx, rest: Tensor, rows: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.kept_dtype = kept.dtype
        return scatter_(rest.clone(memory_format=torch.channels_last), rows, kept)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad, None, grad.index_select(0, rows).to(ctx.kept_dtype)
        # a copy, because GatherRows writes into it and others may hold this gradient
        rest = grad.clone(memory_format=torch.channels_last)
        return rest, None, gather(rest, rows).to(ctx.kept_dtype)


def kept_block(branch: nn.Module, shortcut: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """One block on the `rows` of x that keep it, its shortcut on the others."""
    if len(rows) == len(x):
        return block(branch, shortcut, x)
    if len(rows) == 0:
        return shortcut(x)
    if isinstance(shortcut, nn.Identity):
        rest, kept = GatherRows.apply(x, rows)
        return ScatterRows.apply(rest, rows, block(branch, shortcut, kept))
    rest, kept = GatherRows.apply(shortcut(x), rows)
    branched = writable(branch, GatherRows.apply(x, rows)[1])
    return ScatterRows.apply(rest, rows, F.relu(branched.add_(kept), inplace=True))


def sparse(units: Sequence[Unit], x: Tensor, kept: Sequence[Tensor]) -> Tensor:
    """All blocks, each run on the rows of x that keep it, by `kept_rows`."""
    for (branch, shortcut), rows in zip(units, kept, strict=True):
        x = kept_block(branch, shortcut, x, rows)
    return x


def masked(
    units: Sequence[Unit], x: Tensor, policy: Tensor, counts: list[int] | None = None
) -> Tensor:
    """All blocks, each run on every row and then selected by the policy.

    As released, a block that no row keeps is not run, and its BatchNorm learns nothing. Where
    ranks share BatchNorm's statistics they have to come to it together, and all are run.
    """
    keep = policy != 0  # a tensor of its own, for policies of inference mode cannot be kept
    if torch.jit.is_tracing():  # it has to hold for every policy
        counts = [len(x)] * len(units)
    counts = kept_counts(policy) if counts is None else counts
    for k, ((branch, shortcut), count) in enumerate(zip(units, counts, strict=True)):
        dropped = shortcut(x)
        if not count and not any(isinstance(m, nn.SyncBatchNorm) for m in branch.modules()):
            x = dropped
            continue
        x = torch.where(keep[:, k, None, None, None], F.relu(dropped + branch(x)), dropped)
    return x
