"""Faults of the decoding step in C++ that its tests must find."""

from functools import partial

from tests.kernels.mutants import Mutant

TESTS = ("tests/generate/test_compiled.py",)
step = partial(Mutant, path="kernels/cpu/decode_step.cpp", tests=TESTS)

MUTANTS = [
    step(
        name="bf16_is_cut_off",
        old="uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        new="uint32_t rounded = (bits + 0xffff) >> 16;",
    ),
    step(
        name="the_rest_of_a_dot_is_forgotten",
        old="    for (; i < n; i++) out += widen(a[i]) * b[i];\n",
        new="",
    ),
    step(
        name="the_rest_of_a_product_is_forgotten",
        old="            for (int64_t rest = c; rest < C; rest++)",
        new="            for (int64_t rest = c; rest < 0; rest++)",
    ),
    step(
        name="scales_of_the_feature_before",
        old="m.scale ? m.scale[f + i] : 1",
        new="m.scale ? m.scale[f] : 1",
    ),
    step(
        name="a_bias_is_left_out",
        old="y = value * scale + bias +",
        new="y = value * scale +",
    ),
    step(
        name="the_residual_is_left_out",
        old="(how == ADD ? y : 0)",
        new="0",
    ),
    step(
        name="rows_after_four_are_the_first_again",
        old="x += n * C;",
        new="x += n % 4 * C;",
    ),
    step(
        name="the_last_feature_of_an_odd_number",
        old="const int64_t features = std::min<int64_t>(2, part.stop - f);",
        new="const int64_t features = (part.stop - f) / 2 * 2;",
    ),
    step(
        name="eps_is_added_to_the_deviation",
        old="1 / std::sqrt(squares / double(C) + norm.eps)",
        new="1 / (std::sqrt(squares / double(C)) + norm.eps)",
    ),
    step(
        name="no_mean",
        old="squares += double(x[c] - mean) * (x[c] - mean);",
        new="squares += double(x[c]) * x[c];",
    ),
    step(name="another_gelu", old="0.044715f", new="0.045f"),
    step(name="one_gelu_for_all", old="if (erf) return", new="if (false) return"),
    step(
        name="scores_are_not_scaled",
        old="probs[s] = dot(k + s * D, q, D) * scale;",
        new="probs[s] = dot(k + s * D, q, D);",
    ),
    step(
        name="a_token_does_not_see_itself",
        old="attend(q, k, v, held + t + 1, D,",
        new="attend(q, k, v, held + t, D,",
    ),
    step(
        name="a_token_sees_what_is_proposed_after_it",
        old="attend(q, k, v, held + t + 1, D,",
        new="attend(q, k, v, held + T, D,",
    ),
    step(
        name="keys_at_the_first_tokens_place",
        old="store(q[C + d], k + (held + t) * D + d);",
        new="store(q[C + d], k + held * D + d);",
    ),
    step(
        name="positions_of_the_first_token",
        old="step.lengths[n / T] + n % T",
        new="step.lengths[n / T]",
    ),
    step(
        name="lengths_of_another_row",
        old="step.lengths[n / T] + n % T",
        new="step.lengths[0] + n % T",
    ),
    step(
        name="logits_of_another_token",
        old="x + step.wanted[i] * C",
        new="x + i * C",
    ),
    step(
        name="threads_do_not_wait",
        old="        if (count_ == 1) return;",
        new="        return;",
    ),
]
