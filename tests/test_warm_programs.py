"""What stands in for programs in other tests behaves as they do."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, Outcome, nearly_full_disk, run_command, warm_programs

FORKED = "print('torch' in sys.modules)"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Runs its last argument."""
    path = tmp_path / "program.py"
    path.write_text("import atexit, os, signal, sys, threading, time\nexec(sys.argv[-1])\n")
    return path


def without_frames(outcome: Outcome) -> tuple[int, list[str]]:
    lines = outcome.output.splitlines()
    return outcome.code, [line for line in lines if not line.startswith("  ")]


@pytest.mark.parametrize(
    "code",
    [
        "print('out'); print('err', file=sys.stderr); sys.exit(3)",
        "sys.exit('a sentence')",
        "atexit.register(print, 'at the end'); 1 / 0",
        "raise KeyboardInterrupt",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.abort()",
        "threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
        "print(input(), sys.argv, sys.path, os.getcwd(), os.environ['COLUMNS'])",
        "print(__name__, sys.modules['__main__'].__file__)",
    ],
)
def test_it_ends_and_prints_as_the_program(program, tmp_path, code):
    real, stand_in = (
        run_command(
            "python", program, "word", code, stdin="line\n", cwd=tmp_path, real=real, COLUMNS="90"
        )
        for real in (True, False)
    )
    assert without_frames(stand_in) == without_frames(real)


def test_it_starts_the_program_where_a_fork_cannot_be_the_same(program):
    assert run_command("python", program, FORKED).output == "True\n"
    assert run_command("python", "-u", program, FORKED, COLUMNS="90").output == "True\n"
    # Of a process that has imported torch, which sets it.
    assert run_command("python", program, FORKED, KMP_INIT_AT_FORK="FALSE").output == "True\n"
    for name in ("PYTHONHASHSEED", "OMP_NUM_THREADS", "TORCH_LOGS"):
        assert run_command("python", program, FORKED, **{name: "2"}).output == "False\n", name
    assert run_command("python", "-c", f"import sys; {FORKED}").output == "False\n"


def test_limits_are_those_of_whoever_starts_it(program, tmp_path):
    code = f"open({str(tmp_path / 'file')!r}, 'wb', buffering=0).write(bytes(200))"
    with nearly_full_disk(100):
        run_command("python", program, code)
    assert (tmp_path / "file").stat().st_size == 100


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 5), (signal.SIGKILL, -9)])
def test_a_signal_reaches_the_program(program, number, code):
    words = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [warm_programs() / "python3", program, words],
        **{"stdout": subprocess.PIPE, "env": {**os.environ, **ENVIRONMENT}},
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        # The program holds the other end too.
        assert process.stdout.read() == b""
    assert process.returncode == code
