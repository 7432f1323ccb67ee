"""Ranks forked from one process, in the environment that torchrun gives them.

What the process has imported, no rank imports again: a start takes milliseconds.
"""

import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def fork_rank(
    body: Callable[[], int],
    rank: int,
    ranks: int,
    *,
    port: int | None,
    said: Path,
    attempt: int = 0,
) -> int:
    """Fork a process that ends with what ``body`` returns; returns its id.

    Args:
        body: the work of the rank.
        rank: its number, from 0.
        ranks: how many there are.
        port: of the job's key-value store on this machine; None for a process without torchrun.
        said: a folder; ``out.RANK`` and ``err.RANK`` in it get what the rank prints.
        attempt: how many times the ranks have been started before.
    """
    # what a first optimizer step imports: once for all, before the first fork
    import_module("torch._dynamo")
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        if port is not None:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="True",
                TORCHELASTIC_RESTART_COUNT=str(attempt),
            )
        for number, name in ((1, "out"), (2, "err")):
            handle = os.open(said / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
        code = body()
    except SystemExit as exit:
        code = int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
