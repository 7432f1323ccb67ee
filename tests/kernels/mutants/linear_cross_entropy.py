"""Wrong edits of the head fused with the loss."""

from tests.kernels.mutants import SECOND_DERIVATIVES, Mutant

_CONTRACT = "kernels/linear_cross_entropy.py"
_KERNEL = "kernels/jit/cross_entropy.py"
_TESTS = "tests/kernels/test_linear_cross_entropy.py"
_BUDGET = f"{_TESTS}::test_within_budget"
_CHUNKS = f"{_TESTS}::test_several_chunks_are_within_budget"

MUTANTS = [
    Mutant(
        "second_derivative_lost",
        _CONTRACT,
        '@first_order("linear_cross_entropy")\n',
        "",
        (f"{SECOND_DERIVATIVES}[linear_cross_entropy-triton]",),
        "the gradient of forward is taken for a constant",
    ),
    Mutant(
        "last_chunk_of_the_weight_s_gradient_wins",
        _CONTRACT,
        "dweight = product if dweight is None else dweight.add_(product)",
        "dweight = product",
        (_CHUNKS,),
    ),
    Mutant(
        "weight_s_gradient_summed_in_short",
        _CONTRACT,
        "return _wide(x.dtype) if summed else x.dtype",
        "return x.dtype",
        (f"{_TESTS}::test_weight_gradient_accumulates_in_fp32",),
    ),
    Mutant(
        "targets_of_the_first_chunk",
        _CONTRACT,
        "row_losses(logits, targets[rows], options",
        "row_losses(logits, targets[: rows.stop - rows.start], options",
        (_CHUNKS,),
    ),
    Mutant(
        "short_chunk_keeps_old_rows",
        _CONTRACT,
        "rows = slice(start, min(start + size, N))",
        "rows = slice(min(start, N - size), min(start + size, N))",
        (_CHUNKS,),
        "rows of two chunks count twice in the weight's gradient",
    ),
    Mutant(
        "gradients_of_the_mean_in_forward",
        _CONTRACT,
        "            dx[rows] = head.dx(dlogits)\n",
        "            logits /= kept_count(targets, ignore_index, x.dtype)\n"
        "            dx[rows] = head.dx(dlogits) * kept_count(targets, ignore_index, x.dtype)\n",
        (f"{_TESTS}::test_fp16_gradients_survive_a_loss_scale",),
        "in fp16 the gradient of a mean underflows",
    ),
    Mutant(
        "upstream_gradient_ignored",
        _CONTRACT,
        "    scale = gradient_scale(dloss, count)\n",
        "    scale = 1.0 / count\n",
        (f"{_BUDGET}[triton-(37, 48, 160, 129)-plain-torch.float32]",),
    ),
    Mutant(
        "padding_not_zeroed",
        _CONTRACT,
        "    logits[:, vocab_size:] = 0.0\n",
        "",
        (f"{_TESTS}::test_padded_rows_of_the_head_get_no_gradient",),
    ),
    Mutant(
        "gradient_not_written_over_the_logits",
        _KERNEL,
        "logits if with_grad else None",
        "None",
        (f"{_BUDGET}[triton-(37, 48, 160, 129)-plain-torch.float32]",),
    ),
    Mutant(
        "weight_s_gradient_in_x_s_dtype",
        _CONTRACT,
        "ctx.weight_dtype, ctx.wanted = inputs[1].dtype",
        "ctx.weight_dtype, ctx.wanted = inputs[0].dtype",
        (f"{_TESTS}::test_fp32_weight_with_a_short_x_keeps_its_gradient_in_fp32",),
    ),
    Mutant(
        "unwanted_product",
        _CONTRACT,
        "        if dweight_wanted:\n",
        "        if dx_wanted or dweight_wanted:\n",
        (f"{_TESTS}::test_only_wanted_gradients_are_computed",),
        "a frozen head still costs a third of the work",
    ),
    Mutant(
        "first_rows_of_the_weight_s_gradient_alone",
        _CONTRACT,
        "for first in range(0, len(out), rows):",
        "for first in range(0, rows, rows):",
        (f"{_TESTS}::test_a_gradient_is_scaled_some_rows_at_a_time",),
    ),
]
