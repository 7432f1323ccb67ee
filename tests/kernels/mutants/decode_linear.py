"""Wrong edits of the linear layer of few rows."""

from tests.kernels.mutants import Mutant

_KERNEL = "kernels/jit/decode_linear.py"
_TESTS = "tests/kernels/test_decode_linear.py"
_BUDGET = f"{_TESTS}::test_within_budget"
_PARTS = f"{_TESTS}::test_each_part_alone"
_STRIDED = f"{_TESTS}::test_strided_inputs"

MUTANTS = [
    Mutant(
        "columns_beyond_the_row_count_as_far_from_the_mean",
        _KERNEL,
        "tl.where(mask, x - mean[:, None], 0.0)",
        "x - mean[:, None]",
        (_BUDGET,),
        "zeros are read there, and their distance from the mean is none of the row's variance",
    ),
    Mutant(
        "eps_ignored", _KERNEL, "tl.sum(squares, 1) / C + eps", "tl.sum(squares, 1) / C", (_PARTS,)
    ),
    Mutant("mean_not_subtracted", _KERNEL, "(x - mean[:, None]) * rstd", "x * rstd", (_BUDGET,)),
    Mutant("norm_bias_ignored", _KERNEL, "* scale + shift", "* scale", (_BUDGET,)),
    Mutant(
        "bias_after_the_gelu",
        _KERNEL,
        "y = gelu_tile(y, False)",
        "y = gelu_tile(y - y, False) + y",
        (_BUDGET,),
        "the GELU is of nothing",
    ),
    Mutant("tanh_for_erf", _KERNEL, "y = gelu_tile(y, True)", "y = gelu_tile(y, False)", (_PARTS,)),
    Mutant(
        "scales_ignored",
        _KERNEL,
        "if scales_ptr is not None:",
        "if False:",
        (f"{_TESTS}::test_int8_weights_and_their_scales",),
    ),
    Mutant(
        "first_tile_of_weights_again_and_again",
        _KERNEL,
        "weight_ptrs + cols[None, :], mask",
        "weight_ptrs + offs_c[None, :], mask",
        (_BUDGET,),
    ),
    Mutant(
        "residual_as_close_as_the_output",
        _KERNEL,
        "offs_b[:, None] * strides[2]",
        "offs_b[:, None] * F",
        (_STRIDED,),
    ),
    Mutant(
        "weights_one_after_the_other",
        _KERNEL,
        "offs_f[:, None] * strides[1]",
        "offs_f[:, None] * C",
        (_STRIDED,),
    ),
    Mutant(
        "every_block_of_rows_is_the_first",
        _KERNEL,
        "tl.program_id(1).to(tl.int64) * BLOCK_B",
        "tl.program_id(1).to(tl.int64) * 0",
        (_BUDGET,),
    ),
    Mutant(
        "library_takes_the_norm_for_its_input",
        "kernels/decode_linear.py",
        "x = F.layer_norm(x, x.shape[-1:], *affine, eps)",
        "F.layer_norm(x, x.shape[-1:], *affine, eps)",
        (f"{_TESTS}::test_other_implementations_are_within_budget",),
    ),
]
