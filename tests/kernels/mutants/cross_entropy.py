"""Wrong edits of the cross-entropy kernels."""

from tests.kernels.mutants import Mutant

_KERNEL = "kernels/jit/cross_entropy.py"
_CONTRACT = "kernels/cross_entropy.py"
_TESTS = "tests/kernels/test_cross_entropy.py"
_BUDGET = f"{_TESTS}::test_within_budget"
# several tiles, the last one part padding, part nothing
_TILES = f"{_BUDGET}[(3, 304, 257)"

MUTANTS = [
    Mutant(
        "padding_counts_in_the_sum",
        _KERNEL,
        "_add_tile(tl.where(offs < V, z, _LOWEST), m, s)",
        "_add_tile(tl.where(offs < V_padded, z, _LOWEST), m, s)",
        (f"{_TILES}-plain-torch.float32]",),
    ),
    Mutant(
        "old_sum_not_rescaled",
        _KERNEL,
        "s = s * tl.exp2((m - m_new) * LOG2E) + ",
        "s = s + ",
        (f"{_TILES}-plain-torch.float32]",),
    ),
    Mutant(
        "maximum_not_kept",
        _KERNEL,
        "m_new = tl.maximum(m, tl.max(z, axis=1))",
        "m_new = tl.max(z, axis=1)",
        (f"{_TESTS}::test_logits_of_minus_infinity_are_excluded",),
        "a tile of -inf in a lane that has seen finite logits",
    ),
    Mutant(
        "no_maximum_at_all",
        _KERNEL,
        "    row_max = tl.max(m, axis=0)\n",
        "    row_max = tl.min(m, axis=0)\n",
        (f"{_TESTS}::test_large_logits_do_not_overflow",),
    ),
    Mutant(
        "statistics_joined",
        _KERNEL,
        "tl.exp2((z - row_max) * LOG2E - log2_sum)",
        "tl.exp2((z - (row_max + log2_sum / LOG2E)) * LOG2E)",
        (f"{_TESTS}::test_large_logits_do_not_overflow",),
        "beside a large maximum the last bits of the log sum are lost",
    ),
    Mutant(
        "target_not_subtracted",
        _KERNEL,
        "tl.where(offs == target, dz - share, dz)",
        "dz",
        (f"{_TILES}-plain-torch.float32]",),
    ),
    Mutant(
        "whole_target_subtracted",
        _KERNEL,
        "scale * (1.0 - smoothing))",
        "scale)",
        (f"{_TILES}-smoothed-torch.float32]",),
    ),
    Mutant(
        "smoothing_over_padded_columns",
        _KERNEL,
        "scale * smoothing / V,",
        "scale * smoothing / V_padded,",
        (f"{_TILES}-smoothed-torch.float32]",),
    ),
    Mutant(
        "z_loss_has_no_gradient",
        _KERNEL,
        "(1.0 + 2.0 * z_loss * lse)",
        "1.0",
        (f"{_TILES}-z_loss-torch.float32]",),
    ),
    Mutant(
        "padding_gets_a_gradient",
        _KERNEL,
        "tl.where(last < V, dz, 0.0)",
        "dz",
        (f"{_TESTS}::test_ignored_rows_and_padding_get_zero_gradients",),
    ),
    Mutant(
        "start_of_ignored_rows_unwritten",
        _KERNEL,
        "range(tl.where(kept, whole + BLOCK_V, 0), V_padded",
        "range(whole + BLOCK_V, V_padded",
        (f"{_TESTS}::test_ignored_rows_and_padding_get_zero_gradients",),
    ),
    Mutant(
        "ignored_rows_count_in_the_loss",
        _KERNEL,
        "tl.where(kept, loss, 0.0)",
        "loss",
        (f"{_TILES}-plain-torch.float32]",),
    ),
    Mutant(
        "first_tile_unwritten",
        _KERNEL,
        "start = whole - BLOCK_V - done",
        "start = whole - done",
        (f"{_TILES}-plain-torch.float32]",),
    ),
    Mutant(
        "last_tile_not_read",
        _KERNEL,
        "    m, s = _add_tile(tl.where(offs < V, z, _LOWEST), m, s)\n",
        "",
        (f"{_TILES}-plain-torch.float32]",),
    ),
    Mutant(
        "target_of_the_first_tile_in_every_tile",
        _KERNEL,
        "target - start, statistics",
        "target, statistics",
        (f"{_TILES}-plain-torch.float32]",),
    ),
    Mutant(
        "sum_of_natural_for_binary_exponents",
        _KERNEL,
        "tl.store(stats_ptr + tl.num_programs(0) + row, log2_sum)",
        "tl.store(stats_ptr + tl.num_programs(0) + row, log_sum)",
        (f"{_TILES}-plain-torch.float32]",),
    ),
    Mutant(
        "ignored_rows_unwritten",
        _KERNEL,
        "tl.store(drow_ptr + start + offs, zeros, mask=offs < V_padded - start)",
        "pass",
        (f"{_TESTS}::test_ignored_rows_and_padding_get_zero_gradients",),
    ),
    Mutant(
        "rows_read_as_if_dense",
        _KERNEL,
        "row_ptr = logits_ptr + row * row_strides[0]",
        "row_ptr = logits_ptr + row * V_padded",
        (f"{_TESTS}::test_strided_logits",),
    ),
    Mutant(
        "gradient_of_the_sum_rounded_first",
        _CONTRACT,
        "    scale = gradient_scale(dloss, count)\n"
        "    return _cross_entropy_bwd(logits, targets, stats, scale, *ctx.options), ",
        "    dz = _cross_entropy_bwd(logits, targets, stats, 1.0 / count, *ctx.options)\n"
        "    return dz * dloss, ",
        (f"{_TESTS}::test_fp16_gradient_of_a_mean_survives_a_loss_scale",),
        "in fp16 the gradient of a mean underflows before the loss scale reaches it",
    ),
    Mutant(
        "nothing_kept_divides_by_zero",
        _CONTRACT,
        "losses.sum() / count.clamp(min=1), stats",
        "losses.sum() / count, stats",
        (f"{_TESTS}::test_nothing_kept_gives_zero",),
    ),
]
