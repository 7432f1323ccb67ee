"""``python -m fastgpt2.train``: train a GPT-2 on text, into a run folder."""

import argparse
import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastgpt2 import distributed, runs
from fastgpt2.cli import Parser, file_name, quoted
from fastgpt2.cli import run as run_command
from fastgpt2.devices import device_kind, resolve_device, resolve_dtype
from fastgpt2.errors import UserError
from fastgpt2.peers import Watch, failing_together, recall, remember
from fastgpt2.streams import silent
from fastgpt2.text.mixture import absolute_item, item_paths
from fastgpt2.text.utf8 import is_utf8
from fastgpt2.train import summary
from fastgpt2.train.allocator import keep_freed_memory
from fastgpt2.train.claim import check_outside, check_shared, claimed, empty, is_empty, new_folder
from fastgpt2.train.config import TrainConfig, field_types, merge_layers
from fastgpt2.train.config_file import named_configs, read_config
from fastgpt2.train.guard import KeptStep
from fastgpt2.train.interrupt import nothing_to_save
from fastgpt2.train.origin import noted_source
from fastgpt2.train.outcome import Outcome
from fastgpt2.train.trainer import Trainer

# groups of flags in the help text: the first field of each group
_GROUPS = {
    "data": "data",
    "model": "model",
    "batch_size": "training",
    "dtype": "machine",
    "log_every": "what is shown and saved",
}
_METAVARS: dict[type, str] = {int: "N", float: "X", str: "TEXT", tuple: "WHAT"}
_OWN_METAVARS = {
    "text_column": "NAME",
    "vocab_dir": "DIR",
    "device": "NAME",
    "freeze": "PATTERN",
    "lora_target": "NAME",
    "log": "NAME",
    "profile": "STEPS",
}


def _number_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


_OWN_TYPES: dict[str, Any] = {
    "batch_size": _number_or_auto,
    **dict.fromkeys(("data", "vocab_dir", "init_from"), file_name),
}

# fixed for a whole run: they decide what its weights and its data stream mean
_FIXED = (
    "tokenizer",
    "vocab_size",
    "val_fraction",
    "stride",
    "pack",
    "model",
    "block_size",
    "n_layer",
    "n_head",
    "n_embd",
    "bias",
    "optimizer",
    "init_from",
    "freeze",
    "lora_rank",
    "lora_alpha",
    "lora_target",
    "lora_dropout",
    "seed",
)
# with --init-from, these come from the weights unless the command line gives them
_OF_THE_WEIGHTS = ("tokenizer", "model", "block_size", "n_layer", "n_head", "n_embd", "bias")
# fields that a run records itself
_NOTED = ("init_sha256", "ranks", "auto_batch_size")


@dataclass(frozen=True)
class Plan:
    """What a command line means: the run, its folder, and what happens to the folder's content."""

    config: TrainConfig
    folder: Path
    named: str | None
    made: tuple[Path, ...]
    resume: bool
    overwrite: bool


def build_parser() -> argparse.ArgumentParser:
    """One flag for each field of ``TrainConfig``, and a few for the run folder."""
    parser = Parser(
        prog="fastgpt2 train",
        usage="%(prog)s [--config NAME|FILE] [--out DIR] [--resume | --overwrite] [flags]",
        description="Train a GPT-2. Without arguments: GPT-2 124M on a GPU, a small model on a "
        "CPU, on Python's own help texts. Flags override the configuration; defaults are in "
        "brackets.",
        argument_default=argparse.SUPPRESS,
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--config",
        metavar="NAME|FILE",
        type=file_name,
        help=f"{', '.join(named_configs())}, or a TOML file [cuda where there is a GPU, else cpu]",
    )
    run.add_argument(
        "--out", metavar="DIR", type=file_name, help="run folder [a new one under runs/]"
    )
    run.add_argument("--resume", action="store_true", help="continue the run in --out")
    run.add_argument("--overwrite", action="store_true", help="first delete everything in --out")
    run.add_argument(
        "--replay",
        metavar="FILE",
        type=file_name,
        help="repeat a saved step whose loss was not finite; --device, --dtype and --impl apply",
    )
    types = field_types()
    group = run
    for name, item in TrainConfig.__dataclass_fields__.items():
        if name in _NOTED:
            continue
        if name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[name])
        plain, _ = types[name]
        extra: dict[str, Any] = {"dest": name, "help": _help(item.metadata["help"], item.default)}
        if plain is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"] = _OWN_TYPES.get(name, str if plain is tuple else plain)
            extra["choices"] = item.metadata["choices"]
            metavar = _OWN_METAVARS.get(name, _METAVARS[plain])
            extra["metavar"] = None if extra["choices"] else metavar
        if plain is tuple:
            # a repeated flag adds more values
            extra |= {"nargs": "+", "action": "extend"}
        group.add_argument("--" + name.replace("_", "-"), **extra)
    return parser


