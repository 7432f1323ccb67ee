"""Numbers printed in Raschka, "Build a Large Language Model (From Scratch)", 2024.

Whoever types the book's examples with this package's classes must see the book's numbers: seeds,
order of initialisation and formulas all have to agree.
"""

import torch

# chapter 3: six words as vectors of width 3
JOURNEY = torch.tensor(
    [
        [0.43, 0.15, 0.89],
        [0.55, 0.87, 0.66],
        [0.57, 0.85, 0.64],
        [0.22, 0.58, 0.33],
        [0.77, 0.25, 0.10],
        [0.05, 0.80, 0.55],
    ]
)
SIMPLE_ATTENTION = torch.tensor(
    [
        [0.4421, 0.5931, 0.5790],
        [0.4419, 0.6515, 0.5683],
        [0.4431, 0.6496, 0.5671],
        [0.4304, 0.6298, 0.5510],
        [0.4671, 0.5910, 0.5266],
        [0.4177, 0.6503, 0.5645],
    ]
)
# torch.manual_seed(123), SelfAttention_v1(3, 2)
SELF_ATTENTION_V1 = torch.tensor(
    [
        [0.2996, 0.8053],
        [0.3061, 0.8210],
        [0.3058, 0.8203],
        [0.2948, 0.7939],
        [0.2927, 0.7891],
        [0.2990, 0.8040],
    ]
)
# torch.manual_seed(789), SelfAttention_v2(3, 2)
SELF_ATTENTION_V2 = torch.tensor(
    [
        [-0.0739, 0.0713],
        [-0.0748, 0.0703],
        [-0.0749, 0.0702],
        [-0.0760, 0.0685],
        [-0.0763, 0.0679],
        [-0.0754, 0.0693],
    ]
)
# torch.manual_seed(123), MultiHeadAttentionWrapper(3, 2, 6, 0.0, num_heads=2)
WRAPPER = torch.tensor(
    [
        [-0.4519, 0.2216, 0.4772, 0.1063],
        [-0.5874, 0.0058, 0.5891, 0.3257],
        [-0.6300, -0.0632, 0.6202, 0.3860],
        [-0.5675, -0.0843, 0.5478, 0.3589],
        [-0.5526, -0.0981, 0.5321, 0.3428],
        [-0.5299, -0.1081, 0.5077, 0.3493],
    ]
)
# torch.manual_seed(123), MultiHeadAttention(3, 2, 6, 0.0, num_heads=2)
MULTI_HEAD = torch.tensor(
    [
        [0.3190, 0.4858],
        [0.2943, 0.3897],
        [0.2856, 0.3593],
        [0.2693, 0.3873],
        [0.2639, 0.3928],
        [0.2575, 0.4028],
    ]
)
# chapter 4: torch.manual_seed(123), layers of width [3, 3, 3, 3, 3, 1], input [1, 0, -1]
GRADIENTS_WITHOUT_SHORTCUTS = [
    0.00020173587836325169,
    0.0001201116101583466,
    0.0007152041173171182,
    0.001398873864673078,
    0.005049646366387606,
]
GRADIENTS_WITH_SHORTCUTS = [
    0.22169792652130127,
    0.20694105327129364,
    0.32896995544433594,
    0.2665732502937317,
    1.3258541822433472,
]
# chapter 4: the 124M configuration with a head of its own
PARAMETERS_124M = 163_009_536
# chapter 5: the same with 256 of context, seed 123, on the last tenth of The Verdict
UNTRAINED_LOSS = 10.98110580444336
# chapter 2: The Verdict has 1,130 distinct words and marks, and this quotation from it
VERDICT_WORDS, VERDICT_VOCABULARY = 4690, 1130
QUOTATION = '"It\'s the last he painted, you know," Mrs. Gisburn said with pardonable pride.'
QUOTATION_IDS = [1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38, 851, 1108, 754,
                 793, 7]  # fmt: skip
