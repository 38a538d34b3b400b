"""A server process that has imported the project and forks jobs, so that subprocess tests need no imports.

server = Server()
done = server.run("import os; print(os.getpid())", "an argument", processes=2)   # as `python -c code an argument`
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

IMPORTS = "diffusers, transformers, peft, diffalign.training.hooks.standard, reward_models"


class Server:
    """Forks one job at a time. Linux only, without accelerator."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__)), IMPORTS]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, code: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        """Run Python code with sys.argv[1:] in forked processes; several processes form a gloo group.

        Returns the first nonzero exit code (negative for a signal) and the output of all processes.
        """
        environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
            environment |= {**world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with tempfile.TemporaryDirectory() as folder:
            job = {"code": code, "argv": ["-c", *arguments], "env": environment, "n": processes, "folder": folder}
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.write(json.dumps({**job, "cwd": os.getcwd(), "path": sys.path}) + "\n")
            self.process.stdin.flush()
            codes = json.loads(self.process.stdout.readline())
            out, err = ("".join(Path(folder, f"{k}.{x}").read_text() for k in range(processes)) for x in ("out", "err"))
        return subprocess.CompletedProcess(arguments, next((c for c in codes if c), 0), out, err)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _child(job: dict[str, Any], rank: int) -> int:
    for fd, name in ((1, "out"), (2, "err")):
        file = os.open(Path(job["folder"], f"{rank}.{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, fd)
    os.environ.clear()
    os.environ.update(job["env"])
    if job["n"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.chdir(job["cwd"])
    sys.argv, sys.path[:] = job["argv"], job["path"]
    sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        exec(compile(job["code"], "<forked>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve() -> None:
    for name in sys.argv[1].split(","):
        __import__(name.strip())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of imports and children must not mix with answers
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank in range(job["n"]):
            if not (child := os.fork()):
                code = _child(job, rank)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # the server's own exit is not the child's
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
