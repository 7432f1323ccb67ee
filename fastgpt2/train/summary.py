"""What a person reads before and after training."""

import torch

from fastgpt2.devices import device_name
from fastgpt2.lora import adapters
from fastgpt2.model import GPT
from fastgpt2.train.memory import Memory
from fastgpt2.train.optimizers import moment_bytes

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16."""
    return _DTYPE_NAMES[dtype]


def trained_parameters(model: GPT) -> int:
    """Number of parameters that are trained, without the padding of the vocabulary."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wte, config = model.transformer.wte.weight, model.config
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd
    return count - padding * wte.requires_grad


def human(count: float, unit: str = "") -> str:
    """1234567 -> 1.23M; for bytes, decimal units too."""
    for suffix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {suffix}{unit}" if unit else f"{count / size:.3g}{suffix}"
    return f"{count:.3g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def memory_line(memory: Memory) -> str:
    """What a process needs, in total and in parts; the parts do not all exist at one time."""
    names = ("weights", "gradients", "moments", "activations", "loss")
    parts = ", ".join(f"{name} {human(getattr(memory, name), 'B')}" for name in names)
    return (
        f"memory: about {human(memory.peak, 'B')} for training, at its peak ({parts}); "
        f"{human(memory.copy, 'B')} more of the host's while a checkpoint is written"
    )


def optimizer_line(optimizer: torch.optim.Optimizer) -> str:
    """The groups of parameters, each with its optimizer, peak learning rate and weight decay.

    Args:
        optimizer: before its first step.
    """
    groups = (
        f"{'muon' if 'momentum' in group else 'adamw'} on {human(count)} parameters, lr "
        f"{group['lr']:g}, weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
        if (count := sum(p.numel() for p in group["params"]))
    )
    return f"optimizer: {'; '.join(groups)}"


def model_lines(
    model: GPT, optimizer: torch.optim.Optimizer, memory: Memory, dtype: torch.dtype
) -> list[str]:
    """The model, its trained part, its memory and where it runs, one line each."""
    config = model.config
    parameters = model.get_num_params(non_embedding=False)
    # a checkpoint holds only the adapters, and names the weights that they belong to
    layers = adapters(model).values()
    stored = sum(x.lora_A.numel() + x.lora_B.numel() for x in layers) or parameters
    trained, moments = trained_parameters(model), moment_bytes(optimizer)
    device = model.lm_head.weight.device
    share = "all" if trained == parameters else f"{trained / parameters:.3g} of all"
    lines = [
        f"model: {human(parameters)} parameters ({config.n_layer} layers, {config.n_head} heads, "
        f"width {config.n_embd}, context {config.block_size}, vocabulary {config.vocab_size})",
        f"trained: {human(trained)} parameters ({share}); optimizer "
        f"{human(moments, 'B')}, a checkpoint {human(4 * stored + moments, 'B')}",
        optimizer_line(optimizer),
        memory_line(memory),
        f"device: {device_name(device)}, {dtype_name(dtype)}, "
        f"{torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}",
    ]
    if model.lora is not None:
        lora = model.lora
        lines.append(
            f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}; a "
            f"checkpoint holds the adapters, the weights stay in {lora.base}"
        )
    return lines
