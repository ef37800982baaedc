"""A user's own --user-dir, in which a process is sent a signal if its environment says so.

KILLED_AT and STOPPED_AT are numbers of all-reduces. Once all processes have begun, they wait for
each other for five seconds.
"""

import functools
import itertools
import os
import signal
from datetime import timedelta

import torch.distributed
from torch.distributed import distributed_c10d

import fairseq_gradinit.plugin.install  # noqa: F401

SIGNALS = {
    os.environ.get("KILLED_AT"): signal.SIGKILL,
    os.environ.get("STOPPED_AT"): signal.SIGSTOP,
}

all_reduce = torch.distributed.all_reduce
numbers = itertools.count(1)


# An error names it.
@functools.wraps(all_reduce)
def dangerous_all_reduce(tensor, op=torch.distributed.ReduceOp.SUM, group=None, async_op=False):
    number = next(numbers)
    if number == 10:
        distributed_c10d._set_pg_timeout(timedelta(seconds=5), group)
    if found := SIGNALS.get(str(number)):
        os.kill(os.getpid(), found)
    return all_reduce(tensor, op, group, async_op)


torch.distributed.all_reduce = dangerous_all_reduce
