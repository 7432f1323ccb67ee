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
        "z = tl.where(offs < V, z, _LOWEST)",
        "z = tl.where(offs < V_padded, z, _LOWEST)",
        (f"{_TILES}-plain-torch.float32]",),
    ),
    Mutant(
        "old_sum_not_rescaled",
        _KERNEL,
        "s = s * tl.exp(m - m_new) + ",
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
        "dz = tl.exp(z - row_max - log_sum) * p_scale",
        "dz = tl.exp(z - (row_max + log_sum)) * p_scale",
        (f"{_TESTS}::test_large_logits_do_not_overflow",),
        "beside a large maximum the last bits of the log sum are lost",
    ),
    Mutant(
        "target_not_subtracted",
        _KERNEL,
        "        dz -= tl.where(offs == target, scale * (1.0 - smoothing), 0.0)\n",
        "",
        (f"{_TILES}-plain-torch.float32]",),
    ),
    Mutant(
        "whole_target_subtracted",
        _KERNEL,
        "scale * (1.0 - smoothing), 0.0)",
        "scale, 0.0)",
        (f"{_TILES}-smoothed-torch.float32]",),
    ),
    Mutant(
        "smoothing_over_padded_columns",
        _KERNEL,
        "scale * smoothing / V\n",
        "scale * smoothing / V_padded\n",
        (f"{_TILES}-smoothed-torch.float32]",),
    ),
    Mutant(
        "z_loss_has_no_gradient",
        _KERNEL,
        "(1.0 + 2.0 * z_loss * (row_max + log_sum))",
        "1.0",
        (f"{_TILES}-z_loss-torch.float32]",),
    ),
    Mutant(
        "padding_gets_a_gradient",
        _KERNEL,
        "dz = tl.where((offs < V) & kept, dz, 0.0)",
        "dz = tl.where(kept, dz, 0.0)",
        (f"{_TESTS}::test_ignored_rows_and_padding_get_zero_gradients",),
    ),
    Mutant(
        "ignored_rows_get_a_gradient",
        _KERNEL,
        "dz = tl.where((offs < V) & kept, dz, 0.0)",
        "dz = tl.where(offs < V, dz, 0.0)",
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
        "last = (tl.cdiv(V_padded, BLOCK_V) - 1) * BLOCK_V",
        "last = tl.cdiv(V_padded, BLOCK_V) * BLOCK_V",
        (f"{_TILES}-plain-torch.float32]",),
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
        "    scale = dloss / count\n"
        "    return _cross_entropy_bwd(logits, targets, stats, scale, *ctx.options), ",
        "    dz = _cross_entropy_bwd(logits, targets, stats, 1.0 / count, *ctx.options)\n"
        "    return dz * dloss, ",
        (f"{_TESTS}::test_fp16_gradient_of_a_mean_survives_a_loss_scale",),
        "in fp16 the gradient of a mean underflows before the loss scale reaches it",
    ),
    Mutant(
        "nothing_kept_divides_by_zero",
        _CONTRACT,
        ".clamp(min=1)",
        "",
        (f"{_TESTS}::test_nothing_kept_gives_zero",),
    ),
]
