"""Wrong edits of GELU."""

from tests.kernels.mutants import Mutant

_KERNEL = "kernels/jit/gelu.py"
_ROWS = "kernels/jit/rows.py"
_TESTS = "tests/kernels/test_gelu.py"
_ERF = "tests/kernels/test_gelu_erf.py::test_triton_within_budget[bias_gelu-torch.float32]"
_BUDGET = f"{_TESTS}::test_within_budget"

MUTANTS = [
    Mutant(
        "tails_cancel",
        _KERNEL,
        "smaller = e * larger",
        "smaller = 1.0 - larger",
        (f"{_TESTS}::test_tails_keep_their_relative_precision",),
        "1 - sigmoid(z) has no relative precision where it is small",
    ),
    Mutant(
        "wrong_constant",
        _KERNEL,
        "0.07135481627260025",
        "0.071355",
        (f"{_TESTS}::test_tails_keep_their_relative_precision",),
    ),
    Mutant(
        "sides_swapped",
        _KERNEL,
        "tl.where(w >= 0, larger, smaller)",
        "tl.where(w <= 0, larger, smaller)",
        (_BUDGET,),
    ),
    Mutant(
        "slope_of_the_cubic_forgotten",
        _KERNEL,
        "(3.0 * _CUBIC) * tl.minimum",
        "_CUBIC * tl.minimum",
        (_BUDGET,),
    ),
    Mutant(
        "zero_times_infinity",
        _KERNEL,
        "tl.minimum(z * z, 1e4)",
        "(z * z)",
        (f"{_TESTS}::test_every_finite_input_has_a_finite_slope",),
    ),
    Mutant(
        "density_forgotten",
        _KERNEL,
        "_normal_cdf(z) + z * tl.exp2(z * z * (-0.5 * LOG2E)) * _PEAK",
        "_normal_cdf(z)",
        (_ERF,),
    ),
    Mutant("density_of_half_the_variance", _KERNEL, "(-0.5 * LOG2E)", "(-LOG2E)", (_ERF,)),
    Mutant("erf_of_half_the_variance", _KERNEL, "tl.erf(z * _ROOT_HALF)", "tl.erf(z)", (_ERF,)),
    Mutant(
        "gradient_of_the_other_form",
        "kernels/gelu.py",
        "gelu_bwd(dy, x, bias, ctx.form)",
        'gelu_bwd(dy, x, bias, "tanh")',
        (_ERF,),
    ),
    Mutant(
        "bias_ignored",
        _KERNEL,
        "        z += tl.load(bias_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)\n",
        "        z += 0.0\n",
        (_BUDGET,),
    ),
    Mutant(
        "bias_gradient_of_the_last_block_only",
        _KERNEL,
        "dbias += tl.sum(dz, axis=0)",
        "dbias = tl.sum(dz, axis=0)",
        (f"{_BUDGET}[(129, 1)-torch.float32]",),
    ),
    Mutant(
        "bias_gradient_summed_in_short",
        _KERNEL,
        "dbias += tl.sum(dz, axis=0)",
        "dbias = (dbias + tl.sum(dz, axis=0)).to(dx_ptr.dtype.element_ty).to(tl.float32)",
        (f"{_TESTS}::test_bias_gradient_is_summed_in_fp32",),
    ),
    Mutant(
        "rows_read_as_if_dense",
        _KERNEL,
        "x_ptrs = x_ptr + offs_n[:, None] * x_stride + offs_f[None, :]\n    y =",
        "x_ptrs = x_ptr + offs_n[:, None] * F + offs_f[None, :]\n    y =",
        (f"{_TESTS}::test_strided_inputs_and_gradients",),
    ),
    Mutant(
        "column_blocks_in_the_wrong_order",
        _KERNEL,
        "offs_n = pid // column_blocks * BLOCK_N",
        "offs_n = pid % column_blocks * BLOCK_N",
        (_BUDGET,),
    ),
    Mutant(
        "a_program_too_few",
        _ROWS,
        "max(1, resident // columns)",
        "resident // columns",
        (f"{_BUDGET}[(3, 768)-torch.float32]",),
        "more columns than programs wanted: none is launched",
    ),
]
