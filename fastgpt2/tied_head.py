"""State dicts of a model whose head is tied to its embedding: one tensor, without its padding."""

from typing import Any

import torch.nn.functional as F

_TIED_KEYS = ("transformer.wte.weight", "lm_head.weight")


def cut_padding(
    model: Any, state_dict: dict[str, Any], prefix: str, _metadata: dict[str, Any]
) -> None:
    """Saved files hold the true vocabulary."""
    for key in _TIED_KEYS:
        state_dict[prefix + key] = state_dict[prefix + key][: model.config.vocab_size]


def add_padding(model: Any, state_dict: dict[str, Any], prefix: str, *_unused: object) -> None:
    """Take the true vocabulary, or one that another program has padded, into the padded rows.

    A file that stores the tied head once, or twice, serves alike.
    """
    wte_key, head_key = (prefix + key for key in _TIED_KEYS)
    weight, head = state_dict.get(wte_key), state_dict.get(head_key)
    weight, head = (head if weight is None else weight), (weight if head is None else head)
    if weight is None or head is None:
        return
    if head is not weight and head.data_ptr() != weight.data_ptr() and not head.equal(weight):
        raise ValueError(f"GPT: {head_key} differs from {wte_key}, but GPT-2's head is tied to it")
    missing = model.config.padded_vocab_size - weight.shape[0]
    if missing and weight.shape[0] == model.config.vocab_size:
        weight = F.pad(weight, (0, 0, 0, missing))
    state_dict[wte_key] = state_dict[head_key] = weight


def tie(model: Any, _incompatible_keys: object) -> None:
    """``assign=True`` makes two parameters of the two names: they are one again."""
    model.tie_weights()
