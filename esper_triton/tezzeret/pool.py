"""The forge pool: compiles in processes of their own, so that neither training nor a crash of a compiler is shared."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import enum
import json
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import CompileError, EsperError, StoreUnavailable, UnknownTarget, error_named
from esper_triton.tezzeret.artifacts import Artifacts
from esper_triton.tezzeret.process import WorkerGone, WorkerProcess
from esper_triton.urza import Artifact, Urza

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_BUDGET_S", "CompileTask", "Forge", "Outcome", "TaskState", "shared_forge"]

DEFAULT_BUDGET_S = 60.0
_JOBS_A_WORKER = 200  # then a new one: compilers grow
_START_S = 120.0


class TaskState(enum.StrEnum):
    """What has become of a submitted compile."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class Outcome:
    """One artifact of a task: whether it was there already, seconds from request to verdict, and the size of its
    code."""

    def __init__(self, artifact: Artifact, hit: bool, seconds: float, code_bytes: int) -> None:
        self.artifact, self.hit, self.seconds, self.code_bytes = artifact, hit, seconds, code_bytes


class CompileTask:
    """A compile that was submitted. `await task` gives its `Artifacts`, or raises what went wrong.

    Attributes:
        state: see TaskState. stage: what is being done, in words. progress: the part that is done, from 0 to 1.
        error: why it FAILED. outcomes: of each target in order, when it is DONE.

    An `await` that is cancelled, as by a timeout, leaves the compile alone; `cancel` ends it.
    """

    def __init__(self, name: str, job: bytes, urza: Urza) -> None:
        self.name = name
        self.state = TaskState.WAITING
        self.stage = "waiting"
        self.progress = 0.0
        self.error: BaseException | None = None
        self.outcomes: tuple[Outcome, ...] = ()
        self._job, self._urza = job, urza
        self._guard = threading.Lock()
        self._over: Future[None] = Future()
        self._over.set_running_or_notify_cancel()
        self._end: Callable[[], None] | None = None  # kills the worker that has it

    def __repr__(self) -> str:
        return f"<CompileTask {self.name!r} {self.state}, {self.stage}>"

    def __await__(self) -> Generator[Any, None, Artifacts]:
        yield from asyncio.wait([asyncio.wrap_future(self._over)]).__await__()
        return self.result()

    def done(self) -> bool:
        """Whether it is DONE, FAILED or CANCELLED."""
        return self._over.done()

    def result(self, timeout_s: float | None = None) -> Artifacts:
        """Waits on this thread. Raises what went wrong, CompileError where it was cancelled, and TimeoutError."""
        self._over.result(timeout_s)
        if self.state is TaskState.CANCELLED:
            raise CompileError(f"the compile of blueprint {self.name!r} was cancelled")
        if self.error is not None:
            raise self.error
        return Artifacts(outcome.artifact for outcome in self.outcomes)

    def cancel(self) -> bool:
        """Ends it: what it has not stored yet is lost. False where it is over already."""
        with self._guard:
            if self.done():
                return False
            end = self._end
            self._finish(TaskState.CANCELLED, "cancelled")
        if end is not None:
            end()
        return True

    def add_done_callback(self, callback: Callable[[CompileTask], object]) -> None:
        """Calls it once the task is over, on whichever thread ends it; at once where it is."""
        self._over.add_done_callback(lambda _: callback(self))

    # What follows is the pool's.

    def _begin(self, end: Callable[[], None]) -> bool:
        with self._guard:
            if self.done():
                return False
            self.state, self._end = TaskState.RUNNING, end
            return True

    def _tell(self, stage: str, progress: float) -> None:
        with self._guard:
            if not self.done():
                self.stage, self.progress = stage, max(self.progress, progress)

    def _succeed(self, outcomes: Iterable[Outcome]) -> None:
        with self._guard:
            if not self.done():
                self.outcomes, self.progress = tuple(outcomes), 1.0
                self._finish(TaskState.DONE, "done")

    def _fail(self, error: BaseException) -> None:
        with self._guard:
            if not self.done():
                self.error = error
                self._finish(TaskState.FAILED, "failed")

    def _finish(self, state: TaskState, stage: str) -> None:
        self.state, self.stage, self._end, self._job = state, stage, None, b""
        self._over.set_result(None)


