"""A residual block of an inference-only twin: its convolutions, and the images that it runs on.

BatchNorm is folded into the convolutions, and the sum and relu that end a block run inside its last
one where the backend has such a kernel (oneDNN on the CPU). A block writes over the rows that keep
it, so the others are not touched.
"""

import math
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import flop_counter

from models import capabilities
from models.execution import as_images, as_rows, neighbours

from . import reading

# oneDNN orders weights for the batch that they will meet. With AVX2 an order for one image is up to
# seven times slower on ten, the other way round up to twenty times; one for this many serves all.
PACKED_BATCH = 16

# oneDNN makes its kernels anew for each batch size that it meets, which may take longer than to run
# them. So above two tiles a part of a batch runs in two pieces, whole tiles and the rest, and few
# sizes occur.
TILE = 32


def count_flops() -> None:
    """Have torch's FLOP counter count oneDNN's kernels, which it does not know by itself.

    Other counters (thop, ptflops, torchinfo) go by modules, of which a twin has none.
    """
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_convolution_pointwise"):  # a build without oneDNN
        return
    if ops._convolution_pointwise in flop_counter.flop_registry:  # by another copy of this module
        return

    def pointwise(x, weight, *_, out_shape=None, **__) -> int:
        return flop_counter.conv_flop_count(x, weight, out_shape, transposed=False)

    def in_place(shortcut, x, weight, *_, out_shape=None, **__) -> int:
        return flop_counter.conv_flop_count(x, weight, shortcut, transposed=False)

    flop_counter.register_flop_formula(ops._convolution_pointwise)(pointwise)
    flop_counter.register_flop_formula(ops._convolution_pointwise_)(in_place)


count_flops()  # a counter knows the formulas that there were when it was made

# Packed copies that a convolution keeps, each as large as its weight: one for each size of images,
# twice as many where batches of one come as well. Where more come in turn, each is made anew.
PACKINGS = 16

# Multiply-adds of a block on one image from which to copy it costs more than to call kernels more
# often: kept images then run where they are, neighbours together.
IN_PLACE = 30e6


