"""Wrong edits of the head with the largest of its logits, and of the greedy choice."""

from functools import partial

from tests.kernels.mutants import Mutant

_TESTS = "tests/kernels/test_decode_head.py"
_TOPS = f"{_TESTS}::test_tops_are_the_largest_of_every_eight_rounded_logits"
_NAN = f"{_TESTS}::test_a_logit_that_is_not_a_number_is_the_largest"
_CHOICE = f"{_TESTS}::test_the_largest_logit_is_chosen_and_counted"
_EQUAL = f"{_TESTS}::test_of_equal_logits_the_first_is_taken"
_SEEN = f"{_TESTS}::test_what_is_not_a_number_is_chosen_and_seen"
_LAST = f"{_TESTS}::test_a_step_after_the_last_is_counted_and_not_kept"
_STRIDED = f"{_TESTS}::test_strided_logits_and_small_integers"
_STEP = "tests/generate/test_gpu_step.py"

kernel = partial(Mutant, path="kernels/jit/decode_head.py")
graph = partial(Mutant, path="fastgpt2/generate/graph.py")

MUTANTS = [
    kernel(
        name="tops_of_logits_that_are_not_rounded",
        old="    y = y.to(logits_ptr.dtype.element_ty)\n",
        new="",
        tests=(_TOPS,),
        why="the choice would not find the largest among the logits",
    ),
    kernel(
        name="what_lies_after_the_vocabulary_counts",
        old="tl.where(mask_f[None, :], _or_most(y), LEAST)",
        new="_or_most(y)",
        tests=(_TOPS,),
        why="a product with no weights is zero, which may be more than any logit",
    ),
    kernel(
        name="not_a_number_is_not_seen",
        old="tl.where(x == x, x, MOST)",
        new="tl.where(x == x, x, LEAST)",
        tests=(_NAN, _SEEN),
    ),
    kernel(
        name="tops_of_the_first_program_again_and_again",
        old="tl.program_id(0).to(tl.int64) * BLOCKS",
        new="tl.program_id(0).to(tl.int64) * 0",
        tests=(_TOPS,),
    ),
    kernel(
        name="tops_of_rows_too_close",
        old="offs_b[:, None] * n + offs_n",
        new="offs_b[:, None] * (n - 1) + offs_n",
        tests=(_TOPS,),
    ),
    kernel(name="the_last_of_equals", old="value > top", new="value >= top", tests=(_EQUAL,)),
    kernel(
        name="the_last_lane_of_equals",
        old="token = tl.min(tl.where(top == best, place, n), 0)",
        new="token = tl.max(tl.where(top == best, place, -1), 0)",
        tests=(_EQUAL,),
    ),
    kernel(
        name="the_last_of_equals_in_a_block",
        old="token = tl.min(tl.where(value == best, at, V), 0)",
        new="token = tl.max(tl.where(value == best, at, -1), 0)",
        tests=(_EQUAL,),
    ),
    kernel(
        name="the_first_of_the_block_whatever_it_is",
        old="token * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK)",
        new="token * VOCAB_BLOCK + tl.arange(0, VOCAB_BLOCK) * 0",
        tests=(_CHOICE,),
    ),
    kernel(
        name="rows_that_are_not_in_use_get_a_token",
        old="step >= 0",
        new="step >= -1",
        tests=(_CHOICE,),
    ),
    kernel(
        name="lengths_stay",
        old="length + 1",
        new="length",
        tests=(_CHOICE,),
    ),
    kernel(
        name="steps_stay",
        old="step + 1",
        new="step",
        tests=(_CHOICE,),
    ),
    kernel(
        name="a_step_too_many_is_kept",
        old="step < recent_steps",
        new="step < recent_steps + 1",
        tests=(_LAST,),
    ),
    kernel(
        name="steps_of_a_buffer_of_its_own",
        old="strides[1], best",
        new="recent_steps * strides[2], best",
        tests=(_STRIDED,),
    ),
    kernel(
        name="logits_of_rows_without_a_gap",
        old="logits_ptr += b * strides[0]",
        new="logits_ptr += b * V",
        tests=(_STRIDED,),
    ),
    graph(
        name="rows_advance_while_a_step_is_captured",
        old="        self._steps.fill_(-1)\n",
        new="",
        tests=(f"{_STEP}::test_ids_without_a_text_are_not_chosen",),
    ),
    graph(
        name="an_interrupt_leaves_the_token",
        old="        self._held = 0, []\n",
        new="",
        tests=(f"{_STEP}::test_an_interrupt_between_two_steps_changes_no_text",),
    ),
    graph(
        name="ids_without_a_text_are_chosen",
        old="features_of(self._weights.head, 0, choice.known)",
        new="features_of(self._weights.head, 0, None)",
        tests=(f"{_STEP}::test_ids_without_a_text_are_not_chosen",),
    ),
    graph(
        name="rows_go_on_after_the_host_has_looked",
        old="        self._steps[:] = -1\n",
        new="",
        tests=(f"{_STEP}::test_rows_that_are_not_fed_stay_as_they_are",),
        why="they advance with other rows",
    ),
    graph(
        name="the_choice_of_the_weights_before",
        old="            self._greedy: dict[Greedy, Callable[[], None]] = {}\n",
        new='            self._greedy = getattr(self, "_greedy", {})\n',
        tests=(f"{_STEP}::test_other_weights_are_captured_anew",),
    ),
]
