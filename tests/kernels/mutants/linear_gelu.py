"""Wrong edits of projection, bias and GELU in one."""

from tests.kernels.mutants import Mutant

_KERNEL = "kernels/jit/linear_gelu.py"
_CONTRACT = "kernels/linear_gelu.py"
_ERF = "tests/kernels/test_gelu_erf.py::test_triton_within_budget"
_TESTS = "tests/kernels/test_linear_gelu.py"
# several tiles each way, none of them whole
_BUDGET = f"{_TESTS}::test_within_budget[fused-(37, 48, 80)-torch.float32]"
_EXACT = f"{_TESTS}::test_every_config_is_exact_on_integers"

MUTANTS = [
    Mutant(
        "tail_of_the_sum_unmasked",
        _KERNEL,
        "mask_k = offs_k < C - start",
        "mask_k = offs_k < C",
        (f"{_TESTS}::test_within_budget[fused-(1, 33, 20)-torch.float32]",),
        "reads into the next row",
    ),
    Mutant(
        "last_tile_of_the_sum_dropped",
        _KERNEL,
        "for start in range(0, C, BLOCK_K):",
        "for start in range(0, C - BLOCK_K, BLOCK_K):",
        (_BUDGET,),
    ),
    Mutant(
        "weight_not_advanced",
        _KERNEL,
        "        w_ptrs += BLOCK_K * weight_strides[1]\n",
        "",
        (_BUDGET,),
    ),
    Mutant(
        "weight_s_strides_swapped",
        _KERNEL,
        "columns[None, :] * weight_strides[0] + offs_k[:, None] * weight_strides[1]",
        "columns[None, :] * weight_strides[1] + offs_k[:, None] * weight_strides[0]",
        (_BUDGET,),
    ),
    Mutant(
        "halves_interleaved",
        _KERNEL,
        "tl.reshape(z, [BLOCK_M, 2, HALF]).permute(0, 2, 1)",
        "tl.reshape(z, [BLOCK_M, HALF, 2])",
        (_EXACT,),
    ),
    Mutant(
        "second_half_at_the_first_s_columns",
        _KERNEL,
        "start, first_n = start + HALF, first_n + HALF",
        "first_n = first_n + HALF",
        (_EXACT,),
    ),
    Mutant(
        "group_of_tiles_skipped",
        _KERNEL,
        "height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)",
        "height = GROUP_M",
        (_BUDGET,),
        "a short last group leaves tiles out",
    ),
    Mutant(
        "pre_activation_with_bias",
        _KERNEL,
        "        tl.store(z_ptr + start + offs, z, mask=mask)\n    if bias_ptr is not None:\n"
        "        z += tl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0.0)"
        ".to(tl.float32)[None, :]\n",
        "        pass\n    if bias_ptr is not None:\n"
        "        z += tl.load(bias_ptr + first_n + offs_n, mask=mask_n, other=0.0)"
        ".to(tl.float32)[None, :]\n"
        "        if z_ptr is not None:\n"
        "            tl.store(z_ptr + start + offs, z, mask=mask)\n",
        (_BUDGET,),
        "backward would add the bias twice",
    ),
    Mutant(
        "bias_of_the_first_tile",
        _KERNEL,
        "tl.load(bias_ptr + first_n + offs_n",
        "tl.load(bias_ptr + offs_n",
        (_BUDGET,),
    ),
    Mutant(
        "slope_of_gelu_forgotten",
        _CONTRACT,
        "_rows(dz).t() @ _rows(x)",
        "_rows(dy).t() @ _rows(x)",
        (_BUDGET,),
    ),
    Mutant(
        "gradient_of_the_other_form",
        _CONTRACT,
        "gelu_bwd(dy, z, bias, ctx.form)",
        'gelu_bwd(dy, z, bias, "tanh")',
        (f"{_ERF}[linear_gelu fused-torch.float32]",),
    ),
    Mutant(
        "routes_swapped",
        _CONTRACT,
        "    if not fused:\n",
        "    if fused:\n",
        (f"{_TESTS}::test_routes_are_what_they_claim",),
        "our own product where the library's was asked for",
    ),
    Mutant(
        "fresh_memory_for_every_gelu",
        _CONTRACT,
        "if watched or wants_gradient(x, weight, bias):",
        "if True:",
        (f"{_TESTS}::test_pytorchs_gelu_takes_memory_of_its_own_only_for_a_gradient",),
    ),
]
