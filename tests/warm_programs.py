"""Programs of the environment, seconds earlier: forked from a process that has imported fairseq.

    python warm_programs.py FOLDER

A server that puts stand-ins for the programs into FOLDER, and a socket. A stand-in hands its words,
folder, environment and standard streams to the server, which forks a process that goes on as the
program would have after its imports; the stand-in ends with its exit code. Whoever kills a stand-in
kills the program. What must be in the environment when a program starts, such as OMP_NUM_THREADS,
is that of the server.
"""

from __future__ import annotations

import array
import atexit
import importlib
import json
import logging
import os
import runpy
import select
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
    "fairseq-gradinit": ("fairseq_gradinit.command", "main"),
}
# None of fairseq_cli, whose modules set up the log when they are imported.
IMPORTED = (
    *("fairseq.trainer", "fairseq.sequence_generator", "fairseq.tasks", "fairseq.optim"),
    *("sacrebleu.metrics", "sacremoses", "sentencepiece"),
    # It is imported when torch makes its first optimizer.
    "torch._dynamo",
)
SOCKET, READY = "socket", "ready"


def main(folder: Path) -> Callable[[], object] | None:
    """Serve until standard input ends; in a process that is to be a program, what remains to do."""
    for module in IMPORTED:
        importlib.import_module(module)
    # Nothing waits for those that serve a connection.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / SOCKET))
    listener.listen(64)
    for name in (*MAIN, "python3"):
        stand_in = folder / name
        stand_in.write_text(f"#!{sys.executable} -IS\n{CLIENT}")
        stand_in.chmod(0o755)
    print(READY, flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            # Whoever began this has ended.
            return None
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return serve(connection)
        connection.close()


def serve(connection: socket.socket) -> Callable[[], object]:
    """Fork the program and tell how it ended; returns in the program."""
    # One byte, with which the streams come.
    _, control, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(12))
    streams = array.array("i", control[0][2])
    with connection.makefile(encoding="utf-8") as lines:
        job = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        return become(job, streams)
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if ended in ready:
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(job: dict, streams: array.array) -> Callable[[], object]:
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    # Whoever logs first while modules are imported sets up the root logger.
    logging.getLogger().handlers.clear()
    name, *words = job["words"]
    more = [path for path in job["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = dict.fromkeys([*more, *sys.path[1:]])
    if name == "python3":
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        return lambda: runpy.run_path(words[0], run_name="__main__") and None
    sys.argv = [str(Path(sys.executable).parent / name), *words]
    module, function = MAIN[name]
    return getattr(importlib.import_module(module), function)


# A script of the standard library alone, which starts in some ten milliseconds.
CLIENT = """
import array, json, os, signal, socket, sys

folder, name = os.path.split(os.path.abspath(sys.argv[0]))
if name == "python3" and not (len(sys.argv) > 1 and sys.argv[1].endswith(".py")):
    os.execv(sys.executable, ["python3", *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect(os.path.join(folder, "socket"))
streams = array.array("i", [0, 1, 2])
server.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
job = {"words": [name, *sys.argv[1:]], "folder": os.getcwd(), "environment": dict(os.environ)}
server.sendall((json.dumps(job) + "\\n").encode())
answer = server.makefile().readline()
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
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
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