class Conv:
    """A convolution with its BatchNorm folded in, and what follows it in a residual network."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype):
        weight, bias = reading.folded(conv, norm)
        weight = weight.detach().to(dtype)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias = bias.detach().to(dtype)
        self.geometry = (list(conv.padding), list(conv.stride), [1, 1], 1)
        self.onednn = conv.weight.device.type == "cpu" and capabilities.fused_convolutions(dtype)
        self.packed: dict[tuple[int, ...], Tensor] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "packed": {}}  # which cannot be copied, and is made anew

    def weight_for(self, x: Tensor) -> Tensor:
        """The weight as oneDNN's kernels read it, made at the first batch of this kind.

        A packing holds for one number of threads as well: another costs a reordering a call.
        """
        size = (1 if len(x) == 1 else PACKED_BATCH, *x.shape[1:])
        kind = (torch.get_num_threads(), *size)
        weight = self.packed.get(kind)
        if weight is None:
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, size)
            self.packed = dict([*self.packed.items(), (kind, weight)][-PACKINGS:])
        return weight

    def plain(self, x: Tensor) -> Tensor:
        if self.onednn:
            return self.fused(x, "none")
        padding, stride, _, _ = self.geometry
        return F.conv2d(x, self.weight, self.bias, stride, padding)

    def relu(self, x: Tensor) -> Tensor:
        """relu(conv(x))."""
        return self.fused(x, "relu") if self.onednn else self.plain(x).relu_()

    def fused(self, x: Tensor, activation: str) -> Tensor:
        """Convolution and activation in one kernel, as torch.compile emits for frozen networks."""
        weight = self.weight_for(x)
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, weight, self.bias, *self.geometry, activation, [], ""
        )

    def add_relu(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """relu(shortcut + conv(x)), written over `shortcut`."""
        if self.onednn:
            weight = self.weight_for(x)
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                shortcut, x, weight, self.bias, *self.geometry, "add", 1.0, "relu", [], ""
            )
        return shortcut.add_(self.plain(x)).relu_()


class Batch:
    """Images (B, C, H, W), channels_last, and the same memory as a matrix with one row an image.

    Both views are made once and serve many blocks: at small batches making them anew would cost
    as much as the arithmetic.
    """

    def __init__(self, images: Tensor, matrix: Tensor | None = None):
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.matrix = as_rows(self.images) if matrix is None else matrix

    def gather(self, rows: Tensor | range) -> "Batch":
        """A copy of some rows; of a range the rows themselves."""
        if isinstance(rows, range):
            span = slice(rows.start, rows.stop)
            return Batch(self.images[span], self.matrix[span])
        matrix = self.matrix.index_select(0, rows)
        return Batch(as_images(matrix, self.images), matrix)

    def scatter_(self, rows: Tensor | range, kept: "Batch") -> None:
        """Write back what `gather` gave."""
        if not isinstance(rows, range):
            self.matrix.index_put_((rows,), kept.matrix)


class Block:
    """A residual block and its shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, dtype: torch.dtype):
        pairs = reading.convolutions(branch)
        self.convs = [Conv(conv, norm, dtype) for conv, norm in pairs]
        # multiply-adds a pixel of the input, and pixels of the output for each of these
        self.work, self.shrinks = 0.0, 1.0
        for conv in self.convs:
            self.shrinks /= math.prod(conv.geometry[1])
            self.work += self.shrinks * conv.weight.numel()
        self.is_identity = isinstance(shortcut, nn.Identity)
        projection = reading.shortcut_layers(shortcut)
        self.shortcut = deepcopy(shortcut) if projection is None else Conv(*projection, dtype).plain

    def run(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """relu(shortcut + F(x)), written over `shortcut`, which may be x itself."""
        for conv in self.convs[:-1]:
            x = conv.relu(x)
        return self.convs[-1].add_relu(x, shortcut)

    def run_part(self, x: Tensor, shortcut: Tensor) -> None:
        """`run` on a part of a batch, whose size may not come again; see TILE."""
        rest = len(x) % TILE if self.convs[0].onednn and len(x) > 2 * TILE else 0
        if rest:
            self.run(x[:-rest], shortcut[:-rest])
            x, shortcut = x[-rest:], shortcut[-rest:]
        self.run(x, shortcut)

    def in_place(self, x: Tensor) -> bool:
        """Whether images of this size are run where they are; see IN_PLACE."""
        return x.device.type == "cpu" and self.work * x[0, 0].numel() >= IN_PLACE

    def full(self, x: Tensor) -> Tensor:
        return self.run(x, x if self.is_identity else self.shortcut(x))

    def dropped(self, x: Tensor, relu_dropped: bool) -> Tensor:
        """The block for images that drop it; see `sparse`."""
        if self.is_identity:
            return x
        return self.shortcut(x).relu_() if relu_dropped else self.shortcut(x)

    def sparse(self, batch: Batch, rows: Tensor | range, relu_dropped: bool = False) -> Batch:
        """The block on the rows that keep it, the shortcut on the others; may write over them.

        With `relu_dropped` a shortcut that computes something is followed by relu (ConvNet-AIG).
        """
        if len(rows) == 0:
            return batch if self.is_identity else Batch(self.dropped(batch.images, relu_dropped))
        out = batch if self.is_identity else Batch(self.shortcut(batch.images))
        if len(rows) == len(batch.images):
            self.run(batch.images, out.images)
            return out
        if self.in_place(batch.images):
            for span in neighbours(rows.tolist() if isinstance(rows, Tensor) else rows):
                self.run(batch.images[span], out.images[span])
            if relu_dropped and not self.is_identity:
                out.images.relu_()
            return out
        shortcut = out.gather(rows)
        kept = shortcut if self.is_identity else batch.gather(rows)
        self.run_part(kept.images, shortcut.images)
        if relu_dropped and not self.is_identity:
            out.images.relu_()
        out.scatter_(rows, shortcut)
        return out
