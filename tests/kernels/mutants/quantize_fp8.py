"""Wrong edits of the rounding to FP8."""

from tests.kernels.mutants import Mutant

_KERNEL = "kernels/jit/quantize_fp8.py"
_CONTRACT = "kernels/quantize_fp8.py"
_TESTS = "tests/kernels/test_quantize_fp8.py"
# several tiles each way, none of them whole
_BITS = f"{_TESTS}::test_the_bits_are_those_of_the_definition"
_FP32 = f"{_BITS}[(37, 48)-torch.float32-torch.float8_e4m3fn]"
_WIDE = f"{_BITS}[(37, 48)-torch.float32-torch.float8_e5m2]"
_BAD = f"{_TESTS}::test_what_is_not_finite_is_not_hidden"

MUTANTS = [
    Mutant("sign_kept", _KERNEL, " & 0x7FFFFFFF", "", (_FP32,), "negative magnitudes are lost"),
    Mutant(
        "only_the_first_tile",
        _KERNEL,
        "range(pid_n * BLOCK_N, N, P * BLOCK_N)",
        "range(pid_n * BLOCK_N, N, N)",
        (_FP32,),
    ),
    Mutant(
        "partial_results_overwritten",
        _KERNEL,
        "partial_ptr + pid_c * P + pid_n",
        "partial_ptr + pid_c + pid_n",
        (_FP32,),
    ),
    Mutant(
        "largest_of_the_last_tile",
        _KERNEL,
        "tl.maximum(largest, x.to(",
        "tl.maximum(largest * 0, x.to(",
        (_FP32,),
    ),
    Mutant(
        "partial_results_of_one_program",
        _KERNEL,
        "mask=offs_p < P, other=0), axis=0)",
        "mask=offs_p < 1, other=0), axis=0)",
        (_FP32,),
    ),
    Mutant(
        "partial_results_not_masked",
        _KERNEL,
        "mask=offs_p < P, other=0), axis=0)",
        "mask=offs_p < P, other=2139095040), axis=0)",
        (f"{_BITS}[(80, 160)-torch.float32-torch.float8_e4m3fn]", _FP32),
        "infinity beyond the last program's",
    ),
    Mutant(
        "zeros_divided_by_zero",
        _KERNEL,
        "tl.maximum(bits, _SMALLEST).to(",
        "bits.to(",
        (f"{_TESTS}::test_the_smallest_and_the_largest_numbers",),
    ),
    Mutant(
        "another_smallest",
        _KERNEL,
        "(127 - 60) << 23",
        "(127 - 62) << 23",
        (f"{_TESTS}::test_the_smallest_and_the_largest_numbers",),
    ),
    Mutant(
        "divided_once",
        _KERNEL,
        "(tl.div_rn(1.0, amax) * m)",
        "tl.div_rn(m, amax)",
        (f"{_TESTS}::test_the_scale_has_the_definitions_last_bit",),
        "another scale in the last bit",
    ),
    Mutant(
        "inverse_of_the_inverse", _KERNEL, "tl.div_rn(amax, m))", "tl.div_rn(m, amax))", (_FP32,)
    ),
    Mutant("one_range_for_both", _KERNEL, "57344.0 if E5M2 else 448.0", "448.0", (_WIDE,)),
    Mutant("one_format_for_both", _KERNEL, "tl.float8e5 if E5M2 else", "", (_WIDE,)),
    Mutant(
        "straight_by_the_wrong_stride",
        _KERNEL,
        "straight_ptr + offs_n[:, None] * C",
        "straight_ptr + offs_n[:, None] * x_stride",
        (f"{_TESTS}::test_any_strides",),
    ),
    Mutant("not_turned", _KERNEL, "tl.trans(q)", "tl.reshape(q, [BLOCK_C, BLOCK_N])", (_FP32,)),
    Mutant(
        "turned_without_its_padding",
        _KERNEL,
        "(offs_n < padded_N)[None, :])",
        "(offs_n < N)[None, :])",
        (_FP32,),
        "NaNs in the sum",
    ),
    Mutant(
        "turned_by_an_unpadded_stride",
        _KERNEL,
        "turned_ptr + offs_c[:, None] * padded_N",
        "turned_ptr + offs_c[:, None] * N",
        (_FP32,),
    ),
    Mutant(
        "a_bound_ignored",
        _KERNEL,
        "_partial_amax(rows) if amax is None else",
        "_partial_amax(rows) if True else",
        (f"{_TESTS}::test_a_bound_that_is_given_is_the_scale",),
    ),
    Mutant(
        "a_nan_hidden",
        _KERNEL,
        "x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)",
        "tl.where(x == x, x, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF)",
        (_BAD,),
    ),
    Mutant(
        "both_layouts_always",
        _KERNEL,
        "q_turned if turned else None",
        "q_turned",
        (f"{_TESTS}::test_only_the_layouts_that_are_wanted",),
        "writes beyond an empty tensor",
    ),
    Mutant(
        "not_padded",
        _CONTRACT,
        "return -(-rows // MULTIPLE) * MULTIPLE",
        "return rows",
        ("tests/kernels/test_linear_fp8.py::test_transposes_are_padded_with_zeros",),
        "tensor cores refuse the product",
    ),
    Mutant(
        "taken_without_fp8",
        _CONTRACT,
        "resolve(op, impl, x, no_fp8_kernel(x))",
        "resolve(op, impl, x)",
        (f"{_TESTS}::test_auto_takes_the_kernels_where_there_is_fp8",),
    ),
    Mutant(
        "compiled_without_fp8",
        "kernels/gpus.py",
        "int(number) >= 89",
        "int(number) >= 86",
        (f"{_TESTS}::test_it_is_compiled_where_there_is_fp8",),
    ),
]
