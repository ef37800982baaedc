"""Ranks of fairseq-train that are forked from one process, and so share the time of its imports.

Reads jobs from standard input, one in a line of JSON: the `words`, the `environment` and the `log`
of each rank, and the `limit` in seconds after which those that are left are killed. When all ranks
have ended it writes their exit codes. A rank goes through fairseq-train's own function, and ends as
any interpreter does. Those that were stopped are told to continue once all others have ended.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any


def become(rank: Mapping[str, Any]) -> None:
    """Make this process look as if a shell had started it."""
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(rank["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, descriptor)
    os.environ.update(rank["environment"])
    sys.argv = rank["words"]


def codes(pids: list[int], limit: float) -> list[int]:
    ended: dict[int, int] = {}
    stopped: set[int] = set()
    deadline = time.monotonic() + limit
    while left := {*pids} - ended.keys():
        if left == stopped or time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGCONT if left == stopped else signal.SIGKILL)
            stopped.clear()
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if pid == 0:
            time.sleep(0.01)
        elif os.WIFSTOPPED(status):
            stopped.add(pid)
        else:
            ended[pid] = os.waitstatus_to_exitcode(status)
    return [ended[pid] for pid in pids]


def serve() -> bool:
    """Answer until there is nothing more; True in a rank, which then has to do its work."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # fairseq logs to standard output as soon as it is imported
    # The last is imported when torch makes its first optimizer.
    for module in ("fairseq_cli.train", "fairseq_gradinit.hook", "torch._dynamo"):
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for rank in job["ranks"]:
            pid = os.fork()
            if pid == 0:
                become(rank)
                return True
            pids.append(pid)
        print(json.dumps(codes(pids, job["limit"])), file=answers, flush=True)
    return False


if __name__ == "__main__" and serve():
    sys.exit(sys.modules["fairseq_cli.train"].cli_main())
