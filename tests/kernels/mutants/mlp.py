"""Wrong edits of the MLP as one op."""

from tests.kernels.mutants import Mutant

_KERNEL = "kernels/jit/gelu.py"
_CONTRACT = "kernels/mlp.py"
_ERF = "tests/kernels/test_gelu_erf.py::test_triton_within_budget"
_TESTS = "tests/kernels/test_mlp.py"
_BUDGET = f"{_TESTS}::test_within_budget[(37, 48, 80)-torch.float32]"
_SAVED = f"{_TESTS}::test_saves_the_pre_activation_and_no_gelu"
_SAME = f"{_TESTS}::test_backward_makes_the_very_gelu_of_forward"

MUTANTS = [
    Mutant(
        "pre_activation_for_its_gelu",
        _CONTRACT,
        "dproj = dy.t() @ hidden",
        "dproj = dy.t() @ z",
        (_BUDGET,),
        "the second weight's gradient from the wrong operand",
    ),
    Mutant(
        "slope_of_gelu_forgotten",
        _CONTRACT,
        "dz.t() @ x if",
        "(dy @ proj_weight).t() @ x if",
        (_BUDGET,),
    ),
    Mutant(
        "slope_of_gelu_forgotten_in_dx",
        _CONTRACT,
        "dz @ fc_weight if",
        "(dy @ proj_weight) @ fc_weight if",
        (_BUDGET,),
    ),
    Mutant(
        "bias_left_out_of_backward",
        _CONTRACT,
        "proj_weight, z, fc_bias, ctx.form)",
        "proj_weight, z, None if fc_bias is None else fc_bias * 0, ctx.form)",
        (_BUDGET,),
        "z is without the bias",
    ),
    Mutant(
        "made_again_without_the_nonlinearity",
        _KERNEL,
        "tl.store(y_ptr + out_offs, gelu_tile(z, ERF), mask=mask)",
        "tl.store(y_ptr + out_offs, z, mask=mask)",
        (_SAME,),
    ),
    Mutant(
        "made_again_from_the_gradient",
        _KERNEL,
        "tl.store(y_ptr + out_offs, gelu_tile(z, ERF), mask=mask)",
        "tl.store(y_ptr + out_offs, gelu_tile(dz, ERF), mask=mask)",
        (_SAME,),
    ),
    Mutant(
        "made_again_in_the_other_form",
        _CONTRACT,
        "proj_weight, z, fc_bias, ctx.form)",
        'proj_weight, z, fc_bias, "tanh")',
        (f"{_ERF}[mlp-torch.float32]",),
    ),
    Mutant(
        "parts_for_the_op",
        _CONTRACT,
        "if choice is Impl.TORCH or not wants_gradient(x, fc_weight, fc_bias, proj_weight):",
        "if True:",
        (_SAVED,),
        "the GELU is saved after all",
    ),
    Mutant(
        "input_of_a_frozen_layer_kept",
        _CONTRACT,
        "kept = x if dfc_wanted else None,",
        "kept = x,",
        (
            "tests/kernels/test_saved_memory.py::test_frozen_layers_keep_nothing_of_their_input[share1]",
        ),
        "adapters take as much memory as training all",
    ),
]
