#!/bin/sh
# torch 2.13.0: a step of an optimizer with fused=True (SGD, Adam, AdamW) changes weights without raising
# their version counters, by which autograd tells that a tensor it saved has been changed. A second
# backward pass through a graph that was kept over such a step gives a wrong gradient in silence, where
# the plain optimizer's step makes it raise; whatever caches by versions, as copies made for inference,
# goes on with old weights. Seen: versions 0 and 0 before and after a fused step, 0 and 1 or 2 with a
# plain one; the second gradient is the one at the new weights.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'END'
import torch


def twice(optimizer, **options):
    """Versions of a weight around a step, and the gradient of its kept graph before and after it."""
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = (weight**2).sum()
    loss.backward(retain_graph=True)
    before, gradient = weight._version, weight.grad.clone()
    optimizer([weight], lr=0.5, **options).step()
    after, weight.grad = weight._version, None
    try:
        loss.backward()
        again = weight.grad.tolist()
    except RuntimeError as error:
        again = str(error).split(":")[0]
    return (before, after), gradient.tolist(), again


for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
    for fused in (False, True):
        versions, gradient, again = twice(optimizer, fused=fused)
        print(optimizer.__name__, "fused" if fused else "plain", versions, gradient, again)
        assert gradient == [4, 6]
        if fused:
            assert versions[0] == versions[1] and isinstance(again, list) and again != gradient
        else:
            assert versions[0] < versions[1] and isinstance(again, str)
END
