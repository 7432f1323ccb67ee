"""The run folder before the first step: configuration, tokenizer, and the log opened in it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from fastgpt2 import runs
from fastgpt2.errors import UserError
from fastgpt2.files import is_temporary, write_text
from fastgpt2.text import Tokenizer, save_tokenizer
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.loggers import Log


def begin_folder(
    run: Path, config: TrainConfig, tokenizer: Tokenizer, step: int, notify: Callable[[str], None]
) -> Log:
    """Write what every run folder holds, and open its log.

    Args:
        run: the folder; created if it does not exist.
        config: the run's configuration.
        tokenizer: the run's tokenizer.
        step: steps taken so far.
        notify: shows a line.

    Raises:
        UserError: it cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        # the folder is this job's alone
        for leftover in filter(is_temporary, run.iterdir()):
            leftover.unlink()
        write_text(run / runs.RUN_CONFIG, config.to_toml())
        save_tokenizer(tokenizer, run)
        return Log(run, step, config.loggers, asdict(config), notify)
    except OSError as error:
        raise UserError(f"{run}: cannot be written: {error.strerror}") from None
