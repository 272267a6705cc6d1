"""The process that sandboxes are forked from: `python -m esper_triton.urabrask.zygote`, started by `sandbox`.

It has imported everything that a cell needs and has started no thread, so that a fork of it is a fresh process for the
price of some milliseconds. It runs no artifact's code itself. When its socket is closed it ends, and its cells with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from typing import Any

__all__ = ["main"]

_GRACE_S = 1.0  # in which a cell whose pipe is closed has ended, if it has


def main() -> int:
    """Serves its socket, whose file descriptor is the only argument, until that is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    from esper_triton.tezzeret.worker import weigh_session
    from esper_triton.urabrask import cell

    weigh_session()
    cell.prepare()
    control.sendall(json.dumps({"ready": os.getpid()}).encode() + b"\n")
    folders: dict[int, str] = {}  # of the cells that there are
    try:
        while True:
            content, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 8)
            if not content:
                return 0
            request = json.loads(content)
            if "start" in request:
                answer = _start(control, request, descriptors)
                if "pid" in answer:
                    folders[answer["pid"]] = request["start"]["folder"]
            else:
                answer = _end(request["end"], request["kill"])
                folders.pop(request["end"], None)
            control.sendall(json.dumps(answer).encode() + b"\n")
    except OSError:  # nobody reads any more
        return 0
    finally:
        # Whoever they were for has gone without ending them.
        for pid, folder in folders.items():
            _end(pid, kill=True)
            shutil.rmtree(folder, ignore_errors=True)


def _start(control: socket.socket, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    try:
        pid = os.fork()
    except OSError as error:
        return {"error": f"no process can be started: {error.strerror}"}
    finally:
        if "pid" not in locals():
            _close(descriptors)
    if pid == 0:
        code = 70
        try:
            control.close()
            from esper_triton.urabrask import cell

            code = cell.main(request["start"], descriptors)
        finally:
            os._exit(code)
    with contextlib.suppress(OSError):  # it may have done so itself, and have ended
        os.setpgid(pid, pid)
    _close(descriptors)
    return {"pid": pid}


def _end(pid: int, kill: bool) -> dict[str, Any]:
    """Waits for a cell's end, and brings it about where it does not come."""
    deadline = time.monotonic() + (0.0 if kill else _GRACE_S)
    killed = False
    while True:
        found, status, usage = os.wait4(pid, 0 if killed else os.WNOHANG)
        if found:
            return {"status": status, "killed": killed, "peak_bytes": usage.ru_maxrss * 1024}
        if time.monotonic() >= deadline:
            killed = True
            for one in (os.killpg, os.kill):
                with contextlib.suppress(OSError):
                    one(pid, signal.SIGKILL)
        else:
            time.sleep(0.002)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
