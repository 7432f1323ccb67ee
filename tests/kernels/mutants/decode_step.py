"""Faults of the decoding step in C++ that its tests must find."""

from functools import partial

from tests.kernels.mutants import Mutant

TESTS = ("tests/generate/test_compiled.py",)
step = partial(Mutant, path="kernels/cpu/decode_step.cpp", tests=TESTS)
products = partial(Mutant, path="kernels/cpu/products.h", tests=TESTS)
lanes = partial(Mutant, path="kernels/cpu/lanes.h", tests=TESTS)
transposed = partial(Mutant, path="kernels/cpu/transposed.h", tests=TESTS)
tiles = partial(Mutant, path="kernels/cpu/tiles.h", tests=TESTS)
vectors = partial(Mutant, path="kernels/cpu/vectors.h", tests=TESTS)
AHEAD = ("tests/generate/test_compiled_ahead.py",)
choice = partial(Mutant, path="kernels/cpu/choice.h", tests=AHEAD)
ahead = partial(Mutant, path="kernels/cpu/decode_step.cpp", tests=AHEAD)

MUTANTS = [
    vectors(
        name="bf16_is_cut_off",
        old="rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        new="rounded = (bits + 0xffff) >> 16;",
    ),
    vectors(
        name="the_rest_of_a_dot_is_forgotten",
        old="    for (; i < n; i++) out += widen(a[i]) * b[i];\n",
        new="",
    ),
    vectors(
        name="the_rest_of_four_dots_is_forgotten",
        old="out[k] += widen(a[k * n + i]) * b[i];",
        new="out[k] += 0;",
    ),
    vectors(
        name="the_rest_of_a_total_is_forgotten",
        old="even[0] += term(Wide{} + double(x[i]))[0];",
        new="even[0] += 0;",
    ),
    vectors(
        name="a_total_of_every_other_half",
        old="    even += odd;\n",
        new="",
    ),
    products(
        name="the_rest_of_a_product_is_forgotten",
        old="j < ROWS && c < C; j++",
        new="j < ROWS && c < 0; j++",
    ),
    products(
        name="scales_of_the_feature_before",
        old="m.scale ? m.scale[feature] : 1",
        new="m.scale ? m.scale[f] : 1",
    ),
    products(
        name="a_bias_is_left_out",
        old="units * scale + bias;",
        new="units * scale;",
    ),
    products(
        name="the_residual_is_left_out",
        old="(how == ADD ? y : 0)",
        new="0",
    ),
    products(
        name="rows_after_four_are_the_first_again",
        old="x.values + n * C;",
        new="x.values + n % 4 * C;",
    ),
    products(
        name="the_last_feature_of_an_odd_number",
        old="const int64_t features = std::min<int64_t>(FEATURES, part.stop - f);",
        new="const int64_t features = (part.stop - f) / FEATURES * FEATURES;",
    ),
    products(
        name="integers_are_cut_off",
        old="const Vec rounded = entries * inverse + ROUND;",
        new="const Vec rounded = entries * inverse - 0.4999f + ROUND;",
    ),
    products(
        name="a_scale_of_14_bits",
        old="scales[n] = largest / 32639;",
        new="scales[n] = largest / 8191;",
    ),
    products(
        name="the_largest_of_positive_numbers",
        old="Ints(entries) & 0x7fffffff;",
        new="Ints(entries);",
    ),
    products(
        name="nan_is_smaller_than_any",
        old="bits = std::max(bits, sizes[i]);",
        new="if (sizes[i] <= 0x7f7fffff) bits = std::max(bits, sizes[i]);",
    ),
    products(
        name="sums_of_integers_overflow",
        old="SEGMENT = 256 * AT_ONCE;",
        new="SEGMENT = 512 * AT_ONCE;",
    ),
    products(
        name="a_segment_replaces_the_one_before",
        old="totals[i] += K::sum(s[0][0]",
        new="totals[i] = K::sum(s[0][0]",
    ),
    products(
        name="scales_of_the_first_row",
        old="std::memcpy(&units, x.scales + n, ROWS",
        new="std::memcpy(&units, x.scales, ROWS",
    ),
    products(
        name="only_the_first_of_one_rows_sums",
        old="s[j][0] += s[j][k];",
        new="s[j][0] += 0 * s[j][k];",
    ),
    products(
        name="a_step_of_other_columns_for_another_number_of_rows",
        old="STEP = 4 * K::AT_ONCE;",
        new="STEP = SUMS * K::AT_ONCE;",
    ),
    tiles(
        name="features_of_no_whole_tile_are_forgotten",
        old="(part.stop - part.first) % (2 * SIDE);",
        new="0;",
    ),
    tiles(
        name="the_second_piece_of_an_int16_wraps_around",
        old="_mm512_set1_epi16(128)",
        new="_mm512_set1_epi16(0)",
    ),
    tiles(
        name="two_pieces_of_a_number_of_three",
        old="piece = TILES - 1; piece >= 0; piece--) {\n                _tile_loadd",
        new="piece = TILES - 2; piece >= 0; piece--) {\n                _tile_loadd",
    ),
    tiles(
        name="three_products_of_pieces_instead_of_six",
        old="other = TILES - 1 - piece; other",
        new="other = TILES - 2 - piece; other",
    ),
    tiles(
        name="a_bias_for_each_panel",
        old="c ? nullptr : m.bias",
        new="m.bias",
    ),
    tiles(
        name="a_panel_replaces_the_one_before",
        old="c ? ADD : how",
        new="how",
    ),
    tiles(
        name="rows_after_256_are_the_first_again",
        old="lay_out<W>(x.values + first * C,",
        new="lay_out<W>(x.values,",
    ),
    tiles(
        name="scales_of_the_first_rows",
        old="x.scales ? x.scales + n",
        new="x.scales ? x.scales + n % 8",
    ),
    transposed(
        name="a_residual_of_tiles_is_left_out",
        old="if (how == ADD) y += load",
        new="if (false) y += load",
    ),
    transposed(
        name="a_bias_of_tiles_is_left_out",
        old="biases = bias ? load(bias) : Vec{};",
        new="biases = {};",
    ),
    transposed(
        name="a_tile_of_two_quarters_that_are_the_same",
        old="t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);",
        new="t[i + 12] = _mm512_shuffle_i32x4(b, d, 0x88);",
    ),
    transposed(
        name="no_rest_of_a_number",
        old="return _mm512_maskz_sub_ps(finite,",
        new="return _mm512_maskz_sub_ps(0,",
    ),
    lanes(
        name="features_of_no_whole_tile_of_lines_are_forgotten",
        old="(part.stop - part.first) % SIDE;",
        new="0;",
    ),
    lanes(
        name="only_the_first_pieces",
        old="_mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4e));",
        new="sum;",
    ),
    lanes(
        name="the_second_piece_is_cut_off",
        old="__m512i(_mm512_cvtne2ps_pbh(rest(b), rest(a)));",
        new="first_bits(rest(a), rest(b));",
    ),
    lanes(
        name="the_second_group_meets_the_first_ones_lines",
        old="columns[g * count + k][line]",
        new="columns[k][line]",
    ),
    lanes(
        name="rows_after_two_groups_are_the_first_again",
        old="pieces + n / L::ROWS * count;",
        new="pieces;",
    ),
    lanes(
        name="the_second_half_of_the_features_is_the_first_again",
        old="weight + first * C + k",
        new="weight + k",
    ),
    lanes(
        name="rows_of_the_group_before",
        old="const int64_t row = n + g * L::ROWS;",
        new="const int64_t row = n;",
    ),
    vectors(
        name="the_last_numbers_of_a_row_are_forgotten",
        old="    if (i < n) work(i, some(x + i, n - i), n - i);\n",
        new="",
    ),
    vectors(
        name="another_exponential",
        old="1 / 24.0f",
        new="1 / 23.0f",
    ),
    vectors(
        name="exponentials_of_very_small_numbers_wrap_around",
        old="    x = x < low ? low : x;\n",
        new="",
    ),
    step(
        name="values_of_the_key_before",
        old="load(v + s * D + k * LANES) * probs[s]",
        new="load(v + s * D + k * LANES) * probs[s ? s - 1 : 0]",
    ),
    step(
        name="threads_multiply_rows_that_are_not_prepared",
        old="if (!alone && (INT8 || from == rows)) barrier.wait();",
        new="",
    ),
    step(
        name="eps_is_added_to_the_deviation",
        old="1 / std::sqrt(squares / double(C) + norm.eps)",
        new="1 / (std::sqrt(squares / double(C)) + norm.eps)",
    ),
    step(
        name="no_mean",
        old="return (v - mean) * (v - mean);",
        new="return v * v;",
    ),
    step(name="another_gelu", old="0.044715f", new="0.045f"),
    step(name="one_gelu_for_all", old="if (erf) {", new="if (false) {"),
    step(
        name="scores_are_not_scaled",
        old="dot_four(k + first * D, q, D) * scale;",
        new="dot_four(k + first * D, q, D);",
    ),
    step(
        name="scores_of_the_last_keys_are_not_scaled",
        old="= dot(k + first * D, q, D) * scale;",
        new="= dot(k + first * D, q, D);",
    ),
    step(
        name="a_bias_of_layer_norm_is_left_out",
        old="if (norm.bias) y += some",
        new="if (false) y += some",
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
        old="keep(q + C, k + (held + t) * D);",
        new="keep(q + C, k + held * D);",
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
        old="is_last ? step.wanted[k] : k",
        new="k",
    ),
    step(
        name="threads_do_not_wait",
        old="        if (count_ == 1) return;",
        new="        return;",
    ),
    choice(
        name="the_last_of_equal_logits",
        old="if (logits[i] <= *best) continue;",
        new="if (logits[i] < *best) continue;",
    ),
    choice(
        name="a_logit_that_is_nan_is_passed_over",
        old="if (std::isnan(*best)) return found;",
        new="",
    ),
    choice(
        name="one_token_more_than_top_k",
        old="least = order[choice.top_k - 1];",
        new="least = order[choice.top_k];",
    ),
    choice(
        name="equals_of_the_kth_are_dropped",
        old="if (scores[i] < least)",
        new="if (scores[i] <= least)",
    ),
    choice(
        name="a_temperature_that_rounds_to_0",
        old="std::max(choice.temperature, 1e-30)",
        new="choice.temperature",
    ),
    choice(
        name="clocks_run_at_the_inverse_rate",
        old="std::exp(scores[i]) / times[i]",
        new="std::exp(scores[i]) * times[i]",
    ),
    choice(
        name="an_unknown_token_follows",
        old="const int64_t V = choice.known;",
        new="const int64_t V = choice.known + 1;",
    ),
    ahead(
        name="a_choice_sees_fp32",
        old="if (model->cache_kind == 1)\n            each",
        new="if (false)\n            each",
    ),
    ahead(
        name="every_token_at_one_place",
        old="step->lengths[b]++;",
        new="",
    ),
    ahead(
        name="random_numbers_of_the_first_step",
        old="choice->times + at * V",
        new="choice->times + b * V",
    ),
    ahead(
        name="every_step_after_the_same_token",
        old="step->tokens[b] = choice->tokens[at];",
        new="",
    ),
    ahead(
        name="every_row_by_the_first_row_s_logits",
        old="step->logits + b * V;",
        new="step->logits;",
    ),
]
