"""Runs the released codes beside ours, under the Python and torch that they were written for.

Called by released.py as `PYTHON released_calls.py CALL CHECKOUT GIVEN OUT [ARGUMENTS]`. GIVEN is an
.npz of arrays, OUT one of what came out. This file alone is read by those old interpreters: it is
valid in Python 2.7 and 3.
"""

import os
import sys
import types

import numpy as np
import torch
from torch import nn


def without_gpu():
    """The released codes always send to a GPU."""

    def stay(self, *args, **kwargs):
        return self

    torch.Tensor.cuda = stay
    nn.Module.cuda = stay


def named_gradients(name, module):
    return {
        "/".join(("gradient", name, key)): p.grad.numpy()
        for key, p in module.named_parameters()
        if p.grad is not None
    }


def named_buffers(name, module):
    return {
        "/".join(("buffer", name, key)): tensor.numpy()
        for key, tensor in module.state_dict().items()
        if "running_" in key
    }


def blockdrop(checkout, given, arguments):
    """Run one of its scripts, its data set replaced by the images that are given.

    images: (N, H, W, 3) uint8, which its transforms get, or (N, 3, H, W) float32 as they are.
    noise (B, K): uniform numbers to sample the policies of a step with, if given.
    """
    import torchvision
    from PIL import Image

    class Images:
        def __init__(self, transform=None, **_):
            self.transform = transform

        def __len__(self):
            return len(given["labels"])

        def __getitem__(self, index):
            image, label = given["images"][index], int(given["labels"][index])
            if image.dtype == np.uint8:
                return self.transform(Image.fromarray(image)), label
            return torch.from_numpy(image), label

    torchvision.datasets.CIFAR10 = torchvision.datasets.CIFAR100 = Images
    logger = types.ModuleType("tensorboard_logger")
    logger.configure = logger.log_value = lambda *args, **kwargs: None
    sys.modules["tensorboard_logger"] = logger
    losses = []
    backward = torch.Tensor.backward

    def noted(self, *args, **kwargs):
        losses.append(self.item())
        return backward(self, *args, **kwargs)

    torch.Tensor.backward = noted
    if "noise" in given:
        noise = torch.from_numpy(given["noise"])
        torch.randperm = torch.arange  # the batch in its order
        torch.distributions.Bernoulli.sample = lambda self: (noise < self.probs).float()

    script = arguments[0]
    sys.path.insert(0, checkout)
    sys.argv = arguments
    scope = {"__name__": "__main__", "__file__": script}
    with open(os.path.join(checkout, script)) as file:
        exec(compile(file.read(), script, "exec"), scope)
    found = {"losses": np.array(losses)}
    for name, module in (("agent", scope["agent"]), ("resnet", scope["rnet"])):
        found.update(named_gradients(name, module))
        found.update(named_buffers(name, module))
    return found


def aig(checkout, given, arguments):
    """ConvNet-AIG's CIFAR network: gates and logits, and loss and gradients of a training step.

    images (N, 3, 32, 32), labels (N,), noise (blocks, N, 2) of Gumbel, target. Computes in the type
    of the images.
    """
    sys.path.insert(0, checkout)
    import convnet_aig
    import gumbelmodule
    from torch.nn import functional

    # it hands BatchNorm1d four dimensions, which torch refuses since 0.4
    nn.BatchNorm1d._check_input_dim = lambda self, x: None
    coming = []
    sampler = gumbelmodule.GumbleSoftmax
    sampler.sample_gumbel_like = lambda self, like: coming.pop(0).view_as(like)
    file, stages, classes = arguments
    torch.set_default_dtype(torch.from_numpy(given["images"]).dtype)
    stages = [int(part) for part in stages.split(",")]
    net = convnet_aig.ResNet_cifar(convnet_aig.BasicBlock, stages, int(classes))
    state = torch.load(file)["state_dict"]
    net.load_state_dict({name[len("module.") :]: tensor for name, tensor in state.items()})
    images, labels = torch.from_numpy(given["images"]), torch.from_numpy(given["labels"])
    noise = torch.from_numpy(given["noise"])
    found = {}
    with torch.no_grad():
        net.eval()
        for name, numbers in (("argmax", torch.zeros_like(noise)), ("sampled", noise)):
            coming[:] = list(numbers)
            logits, gates = net(images)
            found[name + "/logits"] = logits.numpy()
            found[name + "/gates"] = torch.stack([g.view(-1) for g in gates], 1).numpy()
    net.train()
    coming[:] = list(noise)
    logits, gates = net(images)
    target = float(given["target"])
    distance = sum((g.mean() - target) ** 2 for g in gates) / len(gates)
    loss = functional.cross_entropy(logits, labels) + 2 * distance
    loss.backward()
    found["losses"] = np.array([loss.item()])
    found.update(named_gradients("resnet", net))
    found.update(named_buffers("resnet", net))
    return found


def main():
    call, checkout, given, out = sys.argv[1:5]
    without_gpu()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    given = dict(np.load(given))
    found = {"blockdrop": blockdrop, "aig": aig}[call](checkout, given, sys.argv[5:])
    np.savez(out, **found)


if __name__ == "__main__":
    main()
