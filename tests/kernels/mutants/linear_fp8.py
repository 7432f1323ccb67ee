"""Wrong edits of the products in FP8."""

from tests.kernels.mutants import Mutant

_CONTRACT = "kernels/linear_fp8.py"
_ROUNDS = "kernels/quantize_fp8.py"
_HEAD = "kernels/linear_cross_entropy.py"
_TESTS = "tests/kernels/test_linear_fp8.py"
_CALLS = "tests/kernels/test_linear_fp8_calls.py"
_LAYOUTS = "tests/kernels/test_quantize_fp8.py"
_ROUNDING = f"{_TESTS}::test_rounding_is_the_format_s"
_SPECIAL = f"{_TESTS}::test_special_values"
_PRODUCTS = f"{_TESTS}::test_products_of_the_rounded_operands"
_LOSS = f"{_TESTS}::test_head_and_loss"
_CALL = f"{_CALLS}::test_the_tensor_cores_call"

MUTANTS = [
    Mutant(
        "scaled_to_half_of_the_range",
        _ROUNDS,
        "x * (largest / amax)[None]",
        "x * (largest / (2 * amax))[None]",
        (_ROUNDING,),
    ),
    Mutant(
        "scale_not_undone",
        _ROUNDS,
        "(largest / amax)[None], amax / largest",
        "(largest / amax)[None], torch.ones_like(amax)",
        (_ROUNDING,),
    ),
    Mutant(
        "zeros_divided_by_zero",
        _ROUNDS,
        ".clamp(min=_SMALLEST_AMAX)\n",
        "\n",
        (_SPECIAL,),
    ),
    Mutant(
        "product_with_the_scale_in_short",
        _ROUNDS,
        "return x * (largest / amax)[None], ",
        "return x * (largest / amax), ",
        (_PRODUCTS, f"{_TESTS}::test_bf16_is_scaled_in_fp32"),
        "a scalar leaves the product in bf16: two roundings",
    ),
    Mutant(
        "a_scale_for_each_tile",
        _CONTRACT,
        "scaled_for(tile, E5M2, amax)",
        "scaled_for(tile, E5M2, largest_of(tile))",
        (f"{_TESTS}::test_head_in_many_tiles",),
        "each tile has a scale of its own, and one scale is undone",
    ),
    Mutant(
        "layout_kept",
        _ROUNDS,
        "scaled.to(dtype, memory_format=torch.contiguous_format)",
        "scaled.to(dtype)",
        (f"{_CALLS}::test_a_layer_s_calls",),
        "a GPU refuses a weight stored the other way round",
    ),
    Mutant(
        "transpose_not_laid_out",
        _ROUNDS,
        "Quantized(turned.contiguous().view(self.values.dtype)",
        "Quantized(turned.view(self.values.dtype)",
        (f"{_CALLS}::test_a_layer_s_calls",),
        "a CPU multiplies any layout, a GPU refuses",
    ),
    Mutant(
        "second_operand_row_major",
        _CONTRACT,
        "        b.t(),\n",
        "        b.t().contiguous(),\n",
        (f"{_CALLS}::test_a_layer_s_calls",),
        "a GPU refuses",
    ),
    Mutant(
        "gradients_with_short_sums",
        _CONTRACT,
        "    fast: bool = False,\n",
        "    fast: bool = True,\n",
        (f"{_CALLS}::test_the_head_s_calls",),
    ),
    Mutant(
        "infinities_hidden",
        _ROUNDS,
        "torch.linalg.vector_norm(x, ord=torch.inf, dtype=torch.float32)",
        "torch.linalg.vector_norm(x.nan_to_num(), ord=torch.inf, dtype=torch.float32)",
        (_SPECIAL,),
        "a diverged step would go on training",
    ),
    Mutant(
        "gradients_in_the_narrow_format",
        _CONTRACT,
        "            dy, E5M2, straight=",
        "            dy, E4M3, straight=",
        (_PRODUCTS,),
    ),
    Mutant(
        "activations_in_the_wide_format",
        _CONTRACT,
        "x8, x8_t = quantize_fp8(x, E4M3,",
        "x8, x8_t = quantize_fp8(x, E5M2,",
        (_PRODUCTS,),
    ),
    Mutant(
        "bias_s_gradient_from_the_rounded_one",
        _CONTRACT,
        "dy.sum(0, dtype=torch.float32)",
        "dy8.values.float().sum(0).mul(dy8.inverse)",
        (_PRODUCTS,),
    ),
    Mutant(
        "bias_before_the_scale",
        _CONTRACT,
        ".mul_(a_inverse).mul_(b_inverse)\n"
        "    return (sums if bias is None else sums.add_(bias)).to(out_dtype)",
        "\n    return (sums if bias is None else sums.add_(bias)).mul_(a_inverse).mul_(b_inverse)"
        ".to(out_dtype)",
        (_PRODUCTS,),
    ),
    Mutant(
        "one_scale_forgotten",
        _CONTRACT,
        ".mul_(a_inverse).mul_(b_inverse)",
        ".mul_(a_inverse)",
        (_PRODUCTS,),
    ),
    Mutant(
        "transpose_not_padded",
        _ROUNDS,
        "missing = _padded(self.values.shape[0]) - self.values.shape[0]",
        "missing = 0",
        (f"{_TESTS}::test_transposes_are_padded_with_zeros",),
        "tensor cores refuse the product",
    ),
    Mutant(
        "transpose_padded_with_something",
        _ROUNDS,
        "turned.new_zeros(columns, missing)",
        "turned.new_full((columns, missing), 60)",
        (f"{_TESTS}::test_transposes_are_padded_with_zeros",),
    ),
    Mutant(
        "scales_of_the_tensor_cores_swapped",
        _CONTRACT,
        "scale_a=a_inverse,",
        "scale_a=b_inverse,",
        (_CALL,),
    ),
    Mutant(
        "bias_of_a_wide_output_lost",
        _CONTRACT,
        "out if bias is None or inside is not None else out.add_(bias)",
        "out",
        (_CALL,),
    ),
    Mutant(
        "bound_of_the_gradient_with_a_z_loss",
        _HEAD,
        "amax = 1.0 if z_loss == 0 else None",
        "amax = 0.01",
        (_LOSS,),
        "numbers beyond the bound become infinite",
    ),
    Mutant(
        "head_not_in_fp8",
        _HEAD,
        "        if fp8\n        else _Head",
        "        if False\n        else _Head",
        (_LOSS,),
    ),
    Mutant(
        "both_layouts_saved",
        _CONTRACT,
        "ctx.save_for_backward(*x8_t, *weight8_t)",
        "ctx.save_for_backward(*x8_t, *weight8_t, *x8)",
        (f"{_LAYOUTS}::test_a_layer_saves_one_layout_of_each_operand",),
    ),
    Mutant(
        "transposes_that_nobody_wants",
        _CONTRACT,
        "turned=dweight_wanted, impl=impl)\n        weight8",
        "impl=impl)\n        weight8",
        (f"{_LAYOUTS}::test_a_layer_saves_one_layout_of_each_operand",),
    ),
    Mutant(
        "head_never_on_the_kernels",
        _CONTRACT,
        "able = triton and",
        "able = False and",
        (f"{_LAYOUTS}::test_the_head_s_kernels_are_launched",),
    ),
    Mutant(
        "old_gpus_taken",
        _CONTRACT,
        "_OLDEST_CAPABILITY = (8, 9)",
        "_OLDEST_CAPABILITY = (8, 0)",
        (f"{_TESTS}::test_who_has_fp8",),
    ),
]
