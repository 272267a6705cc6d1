"""A process that compiles: `python -m esper_triton.tezzeret.worker`, started by the pool and spoken to through pipes.

A message is one line of JSON. In: a job, with its blueprint, limits and store, of one elsewhere with the token, which
need not be in the environment. Out: `ready` once, then for each job any number of `stage`, and `built` or `error`.
Nothing is pickled. When stdin ends, so does the worker, in the middle of a job too: whoever would have read the answer
is gone.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import sys
import threading
import time
from typing import Any

__all__ = ["limit_process", "main", "run_job", "weigh_session"]


def main() -> int:
    """Serves jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print must not come between the answers
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), name="esper-worker-reader", daemon=True).start()
    os.nice(int(os.environ.get("ESPER_WORKER_NICE", "15")))
    weigh_session()
    # What every job needs, before the first one is timed.
    import torch  # noqa: F401
    import triton  # noqa: F401

    import esper_triton.tezzeret.builds
    import esper_triton.urabrask.verdict  # noqa: F401

    one_at_a_time = threading.Lock()

    def answer(message: dict[str, Any]) -> None:
        with one_at_a_time:
            answers.write(json.dumps(message) + "\n")

    answer({"ready": os.getpid()})
    while True:
        job = json.loads(jobs.get())
        try:
            limit_process(job["memory_limit"], job["cpu_limit"])
            answer({"built": run_job(job, answer)})
        except Exception as error:
            kind = MemoryError if _is_of_memory(error) else type(error)
            answer({"error": {"type": kind.__name__, "message": str(error)}})


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is that there was no more memory."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _read(jobs: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    # With the compilers that a job has started: the pool has given this process a group of its own.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def run_job(job: dict[str, Any], answer: Any) -> list[dict[str, Any]]:
    """Builds a job's requests and tells what came of each. Raises as `build_all` does."""
    from esper_triton.tezzeret.builds import build_all, requests_of
    from esper_triton.urza import Urza

    def announce(stage: str, part: float) -> None:
        answer({"stage": stage, "progress": part})

    built = build_all(requests_of(job), Urza.received(job["store"]), announce)
    return [
        {"id": one.artifact.id, "hit": one.hit, "seconds": one.seconds, "code_bytes": one.code_bytes} for one in built
    ]


def weigh_session() -> None:
    """Gives this process's session the weight of its niceness. For a session whose processes are all as nice.

    Where Linux groups processes by session (autogroup, sched(7)), each session gets as much of the processors as any
    other, and niceness counts only inside it: a nice worker in a session of its own would yield to nobody.
    """
    niceness = os.nice(0)
    if niceness <= 0:
        return
    for _ in range(10):
        try:
            with open("/proc/self/autogroup", "w", encoding="ascii") as file:
                file.write(str(niceness))
            return
        except BlockingIOError:  # the kernel takes ten of these a second, of all processes together
            time.sleep(0.1)
        except OSError:  # a kernel without, or not ours to write
            return


def limit_process(memory_limit: int | None, cpu_limit: float | None) -> None:
    """From now on this process may map `memory_limit` more bytes of memory, and use `cpu_limit` more seconds of CPU."""
    if memory_limit is not None:
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_limit, hard))
    if cpu_limit is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        seconds = int(used.ru_utime + used.ru_stime + cpu_limit) + 1  # whole ones are what the kernel counts
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))


if __name__ == "__main__":
    sys.exit(main())
