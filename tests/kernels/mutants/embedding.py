"""Wrong edits of the embedding."""

from tests.kernels.mutants import SECOND_DERIVATIVES, Mutant

_KERNEL = "kernels/jit/embedding.py"
_CONTRACT = "kernels/embedding.py"
_TESTS = "tests/kernels/test_embedding.py"
_BUDGET = f"{_TESTS}::test_within_budget[(2, 17, 80)-torch.float32]"

MUTANTS = [
    Mutant(
        "positions_run_on_into_the_next_row",
        _KERNEL,
        "positions = offs_n % T",
        "positions = offs_n",
        (_BUDGET,),
    ),
    Mutant(
        "positions_forgotten",
        _KERNEL,
        "    x += _gather(wpe_ptr, positions, row_strides[1], table_rows[1], mask, offs_c)\n",
        "",
        (_BUDGET,),
    ),
    Mutant(
        "ids_not_checked_from_below",
        _KERNEL,
        "known = (ids >= 0) & (ids < n_rows)",
        "known = ids < n_rows",
        (f"{_TESTS}::test_ids_outside_their_tables_give_nan",),
    ),
    Mutant(
        "last_token_of_an_id_dropped",
        _KERNEL,
        "tl.load(bounds_ptr + row + 1)\n",
        "tl.load(bounds_ptr + row + 1) - 1\n",
        (_BUDGET,),
    ),
    Mutant(
        "first_tokens_of_an_id_only",
        _KERNEL,
        "total += tl.sum(dx, axis=0)",
        "total = tl.sum(dx, axis=0)",
        (_BUDGET,),
    ),
    Mutant(
        "gradient_of_the_head_overwritten",
        _KERNEL,
        "total = tl.load(dtable_ptrs, mask=mask_c, other=0.0).to(tl.float32)",
        "total = tl.zeros([BLOCK_C], tl.float32)",
        (f"{_TESTS}::test_tied_gradient_is_added_in_place",),
    ),
    Mutant(
        "expanded_gradient_of_the_head_written_to",
        _CONTRACT,
        "dhead.contiguous().index_put_(",
        "dhead.index_put_(",
        (f"{_TESTS}::test_tied_with_one_use_and_with_two",),
    ),
    Mutant(
        "summed_in_short",
        _KERNEL,
        "total += tl.sum(dx, axis=0)",
        "total = (total + tl.sum(dx, axis=0)).to(dx_ptr.dtype.element_ty).to(tl.float32)",
        (f"{_TESTS}::test_a_frequent_token_is_summed_in_fp32",),
    ),
    Mutant(
        "gradient_masked_by_sorted_place",
        _KERNEL,
        "dropout_tile(dx, dropout, tokens, C, ",
        "dropout_tile(dx, dropout, offs, C, ",
        (f"{_TESTS}::test_dropout_is_within_budget",),
        "the mask belongs to the token's place in the batch",
    ),
    Mutant(
        "gradient_read_as_if_dense",
        _KERNEL,
        "ptrs = dx_ptr + tokens[:, None] * dx_stride",
        "ptrs = dx_ptr + tokens[:, None] * C",
        (f"{_TESTS}::test_strided_upstream_gradient",),
    ),
    Mutant(
        "table_read_as_if_dense",
        _KERNEL,
        "ptrs = table_ptr + ids[:, None] * row_stride",
        "ptrs = table_ptr + ids[:, None] * tl.max(offs_c + 1, axis=0)",
        (f"{_TESTS}::test_int32_ids_and_strided_tables",),
    ),
    Mutant(
        "counting_ends_early",
        _KERNEL,
        "torch.arange(n_rows + 1, device=device).clamp_(max=T) * B",
        "torch.arange(n_rows + 1, device=device).clamp_(max=T - 1) * B",
        (f"{_TESTS}::test_rows_that_do_not_occur_get_zero_gradients",),
    ),
    Mutant(
        "given_positions_get_the_counting_gradient",
        _CONTRACT,
        "    if positions is None:\n        B, T",
        "    if True:\n        B, T",
        (f"{_TESTS}::test_positions_of_a_row_and_of_each",),
    ),
    Mutant(
        "second_derivative_lost",
        _CONTRACT,
        '    @first_order("tied_embedding")\n',
        "",
        (f"{SECOND_DERIVATIVES}[tied_embedding-triton]",),
        "autograd does not see what is added in place",
    ),
]
