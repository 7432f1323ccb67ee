"""Which parts of a GPT run on fused kernels and which by their module's own call, and why."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastgpt2.kernels import explain
from fastgpt2.layers import MLP, Block, CausalSelfAttention
from fastgpt2.plain import obstacle


def explain_gpt(model: Any) -> str:
    """One line on the kernels, then one for each module of a GPT that is called.

    A module that is not listed is plain: its weights go to the kernels.
    """
    parts = list(_parts(model.transformer))
    parts.append(("lm_head", model.lm_head, nn.Linear))
    parameter = next(model.parameters())
    lines = [f"kernels: {explain(parameter.device, parameter.dtype, model.config.impl)}"]
    for name, module, kind in parts:
        why = obstacle(module, kind)
        if why is None:
            continue
        effect = ", so the loss is computed from its logits" if name == "lm_head" else ""
        if model.config.fp8 and kind is nn.Linear:
            effect += ", not in FP8"
        lines.append(f"{name} is called{effect}: {why}")
    if len(lines) == 1:
        lines.append("every module is plain: its weights go to the kernels")
    return "\n".join(lines)


def _parts(transformer: Any) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
    """Name, module and plain type of every module that a kernel can replace, in order."""
    yield "transformer.wte", transformer.wte, nn.Embedding
    yield "transformer.wpe", transformer.wpe, nn.Embedding
    kinds: dict[str, type[nn.Module]] = {
        "ln_1": nn.LayerNorm,
        "attn": CausalSelfAttention,
        "ln_2": nn.LayerNorm,
        "mlp": MLP,
    }
    for i, block in enumerate(transformer.h):
        where = f"transformer.h.{i}"
        if not isinstance(block, Block):
            yield where, block, Block
            continue
        for name, kind in kinds.items():
            part = getattr(block, name)
            yield f"{where}.{name}", part, kind
            if isinstance(part, CausalSelfAttention | MLP):
                for layer_name, layer in part.named_children():
                    yield f"{where}.{name}.{layer_name}", layer, nn.Linear
    yield "transformer.ln_f", transformer.ln_f, nn.LayerNorm
