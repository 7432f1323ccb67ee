"""Wrong edits of attention, forward and backward, and of the guard around it."""

from tests.kernels.mutants import Mutant

_FWD = "kernels/jit/attention.py"
_BWD = "kernels/jit/attention_bwd.py"
_PARTS = "kernels/jit/attention_parts.py"
_CHECK = "kernels/jit/attention_check.py"
_TESTS = "tests/kernels/test_attention.py"
_PLAIN = f"{_TESTS}::test_within_budget[(1, 65, 2, 64)-torch.float32]"
_OPTIONS = f"{_TESTS}::test_options_are_within_budget"
_BITS = "kernels/jit/attention_dropout.py"
_PACKED = f"{_TESTS}::test_packed_bits_are_the_mask"
_MASK = f"{_TESTS}::test_dropout_mask_is_philox_bit_for_bit"
_BLIND = f"{_TESTS}::test_blind_queries_give_zeros"
_STRIDED = f"{_TESTS}::test_strided_inputs_and_gradients"
_GUARD = "tests/kernels/test_attention_check.py"


def _option(name: str) -> str:
    return f"{_OPTIONS}[{name}-torch.float32-49]"


MUTANTS = [
    Mutant(
        "a_query_does_not_see_itself", _PARTS, "tl.where(k <= q, x", "tl.where(k < q, x", (_PLAIN,)
    ),
    Mutant(
        "diagonal_tile_not_masked",
        _FWD,
        "crosses = first_k + BLOCK_N > first_q",
        "crosses = first_k > first_q",
        (_PLAIN,),
        "queries see the keys after them within the first tile on the diagonal",
    ),
    Mutant(
        "scale_left_out_of_the_exponent",
        _FWD,
        "p = tl.exp2(s * log2_scale",
        "p = tl.exp2(s",
        (_PLAIN,),
    ),
    Mutant("natural_exponent", _FWD, "scale * LOG2E)", "scale)", (_PLAIN,)),
    Mutant("acc_not_rescaled", _FWD, "acc * alpha[:, None]", "acc", (_PLAIN,)),
    Mutant(
        "total_not_rescaled",
        _FWD,
        "total * alpha + tl.sum(p, 1)",
        "total + tl.sum(p, 1)",
        (_PLAIN,),
    ),
    Mutant(
        "maximum_forgotten_between_tiles",
        _FWD,
        "m_new = tl.maximum(m, tl.max(s, 1) * log2_scale)",
        "m_new = tl.max(s, 1) * log2_scale",
        (_BLIND,),
        "right as long as every tile has a visible key, but a hidden tile gives exp2(0)",
    ),
    Mutant(
        "total_in_half_precision",
        _FWD,
        "total * alpha + tl.sum(p, 1)",
        "(total * alpha + tl.sum(p, 1)).to(tl.float16).to(tl.float32)",
        (_PLAIN,),
    ),
    Mutant("segments_ignored", _PARTS, "(ids_q == ids_k) & ", "", (_option("segments"),)),
    Mutant("end_of_range_is_seen", _PARTS, "(k < end)", "(k <= end)", (_option("range"),)),
    Mutant("start_of_range_is_hidden", _PARTS, "(k >= start)", "(k > start)", (_option("range"),)),
    Mutant(
        "causality_lost_with_masks", _PARTS, "(k <= q) & (ids_q", "(ids_q", (_option("segments"),)
    ),
    Mutant(
        "blind_queries_take_the_mean",
        "kernels/jit/primitives.py",
        "LOWEST = tl.constexpr(-1.0e30)",
        "LOWEST = tl.constexpr(-3.0e38)",
        (_BLIND,),
    ),
    Mutant(
        "dropout_by_the_tile",
        _FWD,
        "bits_ptrs += words_until_next(first_k, BLOCK_N)",
        "bits_ptrs += 0",
        (_MASK,),
        "every tile drops the keys of the first",
    ),
    Mutant(
        "one_dropout_mask_for_all_heads",
        _FWD,
        "bit_rows(dropout[0], b * H + h, ",
        "bit_rows(dropout[0], b * H, ",
        (_MASK,),
    ),
    Mutant(
        "dropout_not_scaled_up",
        _FWD,
        "weight /= 1.0 - dropout[1]",
        "weight /= 1.0",
        (_option("dropout"),),
    ),
    Mutant(
        "batch_stride_of_a_packed_tensor", _FWD, "b * stride_b", "b * T * stride_t", (_STRIDED,)
    ),
    Mutant(
        "heads_side_by_side_mixed_up", _FWD, "* C + h * D\n", "* C + (H - 1 - h) * D\n", (_PLAIN,)
    ),
    Mutant("dq_not_scaled", _BWD, "dq * scale", "dq", (_PLAIN,)),
    Mutant("dk_not_scaled", _BWD, "dk * scale", "dk", (_PLAIN,)),
    Mutant(
        "delta_left_out_of_dq",
        _BWD,
        "_score_gradient(p, kept, dp, delta[:, None], ",
        "_score_gradient(p, kept, dp, 0.0, ",
        (_PLAIN,),
    ),
    Mutant(
        "delta_left_out_of_dk",
        _BWD,
        "ds = _score_gradient(p, kept, dp, delta, ",
        "ds = _score_gradient(p, kept, dp, 0.0, ",
        (_PLAIN,),
    ),
    Mutant(
        "delta_has_dropout_s_factor",
        _BWD,
        "delta *= 1.0 - dropout[1]",
        "delta *= 1.0",
        (_option("dropout"),),
        "what it is subtracted from lacks that factor until the end",
    ),
    Mutant(
        "dropout_left_out_of_dp",
        _BWD,
        "return kept * dp - p * delta",
        "return p * (dp - delta)",
        (_option("dropout"),),
        "dq and dk must drop the same elements as the forward",
    ),
    Mutant(
        "dropped_probabilities_lose_delta",
        _BWD,
        "return kept * dp - p * delta",
        "return kept * (dp - delta)",
        (_option("dropout"),),
        "a dropped key still takes part in the row's sum",
    ),
    Mutant(
        "dropout_left_out_of_dv",
        _BWD,
        "kept = tl.where(keep, p, 0.0)\n        dv =",
        "kept = p\n        dv =",
        (_option("dropout"),),
    ),
    Mutant(
        "queries_gradient_not_scaled_up",
        _BWD,
        "_rescaled(dq * scale, dropout)",
        "dq * scale",
        (_option("dropout"),),
    ),
    Mutant(
        "keys_gradient_not_scaled_up",
        _BWD,
        "_rescaled(dk * scale, dropout)",
        "dk * scale",
        (_option("dropout"),),
    ),
    Mutant(
        "values_gradient_not_scaled_up",
        _BWD,
        "_rescaled(dv, dropout)",
        "dv",
        (_option("dropout"),),
    ),
    Mutant(
        "bits_of_a_word_in_another_order",
        _BITS,
        "(groups % GROUPS * 4)",
        "(28 - groups % GROUPS * 4)",
        (_PACKED,),
    ),
    Mutant(
        "one_philox_word_for_four_keys",
        _BITS,
        "b.to(tl.int32) << 1",
        "a.to(tl.int32) << 1",
        (_PACKED,),
    ),
    Mutant(
        "second_word_of_a_tile_is_the_first",
        _BITS,
        "tl.load(ptrs + i)",
        "tl.load(ptrs)",
        (f"{_TESTS}::test_result_does_not_depend_on_tiles",),
    ),
    Mutant(
        "half_a_word_is_a_whole_one",
        _BITS,
        "return ((first_k & 31) + KEYS) >> 5",
        "return 1",
        (f"{_TESTS}::test_result_does_not_depend_on_tiles",),
    ),
    Mutant(
        "second_word_of_the_keys_is_the_first",
        _BITS,
        "tl.trans(ptrs) + tl.arange(0, WORDS)",
        "tl.trans(ptrs) + 0 * tl.arange(0, WORDS)",
        (f"{_TESTS}::test_result_does_not_depend_on_tiles",),
    ),
    Mutant(
        "queries_of_the_diagonal_skipped",
        _BWD,
        "begin = first_k // BLOCK_M * BLOCK_M",
        "begin = (first_k // BLOCK_M + 1) * BLOCK_M",
        (_PLAIN,),
    ),
    Mutant(
        "dk_and_dv_swapped",
        _BWD,
        "store_tile(dk_ptr + C, _rescaled(dv, dropout)",
        "store_tile(dk_ptr + C, dk",
        (_PLAIN,),
    ),
    Mutant(
        "expanded_gradient_read_as_dense",
        _BWD,
        "dout.contiguous()",
        "dout",
        (_STRIDED,),
    ),
    Mutant(
        "gradient_of_half_the_keys",
        _BWD,
        "(first_k < key_range[1])",
        "(first_k + BLOCK_N <= key_range[1])",
        (_option("range"),),
        "the block of keys that the range ends in gets no gradient",
    ),
    Mutant("guard_trusts_13_0", _CHECK, "SAFE_PTXAS = (13, 1)", "SAFE_PTXAS = (13, 0)", (_GUARD,)),
    Mutant(
        "guard_takes_nan_for_right",
        _CHECK,
        "if not bool((dqkv - gold_dqkv).norm() <= GRADIENT_TOLERANCE * gold_dqkv.norm()):",
        "if bool((dqkv - gold_dqkv).norm() > GRADIENT_TOLERANCE * gold_dqkv.norm()):",
        (_GUARD,),
    ),
    Mutant("guard_checks_every_call", _CHECK, "@lru_cache\n", "", (_GUARD,)),
    Mutant(
        "guard_checks_other_segments",
        _CHECK,
        "dtype=segments_dtype",
        "dtype=torch.int32",
        (_GUARD,),
    ),
]
