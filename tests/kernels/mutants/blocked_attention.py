"""Wrong edits of attention over blocks of queries, what a CPU runs in bf16."""

from tests.kernels.mutants import Mutant

_CONTRACT = "kernels/blocked_attention.py"
_TESTS = "tests/kernels/test_blocked_attention.py"
# several blocks, the last of them not whole
_BUDGET = f"{_TESTS}::test_within_budget[no AMX-(1, 300, 2, 64)-torch.float32]"

MUTANTS = [
    Mutant(
        "diagonal_hidden",
        _CONTRACT,
        ".triu_(1)\n    return torch.softmax(scores",
        ".triu_(0)\n    return torch.softmax(scores",
        (_BUDGET,),
        "a token that does not see itself",
    ),
    Mutant(
        "future_visible",
        _CONTRACT,
        ".triu_(1)\n    return torch.softmax(scores",
        ".triu_(2)\n    return torch.softmax(scores",
        (_BUDGET,),
        "one token of the future is seen",
    ),
    Mutant(
        "mask_on_the_first_square",
        _CONTRACT,
        "scores[:, :, queries] +=",
        "scores[:, :, :size] +=",
        (_BUDGET,),
        "later blocks would mask their oldest keys",
    ),
    Mutant(
        "scale_of_the_scores_dropped",
        _CONTRACT,
        "beta=0, alpha=scale, out=scores",
        "beta=0, alpha=1.0, out=scores",
        (_BUDGET,),
    ),
    Mutant(
        "scale_of_dq_dropped",
        _CONTRACT,
        "block = torch.bmm(dscores, k[:, keys]).mul_(scale)",
        "block = torch.bmm(dscores, k[:, keys])",
        (_BUDGET,),
    ),
    Mutant(
        "scale_of_dk_dropped",
        _CONTRACT,
        "dk.copy_(dk_sum.mul_(scale)",
        "dk.copy_(dk_sum",
        (_BUDGET,),
    ),
    Mutant(
        "dv_of_the_last_block_only",
        _CONTRACT,
        "dv_sum[:, keys] += torch.bmm",
        "dv_sum[:, keys] = torch.bmm",
        (_BUDGET,),
    ),
    Mutant(
        "dk_of_the_last_block_only",
        _CONTRACT,
        "dk_sum[:, keys] += torch.bmm",
        "dk_sum[:, keys] = torch.bmm",
        (_BUDGET,),
    ),
    Mutant(
        "row_sum_of_softmax_backward_dropped",
        _CONTRACT,
        "dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)",
        "dscores = p * dp",
        (_BUDGET,),
    ),
    Mutant(
        "sums_in_a_short_dtype",
        _CONTRACT,
        "wide = torch.promote_types(qkv.dtype, torch.float32)",
        "wide = qkv.dtype",
        (f"{_TESTS}::test_sums_over_many_blocks_are_wide[no AMX]",),
    ),
    Mutant(
        "keys_and_values_swapped",
        _CONTRACT,
        "dq, dk, dv = dqkv.permute(2, 0, 3, 1, 4)",
        "dq, dv, dk = dqkv.permute(2, 0, 3, 1, 4)",
        (_BUDGET,),
    ),
    Mutant(
        "forward_sees_everything",
        _CONTRACT,
        "is_causal=True, scale=scale",
        "scale=scale",
        (f"{_TESTS}::test_within_budget[AMX-(1, 300, 2, 64)-torch.float32]",),
    ),
    Mutant(
        "prefixes_see_one_key_more",
        _CONTRACT,
        "triu_(queries.start + 1)",
        "triu_(queries.start + 2)",
        (f"{_TESTS}::test_prefixes_within_budget[no AMX-(1, 300, 2, 64)]",),
    ),
    Mutant(
        "prefixes_with_a_gradient",
        _CONTRACT,
        "        and not wants_gradient(qkv)\n",
        "",
        (f"{_TESTS}::test_prefixes_are_for_lengths_at_which_pytorchs_blocks_are_small",),
    ),
]
