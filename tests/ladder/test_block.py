import pytest
import torch
import torch.nn.functional as F

from fastgpt2.kernels import gelu, layer_norm
from fastgpt2.ladder import (
    GELU,
    DeepNetwork,
    FeedForward,
    LayerNorm,
    TransformerBlock,
    mean_gradients,
)
from tests.ladder import published
from tests.ladder.tiny import SMALL


def test_layer_norm_equals_the_op_and_pytorch() -> None:
    torch.manual_seed(0)
    norm = LayerNorm(24).double()
    torch.nn.init.normal_(norm.scale)
    torch.nn.init.normal_(norm.shift)
    x = 3 + torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(norm(x), layer_norm(x, norm.scale, norm.shift))
    torch.testing.assert_close(norm(x), F.layer_norm(x, (24,), norm.scale, norm.shift))


def test_gelu_equals_the_op_and_pytorch() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(GELU()(x), gelu(x))
    torch.testing.assert_close(GELU()(x), F.gelu(x, approximate="tanh"))


def test_feed_forward_is_four_times_as_wide_inside() -> None:
    ff = FeedForward(SMALL)
    assert [tuple(p.shape) for p in ff.parameters()] == [(96, 24), (96,), (24, 96), (24,)]
    x = torch.randn(3, 24)
    expected = ff.layers[2](F.gelu(ff.layers[0](x), approximate="tanh"))
    torch.testing.assert_close(ff(x), expected)


def test_the_gradient_vanishes_without_shortcuts_only() -> None:
    x = torch.tensor([[1.0, 0.0, -1.0]])
    for use_shortcut, expected in (
        (False, published.GRADIENTS_WITHOUT_SHORTCUTS),
        (True, published.GRADIENTS_WITH_SHORTCUTS),
    ):
        torch.manual_seed(123)
        network = DeepNetwork([3, 3, 3, 3, 3, 1], use_shortcut)
        assert mean_gradients(network, x) == pytest.approx(expected, rel=1e-5)


def test_a_block_adds_to_what_flows_through_it() -> None:
    torch.manual_seed(1)
    block = TransformerBlock(SMALL).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    middle = x + block.att(F.layer_norm(x, (24,)))
    torch.testing.assert_close(block(x), middle + block.ff(F.layer_norm(middle, (24,))))
    for last in (block.att.out_proj, block.ff.layers[2]):
        for parameter in last.parameters():
            torch.nn.init.zeros_(parameter)
    assert torch.equal(block(x), x)


def test_dropout_is_on_the_branches_not_on_the_stream() -> None:
    torch.manual_seed(2)
    block = TransformerBlock(SMALL | {"drop_rate": 0.999})
    x = torch.randn(2, 7, 24)
    out = block(x)
    assert ((out - x).abs() < 1e-6).double().mean() > 0.9
