"""What one of several processes does in tests/test_ranks.py: gradients of one epoch, by stage.

torchrun --nproc_per_node N tests/ranks_worker.py MICRO_BATCH FILE
"""

import sys
from functools import partial
from types import SimpleNamespace

import torch
from conftest import script_module

import engine
import models
import utils
from engine import loop, ranks
from engine.data import TensorLoader

ARGS = SimpleNamespace(alpha=0.8, beta=0.1, penalty=-3.0, samples=2, distill=0.0, loss_factor=2.0)


class Recorder:
    """An optimizer that keeps the gradients and changes nothing."""

    def __init__(self, *networks):
        self.parameters = {
            f"{i}.{n}": p for i, net in enumerate(networks) for n, p in net.named_parameters()
        }
        self.param_groups = [{"params": list(self.parameters.values()), "lr": 0.0}]
        self.gradients = []

    def zero_grad(self):
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self):
        self.gradients.append(
            {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}
        )


def loader(spec, training):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (23,), generator=generator)
    return TensorLoader(images, labels, spec, 7, augment=training, seed=4)


def double(loader_epoch):
    def epoch(*args):
        for images, labels, part in loader_epoch(*args):
            yield images.double(), labels, part

    return epoch


def main(micro_batch, path):
    ranks.start()
    torch.manual_seed(3)
    spec = models.config("R14_C10")
    resnet, policy_net = models.build("R14_C10")
    gated, _ = models.build("AIG14_C10")
    for network in (resnet, policy_net, gated):
        network.double().eval()
    with torch.no_grad():
        policy_net.logit.weight.mul_(20)
    # open and closed for certain: its noise is drawn for each part, not for the whole batch
    for k, gate in enumerate(gated.gates):
        gate.fc2.bias.data = torch.tensor([0.0, 60.0 if k % 2 else -60.0], dtype=torch.float64)
    gated.decide = lambda logits: torch.sigmoid(logits[:, 1] - logits[:, 0])
    gated.training = True  # its BatchNorms stay in evaluation mode
    mask = torch.tensor([False, False, True, True, True, True])
    targets = torch.tensor([0.5, 0.5, 1.0, 0.3, 0.3, 0.3], dtype=torch.float64)
    cl, ft, aig = (script_module(n) for n in ("cl_training", "finetune", "aig_training"))
    stages = {
        "stage 1": (
            [policy_net],
            lambda p: partial(cl.train_step, p, resnet, mask=mask, args=ARGS),
        ),
        "stage 2": ([policy_net, resnet], lambda p, r: partial(ft.train_step, p, r, args=ARGS)),
        "aig": ([gated], lambda g: partial(aig.train_step, g, targets=targets, args=ARGS)),
    }
    found = {}
    for name, (networks, make_step) in stages.items():
        data, recorder = loader(spec, training=True), Recorder(*networks)
        data.epoch = double(data.epoch)
        wrapped = [ranks.wrap(n, drops=isinstance(n, models.ResNet)) for n in networks]
        pieces = None if name == "aig" else micro_batch
        training = loop.Training(wrapped, [recorder], micro_batch=pieces)
        step = make_step(*wrapped)
        for images, labels, shard in training.batches(data, 1):
            training.step(*step(images, labels, shard))
        found[name] = recorder.gradients
        found[f"{name} results"] = training.results.gather()

    def test_step(images, labels):
        policy = utils.greedy(policy_net(images.double())[0])
        reward, correct = utils.reward(resnet(images.double(), policy), labels, policy, -3.0)
        return {"policy": policy, "reward": reward, "correct": correct, "label": labels}

    found["evaluation"] = engine.evaluate(test_step, loader(spec, training=False), "fp32").gather()
    data = loader(spec, training=True)
    data.epoch = double(data.epoch)
    found["candidates"] = engine.candidates.find(resnet, data, spec.stages, "fp32")
    if ranks.is_main():
        torch.save(found, path)


if __name__ == "__main__":
    engine.run_script(partial(main, int(sys.argv[1]) or None, sys.argv[2]))
