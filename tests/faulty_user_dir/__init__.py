"""A user's own --user-dir, in which a process comes to harm if its environment says so.

KILLED_AT, STOPPED_AT   at the all-reduce of this number, counted from 1, it is sent the signal
SPOILED                 what one element of the embedding is set to before GradInit begins
VERSION                 it says that it has this version of fairseq-gradinit
PATIENCE                seconds that it waits for the others in a collective
"""

import functools
import itertools
import os
import signal
from datetime import timedelta

import torch.distributed
from fairseq.trainer import Trainer
from torch.distributed import distributed_c10d

import fairseq_gradinit.plugin

SIGNALS = {
    os.environ.get("KILLED_AT"): signal.SIGKILL,
    os.environ.get("STOPPED_AT"): signal.SIGSTOP,
}

begin_epoch, all_reduce = Trainer.begin_epoch, torch.distributed.all_reduce
numbers = itertools.count(1)


@functools.wraps(all_reduce)
def dangerous_all_reduce(*args, **kwargs):
    if number := SIGNALS.get(str(next(numbers))):
        os.kill(os.getpid(), number)
    return all_reduce(*args, **kwargs)


def begin_spoiled_epoch(trainer, epoch):
    with torch.no_grad():
        trainer.get_model().encoder.embed_tokens.weight[5, 3] = float(os.environ["SPOILED"])
    return begin_epoch(trainer, epoch)


torch.distributed.all_reduce = dangerous_all_reduce
if "SPOILED" in os.environ:
    Trainer.begin_epoch = begin_spoiled_epoch
if "VERSION" in os.environ:
    fairseq_gradinit.phase.__version__ = os.environ["VERSION"]
if "PATIENCE" in os.environ:
    # As docs/distributed.md has it.
    distributed_c10d.default_pg_timeout = timedelta(seconds=float(os.environ["PATIENCE"]))
