"""What a step makes the host wait for on a GPU, and what would mix devices there, without one.

The forward passes run on fake tensors, which have a device and a shape and no memory. Their
backward passes would ask for a driver: tests/test_cuda.py has those.
"""

import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, script_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import engine
import models
import utils
from engine import loop
from engine.storage import ROOT
from models import execution

# Calls that return once the GPU is done: a value that Python reads, or a shape that depends on one.
READS = {
    *("item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__"),
    *("__index__", "__contains__", "__repr__", "__format__", "is_nonzero", "equal", "allclose"),
    *("nonzero", "argwhere", "masked_select", "unique", "_unique2", "unique_dim"),
    *("unique_consecutive", "bincount", "synchronize", "cuda"),
}
# Reads and copies of what is on the host, or on the device, already.
NO_WAITS = {
    ("optimizer.py", "_get_value"): "Adam counts its steps on the host",
    ("clip_grad.py", "_get_total_norm"): "norms are on the device of the first",
    ("clip_grad.py", "_clip_grads_with_norm_"): "and so is the factor",
    ("utils.py", "penalty_between"): "of a batch's noise, which is drawn on the host",
    ("utils.py", "random_route"): "the same",
    ("execution.py", "nested_order"): "asked on a CPU only, as the fake tensors show",
    ("execution.py", "kept_spans"): "the same",
}


def waits(func, args, kwargs) -> bool:
    """Whether the host would wait in this call if its tensors were on a GPU."""
    name = getattr(func, "__name__", "")
    if name == "where":
        return len(args) == 1
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index)
    if name == "repeat_interleave":
        of_tensor = any(isinstance(a, torch.Tensor) for a in [*args[1:], kwargs.get("repeats")])
        return of_tensor and kwargs.get("output_size") is None
    if name in ("tensor", "as_tensor"):
        return kwargs.get("device") is not None
    if name == "to":
        given = [*args[1:], *kwargs.values()]
        return any(isinstance(a, torch.device) for a in given) and not kwargs.get("non_blocking")
    return name in READS


