"""What the state dict of a GPT holds: the true vocabulary, and a tied head once or twice.

In memory the vocabulary may have padded rows; in a state dict it never has, so that files, other
programs and our own models of any padding understand each other.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KEYS = ("transformer.wte.weight", "lm_head.weight")


def head_is_tied(model: Any) -> bool:
    """Whether the head of a GPT is its token embedding: one parameter under two names."""
    embedding = model.transformer.wte._parameters.get("weight")
    return embedding is not None and model.lm_head._parameters.get("weight") is embedding


def register_hooks(model: nn.Module) -> None:
    """Make a GPT's ``state_dict`` and ``load_state_dict`` speak of the true vocabulary."""
    model.register_state_dict_post_hook(_cut_padding)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(_add_padding)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(_tie)  # type: ignore[no-untyped-call]


def _cut_padding(
    model: Any, state_dict: dict[str, Any], prefix: str, _metadata: dict[str, Any]
) -> None:
    """Cut the padded rows off: by a copy, since safetensors refuses a part of a larger storage."""
    V = model.config.vocab_size
    keys = [prefix + key for key in _KEYS if prefix + key in state_dict]
    keys = [key for key in keys if state_dict[key].shape[0] > V]
    if not keys:
        return
    cut = {key: state_dict[key][:V].clone() for key in keys[: 1 if head_is_tied(model) else 2]}
    for key in keys:
        state_dict[key] = cut.get(key, cut[keys[0]])


def _add_padding(
    model: Any,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    *_unused: object,
) -> None:
    """Take the true vocabulary, or one that another program has padded, into the padded rows.

    A file that stores the tied head once serves as well as one that stores it twice. Without
    ``strict``, the name that is not there is reported as missing: safetensors counts on that.
    """
    given = {prefix + key: state_dict.get(prefix + key) for key in _KEYS}
    present = {key: weight for key, weight in given.items() if weight is not None}
    model._tied_before_load = head_is_tied(model)
    if model._tied_before_load and len(present) == 2:
        present = dict.fromkeys(present, _agreed(present, model.lm_head.weight))
    if (
        model._tied_before_load
        and present
        and (model._loads_strictly or metadata.get("assign_to_params_buffers"))
    ):
        present = dict.fromkeys(given, next(iter(present.values())))
    V, rows = model.config.vocab_size, model.config.padded_vocab_size
    padded: dict[int, Tensor] = {}
    for key, weight in present.items():
        if weight.shape[0] == V < rows and id(weight) not in padded:
            padded[id(weight)] = F.pad(weight, (0, 0, 0, rows - V))
        state_dict[key] = padded.get(id(weight), weight)


def _agreed(present: dict[str, Tensor], current: Tensor) -> Tensor:
    """What both names of a tied head stand for."""
    (first, a), (second, b) = present.items()
    if not _same(a, b):
        # some tools complete a file that has one name with the model's own weight under the other
        changed = [x for x in (a, b) if not (x.shape == current.shape and _same(x, current))]
        if len(changed) != 1:
            raise ValueError(f"GPT: {second} differs from {first}, but this model's head is tied")
        return changed[0]
    return a


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or a.is_meta or b.is_meta or a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _tie(model: Any, _incompatible_keys: object) -> None:
    """``assign=True`` makes two parameters of the two names: they become one again."""
    if model._tied_before_load:
        model.tie_weights()