class Forge:
    """Worker processes that compile, started when there is something to do and kept for the next.

    They run at low priority. One that dies, hangs, or takes more than it may costs the task that it had, which fails
    with a CompileError that says what happened; the next task gets another worker. A task builds all of its targets, or
    stores nothing; the same request from several processes is built once, by whoever comes first.

    No method waits for a compile, or for a worker. A fork leaves workers with the parent; a child can submit again.
    Workers end with `close`, with the process, and when they have had nothing to do for a while.
    """

    def __init__(
        self,
        urza: Urza | None = None,
        *,
        jobs: int | None = None,
        memory_limit: int | None = None,
        time_limit: float | None = 600.0,
        cpu_limit: float | None = None,
        nice: int = 15,
        idle_s: float = 600.0,
    ) -> None:
        """Starts nothing.

        Args:
            urza: the store; without one each `submit` names its own. jobs: workers at a time; all processors by
                default. memory_limit: bytes that one task may take beyond what an idle worker has (about 0.5 GB).
            time_limit: seconds for one task. cpu_limit: seconds of processor time for one task.
            nice: added to the niceness of the workers and of what they prove with. With 15 they get a thirtieth of a
                processor that training keeps busy, with 19 a seventieth; a long compile may then need more time than
                `time_limit`. idle_s: seconds after which an idle worker ends.
        """
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs must be at least 1, found {jobs}")
        for name, value in (("memory_limit", memory_limit), ("time_limit", time_limit), ("cpu_limit", cpu_limit)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, found {value}")
        self.urza, self.jobs = urza, jobs or os.cpu_count() or 1
        self.memory_limit, self.time_limit, self.cpu_limit = memory_limit, time_limit, cpu_limit
        self.nice, self.idle_s = nice, idle_s
        self._reset()
        _forges.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[CompileTask] = deque()
        self._serving: dict[threading.Thread, WorkerProcess | None] = {}
        self._running: dict[threading.Thread, CompileTask] = {}
        self._idle = 0
        self._closed = False

    def submit(
        self,
        blueprint: Blueprint,
        dims: Mapping[str, int] | None = None,
        dtype: torch.dtype | str = "float32",
        targets: Iterable[str] | str = ("cpu",),
        pipeline: str = "standard",
        *,
        urza: Urza | None = None,
        budget_s: float = DEFAULT_BUDGET_S,
    ) -> CompileTask:
        """Queues a compile and returns at once; arguments as of `esper.compile`. What is wrong with the request is told
        by the task. Raises ValueError without a store, UnknownTarget without a target, RuntimeError when closed."""
        store = urza or self.urza
        if store is None:
            raise ValueError("no Urza to store in; give one to Forge or to submit")
        names = [targets] if isinstance(targets, str) else list(dict.fromkeys(targets))
        if not names:
            raise UnknownTarget("no target was given; 'cpu' is this machine")
        job = {
            "blueprint": blueprint.model_dump(mode="json"),
            "dims": dict(dims or {}),
            "dtype": str(dtype).removeprefix("torch."),
            "targets": names,
            "pipeline": pipeline,
            "budget_s": budget_s,
            "store": store.sent(),
            "memory_limit": self.memory_limit,
            "cpu_limit": self.cpu_limit,
        }
        try:
            json.dumps(job["store"])
        except TypeError as error:
            raise StoreUnavailable(
                f"store {store.location} cannot be opened by a worker: {error} (of its options); give that in the "
                "environment"
            ) from None
        # What is no size goes as text, for the request's check to say so.
        task = CompileTask(blueprint.name, json.dumps(job, default=repr).encode() + b"\n", store)
        with self._changed:
            if self._closed:
                raise RuntimeError("the forge is closed")
            self._waiting.append(task)
            if self._idle < len(self._waiting) and len(self._serving) < self.jobs:
                thread = threading.Thread(target=self._serve, name="esper-forge", daemon=True)
                self._serving[thread] = None
                thread.start()
            self._changed.notify()
        return task

    def close(self) -> None:
        """Ends the workers; tasks that are not over are CANCELLED."""
        with self._changed:
            self._closed = True
            left = [*self._waiting, *self._running.values()]
            self._waiting.clear()
            threads = [thread for thread in self._serving if thread is not threading.current_thread()]
            self._changed.notify_all()
        for task in left:
            task.cancel()
        for worker in list(self._serving.values()):
            if worker is not None:
                worker.kill()
        for thread in threads:
            thread.join(5.0)

    def __enter__(self) -> Forge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- one thread for each worker

    def _serve(self) -> None:
        own = threading.current_thread()
        worker: WorkerProcess | None = None
        try:
            while (task := self._next(own)) is not None:
                if worker is None and self._was_found(task):
                    continue
                if worker is None or not worker.is_alive or worker.jobs >= _JOBS_A_WORKER:
                    if worker is not None:
                        worker.close()
                    worker = self._started(own, task)
                if worker is not None:
                    self._work(worker, task)
        finally:
            if worker is not None:
                worker.close()

    def _next(self, own: threading.Thread) -> CompileTask | None:
        """The task that is to begin; None where this thread is to end."""
        with self._changed:
            self._running.pop(own, None)
            self._idle += 1
            try:
                self._changed.wait_for(lambda: self._waiting or self._closed, timeout=self.idle_s)
            finally:
                self._idle -= 1
            if self._closed or not self._waiting:
                self._serving.pop(own, None)
                return None
            task = self._running[own] = self._waiting.popleft()
            return task

    @staticmethod
    def _was_found(task: CompileTask) -> bool:
        """A hit is not worth a worker's start. It is looked for only where the compilers are there to ask which
        versions they are."""
        if task.done():
            return True
        if "triton" not in sys.modules:
            return False
        from esper_triton.tezzeret.builds import stored

        job = json.loads(task._job or b"null")
        try:
            found = job and stored(job, task._urza)
        except Exception:  # the worker says what is wrong
            found = None
        if not found:
            return False
        task._succeed(Outcome(one.artifact, True, one.seconds, one.code_bytes) for one in found)
        return True

    def _started(self, own: threading.Thread, task: CompileTask) -> WorkerProcess | None:
        task._tell("starting a worker", 0.0)
        try:
            worker = WorkerProcess(nice=self.nice)
        except OSError as error:
            task._fail(CompileError(f"no worker process can be started for blueprint {task.name!r}: {error}"))
            return None
        with self._changed:
            self._serving[own] = worker
            closed = self._closed
        if closed:
            worker.kill()
        return worker

    def _work(self, worker: WorkerProcess, task: CompileTask) -> None:
        if not task._begin(worker.kill):
            return
        who = f"blueprint {task.name!r}"
        try:
            worker.wait_until_ready(_START_S)
            deadline = None if self.time_limit is None else time.monotonic() + self.time_limit
            answer = worker.run(task._job, task._tell, deadline)
        except WorkerGone as gone:
            worker.kill()
            task._fail(CompileError(f"{who}: {self._why(gone)}; nothing was stored"))
            return
        try:
            if "built" in answer:
                task._succeed(self._outcomes(task, answer["built"]))
                return
            kind, message = answer["error"]["type"], answer["error"]["message"]
        except EsperError as error:  # the store has lost it again
            task._fail(error)
            return
        if kind == "MemoryError":
            worker.kill()  # what it holds is not known
            limit = self.memory_limit
            task._fail(CompileError(f"{who}: its compile needed more memory than memory_limit={limit} bytes"))
            return
        task._fail(error_named(kind, message) or CompileError(f"{who}: {kind}: {message}"))

    def _why(self, gone: WorkerGone) -> str:
        if gone.timed_out:
            return f"its compile took longer than time_limit={self.time_limit:g} s and was ended"
        if gone.signal == "SIGXCPU":
            return f"its compile used more than cpu_limit={self.cpu_limit:g} s of processor time and was ended"
        return f"the process that compiled it died: {gone}"

    @staticmethod
    def _outcomes(task: CompileTask, built: list[dict[str, Any]]) -> list[Outcome]:
        return [Outcome(task._urza.get(one["id"]), one["hit"], one["seconds"], one["code_bytes"]) for one in built]

    def _forked(self) -> None:
        left = [*self._waiting, *self._running.values()]
        workers = [worker for worker in self._serving.values() if worker is not None]
        self._reset()
        for worker in workers:
            worker.abandon()
        for task in left:
            task._guard = threading.Lock()
            with contextlib.suppress(RuntimeError):
                task._fail(CompileError(f"the compile of blueprint {task.name!r} stayed with the parent process"))


_forges: weakref.WeakSet[Forge] = weakref.WeakSet()
_shared: dict[bool, Forge] = {}
_sharing = threading.Lock()


def shared_forge(*, waited_for: bool = False) -> Forge:
    """The process's own, for whoever names none: workers beside training, at low priority. Those that a caller stands
    still for are others, as nice as the caller: they take nothing from a thread that only waits, and at low priority
    everybody else's work on the machine would come before. Closed at exit."""
    with _sharing:
        forge = _shared.get(waited_for)
        if forge is None or forge._closed:
            forge = _shared[waited_for] = Forge(nice=0) if waited_for else Forge()
        return forge


def _close_all() -> None:
    for forge in list(_forges):
        forge.close()


def _after_fork_in_child() -> None:
    global _sharing
    _sharing = threading.Lock()
    for forge in list(_forges):
        forge._forked()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