class Waits(TorchFunctionMode):
    """Counts the calls inside that would wait, by the function that makes them."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if waits(func, args, kwargs or {}):
            self.note(func.__name__)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        for frame in reversed(traceback.extract_stack()[:-2]):
            file = Path(frame.filename)
            if (file.name, frame.name) in NO_WAITS:
                return
            if file.is_relative_to(ROOT) and ".venv" not in file.parts:
                self.found[f"{file.name}:{frame.name} {name}"] += 1
                return

    def take(self) -> dict[str, int]:
        found, self.found = dict(self.found), Counter()
        return found


X = torch.rand(4, 3)
WAITING = {
    "tolist": lambda: X.tolist(),
    "item": lambda: X.sum().item(),
    "bool": lambda: bool(X.sum() > 0),
    "if": lambda: 1 if X.any() else 0,
    "int": lambda: int(X.sum()),
    "float": lambda: float(X.sum()),
    "format": lambda: f"{X.sum():.2f}",
    "range": lambda: range(X.argmax()),
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.numpy(),
    "mask": lambda: X[X > 0.5],
    "mask of columns": lambda: X[:, X[0] > 0.5],
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 0.5),
    "unique": lambda: X.unique(),
    "repeats": lambda: torch.arange(4).repeat_interleave(torch.tensor([1, 2, 0, 1])),
    "made there": lambda: torch.tensor(1.0, device=torch.device("cpu")),
    "copied there": lambda: X.to(torch.device("cpu")),
}
GOING_ON = {
    "another dtype": lambda: X.to(torch.float64),
    "copied on the way": lambda: X.to(torch.device("cpu"), non_blocking=True),
    "rows": lambda: X[torch.tensor([0, 2])],
    "slice": lambda: X[1:3, :2],
    "masked": lambda: X.masked_fill(X > 0.5, 1),
    "one of two": lambda: torch.where(X > 0.5, X, 0.0),
    "known size": lambda: torch.nonzero_static(X > 0.5, size=3),
    "filled there": lambda: torch.full((), 0.5, device=torch.device("cpu")),
}


@pytest.mark.parametrize("name", [*WAITING, *GOING_ON])
def test_each_way_to_wait_is_seen(name):
    with Waits() as found:
        (WAITING | GOING_ON)[name]()
    assert sum(found.found.values()) == (name in WAITING)


@pytest.fixture
def one_step(run, cifar_dir, base_file, policy_files, tmp_path, monkeypatch):
    """one_step(script, ...) -> what the second of two training steps and of two evaluation steps
    of a script waits for.
    """
    batches, step, evaluate = engine.Run.batches, engine.Run.step, loop.evaluate
    steps = {"train": [], "test": []}

    def watched_batches(self, loader):
        with Waits() as self.waits:
            yield from batches(self, loader)

    def watched_step(self, *args):
        step(self, *args)
        steps["train"].append(self.waits.take())

    def watched_evaluation(step, *args):
        def note(images, labels):
            results = step(images, labels)
            steps["test"].append(found.take())
            return results

        with Waits() as found:
            return evaluate(note, *args)

    monkeypatch.setattr(engine.Run, "batches", watched_batches)
    monkeypatch.setattr(engine.Run, "step", watched_step)
    monkeypatch.setattr(loop, "evaluate", watched_evaluation)
    given = {
        "cl_training": ["--base", base_file],
        "finetune": ["--base", base_file, "--pretrained", policy_files / "policy.t7"],
    }

    def call(script, *options):
        options = [*given.get(script, []), *options]
        if "--policy" in options:
            del options[2:4]
        model = "AIG14_C10" if script == "aig_training" else TINY
        status, _, err = run(
            script, "--model", model, "--data_dir", cifar_dir, "--skip_data_check", "--cv_dir",
            tmp_path / "run", "--max_epochs", 1, "--batch_size", 20, "--subset", 40, *options,
        )  # fmt: skip
        assert status == 0, err
        return steps["train"][1], steps["test"][1]

    return call


FINITE = {"loop.py:step __bool__": 1}  # whether loss and gradient are, before the update
COUNTS = {"execution.py:kept_counts tolist": 1}  # of one forward pass
TWICE = {"execution.py:kept_counts tolist": 2}
GATES = {"execution.py:open_rows nonzero": 6}  # one a block of AIG14

STEPS = {
    "stage 0": (["pretrain"], {}, {}),
    "stage 0, routes": (["pretrain", "--routes"], COUNTS, {}),
    "stage 1": (["cl_training"], COUNTS, COUNTS),
    "stage 1, masked": (["cl_training", "--execution", "masked"], COUNTS, COUNTS),
    "stage 1, warm start": (["cl_training", "--warm_start", 1], COUNTS, COUNTS),
    "stage 2": (["finetune"], TWICE, COUNTS),
    "stage 2, masked": (["finetune", "--execution", "masked"], TWICE, COUNTS),
    "stage 2, static": (["finetune", "--policy", "first:3", "--distill", 0.5], COUNTS, COUNTS),
    "stage 2, penalties": (["finetune", "--penalties", -1, -9, "--distill", 0.5], COUNTS, COUNTS),
    "ConvNet-AIG": (["aig_training"], {}, GATES),
}


@pytest.mark.parametrize("stage", STEPS)
def test_what_a_step_waits_for(stage, one_step, policy_files):
    (script, *options), training, evaluation = STEPS[stage]
    if "--penalties" in options:
        options += ["--pretrained", policy_files / "warm.t7"]
    assert one_step(script, *options) == (FINITE | training, evaluation)


def test_a_planted_read_is_counted(one_step, monkeypatch):
    greedy = utils.greedy

    def planted(probs):
        probs.tolist()
        return greedy(probs)

    monkeypatch.setattr(utils, "greedy", planted)
    training, evaluation = one_step("cl_training")
    more = {"test_sync.py:planted tolist": 1}
    assert (training, evaluation) == (FINITE | COUNTS | more, COUNTS | more)


def test_the_bar_looks_at_its_figures_once_a_second(monkeypatch):
    now = iter([0.0, 0.0, 0.4, 0.8, 1.2, 1.2, 1.6])
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(loop, "tqdm", lambda **options: SimpleNamespace(
        disable=False, set_postfix=lambda shown, refresh: looks.append(shown),
        update=lambda count: None))  # fmt: skip
    looks = []
    results = loop.Results(10, "")
    with Waits() as found:
        for correct in (1.0, 0.0, 0.0, 0.0, 0.0):
            policy = torch.tensor([[1, 0, 1], [0, 1, 1]])
            found_now = {"correct": torch.full((2,), correct), "policy": policy}
            results.add(2, {**found_now, "label": torch.arange(2)})
    assert looks == [{"acc": "1.000", "blocks": "2.000"}, {"acc": "0.250", "blocks": "2.000"}]
    assert sum(found.found.values()) == 2


def test_random_numbers_for_a_gpu_are_drawn_into_pinned_memory(monkeypatch):
    asked, moved = [], []
    rand, to = torch.rand, torch.Tensor.to

    def note_rand(*sizes, pin_memory=False, **options):
        asked.append(pin_memory)
        return rand(*sizes, **options)

    def note_to(tensor, device, **options):
        moved.append((device.type, options))
        return to(tensor, "cpu")

    monkeypatch.setattr(torch, "rand", note_rand)
    monkeypatch.setattr(torch.Tensor, "to", note_to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    found = [
        engine.Shard(2, 5, 6, (1, 2), 3).noise(4, device=device and torch.device(device))
        for device in ("cuda", "cpu", None)
    ]
    assert asked == [True, False, False]
    assert moved == [("cuda", {"non_blocking": True})]  # what stays on the host is left there
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_one_policy_for_all_images_goes_to_a_gpu(monkeypatch):
    """Pinned as PyTorch does it: a tensor of the same strides is written to."""

    def pin(tensor):
        return torch.empty_strided(tensor.size(), tensor.stride()).copy_(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(engine.device, "wants_pinned", lambda device: True)
    policy = torch.tensor([1, 0, 1], dtype=torch.uint8).expand(4, -1)
    sent = engine.device.send(policy[1:3], torch.device("cpu"))
    assert sent.tolist() == [[1, 0, 1]] * 2


# Models of every family, on images of a size that leaves something at the end.
FAMILIES = {TINY: 32, "AIG14_C10": 32, "R18_ImgNet": 64, "R50_ImgNet": 64, "AIG50_ImgNet": 64}
BATCH = 4
GPU = torch.device("cuda", 0)


@pytest.fixture
def fake(monkeypatch):
    """Fake tensors; what depends on values is told: block k is kept by k % (BATCH + 1) images."""

    def counts(policy):
        return [k % (BATCH + 1) for k in range(policy.shape[-1])]

    def rows(gate, multiple=1):
        return torch.arange(BATCH - 1, device=gate.device)

    monkeypatch.setattr(execution, "kept_counts", counts)
    monkeypatch.setattr(execution, "open_rows", rows)
    # fake tensors cannot be pinned without a driver
    monkeypatch.setattr(engine.device, "wants_pinned", lambda device: False)
    monkeypatch.setattr(engine.shard, "wants_pinned", lambda device: False)
    # a copied network's tensors would be of a copied mode
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    with FakeTensorMode():
        yield


def on_gpu(name):
    """A model's networks and a batch. Only they are made there by default: a forward pass that
    forgets to say where it wants a tensor gets one of the host.
    """
    with GPU:
        networks = models.build(name)
    size = FAMILIES[name]
    images = torch.rand(BATCH, 3, size, size, device=GPU)
    return *networks, images.contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by deepcopy
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["training", "evaluation", "deployed", "padded"])
def test_forward_passes_stay_on_the_gpu(name, kind, fake):
    resnet, policy_net, images = on_gpu(name)
    networks = [network for network in (resnet, policy_net) if network]
    for network in networks:
        network.train(kind == "training")
    plain = resnet if policy_net else resnet.resnet
    plain.row_multiple = 2 if kind == "padded" else 1
    if kind in ("deployed", "padded"):
        policy = policy_net and models.GreedyPolicy(policy_net)
        resnet, policy = models.deploy(resnet, policy, torch.bfloat16)
        policy_net = policy and policy.policy_net
    with torch.set_grad_enabled(kind == "training"):
        if policy_net is None:
            logits, policy = resnet(images)
        else:
            policy = utils.greedy(policy_net(images)[0])
            logits = resnet(images, policy)
            several = resnet(images, torch.stack([policy] * 2))
            assert several.device == GPU and several.shape[:2] == (2, BATCH)
            if kind == "evaluation":
                plain.execution = "masked"
                assert resnet(images, policy).device == GPU
    assert logits.device == policy.device == GPU and logits.dtype == torch.float32
    assert len(logits) == BATCH and policy.shape == (BATCH, plain.num_blocks)


ARGS = SimpleNamespace(alpha=0.8, beta=0.1, penalty=-3.0, samples=2, distill=0.5, temperature=2.0,
                       loss_factor=2.0, penalties=(-1.0, -9.0))  # fmt: skip


@pytest.mark.parametrize("stage", ["1", "1, warm", "2", "2, ResNet", "2, static", "3"])
def test_losses_and_rewards_stay_on_the_gpu(stage, fake):
    resnet, policy_net, images = on_gpu("AIG14_C10" if stage == "3" else TINY)
    labels = torch.zeros(BATCH, dtype=torch.long, device=GPU)
    shard = engine.Shard(0, BATCH, BATCH)
    cl, ft, aig = (script_module(n) for n in ("cl_training", "finetune", "aig_training"))
    fast, _ = models.deploy(resnet if policy_net else resnet.resnet)
    if stage == "1":
        mask = utils.curriculum_mask(6, 3, GPU)
        step = partial(cl.train_step, policy_net, fast, mask=mask)
    elif stage == "1, warm":
        candidates = torch.ones(4, 6, device=GPU)
        with GPU:
            head = models.Confidence(policy_net.features.num_features, 10, candidates)
        learner = models.WithConfidence(policy_net, head)
        step = partial(cl.warm_step, learner, fast, candidates=candidates)
    elif stage == "2":
        step = partial(ft.train_step, policy_net, resnet, teacher=fast)
    elif stage == "3":
        step = partial(aig.train_step, resnet, targets=torch.full((6,), 0.5, device=GPU))
    else:
        static = models.StaticPolicy(torch.ones(6, device=GPU))
        decide = static if stage == "2, static" else models.GreedyPolicy(policy_net)
        step = partial(ft.resnet_train_step, decide, resnet, teacher=fast)
    loss, results = step(images, labels, shard, args=ARGS)
    assert loss.device == GPU and loss.requires_grad
    assert {value.device for value in results.values()} == {GPU}


def test_a_tensor_of_the_host_in_a_gpus_forward_pass_is_seen(fake, monkeypatch):
    resnet, _, images = on_gpu(TINY)
    kept_rows = execution.kept_rows
    resnet.eval()(images, torch.ones(BATCH, 6, device=GPU))
    monkeypatch.setattr(
        execution, "kept_rows", lambda *args: [rows.to("cpu") for rows in kept_rows(*args)]
    )
    with pytest.raises(RuntimeError, match="device"):
        resnet(images, torch.ones(BATCH, 6, device=GPU))
