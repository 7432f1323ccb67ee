"""Loops, branches inside them and units, in machine code written by hand."""

from fastgpt2.kernels.machine_code import count_loops, unit_of

STRAIGHT = """
        /*0000*/                   LDG.E R0, [R2] ;
        /*0010*/                   FADD R0, R0, 1 ;
        /*0020*/                   EXIT ;
.L_x_0:
        /*0030*/                   BRA `(.L_x_0);
"""
# a loop of 7 of which a branch skips 2, and a second one of 3
LOOPS = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E R0, [R2] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FSEL R0, R0, R1, P1 ;
        /*0040*/                   ISETP.GE.AND P1, PT, R0, R1, PT ;
.L_x_2:
        /*0050*/                   MUFU.EX2 R0, R0 ;
        /*0060*/                   IADD3 R4, R4, 1, RZ ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   STG.E [R2], R0 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/               @P3 BRA `(.L_x_3) ;
        /*00b0*/                   EXIT ;
"""
# the inner loop counts; code moved past the end belongs to the loop that it returns to
NESTED = """
.L_x_1:
        /*0000*/                   IADD3 R4, R4, 1, RZ ;
.L_x_2:
        /*0010*/                   FADD R0, R0, 1 ;
        /*0020*/               @P1 BRA `(.L_x_4) ;
.L_x_3:
        /*0030*/               @P2 BRA `(.L_x_2) ;
        /*0040*/               @P3 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_4:
        /*0060*/                   FMUL R0, R0, R0 ;
        /*0070*/                   BRA `(.L_x_3) ;
"""


def test_without_a_loop_the_whole_program_counts() -> None:
    (count,) = count_loops(STRAIGHT)
    # the trap after the end is never reached
    assert count.instructions == 3 and count.skipped == 0
    assert dict(count.units) == {"memory": 1, "fp32": 1, "control": 1}


def test_each_loop_and_what_a_branch_skips() -> None:
    first, second = count_loops(LOOPS)
    assert (first.instructions, first.skipped) == (7, 2)
    assert first.units["mufu"] == first.units["memory"] == first.units["fp32"] == 1
    assert (second.instructions, second.skipped) == (3, 0)
    assert second.units["barrier"] == 1


def test_only_the_innermost_loop_counts() -> None:
    (count,) = count_loops(NESTED)
    assert (count.instructions, count.skipped) == (5, 2)


def test_units() -> None:
    units = {
        "HGMMA.64x64x16.F32.BF16": "tensor",
        "FFMA": "fp32",
        "MUFU.RSQ": "mufu",
        "LDGSTS.E.BYPASS.128": "memory",
        "IMAD.WIDE": "integer",
        "SHFL.BFLY": "integer",
        "WARPGROUP.DEPBAR.LE": "barrier",
        "BRA": "control",
    }
    assert {opcode: unit_of(opcode) for opcode in units} == units
