"""Entries for torch.hub: trained networks, images in, logits out.

    net = torch.hub.load("path/to/this/repository", "R110_C10", source="local")
    logits = net(images)         # (B, 3, 32, 32), uint8 or float in [0, 1]
    policy = net.policy(images)  # (B, 54): which blocks each image runs

Weights come with the repository, nothing is downloaded. Needs torch and numpy alone.
"""

import sys as _sys
import threading as _threading
from contextlib import contextmanager as _contextmanager
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

dependencies = ["torch", "numpy"]

_ROOT = _Path(__file__).resolve().parent

# An entry's model and its checkpoint; where that is of stage 1, its base.
_SHIPPED = {
    "R32_C10": ("R32_C10", "cv/R32_C10/stage2/ckpt_E_6_A_0.919_R_2.73E-01_S_7.60_#_9.t7"),
    "R32_C10_anytime": (
        "R32_C10",
        "cv/R32_C10/penalties/ckpt_E_6_A_0.911_R_3.03E-01_S_6.20_#_8.t7",
    ),
    "R32_C10_late8": ("R32_C10", "cv/R32_C10/late8/ckpt_E_6_A_0.920_R_2.60E-01_S_8.00_#_1.t7"),
    "R32_C10_full": ("R32_C10", "cv/pretrained/R32_C10/pk_E_24_A_0.929.t7"),
    "R110_C10": ("R110_C10", "cv/R110_C10/stage2/ckpt_E_4_A_0.928_R_5.07E-01_S_13.91_#_32.t7"),
    "R110_C10_anytime": (
        "R110_C10",
        "cv/R110_C10/curve/ckpt_E_8_A_0.924_R_4.93E-01_S_12.69_#_31.t7",
        "cv/pretrained/R110_C10/pk_E_15_A_0.929.t7",
    ),
    "R110_C10_full": ("R110_C10", "cv/pretrained/R110_C10/pk_E_15_A_0.929.t7"),
    "AIG32_C10": ("AIG32_C10", "cv/AIG32_C10/target0.6/ckpt_E_12_A_0.912_S_11.19_#_636.t7"),
    "AIG32_C10_target04": ("AIG32_C10", "cv/AIG32_C10/target0.4/ckpt_E_12_A_0.894_S_7.64_#_950.t7"),
}

_OURS = ("deploy", "models", "utils")

# torch.hub runs this file anew at each load. What is imported for the first serves the others.
_shared = _ModuleType(f"hubconf of {_ROOT}")
_shared.kept, _shared.lock = {}, _threading.RLock()
_shared = _sys.modules.setdefault(_shared.__name__, _shared)


@_contextmanager
def _own_modules():
    """Inside, `models` and `utils` are this repository's, whatever the caller's program calls so.

    torch.hub puts this directory on the path and leaves what was imported in sys.modules. A caller
    with a `utils` of its own, imported before, would break us; one that imports its own later would
    get ours. So ours come in under these names and leave again. They import nothing late.
    """

    def taken() -> dict:
        return {n: m for n, m in _sys.modules.items() if n.split(".")[0] in _OURS}

    with _shared.lock:
        callers = taken()
        for name in callers:
            del _sys.modules[name]
        _sys.modules.update(_shared.kept)
        _sys.path.insert(0, str(_ROOT))
        try:
            yield
        finally:
            _shared.kept.update(taken())
            for name in taken():
                del _sys.modules[name]
            _sys.modules.update(callers)
            _sys.path.remove(str(_ROOT))


with _own_modules():
    import models as _models
    import utils as _utils
    from deploy.classifier import Classifier as _Classifier


def _network(entry: str, pretrained: bool, penalty: float | None = None) -> _Classifier:
    """One entry's network, in evaluation mode; with a penalty, its policies are those for it."""
    name, *files = _SHIPPED[entry]
    config = _models.config(name)
    resnet, policy_net = _models.build(name)
    found, *base = (_models.Checkpoint.read(_ROOT / file) for file in files)
    if config.gated and not pretrained:
        resnet.set_targets(found.targets)
    if pretrained:
        (*base, found)[0].load_into(resnet)
    if found.policy is not None:
        policy_net.look_at(found.policy_size)
        if pretrained:
            found.load_into(policy_net)
    static = found.static_policy and _utils.static_policy(found.static_policy, config.stages)
    policy = None
    if not config.gated:
        policy = found.policy_module(config, policy_net, static, penalty)
    if penalty is not None and not pretrained:
        for layer in policy.confidence.children():
            layer.reset_parameters()
    return _Classifier(resnet, policy, config).eval()


def _entry(name: str):
    def entry(pretrained: bool = True):
        return _network(name, pretrained)

    model = _SHIPPED[name][0]
    entry.__name__ = name
    entry.__doc__ = f"""{model}, with the weights of {_SHIPPED[name][1]} unless not `pretrained`.

    Returns a module: images (B, 3, 32, 32), uint8 or float in [0, 1], to logits (B, 10); its
    `policy(images)` gives (B, K) of 0 and 1.
    """
    return entry


def _anytime(name: str, kept: str):
    def entry(pretrained: bool = True, penalty: float = -5.0):
        return _network(name, pretrained, penalty)

    model = _SHIPPED[name][0]
    entry.__name__ = name
    entry.__doc__ = f"""{model} for any budget: the lower the penalty, the reward of a wrong class,
    the more blocks are run. On average {kept}.

    Returns a module as the other entries do.
    """
    return entry


R32_C10_anytime = _anytime("R32_C10_anytime", "-0.5 keeps 4.5 of 15, -5 keeps 6.2, -50 keeps 10.4")
R110_C10_anytime = _anytime(
    "R110_C10_anytime", "-0.5 keeps 9.4 of 54, -5 keeps 12.3, -50 keeps 15.2"
)
globals().update({_name: _entry(_name) for _name in _SHIPPED if _name not in globals()})
