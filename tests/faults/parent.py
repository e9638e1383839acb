"""The parent of attempts: a process under the shim that has imported everything once, and forks a merge when asked.

It reads a request, a line of JSON, from stdin, and writes how the child stands, a line of JSON, to stdout.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
from typing import Any

SHIM = ctypes.CDLL(None)
KINDS = ("nothing", "fail", "kill", "stop", "short", "lose", "done", "tear")


def warm_up(argv: list[str]) -> None:
    """Imports what a merge imports, and does nothing with it: what has run torch must not fork."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_RDWR), 2)
        code = run(argv)
        with os.fdopen(writer, "w") as file:
            json.dump([code, [name for name in sys.modules if name != "__main__"]], file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        code, modules = json.load(file)
    os.waitpid(pid, 0)
    if code:
        raise SystemExit(f"the undisturbed merge ends with {code}")
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def run(argv: list[str]) -> int:
    """The exit code of the command line with these arguments."""
    from distmerge.cli.main import main

    sys.argv = ["distmerge", *argv]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def attempt(request: dict[str, Any]) -> None:
    """The child's part: sets itself up, arms the shim, merges."""
    for number in (1, 2):
        os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(request["setup"], {})
    if request["log"]:
        SHIM.fi_log(request["log"].encode())
    calls, prefix, nth, kind, code = request["fault"]
    SHIM.fi_arm(f",{','.join(calls)},".encode(), prefix.encode(), ctypes.c_long(nth), KINDS.index(kind), code)
    code = run(request["argv"])
    sys.stderr.flush()
    os._exit(code)


def stand(pid: int) -> dict[str, Any]:
    """How the child ended, or that it is stopped."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    SHIM.fi_hits.restype = ctypes.c_long
    ended = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    return {"pid": pid, "code": ended, "hits": SHIM.fi_hits()}


def main() -> None:
    """Serves requests until there are no more."""
    import torch

    from distmerge import layout

    torch.set_num_threads(1)
    layout._SEGMENT_NBYTES = (1024, 1024)  # so that the files of a tiny model have several
    gc.disable()
    warm_up(json.loads(sys.stdin.readline()))
    gc.freeze()
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "fault" in request:
            pid = os.fork()
            if pid == 0:
                attempt(request)
        else:
            pid = request["pid"]
            for number in request["signals"]:
                os.kill(pid, number)
        answer = {"pid": pid} if request.get("beside") else stand(pid)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
