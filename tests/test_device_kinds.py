"""Types of devices: told apart in one place, and those that are not here play through the rest."""

import ast
from pathlib import Path

import pytest
import torch

from fastgpt2 import devices
from fastgpt2.compiler import compiler_obstacle
from fastgpt2.devices import DEVICE_TYPES, default_generator, device_kind, of_this_process
from fastgpt2.train.optimizers import build_optimizer
from fastgpt2.train.step import TrainingStep
from tests.test_architecture import PACKAGE, nodes
from tests.tiny_gpt import tiny_batch, tiny_gpt
from tests.train.tiny_run import tiny_train_config

# the place itself, what asks which operator or backend PyTorch has, CUDA graphs, and the lessons
_PLACES = ["devices", "kernels", "quantize", "distributed", "generate.graph", "ladder"]
EXEMPT = tuple(f"fastgpt2.{x}" for x in _PLACES)


def tells_devices_apart(node: ast.AST) -> bool:
    """``x.type == "cuda"``, ``kind in ("cuda", "cpu")``, ``x.is_cuda``, ``torch.cuda.anything``."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        sides += [item for side in sides if isinstance(side, ast.Tuple) for item in side.elts]
        return any(isinstance(s, ast.Constant) and s.value in DEVICE_TYPES for s in sides)
    names = ("cuda", "mps", "is_cuda", "is_mps")
    return isinstance(node, ast.Attribute) and node.attr in names


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("x.type == 'cuda'", True),
        ("'cpu' != x", True),
        ("x in ('cuda', 'cpu')", True),
        ("x.is_cuda", True),
        ("torch.cuda.is_available()", True),
        ("device_kind(x).fused_adamw", False),
        ("torch.device('cpu')", False),
        ("x == 'muon'", False),
    ],
)
def test_the_rule(code: str, found: bool) -> None:
    assert any(tells_devices_apart(node) for node in ast.walk(ast.parse(code))) is found


def test_device_types_are_told_apart_in_one_place() -> None:
    guilty = [
        f"{module}:{getattr(node, 'lineno', 0)}"
        for module, path in PACKAGE.items()
        if not module.startswith(EXEMPT)
        for node in nodes(path)
        # device_kind(x).cuda is the one place's own answer
        if tells_devices_apart(node) and "device_kind(" not in ast.unparse(node)
    ]
    assert not guilty


def test_what_is_known_of_a_device() -> None:
    assert device_kind("cpu").host and not device_kind("cpu").cuda
    assert device_kind(torch.device("cuda:1")).cuda
    # what nobody knows can do the least
    assert device_kind("tpu") == device_kind("mps") and not device_kind("mps").fused_adamw
    assert compiler_obstacle(torch.device("mps")) == "not offered on mps"
    assert default_generator(torch.device("cpu")) is torch.default_generator


def test_a_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    for given, own in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), ("mps", "mps")):
        assert of_this_process(torch.device(given)) == torch.device(own)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_device_without_fused_adamw_trains_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``--device mps`` does, played on a CPU; and a bad gradient changes nothing there."""
    config = tiny_train_config(Path("unused"), optimizer=name, lr=1e-3)

    def steps(bad: bool) -> list[torch.Tensor]:
        model = tiny_gpt()
        step = TrainingStep(
            model,
            build_optimizer(model, config),
            dtype=torch.float32,
            grad_clip=0.5,
            forward=model,
            poll=lambda: None,
        )
        for seed in range(3):
            step([tiny_batch(seed=seed)], lr=1e-3)
        if bad:
            model.transformer.wpe.weight.register_hook(lambda grad: grad * torch.nan)  # type: ignore[no-untyped-call]
            step([tiny_batch()], lr=1e-3)
        return [p.detach() for p in model.parameters()]

    fused = steps(bad=False)
    monkeypatch.setitem(devices._KINDS, "cpu", device_kind("mps"))
    assert not any(group.get("fused") for group in build_optimizer(tiny_gpt(), config).param_groups)
    # where a gradient is nearly zero, AdamW makes much of its rounding; one step is 1e-3
    for a, b in zip(steps(bad=True), fused, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
