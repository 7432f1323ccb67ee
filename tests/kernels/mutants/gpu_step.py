"""Wrong edits of a decoding step on a GPU."""

from functools import partial

from tests.kernels.mutants import Mutant

_TESTS = "tests/generate/test_gpu_step.py"
_FULL = f"{_TESTS}::test_an_interpreted_step_is_the_full_pass"

step = partial(Mutant, path="fastgpt2/generate/gpu_step.py", tests=(_FULL,))

MUTANTS = [
    step(
        name="the_next_blocks_norm_is_this_blocks",
        old="for layer in weights.layers[1:])",
        new="for layer in weights.layers[:-1])",
    ),
    step(
        name="the_stream_before_attention_again",
        old="x, normed = add(x, product(layer.proj",
        new="_, normed = add(x, product(layer.proj",
    ),
    step(
        name="no_gelu_of_many_rows",
        old="product(layer.fc, normed, form)",
        new="product(layer.fc, normed)",
    ),
    step(
        name="the_branch_without_the_stream",
        old="scales=scales, residual=x, impl=impl",
        new="scales=scales, residual=x * 0, impl=impl",
    ),
    step(
        name="the_mlp_is_normalised_as_attention_is",
        old="impl, dtype, layer.norm_2, form=form",
        new="impl, dtype, layer.norm_1, form=form",
    ),
    step(
        name="lengths_one_too_few_for_attention",
        old="out = decode_attention(q[:, None], cache[0], cache[1], lengths, impl=impl)",
        new="out = decode_attention(q[:, None], cache[0], cache[1], lengths - 1, impl=impl)",
    ),
]
