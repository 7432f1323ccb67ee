"""``--freeze``: parameters that keep the values they begin with."""

from fnmatch import fnmatchcase

from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.state_dict import head_is_tied

# the second name of the token embedding where the head is tied
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"


def freeze(model: GPT, patterns: tuple[str, ...]) -> list[str]:
    """Stop training the parameters that a pattern names: no gradient, no moments, no decay.

    A pattern is one of the shell's (``*``, ``?``, ``[0-3]``, case-sensitive) for the whole name of
    a parameter or of a module that holds it: ``transformer.h.0``, ``*.ln_?.*``.

    Args:
        model: the whole model; a tied head is frozen with the token embedding, by either name.
        patterns: the patterns of ``--freeze``; without any, nothing is frozen.

    Returns:
        Lines that say what was frozen and what is left; none without patterns.

    Raises:
        UserError: a pattern matches no parameter, or nothing is left to train.
    """
    if not patterns:
        return []
    parameters = dict(model.named_parameters())
    tied = head_is_tied(model)
    names = {name: name for name in parameters} | ({_HEAD: _EMBEDDING} if tied else {})
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {stored for name, stored in names.items() if _matches(name, pattern)}
        if not matched:
            raise UserError(
                f"--freeze {pattern!r}: no parameter has such a name; names are like {_EMBEDDING}, "
                "transformer.h.0.attn.c_attn.weight"
            )
        frozen |= matched
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"--freeze {' '.join(patterns)}: nothing is left to train")
    lines = [f"frozen: {len(frozen)} of {len(parameters)} tensors, by {' '.join(patterns)}"]
    if tied and _EMBEDDING in frozen:
        lines.append(f"frozen: {_HEAD} is {_EMBEDDING}, so the head is frozen with the embedding")
    return lines


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern names the parameter, or a module that contains it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