def _help(text: str, default: Any) -> str:
    if default is None or default == ():
        return text.replace("%", "%%")
    if isinstance(default, bool):
        default = "yes" if default else "no"
    elif isinstance(default, tuple):
        default = " ".join(default)
    elif default == "\n":
        default = "a line break"
    return f"{text} [{default}]".replace("%", "%%")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code. Only the first of several processes prints."""
    with silent(distributed.launched_rank() > 0):
        arguments = vars(build_parser().parse_args(argv))
    return run_command("train", lambda: _train(arguments), steady=True)


def _train(arguments: dict[str, Any]) -> int:
    if "replay" in arguments:
        return _replay(**arguments)
    name = distributed.local_device(str(arguments.get("device", "auto")))
    kind = (
        "cuda"
        if name == "auto" and device_kind(resolve_device("auto")).cuda
        else name.partition(":")[0]
    )
    speaks = distributed.launched_rank() == 0
    with (
        nothing_to_save(),
        silent(not speaks, errors=False),
        distributed.process_group(kind),
        failing_together() as watch,
        ExitStack() as stack,
    ):
        plan = distributed.on_rank_0(lambda: _plan(dict(arguments)))
        distributed.on_rank_0(lambda: _claim(stack, plan))
        check_shared(plan.folder)
        return _train_in(plan, watch)


def _replay(
    replay: str, device: str = "auto", dtype: str = "auto", impl: str = "auto", **others: Any
) -> int:
    if others:
        raise UserError(f"--replay: does not take --{next(iter(others)).replace('_', '-')}")
    place = resolve_device(device)
    bad = KeptStep.load(Path(replay), impl=impl)
    bad.model.to(place).train()
    found = bad.first_bad(resolve_dtype(dtype, place))
    if found is not None:
        raise UserError(f"step {bad.step}: not finite first: {found}")
    print(f"step {bad.step}: everything is finite")
    return 0


def _plan(arguments: dict[str, Any]) -> Plan:
    begun = recall("run")
    if begun is not None:
        # torchrun has restarted this job: continue the run that it began
        if runs.saved_steps(Path(begun)):
            arguments = {"out": begun, "resume": True}
        else:
            arguments |= {"out": begun, "overwrite": True, "resume": False}
    name, out = arguments.pop("config", None), arguments.pop("out", None)
    resume, overwrite = arguments.pop("resume", False), arguments.pop("overwrite", False)
    arguments |= {name: tuple(x) for name, x in arguments.items() if isinstance(x, list)}
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if resume and (out is None or name is not None):
        raise UserError("--resume continues the run given by --out, with its own configuration")
    if out is None:
        base = _base(name, arguments)
        config = _configuration(base, arguments, resume=False)
        made = new_folder(Path(name or "default").stem)
        folder = made[0]
    else:
        folder, made = Path(out), ()
        if not is_utf8(out):
            raise UserError(f"--out {out}: must be UTF-8 text for the library safetensors")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {out}: is a file")
        base = _resumed(folder, arguments) if resume else _base(name, arguments)
        config = _configuration(base, arguments, resume=resume)
    return Plan(config, folder, name, made=made, resume=resume, overwrite=overwrite)


def _claim(stack: ExitStack, plan: Plan) -> None:
    """Keep the run folder until ``stack`` ends."""
    stack.enter_context(claimed(plan.folder, made=plan.made))
    if not plan.made and not plan.resume:
        _check_unused(plan.folder, plan.overwrite)
    if plan.overwrite:
        _check_keeps_sources(plan.folder, plan.config, plan.named)


def _train_in(plan: Plan, watch: Watch) -> int:
    print(f"run: {plan.folder}")
    print("".join(f"  {line}\n" for line in plan.config.to_toml().splitlines()), end="")
    trainer = Trainer(plan.config, plan.folder, resume=plan.resume)
    if device_kind(trainer.device).host:
        keep_freed_memory()
    if plan.overwrite:
        # delete the old run only now, after everything has been checked
        distributed.on_rank_0(lambda: empty(plan.folder))
    distributed.on_rank_0(lambda: remember("run", str(plan.folder.absolute())))
    # not earlier: a large text takes long to become tokens
    watch.timeout = plan.config.timeout
    outcome = trainer.run()
    _report(outcome, plan.folder, plan.config.sample_prompt)
    return outcome.exit_code


def _base(name: str | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The configuration of that name, or the machine's default one."""
    if name is not None:
        return read_config(name)
    base = read_config("cuda" if device_kind(resolve_device("auto")).cuda else "cpu")
    if arguments.get("init_from") is not None:
        # Muon at the rates of a run from scratch would undo the weights
        base.pop("optimizer", None)
    return base


