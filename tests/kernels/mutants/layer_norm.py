"""Wrong edits of LayerNorm, alone and fused with the residual addition."""

from tests.kernels.mutants import Mutant

_KERNEL = "kernels/jit/layer_norm.py"
_ROWS = "kernels/jit/rows.py"
_CONTRACT = "kernels/layer_norm.py"
_TESTS = "tests/kernels/test_layer_norm.py"
_FUSED = f"{_TESTS}::test_fused_is_within_budget"
_NORM = f"{_TESTS}::test_norm_is_within_budget"
_DROPOUT = f"{_TESTS}::test_fused_with_dropout_is_within_budget"

MUTANTS = [
    Mutant(
        "variance_counts_the_padding",
        _KERNEL,
        "tl.where(mask, s - mean[:, None], 0.0)",
        "s - mean[:, None]",
        (_NORM,),
        "columns beyond C add mean^2 to the variance",
    ),
    Mutant(
        "eps_forgotten",
        _KERNEL,
        "axis=1) / C + eps)",
        "axis=1) / C)",
        (f"{_NORM}[(129, 1)-torch.float32]",),
        "a row of equal values divides by zero",
    ),
    Mutant(
        "rows_after_the_last_begin_again",
        _KERNEL,
        "tl.minimum(tl.arange(0, BLOCK_N), last)",
        "tl.minimum(tl.arange(0, BLOCK_N), last - 1)",
        (f"{_TESTS}::test_results_do_not_depend_on_tiles",),
        "the last row of all is not computed",
    ),
    Mutant(
        "beta_ignored",
        _KERNEL,
        "        y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)\n",
        "        y += 0.0\n",
        (_NORM,),
    ),
    Mutant(
        "gamma_ignored_in_backward",
        _KERNEL,
        "g = dy * w",
        "g = dy",
        (_NORM,),
    ),
    Mutant(
        "mean_of_g_forgotten",
        _KERNEL,
        "g - mean_g[:, None] - n",
        "g - n",
        (_NORM,),
        "the gradient along the row's mean",
    ),
    Mutant(
        "stream_s_gradient_dropped",
        _KERNEL,
        "            ds += tl.load(dstream_ptrs",
        "            tl.load(dstream_ptrs",
        (_FUSED,),
    ),
    Mutant(
        "normalises_before_rounding",
        _KERNEL,
        "        s = stream.to(tl.float32)\n",
        "        s = s + update\n",
        (f"{_TESTS}::test_norm_is_of_the_rounded_stream",),
        "backward would see another stream than forward",
    ),
    Mutant(
        "branch_read_with_x_s_stride",
        _KERNEL,
        "branch_ptr + (offs_n[:, None] * branch_stride",
        "branch_ptr + (offs_n[:, None] * x_stride",
        (f"{_TESTS}::test_rows_of_different_strides",),
    ),
    Mutant(
        "mask_drawn_per_tile",
        _KERNEL,
        "dropout_tile(update, dropout, first + offs_n, C, 0)",
        "dropout_tile(update, dropout, offs_n.to(tl.int64), C, 0)",
        (f"{_TESTS}::test_stream_and_mask_are_the_reference_s_bit_for_bit",),
    ),
    Mutant(
        "mask_not_replayed",
        _KERNEL,
        "dropout_tile(ds, dropout, offs_n, C, 0)",
        "dropout_tile(ds, dropout, offs_n + 1, C, 0)",
        (_DROPOUT,),
    ),
    Mutant(
        "dropout_unscaled",
        _ROWS,
        "x * (1.0 / (1.0 - dropout[1]))",
        "x",
        (_DROPOUT,),
    ),
    Mutant(
        "programs_walk_one_block_short",
        _KERNEL,
        "range(pid * BLOCK_N, N, P * BLOCK_N)",
        "range(pid * BLOCK_N, N - BLOCK_N, P * BLOCK_N)",
        (_NORM,),
    ),
    Mutant(
        "last_partial_sums_lost",
        _ROWS,
        "(offs_p < P)[:, None]",
        "(offs_p < P - 1)[:, None]",
        (_NORM,),
    ),
    Mutant(
        "bf16_statistics",
        _KERNEL,
        "    mean = tl.sum(s, axis=1) / C\n",
        "    mean = (tl.sum(s, axis=1) / C).to(tl.bfloat16).to(tl.float32)\n",
        (_NORM,),
    ),
    Mutant(
        "branch_gets_the_stream_s_gradient",
        _CONTRACT,
        "(dbranch if dbranch.numel() else dx)",
        "dx",
        (_DROPOUT,),
        "the mask is missing from the branch's gradient",
    ),
]
