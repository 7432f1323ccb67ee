"""Wrong edits of the projection to queries, keys and values that writes them into the cache."""

from functools import partial

from tests.kernels.mutants import Mutant

_TESTS = "tests/kernels/test_decode_qkv.py"
_PLACES = f"{_TESTS}::test_only_the_new_tokens_places_change"
_OUTSIDE = f"{_TESTS}::test_nothing_is_written_outside_the_cache"
_STRIDED = f"{_TESTS}::test_strided_inputs"
_BUDGET = f"{_TESTS}::test_within_budget"

kernel = partial(Mutant, path="kernels/jit/decode_qkv.py")
contract = partial(Mutant, path="kernels/decode_qkv.py")

MUTANTS = [
    kernel(
        name="a_full_row_writes_after_its_end",
        old="& (slot < S)",
        new="& (slot < S + 1)",
        tests=(_OUTSIDE, _PLACES),
    ),
    kernel(
        name="a_negative_length_writes_before_the_row",
        old="(slot >= 0) & (slot < S)",
        new="slot < S",
        tests=(_OUTSIDE,),
    ),
    kernel(
        name="one_place_too_far",
        old="slot * strides[4 + 3 * part]",
        new="(slot + 1) * strides[4 + 3 * part]",
        tests=(_PLACES, _BUDGET),
    ),
    kernel(
        name="the_first_rows_length_for_all",
        old="cache[2] + offs_b",
        new="cache[2] + offs_b * 0",
        tests=(_PLACES, _BUDGET),
    ),
    kernel(
        name="values_with_the_strides_of_the_keys",
        old="strides[2 + 3 * part] + slot * strides[4 + 3 * part]",
        new="strides[2] + slot * strides[4]",
        tests=(_STRIDED,),
    ),
    kernel(
        name="heads_one_after_the_other",
        old="feature // D * strides[3 + 3 * part]",
        new="feature // D * D",
        tests=(_BUDGET,),
    ),
    kernel(
        name="values_where_the_keys_are",
        old="cache[part] + row",
        new="cache[0] + row",
        tests=(_BUDGET,),
    ),
    kernel(
        name="keys_twice",
        old="offs_f - (part + 1) * H * D",
        new="offs_f - H * D",
        tests=(_BUDGET,),
    ),
    kernel(
        name="keys_among_the_queries",
        old="(offs_f < H * D)[None, :]\n    tl.store(q_ptr",
        new="(offs_f < 2 * H * D)[None, :]\n    tl.store(q_ptr",
        tests=(_BUDGET,),
        why="a row's keys become the next row's queries",
    ),
    contract(
        name="the_library_replaces_a_full_rows_last_key",
        old="torch.where(fits, new, cache[rows, :, slots])",
        new="new",
        tests=(_PLACES,),
    ),
    contract(
        name="gradients_reach_the_cache",
        old="@torch.no_grad()\n",
        new="",
        tests=(f"{_TESTS}::test_no_gradient_reaches_the_cache",),
    ),
]