def _for_the_weights(base: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The configuration without a shape that belongs to other weights than those of --init-from.

    Raises:
        UserError: a preset is given together with weights.
    """
    source = base.get("init_from")
    if arguments.get("init_from", source) is None:
        return base
    # a run that began with weights has noted their shape, and their sha256, in its configuration
    asked = source is not None and "init_sha256" not in base
    if "model" in arguments or (asked and "model" in base):
        raise UserError("--model and --init-from exclude each other: the weights fix the shape")
    if asked or arguments.get("init_from", source) == source:
        return base
    # the shape of a run from scratch, or of other weights, does not fit these
    return {name: value for name, value in base.items() if name not in _OF_THE_WEIGHTS}


def _configuration(base: dict[str, Any], arguments: dict[str, Any], *, resume: bool) -> TrainConfig:
    if not resume:
        base = _for_the_weights(base, arguments)
    config = TrainConfig.from_layers(base, _length(arguments), _share(base, arguments), arguments)
    if config.init_from is None and config.bias is None:
        config = replace(config, bias=True)
    # sizes given now are meant for the current number of processes
    said = "batch_size" in arguments or "grad_accum" in arguments
    ranks = distributed.world_size()
    # the run may be resumed from another working directory
    return replace(
        config,
        ranks=ranks if said or config.ranks is None else config.ranks,
        data=tuple(absolute_item(item) for item in config.data),
        vocab_dir=None if config.vocab_dir is None else str(Path(config.vocab_dir).absolute()),
        init_from=None if config.init_from is None else noted_source(config.init_from),
    )


def _share(base: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """If --lr is given, min_lr stays the same share of it as in the configuration."""
    base = merge_layers(base, {n: arguments[n] for n in ("optimizer",) if n in arguments})
    if "lr" not in arguments or base.get("min_lr") is None or not base.get("lr"):
        return {}
    return {"min_lr": arguments["lr"] * (base["min_lr"] / base["lr"])}


def _length(arguments: dict[str, Any]) -> dict[str, Any]:
    """A length on the command line replaces the configuration's lengths."""
    names = ("steps", "epochs", "minutes")
    return dict.fromkeys(names) if any(name in arguments for name in names) else {}


def _resumed(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run in ``folder``, which the command line must not contradict."""
    if not runs.is_run(folder):
        raise UserError(f"--resume: {folder} is not a run folder (it has no config.toml)")
    if not runs.saved_steps(folder):
        raise UserError(f"--resume: {folder} has no checkpoint yet; start again with --overwrite")
    base = read_config(str(folder / "config.toml"))
    source = arguments.get("init_from")
    if source is not None and base.get("init_from") in (source, str(Path(source).resolve())):
        # the weights may be gone: they are not needed again
        arguments["init_from"] = base["init_from"]
    for name in _FIXED:
        if name in arguments and arguments[name] != base.get(name):
            raise UserError(
                f"--resume: the run has {name} = {base.get(name)!r}, which cannot become "
                f"{arguments[name]!r}; start a new run for that"
            )
    return base


def _check_unused(folder: Path, overwrite: bool) -> None:
    if is_empty(folder):
        return
    if not overwrite:
        raise UserError(f"--out {folder}: not empty; give --resume or --overwrite")
    if not runs.is_run(folder):
        raise UserError(f"--out {folder}: not a run folder, so --overwrite does not delete it")


def _check_keeps_sources(folder: Path, config: TrainConfig, name: str | None) -> None:
    """Refuse to delete an old run that holds what the new run needs."""
    check_outside(folder, (path for item in config.data for path in item_paths(item)), "data")
    if config.vocab_dir is not None:
        check_outside(folder, [Path(config.vocab_dir)], "vocabulary")
    if config.init_from is not None and Path(config.init_from).exists():
        check_outside(folder, [Path(config.init_from)], "weights")
    # the old run's own configuration is rewritten
    if name is not None and Path(name).is_file() and Path(name).name != runs.RUN_CONFIG:
        check_outside(folder, [Path(name)], "configuration")


def _report(outcome: Outcome, folder: Path, prompt: str) -> None:
    loss = outcome.train_loss
    print(
        f"\ntrained {outcome.step:,} steps, {outcome.tokens:,} tokens, in "
        f"{summary.duration(outcome.elapsed)}"
        + (f"; training loss {loss:.4f}" if math.isfinite(loss) else "")
    )
    if outcome.validation is not None:
        result = outcome.validation
        per_byte = (
            f", {result.nats_per_byte:.4f} nats/byte, {result.bits_per_byte:.4f} bits/byte"
            if result.text_bytes
            else ""
        )
        print(
            f"validation: {result.loss:.4f} nats/token, perplexity {result.perplexity:.2f}"
            + per_byte
        )
    curves = f"; curves: {folder / 'loss.png'}" if outcome.drawn else ""
    print(f"best checkpoint: step {outcome.best_step:,}{curves}")
    if outcome.exit_code:
        print(f"continue with: python -m fastgpt2.train --out {quoted(folder)} --resume")
    said = "" if prompt == "\n" else f" --prompt {quoted(prompt)}"
    print(f"generate with: python -m fastgpt2.generate --run {quoted(folder)}{said}")


if __name__ == "__main__":
    raise SystemExit(main())
