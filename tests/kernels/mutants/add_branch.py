"""Wrong edits of the residual addition, and of the stream that goes past a LayerNorm."""

from tests.kernels.mutants import Mutant

_KERNEL = "kernels/jit/add_branch.py"
_TESTS = "tests/kernels/test_add_branch.py"
_BUDGET = f"{_TESTS}::test_within_budget"
_STREAM = "tests/kernels/test_stream_layer_norm.py"

MUTANTS = [
    Mutant(
        "bias_ignored",
        _KERNEL,
        "        update += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)\n",
        "        update += 0.0\n",
        (_BUDGET,),
    ),
    Mutant(
        "stream_ignored",
        _KERNEL,
        "tl.store(y_ptr + offs_out, x + update, mask=mask)",
        "tl.store(y_ptr + offs_out, update, mask=mask)",
        (_BUDGET,),
    ),
    Mutant(
        "mask_of_the_next_element",
        _KERNEL,
        "dropout_tile(update, dropout, offs_n, C, pid % column_blocks * BLOCK_C)",
        "dropout_tile(update, dropout, offs_n + 1, C, pid % column_blocks * BLOCK_C)",
        (f"{_TESTS}::test_mask_is_the_reference_s_bit_for_bit",),
    ),
    Mutant(
        "branch_read_with_the_stream_s_stride",
        _KERNEL,
        "branch_ptr + offs_n[:, None] * branch_stride",
        "branch_ptr + offs_n[:, None] * C",
        (f"{_TESTS}::test_strided_inputs_and_gradients",),
    ),
    Mutant(
        "gradient_without_its_mask",
        _KERNEL,
        "dropout_tile(dbranch, dropout, offs_n, C, first_c)",
        "dbranch / (1.0 - dropout[1])",
        (_BUDGET,),
    ),
    Mutant(
        "bias_gradient_of_the_last_block_only",
        _KERNEL,
        "dbias += tl.sum(dbranch, axis=0)",
        "dbias = tl.sum(dbranch, axis=0)",
        (_BUDGET,),
    ),
    Mutant(
        "bias_gradient_summed_in_short",
        _KERNEL,
        "dbias += tl.sum(dbranch, axis=0)",
        "dbias = (dbias + tl.sum(dbranch, axis=0)).to(dy_ptr.dtype.element_ty).to(tl.float32)",
        (f"{_TESTS}::test_bias_gradient_is_summed_in_fp32",),
    ),
    Mutant(
        "column_blocks_in_the_wrong_order",
        _KERNEL,
        "offs_n = pid // column_blocks * BLOCK_N",
        "offs_n = pid % column_blocks * BLOCK_N",
        (_BUDGET,),
    ),
    Mutant(
        "gradient_of_the_stream_lost",
        "kernels/layer_norm.py",
        "dy, dstream, x, weight, bias, None, stats, None, 0.0",
        "dy, None, x, weight, bias, None, stats, None, 0.0",
        (_STREAM,),
    ),
]
