"""CUDA graphs of deployed networks, with plain calls in the graphs' place."""

import gc
import weakref

import pytest
import torch
from test_models import random_norms

import deploy
import models
from deploy.graphs import GraphPerBlock, OneGraph


def remember(call):
    """In a CUDA graph's place: a result that always lies in the same tensor."""
    result = call()
    return lambda: result.copy_(call()), result


def pair(name):
    torch.manual_seed(0)
    resnet, policy_net = map(random_norms, models.build(name))
    policy_net.logit.weight.data.mul_(100)  # policies that differ
    policy = models.GreedyPolicy(policy_net)
    return resnet, policy, models.deploy(resnet, policy, torch.float64)


@pytest.mark.parametrize("name", ["R14_C10", "R18_ImgNet"])
def test_a_graph_a_block_runs_the_kept_blocks(name):
    resnet, _, (fast, _) = pair(name)
    example, *images = torch.randn(4, 1, 3, 64, 64, dtype=torch.float64)
    alone = GraphPerBlock(fast, example, remember)
    full = OneGraph(fast, example, remember)
    for x in images:
        policy = (torch.rand(1, resnet.num_blocks) < 0.5).double()
        torch.testing.assert_close(alone(x, policy), resnet(x, policy).detach())
        torch.testing.assert_close(full(x), resnet(x).detach())


def test_a_recorded_pair_decides_and_runs():
    resnet, decide, (fast, fast_policy) = pair("R14_C10")
    images = torch.randn(40, 1, 3, 32, 32, dtype=torch.float64)
    run = deploy.record(fast, fast_policy, images[0], remember)
    policies = set()
    for x in images:
        logits, policy = run(x)
        assert torch.equal(policy, decide(x))
        torch.testing.assert_close(logits, resnet(x, policy).detach())
        policies.add(tuple(policy[0].tolist()))
    assert len(policies) > 1


def test_what_graphs_read_and_write_is_held():
    """A CUDA graph replays addresses: what is freed there would be another's."""
    _, _, (fast, fast_policy) = pair("R14_C10")
    seen = [weakref.ref(fast), weakref.ref(fast_policy)]

    def watch(call):
        seen.extend(weakref.ref(given) for given in call.args if isinstance(given, torch.Tensor))
        return (lambda: None), call()

    run = deploy.record(fast, fast_policy, torch.randn(1, 3, 32, 32), watch)
    del fast, fast_policy
    gc.collect()
    assert len(seen) > 10 and all(held() is not None for held in seen), run


def test_no_gpu_and_several_images_are_refused():
    _, _, (fast, fast_policy) = pair("R14_C10")
    with pytest.raises(ValueError, match="need a GPU.* on the cpu"):
        deploy.record(fast, fast_policy, torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="2 images: .* one at a time"):
        deploy.record(fast, fast_policy, torch.randn(2, 3, 32, 32), remember)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 3, 1, 32), (), (2, 3, 32, 32)])
def test_images_of_another_shape_are_refused(shape):
    """A copy would spread them over the recorded image."""
    _, _, (fast, fast_policy) = pair("R14_C10")
    example = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    run = deploy.record(fast, fast_policy, example, remember)
    with pytest.raises(ValueError, match="recorded were"):
        run(torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="recorded were"):
        GraphPerBlock(fast, example, remember)(
            torch.zeros(shape, dtype=torch.float64), torch.ones(1, 6, dtype=torch.float64)
        )


def test_only_deployed_resnets_with_a_policy_are_recorded():
    resnet, policy, (fast, _) = pair("R14_C10")
    example = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    gated, nothing = models.deploy(models.build("AIG14_C10")[0].eval(), None)
    for network, decide in ((resnet, policy), (fast, None), (gated, nothing)):
        with pytest.raises(ValueError, match="graphs are recorded of what deploy gives"):
            deploy.record(network, decide, example, remember)
