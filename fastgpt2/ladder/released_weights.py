"""Rung 13: OpenAI's weights in the ladder's model, and the way to ``fastgpt2.GPT`` and back.

OpenAI's parameters come as nested dictionaries: ``wte``, ``wpe``, ``g``, ``b`` (the final norm) and
``blocks``, a list with ``attn``, ``mlp``, ``ln_1``, ``ln_2``. Matrices are stored (in, out), the
transpose of PyTorch's linear layers, and q, k and v lie side by side in ``c_attn``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.ladder.gpt import GPTModel
from fastgpt2.model import GPT

# path in a block of OpenAI's parameters -> name in a TransformerBlock; c_attn apart: it is three
_BLOCK = {
    "ln_1/g": "norm1.scale",
    "ln_1/b": "norm1.shift",
    "attn/c_proj/w": "att.out_proj.weight",
    "attn/c_proj/b": "att.out_proj.bias",
    "ln_2/g": "norm2.scale",
    "ln_2/b": "norm2.shift",
    "mlp/c_fc/w": "ff.layers.0.weight",
    "mlp/c_fc/b": "ff.layers.0.bias",
    "mlp/c_proj/w": "ff.layers.2.weight",
    "mlp/c_proj/b": "ff.layers.2.bias",
}
_TOP = {
    "wte": "tok_emb.weight",
    "wpe": "pos_emb.weight",
    "g": "final_norm.scale",
    "b": "final_norm.shift",
}
_QKV = ("att.W_query", "att.W_key", "att.W_value")


def _at(tree: Mapping[str, Any], path: str, where: str = "") -> Tensor:
    for key in path.split("/"):
        if key not in tree:
            raise UserError(f"load_weights_into_gpt: the parameters lack {where}{path}")
        tree = tree[key]
    tensor = torch.as_tensor(tree)
    return tensor.T if path.endswith("/w") else tensor


def load_weights_into_gpt(gpt: GPTModel, params: Mapping[str, Any]) -> None:
    """Copy OpenAI's parameters into ``gpt``; the head becomes a copy of the token embedding.

    Args:
        gpt: a model of the same shape, with ``qkv_bias=True``; the book's own class will do.
        params: nested dictionaries of numpy arrays or tensors, as ``openai_params`` makes them.

    Raises:
        UserError: a parameter is missing, or its shape is not the model's; ``gpt`` is unchanged.
    """
    blocks = params.get("blocks", [])
    own = gpt.state_dict()
    n_layers = len(gpt.trf_blocks)
    if len(blocks) != n_layers:
        raise UserError(
            f"load_weights_into_gpt: the parameters have {len(blocks)} blocks, "
            f"the model has {n_layers}"
        )
    if any(f"trf_blocks.{i}.att.W_query.bias" not in own for i in range(n_layers)):
        raise UserError("load_weights_into_gpt: the parameters have biases, use qkv_bias=True")
    state = {ours: _at(params, path) for path, ours in _TOP.items()}
    state["out_head.weight"] = state["tok_emb.weight"]
    for i, block in enumerate(blocks):
        where = f"blocks[{i}]/"
        for path, ours in _BLOCK.items():
            state[f"trf_blocks.{i}.{ours}"] = _at(block, path, where)
        for kind, path in (("weight", "attn/c_attn/w"), ("bias", "attn/c_attn/b")):
            for ours, part in zip(_QKV, _at(block, path, where).chunk(3), strict=True):
                state[f"trf_blocks.{i}.{ours}.{kind}"] = part
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"load_weights_into_gpt: {name} must have shape {tuple(own[name].shape)}, "
                f"the parameters have {tuple(tensor.shape)}"
            )
    # strict=False only for the masks, which are not weights
    gpt.load_state_dict(state, strict=False)


def openai_params(gpt: GPT) -> dict[str, Any]:
    """The parameters of a ``fastgpt2.GPT`` as OpenAI's nested dictionaries; biases it lacks are 0.

    ``openai_params(GPT.from_pretrained("gpt2"))`` is what the ladder's model needs of GPT-2.

    Raises:
        UserError: the model has the erf GELU, where these parameters mean the tanh form.
    """
    if gpt.config.gelu != "tanh":
        raise UserError(
            f"openai_params: the ladder has the tanh GELU, the model has the {gpt.config.gelu} GELU"
        )
    tensors = gpt.state_dict()

    def layer(name: str, weight: str = "w") -> dict[str, Tensor]:
        w = tensors[f"transformer.{name}.weight"]
        bias = tensors.get(f"transformer.{name}.bias")
        return {
            weight: w.T if w.dim() == 2 else w,
            "b": w.new_zeros(len(w)) if bias is None else bias,
        }

    return {
        "wte": tensors["transformer.wte.weight"],
        "wpe": tensors["transformer.wpe.weight"],
        "blocks": [
            {
                "ln_1": layer(f"h.{i}.ln_1", "g"),
                "attn": {part: layer(f"h.{i}.attn.{part}") for part in ("c_attn", "c_proj")},
                "ln_2": layer(f"h.{i}.ln_2", "g"),
                "mlp": {part: layer(f"h.{i}.mlp.{part}") for part in ("c_fc", "c_proj")},
            }
            for i in range(gpt.config.n_layer)
        ],
        **layer("ln_f", "g"),
    }


def from_fastgpt2(gpt: GPT) -> GPTModel:
    """A ladder model with the weights of ``gpt``, in its dtype, on its device: the same logits.

    Raises:
        UserError: ``gpt`` has three different dropout rates, where the ladder knows one; or the
            erf GELU.
    """
    config = gpt.config
    rates = {config.attn_p, config.embd_p, config.resid_p}
    if len(rates) > 1:
        raise UserError(f"from_fastgpt2: GPTModel has one drop_rate, the model has {sorted(rates)}")
    weight = gpt.lm_head.weight
    model = GPTModel(
        {
            "vocab_size": config.vocab_size,
            "context_length": config.block_size,
            "emb_dim": config.n_embd,
            "n_heads": config.n_head,
            "n_layers": config.n_layer,
            "drop_rate": rates.pop(),
            "qkv_bias": True,
        }
    ).to(weight.device, weight.dtype)
    load_weights_into_gpt(model, openai_params(gpt))
    return model.train(gpt.training)


def to_fastgpt2(model: GPTModel) -> GPT:
    """A ``fastgpt2.GPT`` with the weights of ``model``, in its dtype, on its device.

    Raises:
        UserError: ``out_head`` is not the token embedding: GPT-2's head is tied to it, and one of
            the two would be lost.
    """
    state = model.state_dict()
    blocks: list[Any] = list(model.trf_blocks)
    wte = state["tok_emb.weight"]
    if not torch.equal(state["out_head.weight"], wte):
        raise UserError(
            "to_fastgpt2: out_head differs from tok_emb, but GPT-2's head is tied to it; "
            "tie them before training: model.out_head.weight = model.tok_emb.weight"
        )
    names = {
        "transformer.wte.weight": wte,
        "transformer.wpe.weight": state["pos_emb.weight"],
        "transformer.ln_f.weight": state["final_norm.scale"],
        "transformer.ln_f.bias": state["final_norm.shift"],
        "lm_head.weight": wte,
    }
    for i in range(len(blocks)):
        theirs, ours = f"trf_blocks.{i}.", f"transformer.h.{i}."
        for path, name in _BLOCK.items():
            *layer, kind = path.split("/")
            kind = "bias" if kind == "b" else "weight"
            names[f"{ours}{'.'.join(layer)}.{kind}"] = state[theirs + name]
        weights = [state[f"{theirs}{name}.weight"] for name in _QKV]
        names[f"{ours}attn.c_attn.weight"] = torch.cat(weights)
        biases = [state.get(f"{theirs}{name}.bias", wte.new_zeros(wte.shape[1])) for name in _QKV]
        names[f"{ours}attn.c_attn.bias"] = torch.cat(biases)
    config = GPTConfig(
        block_size=len(state["pos_emb.weight"]),
        vocab_size=len(wte),
        n_layer=len(blocks),
        n_head=blocks[0].att.num_heads,
        n_embd=wte.shape[1],
        dropout=model.drop_emb.p,
    )
    gpt = GPT(config).to(wte.device, wte.dtype)
    gpt.load_state_dict(names)
    return gpt.train(model.training)
