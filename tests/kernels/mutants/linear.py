"""Wrong edits of the linear layer's two libraries."""

from tests.kernels.mutants import Mutant

_CONTRACT = "kernels/linear.py"
_TESTS = "tests/kernels/test_linear.py"
_BUDGET = f"{_TESTS}::test_within_budget[onednn-(37,)-bias]"

MUTANTS = [
    Mutant(
        "empty_products_to_onednn",
        _CONTRACT,
        "weight.numel() < _FEWEST",
        "False",
        (f"{_TESTS}::test_empty_products[onednn-5-0-20]",),
    ),
    Mutant(
        "autocast_ignored",
        _CONTRACT,
        ' or torch.is_autocast_enabled("cpu")',
        "",
        (f"{_TESTS}::test_other_dtypes_are_pytorch_s",),
    ),
    Mutant(
        "every_processor",
        _CONTRACT,
        'if "AuthenticAMD" in processor:',
        "if processor:",
        (f"{_TESTS}::test_share_of_each_processor",),
    ),
    Mutant(
        "vector_units_not_asked_for",
        _CONTRACT,
        'if capability not in ("AVX512", "AVX2"):',
        "if False:",
        (f"{_TESTS}::test_share_of_each_processor",),
    ),
    Mutant(
        "transposed_operands_everywhere",
        _CONTRACT,
        "not in_rows or wants_gradient(x, weight, bias)",
        "wants_gradient(x, weight, bias)",
        (f"{_TESTS}::test_forward_only",),
    ),
    Mutant(
        "layers_with_a_gradient_everywhere",
        _CONTRACT,
        "not in_rows or wants_gradient(x, weight, bias)",
        "not in_rows",
        (f"{_TESTS}::test_forward_only",),
    ),
    Mutant(
        "bias_dropped",
        _CONTRACT,
        "product(rows, weight, bias)",
        "product(rows, weight, None)",
        (_BUDGET,),
    ),
    Mutant(
        "bias_s_gradient_of_one_row",
        _CONTRACT,
        "dy.sum(0) if",
        "dy[0] if",
        (_BUDGET,),
    ),
    Mutant(
        "weight_s_gradient_always",
        _CONTRACT,
        "_onednn_linear(dy.t(), x.t(), None) if dweight_wanted else None",
        "_onednn_linear(dy.t(), x.t(), None)",
        (f"{_TESTS}::test_only_wanted_gradients_are_computed",),
    ),
    Mutant(
        "no_gradient_at_all",
        _CONTRACT,
        "if wants_gradient(x, weight, bias) else",
        "if False else",
        (_BUDGET,),
    ),
    Mutant(
        "input_of_a_frozen_layer_kept",
        _CONTRACT,
        "x if dweight_wanted else None",
        "x",
        (
            "tests/kernels/test_saved_memory.py::test_frozen_layers_keep_nothing_of_their_input[share0]",
        ),
        "adapters take as much memory as training all",
    ),
    Mutant(
        "weight_lost_with_the_weight_s_gradient",
        _CONTRACT,
        "weight if dx_wanted else None",
        "weight if dweight_wanted else None",
        (f"{_TESTS}::test_only_wanted_gradients_are_computed",),
    ),
    Mutant(
        "small_weights_to_onednn",
        _CONTRACT,
        "weight.numel() < _FEWEST",
        "weight.numel() < 1",
        (f"{_TESTS}::test_small_weights_are_pytorch_s",),
    ),
    Mutant(
        "the_switch_stays_off",
        _CONTRACT,
        "        torch._C._set_mkldnn_enabled(True)\n",
        "        pass\n",
        (f"{_TESTS}::test_onednn_is_on_again_after_an_error",),
    ),
    Mutant(
        "the_switch_beside_other_threads",
        _CONTRACT,
        "return all(module.startswith",
        "return True or all(module.startswith",
        (f"{_TESTS}::test_onednn_stays_on",),
    ),
    Mutant(
        "the_switch_for_several_rows",
        _CONTRACT,
        "x.numel() == x.shape[-1]",
        "x.numel() > 0",
        (f"{_TESTS}::test_onednn_stays_on",),
    ),
    Mutant(
        "the_switch_for_transposed_weights",
        _CONTRACT,
        "x.stride(-1) == weight.stride(-1) == 1\n        and not",
        "x.stride(-1) == 1\n        and not",
        (f"{_TESTS}::test_one_row_of_bf16_without_onednn",),
    ),
    Mutant(
        "the_other_gelu",
        _CONTRACT,
        'bias, "gelu", [], approximate)',
        'bias, "gelu", [], "none")',
        (f"{_TESTS}::test_what_follows_a_product_is_fused",),
    ),
    Mutant(
        "a_wide_residual_is_rounded",
        _CONTRACT,
        "return residual + unchecked_linear(x, weight, bias)",
        "return residual.to(x.dtype) + unchecked_linear(x, weight, bias)",
        (f"{_TESTS}::test_a_wide_residual_stays_wide",),
    ),
]
