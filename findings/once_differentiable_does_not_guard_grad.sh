#!/bin/sh
# torch 2.13.0: a custom autograd.Function whose backward is marked @once_differentiable raises when its
# gradient is differentiated again by backward(), but not by torch.autograd.grad(..., inputs), which
# leaves out what came through the function and gives a wrong second derivative in silence: the error
# stands behind a detached copy, from where no input is reached. Seen: x * f(x) ** 2 with f(x) = 2 x, at
# x = 2; its second derivative, 24 x, is 48. With f marked, backward() raises and torch.autograd.grad
# gives 16.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'END'
import torch
from torch.autograd.function import once_differentiable


class Double(torch.autograd.Function):
    """x -> 2 x."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad


def gradient(function):
    """Of sum(x * function(x) ** 2), where x is 2, and x."""
    x = torch.tensor([2.0], requires_grad=True)
    value = (x * function(x) ** 2).sum()
    return torch.autograd.grad(value, x, create_graph=True)[0], x


first, x = gradient(lambda x: 2 * x)
(plain,) = torch.autograd.grad(first.sum(), x)
first, x = gradient(Double.apply)
(marked,) = torch.autograd.grad(first.sum(), x)
first, x = gradient(Double.apply)
try:
    first.sum().backward()
    raise SystemExit("backward() does not raise")
except RuntimeError as error:
    print("backward():", error)
print("plain", plain.item(), "- torch.autograd.grad through the function", marked.item())
assert plain.item() == 48 and marked.item() != 48
END
