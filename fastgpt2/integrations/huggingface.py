"""Hugging Face's GPT-2 on our kernels: a drop-in class, and a switch for models already loaded.

One mechanism serves both. ``accelerate`` exchanges the *class* of the modules that have a kernel
(attention, LayerNorm, the tanh GELU, the language model for its loss). Config, parameters, hooks,
submodules and state dict stay the very same objects: nothing is cached, every change of them counts
at once, and ``restore`` only has to exchange the classes back.
"""

from collections.abc import Iterable
from functools import wraps
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.models.gpt2 import modeling_gpt2
from transformers.utils.generic import can_return_tuple

from fastgpt2.errors import UserError
from fastgpt2.integrations import transformers_attention
from fastgpt2.kernels import cross_entropy, explain, gelu, layer_norm, linear_cross_entropy
from fastgpt2.plain import is_plain

_Model = TypeVar("_Model", bound=nn.Module)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` on our kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), the same dtype."""
        # autocast has rules of its own for what is not fp32, and PyTorch's operator knows them
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float32
        unusual = self.weight is None or len(self.normalized_shape) != 1 or self.eps <= 0
        if autocast or unusual or self.weight.dtype != x.dtype:
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class _GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return gelu(x)


class NewGELU(_GELU, NewGELUActivation):
    """``gelu_new``, which transformers writes out in eight elementwise passes, as one."""


class TanhGELU(_GELU, GELUTanh):
    """``gelu_pytorch_tanh`` on our kernel."""


def _shifted(labels: Tensor, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """Flat targets: each position's is the label of the next."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


def _per_item(
    mean: Tensor, targets: Tensor, ignore_index: int, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """The loss divided as transformers divides it: by the batch's items, else by the kept targets.

    With no target kept at all the latter is 0 / 0, there as here.
    """
    n_kept = (targets != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(mean.device)
    return (
        mean * n_kept.clamp(min=1) / (n_kept if num_items_in_batch is None else num_items_in_batch)
    )


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_unused: Any,
) -> Tensor:
    """Cross-entropy of the next token, by the signature of transformers' loss functions, in fp32.

    Unlike theirs it makes no fp32 copy of half-precision logits on a GPU.
    """
    targets = _shifted(labels, shift_labels, ignore_index).to(logits.device)
    mean = cross_entropy(logits.view(-1, vocab_size), targets, ignore_index=ignore_index)
    return _per_item(mean, targets, ignore_index, num_items_in_batch)


class GPT2LMHeadModel(transformers.GPT2LMHeadModel):  # type: ignore[no-untyped-call]
    """``transformers.GPT2LMHeadModel`` on our kernels: change the import, keep the program.

    Attributes:
        fused_loss: in training, compute the loss without the (B, T, V) logits, which are then
            None in the output; saves their memory. Off unless set, since programs read them.

    >>> model = GPT2LMHeadModel.from_pretrained("gpt2")
    >>> print(model.explain())
    """

    fused_loss: bool = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _exchange(self, _FAST)

    @property
    def loss_function(self) -> Any:
        """What ``forward`` calls on logits and labels; assign another to replace it."""
        if hasattr(self, "_loss_function") or self.loss_type not in (None, "ForCausalLM"):
            return super().loss_function
        return causal_lm_loss

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self._loss_function = value

    @wraps(transformers.GPT2LMHeadModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if self._loss_obstacle() is None and _wants_only_the_loss(args, kwargs):
            return self._fused_forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def _loss_obstacle(self) -> str | None:
        """Why the loss is computed from logits, or None if it is not."""
        if not self.fused_loss:
            return "fused_loss is not set"
        if _bound_elsewhere(self):
            return "its forward has been bound to the instance before"
        if not self.training:
            return "the model is in evaluation mode"
        if self.loss_function is not causal_lm_loss:
            return "loss_function has been replaced"
        head = self.lm_head
        if not is_plain(head, nn.Linear) or head._parameters["bias"] is not None:
            return "lm_head is not a bare nn.Linear without bias and hooks"
        return None

    @can_return_tuple  # type: ignore[untyped-decorator]
    def _fused_forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        outputs = self.transformer(input_ids, return_dict=True, **kwargs)
        hidden = outputs.last_hidden_state
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):
            hidden = hidden.to(torch.get_autocast_dtype(device_type))
        ignore_index = kwargs.get("ignore_index", -100)
        targets = _shifted(labels, kwargs.get("shift_labels"), ignore_index).to(hidden.device)
        with torch.autocast(device_type, enabled=False):
            rows = hidden.reshape(-1, hidden.shape[-1])
            mean = linear_cross_entropy(
                rows, self.lm_head.weight, targets, ignore_index=ignore_index
            )
        loss = _per_item(mean, targets, ignore_index, kwargs.get("num_items_in_batch"))
        # the cache goes by one name up to transformers 5.23 and by another from then on
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithCrossAttentions(loss=loss, **others)

    def explain(self) -> str:
        """What runs on our kernels, what on transformers' code, and why: one line a feature."""
        return explain_model(self)


def _wants_only_the_loss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    whole = isinstance(kwargs.get("logits_to_keep", 0), int) and not kwargs.get("logits_to_keep")
    return len(args) <= 1 and kwargs.get("labels") is not None and whole


def _bound_elsewhere(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not, and does not call, that of its class."""
    own = vars(module)
    if "forward" not in own:
        return False
    inner = own.get("_old_forward", own["forward"])
    return getattr(inner, "__func__", None) is not type(module).forward


def _rebind(module: nn.Module, before: type[nn.Module]) -> None:
    """What accelerate's hooks have bound to the instance follows the class."""
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is before.forward:
            setattr(module, name, MethodType(type(module).forward, module))


# classes that are exchanged and restored; subclasses of other programs are left alone
_FAST: dict[type[nn.Module], type[nn.Module]] = {
    modeling_gpt2.GPT2Attention: transformers_attention.GPT2Attention,
    nn.LayerNorm: LayerNorm,
    NewGELUActivation: NewGELU,
    GELUTanh: TanhGELU,
    transformers.GPT2LMHeadModel: GPT2LMHeadModel,
}
_PLAIN = {fast: plain for plain, fast in _FAST.items()}


def accelerate(model: _Model) -> _Model:
    """Put a GPT-2 of transformers on our kernels, in place, and return it.

    Takes every GPT-2 that ``model`` is or contains, with any head or none. Weights, hooks, state
    dict and config stay as they are: our attention answers where the config names ``sdpa``, the
    default. A ``GPT2LMHeadModel`` becomes ours, ``explain`` and ``fused_loss`` included.

    Raises:
        UserError: ``model`` contains no GPT-2 of transformers.
    """
    for gpt2 in _gpt2s("accelerate", model):
        _exchange(gpt2, _FAST)
    return model


def restore(model: _Model) -> _Model:
    """Undo ``accelerate`` exactly, in place, and return the model; ours becomes transformers'.

    Raises:
        UserError: ``model`` contains no GPT-2 of transformers.
    """
    for gpt2 in _gpt2s("restore", model):
        _exchange(gpt2, _PLAIN)
        vars(gpt2).pop("fused_loss", None)
        if gpt2.config._attn_implementation == transformers_attention.NAME:
            gpt2.set_attn_implementation("sdpa")
    return model


def explain_model(model: nn.Module) -> str:
    """What of ``model`` runs on our kernels, what on transformers' code, and why.

    Raises:
        UserError: ``model`` contains no GPT-2 of transformers.
    """
    gpt2 = _gpt2s("explain", model)[0]
    parameter = next(gpt2.parameters())
    norms = [m for m in gpt2.modules() if isinstance(m, nn.LayerNorm)]
    activations = [m.act for m in gpt2.modules() if isinstance(m, modeling_gpt2.GPT2MLP)]
    features = {
        "kernels": explain(parameter.device, parameter.dtype),
        "attention": _explain_attention(gpt2),
        "LayerNorm": _explain_modules(norms),
        "activation": _explain_modules(activations),
        "loss": _explain_loss(gpt2),
    }
    return "\n".join(f"{feature:<11}{line}" for feature, line in features.items())


def _gpt2s(caller: str, model: nn.Module) -> list[Any]:
    """The GPT-2s in ``model``, outermost first."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [m for m in modules if isinstance(m, transformers.GPT2PreTrainedModel)]
    if not found:
        raise UserError(f"{caller}: no GPT-2 of transformers in this {type(model).__name__}")
    return found


def _exchange(model: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        before = type(module)
        if before in table:
            module.__class__ = table[before]
            _rebind(module, before)


def _is_ours(module: nn.Module) -> bool:
    return type(module) in _PLAIN and not _bound_elsewhere(module)


def _explain_attention(model: Any) -> str:
    name = model.config._attn_implementation
    modules = [m for m in model.modules() if isinstance(m, modeling_gpt2.GPT2Attention)]
    n_ours = sum(_is_ours(m) for m in modules)
    if name == "sdpa" and n_ours:
        name = transformers_attention.NAME
        asked = f"ours in place of sdpa, in {n_ours} of {len(modules)} modules, "
    else:
        asked = "ours "
    if name != transformers_attention.NAME:
        return f"transformers' {name}, which the config names"
    return (
        f"{asked}for causal sequences, whole or padded at their ends; transformers' sdpa, which "
        "takes any mask, for tokens after a cache, other masks, masks traced by torch.compile, "
        "packed positions and cross-attention; neither forms the probabilities: output_attentions "
        "and reorder_and_upcast_attn want set_attn_implementation('eager')"
    )


def _explain_modules(modules: Iterable[nn.Module]) -> str:
    names = [type(m).__name__ for m in modules if not _is_ours(m)]
    n_ours = sum(_is_ours(m) for m in modules)
    if not names:
        return f"ours, {n_ours} of {n_ours}"
    others = ", ".join(sorted(set(names)))
    return (
        f"ours, {n_ours} of {n_ours + len(names)}; not exchanged, since no kernel of ours: {others}"
    )


def _explain_loss(model: nn.Module) -> str:
    if not isinstance(model, GPT2LMHeadModel):
        return f"transformers' own: {type(model).__name__} computes it in its forward"
    obstacle = model._loss_obstacle()
    if obstacle is None:
        return "ours, fused with lm_head where labels are given by name; logits are then None"
    if model.loss_function is not causal_lm_loss:
        return f"{getattr(model.loss_function, '__name__', model.loss_function)}, as it was set"
    return f"ours, from the logits ({obstacle})"
