"""Programs of the environment, seconds earlier: forked from a process that has imported fairseq.

    python warm_programs.py FOLDER

A server that puts stand-ins for the programs into FOLDER, and a socket. A stand-in hands its words,
folder, environment and standard streams to the server, which forks a process that goes on as the
program would have after its imports, to the exit code of an interpreter, without taking down the
modules. The stand-in passes on signals, and ends as the program does; whoever kills it kills the
program. It starts the program itself where that cannot be the same: for other words of python than
a script or a module, and where the environment differs in what an interpreter or torch reads as it
starts.
"""

from __future__ import annotations

import array
import atexit
import importlib
import json
import logging
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

MAIN = {
    "fairseq-train": ("fairseq_cli.train", "cli_main"),
    "fairseq-generate": ("fairseq_cli.generate", "cli_main"),
    "fairseq-preprocess": ("fairseq_cli.preprocess", "cli_main"),
    "fairseq-hydra-train": ("fairseq_cli.hydra_train", "cli_main"),
    "fairseq-gradinit": ("fairseq_gradinit.command", "main"),
    "torchrun": ("torch.distributed.run", "main"),
}
PYTHONS = ("python", "python3")
# None of fairseq_cli, whose modules set up the log when they are imported, and nothing of ours.
IMPORTED = (
    *("fairseq.trainer", "fairseq.sequence_generator", "fairseq.tasks", "fairseq.optim"),
    *("fairseq.binarizer", "fairseq.dataclass.initialize"),
    *("sacrebleu.metrics", "sacremoses", "sentencepiece"),
    # It is imported when torch makes its first optimizer.
    "torch._dynamo",
)
DATA_PREP = f"{Path(__file__).resolve().parent.parent / 'data-prep'}{os.pathsep}"
# What variables begin with that count when an interpreter or torch starts.
AT_START = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "LD_", "TORCH_", "PYTORCH_")
AT_START_OF_CUDA = ("CUDA", "NVIDIA_")
READY = "ready"


def main(folder: Path) -> Callable[[], object] | None:
    """Serve until standard input ends; in a process that is to be a program, what remains to do."""
    here = dict(os.environ)
    for module in IMPORTED:
        importlib.import_module(module)
    set_by_imports = {name: text for name, text in os.environ.items() if name not in here}
    # Nothing waits for those that serve a connection.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    at_start = AT_START + (AT_START_OF_CUDA if sys.modules["torch"].cuda.device_count() else ())
    here = {name: text for name, text in here.items() if name.startswith(at_start)}
    known = f"AT_START, DATA_PREP, HERE, IMPORTS = {(at_start, DATA_PREP, here, set_by_imports)!r}"
    for name in (*MAIN, *PYTHONS):
        stand_in = folder / name
        stand_in.write_text(f"#!{sys.executable} -IS\n{known}\n{STAND_IN}")
        stand_in.chmod(0o755)
    print(READY, flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            # Whoever began this has ended.
            shutil.rmtree(folder)
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(set_by_imports)
            return serve(connection, folder)
        connection.close()


def serve(connection: socket.socket, folder: Path) -> Callable[[], object]:
    """Fork the program and tell its process and how that ended; returns in the program."""
    # One byte, with which the streams come.
    _, control, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(12))
    streams = array.array("i", control[0][2])
    with connection.makefile(encoding="utf-8") as lines:
        job = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        return become(job, streams, folder)
    ended = os.pidfd_open(pid)
    connection.sendall(f"{pid}\n".encode())
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if ended in ready:
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(job: dict, streams: array.array, folder: Path) -> Callable[[], object]:
    """Make this process one that has just been started; returns the program."""
    import numpy as np

    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(job["folder"])
    os.umask(job["umask"])
    for kind, limits in job["limits"]:
        resource.setrlimit(kind, limits)
    environment = job["environment"]
    os.environ.update(environment)
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    # As numpy has it when it is imported; `random` sees to that itself after a fork.
    np.random.seed()
    # Whoever logs first while modules are imported sets up the root logger.
    logging.getLogger().handlers.clear()
    name, *words = job["words"]
    more = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = dict.fromkeys([*more, *sys.path[1:]])
    binaries = Path(sys.executable).parent
    # What the program starts by its own interpreter has a stand-in too.
    sys.executable = str(folder / "python3")
    if name not in PYTHONS:
        sys.argv = [str(binaries / name), *words]
        module, function = MAIN[name]
        return lambda: getattr(importlib.import_module(module), function)()
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        del words[0]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        return lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True) and None
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    return lambda: runpy.run_path(words[0], run_name="__main__") and None


# A script of the standard library alone, which starts in some fifty milliseconds.
STAND_IN = """
import array, json, os, resource, signal, socket, sys

def at_start(environment):
    # What imports set may come from whoever started this, who has imported them too.
    everything = {**IMPORTS, **environment}
    found = {name: text for name, text in everything.items() if name.startswith(AT_START)}
    found["PYTHONPATH"] = found.get("PYTHONPATH", "").removeprefix(DATA_PREP)
    # The first one is seen to; torchrun sets the other one, which is of no use here.
    return {**found, "PYTHONUNBUFFERED": "", "TORCH_NCCL_ASYNC_ERROR_HANDLING": ""}

folder, name = os.path.split(os.path.abspath(sys.argv[0]))
words = sys.argv[1:]
program = (words[1:] if words[:1] == ["-u"] else words)[:1]
known = not name.startswith("python") or program == ["-m"] or "".join(program).endswith(".py")
if not known or at_start(os.environ) != at_start(HERE):
    real = os.path.join(os.path.dirname(sys.executable), name)
    os.execv(real, [real, *words])
server = socket.socket(socket.AF_UNIX)
server.connect(os.path.join(folder, "socket"))
streams = array.array("i", [0, 1, 2])
server.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
umask = os.umask(0)
os.umask(umask)
limits = [(kind, resource.getrlimit(kind)) for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS)]
job = {"words": [name, *words], "folder": os.getcwd(), "umask": umask, "limits": limits}
answers = server.makefile()
passed_on = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCONT)
signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
server.sendall((json.dumps({**job, "environment": dict(os.environ)}) + "\\n").encode())
pid = int(answers.readline())
for number in passed_on:
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, _: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
answer = answers.readline()
code = int(answer) if answer else -signal.SIGKILL
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def end_with(program: Callable[[], object]) -> NoReturn:
    """Run it to the exit code of an interpreter, but for taking down the modules, for seconds."""
    try:
        code = program()
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__" and (program := main(Path(sys.argv[1]))):
    end_with(program)
