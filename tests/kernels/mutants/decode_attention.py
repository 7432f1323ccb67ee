"""Wrong edits of decoding attention and of the merge of its shares."""

from tests.kernels.mutants import Mutant

_KERNEL = "kernels/jit/decode_attention.py"
_TESTS = "tests/kernels/test_decode_attention.py"
_BUDGET = f"{_TESTS}::test_within_budget"
_BEHIND = f"{_TESTS}::test_what_lies_after_the_new_tokens_is_never_read"
_EMPTY = f"{_TESTS}::test_nothing_to_do"
_APPEND = "tests/kernels/test_append_kv.py"
_WRITTEN = f"{_APPEND}::test_the_caches_hold_the_new_tokens_and_nothing_else_moves"

MUTANTS = [
    Mutant(
        "lengths_ignored",
        _KERNEL,
        "tl.minimum(tl.load(lengths_ptr + b) + t + 1, S)",
        "(tl.load(lengths_ptr + b) * 0 + S)",
        (_BEHIND,),
    ),
    Mutant(
        "shares_overlap",
        _KERNEL,
        "end = tl.minimum(begin + share_keys, length)",
        "end = length",
        (_BUDGET,),
        "every share walks on to the end of its row",
    ),
    Mutant(
        "lanes_behind_the_length_count",
        _KERNEL,
        "tl.where(first + offs_n < end, tl.sum(q * k, 1), HIDDEN)",
        "tl.sum(q * k, 1)",
        (_BUDGET,),
        "zeros are read there, but a score of zero is a score",
    ),
    Mutant("acc_not_rescaled", _KERNEL, "acc * alpha[:, None] + p", "acc + p", (_BUDGET,)),
    Mutant("total_not_rescaled", _KERNEL, "total * alpha + p", "total + p", (_BUDGET,)),
    Mutant("scale_ignored", _KERNEL, "(scale * LOG2E)", "LOG2E", (_BUDGET,)),
    Mutant("natural_exponent", _KERNEL, "(scale * LOG2E)", "scale", (_BUDGET,)),
    Mutant(
        "lanes_added_without_their_maxima",
        _KERNEL,
        "tl.exp2(m - top)",
        "tl.exp2(m - m)",
        (_BUDGET,),
    ),
    Mutant(
        "shares_weighted_alike",
        _KERNEL,
        "weight = total * tl.exp2(m - tl.max(m, 0))",
        "weight = tl.exp2(m - tl.max(m, 0))",
        (_BUDGET,),
    ),
    Mutant(
        "maxima_of_the_shares_ignored",
        _KERNEL,
        "weight = total * tl.exp2(m - tl.max(m, 0))",
        "weight = total",
        (_BUDGET,),
    ),
    Mutant(
        "empty_rows_divide_by_zero",
        _KERNEL,
        "tl.sum(acc * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)",
        "tl.sum(acc * weight[:, None], 0) / whole",
        (_EMPTY,),
    ),
    Mutant(
        "parts_of_rows_and_shares_mixed_up",
        _KERNEL,
        "(share * tl.num_programs(2) + token)",
        "(token * tl.num_programs(1) + share)",
        (_BUDGET,),
    ),
    Mutant(
        "keys_one_after_the_other_in_every_cache",
        _KERNEL,
        "load_tile(k_ptr, offs_n, k_strides[2]",
        "load_tile(k_ptr, offs_n, D",
        (f"{_TESTS}::test_strided_inputs",),
    ),
    Mutant(
        "one_share_too_many_for_short_caches",
        _KERNEL,
        "triton.cdiv(S, SHARE_KEYS)",
        "1 + S // SHARE_KEYS",
        (f"{_TESTS}::test_shares_are_not_counted_from_lengths_and_are_limited",),
    ),
    Mutant(
        "new_tokens_see_each_other",
        _KERNEL,
        "tl.load(lengths_ptr + b) + t + 1",
        "tl.load(lengths_ptr + b) + T",
        (f"{_TESTS}::test_new_tokens_are_causal_among_themselves",),
    ),
    Mutant(
        "a_token_does_not_see_itself",
        _KERNEL,
        "tl.load(lengths_ptr + b) + t + 1",
        "tl.load(lengths_ptr + b) + t",
        (f"{_TESTS}::test_the_first_token_of_a_row_sees_itself_alone",),
    ),
    Mutant(
        "written_without_its_place_among_the_new",
        _KERNEL,
        "slot = tl.load(lengths_ptr + b).to(tl.int64) + t",
        "slot = tl.load(lengths_ptr + b).to(tl.int64)",
        (_WRITTEN,),
    ),
    Mutant(
        "written_past_the_cache",
        _KERNEL,
        "(slot >= 0) & (slot < S)",
        "slot >= 0",
        (f"{_APPEND}::test_nothing_is_written_outside_the_cache",),
    ),
    Mutant(
        "keys_for_values",
        _KERNEL,
        "store_tile(v_cache_ptr, v, heads",
        "store_tile(v_cache_ptr, k, heads",
        (_WRITTEN,),
    ),
]
