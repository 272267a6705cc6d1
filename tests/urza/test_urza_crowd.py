"""Eight processes that put, get, ask, collect and damage at once: no wrong byte, and one build of a key at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import traceback
from pathlib import Path
from typing import Any

from esper_triton.contracts.errors import ArtifactNotFound, CorruptObject, InvalidCommit
from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.urza import Urza

PROCESSES, KEYS, OPERATIONS = 8, 25, 225  # and each key once by each process, at first: 2,000 in all
BINARY_BYTES = 2000
LIMIT_BYTES = 12 * BINARY_BYTES


def key(number: int) -> str:
    return f"0123456789ab-cpu-standard-{number:012x}"


def binary_of(number: int) -> bytes:
    return random.Random(number).randbytes(BINARY_BYTES)


class Worker:
    """One process. `template` is a manifest whose binary is replaced by the key's own."""

    def __init__(self, root: Path, number: int, template: Manifest, blobs: dict[str, bytes]) -> None:
        self.urza, self.root, self.number = Urza(root / "urza"), root, number
        self.template, self.common = template, blobs
        self.random = random.Random(number)
        self.counts: dict[str, int] = {}

    def offered(self, number: int) -> tuple[Manifest, dict[str, bytes]]:
        binary = binary_of(number)
        kernel = self.template.kernels["forward"]
        manifest = self.template.model_copy(
            update={"id": key(number), "kernels": {"forward": kernel.model_copy(update={"binary": sha256(binary)})}}
        )
        return manifest, self.common | {sha256(binary): binary}

    def check(self, number: int, found: dict[str, bytes]) -> None:
        assert sha256(binary_of(number)) in found
        for digest, content in found.items():
            assert sha256(content) == digest

    def put(self, number: int) -> None:
        with self.urza.building(key(number)) as existing:
            if existing is None:
                marker = self.root / f"building-{number}"
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))  # raises where another builds it at this time
                self.urza.commit(*self.offered(number))
                marker.unlink()
                self.counts["build"] = self.counts.get("build", 0) + 1

    def get(self, number: int) -> None:
        self.check(number, self.urza.load(key(number))[1])

    def prove(self, number: int) -> None:
        with contextlib.suppress(InvalidCommit):  # it was rejected meanwhile
            self.urza.set_status(key(number), KernelStatus.VALIDATED, b"a report", tags=["high_speed"])

    def ask(self, number: int) -> None:
        for match in self.urza.query(required=["high_speed"], limit=5):
            assert match.id in map(key, range(KEYS))

    def collect(self, number: int) -> None:
        self.urza.release()
        self.urza.gc(LIMIT_BYTES)

    def pin(self, number: int) -> None:
        if self.random.random() < 0.5:
            self.urza.pin(key(number))
        else:
            self.urza.unpin(key(number))

    def remember(self, number: int) -> None:
        request = sha256(key(number).encode())
        assert self.urza.recall(request) in (None, key(number).encode())
        self.urza.remember(request, key(number).encode())

    def damage(self, number: int) -> None:
        folder = self.urza.root / ("refs" if self.random.random() < 0.2 else "objects")
        paths = [path for path in folder.rglob("*") if path.is_file()]
        with contextlib.suppress(FileNotFoundError), open(self.random.choice(paths), "r+b") as file:
            file.seek(self.random.randrange(100))
            file.write(b"damage" * self.random.randrange(1, 20))

    def run(self) -> None:
        order = list(range(KEYS))
        self.random.shuffle(order)
        for number in order:
            self.put(number)
            self.get(number)

    def run_mixed(self) -> None:
        acts = [self.put] * 6 + [self.get] * 6 + [self.prove] * 3 + [self.ask] * 2
        acts += [self.collect, self.damage, self.pin, self.remember]
        for _ in range(OPERATIONS):
            act = self.random.choice(acts)
            try:
                act(self.random.randrange(KEYS))
            except (ArtifactNotFound, CorruptObject) as error:
                name = type(error).__name__
                self.counts[name] = self.counts.get(name, 0) + 1


def work(root: Path, number: int, template: Manifest, blobs: dict[str, bytes], barrier: Any, answers: Any) -> None:
    os.fsync = lambda descriptor: None
    worker = Worker(root, number, template, blobs)
    try:
        barrier.wait(timeout=100)
        worker.run()
        builds = worker.counts.pop("build", 0)
        barrier.wait(timeout=100)
        worker.run_mixed()
        worker.urza.close()
        answers.put((builds, worker.counts, None))
    except BaseException:
        barrier.abort()
        answers.put((0, {}, traceback.format_exc()))


def test_a_crowd_never_gets_a_wrong_byte_and_builds_each_key_once_at_a_time(tmp_path, make_artifact):
    template, blobs = make_artifact()
    binary = template.kernels["forward"].binary
    common = {digest: content for digest, content in blobs.items() if digest != binary}
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=work, args=(tmp_path, number, template, common, barrier, answers), daemon=True)
        for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    results = [answers.get(timeout=110) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    answers.close()
    answers.join_thread()
    assert [error for *_, error in results if error] == []
    assert sum(builds for builds, _, _ in results) == KEYS, "while nothing is removed, each key is built once"
    for happened in ("build", "ArtifactNotFound", "CorruptObject"):
        assert any(happened in counts for _, counts, _ in results), f"no {happened} in the second part"

    urza = Urza(tmp_path / "urza")
    worker = Worker(tmp_path, 0, template, common)
    for number in range(KEYS):
        worker.put(number)
        worker.get(number)
    urza.gc()
    # A record that was damaged after its writer had read it is in the log as what it was: that is a fault of its own.
    faults = [fault for fault in urza.verify().faults if "changes record" not in fault.message]
    assert faults == []
    assert {match.id for match in urza.query(statuses=list(KernelStatus), limit=100)} == set(urza.ids())
    assert list(tmp_path.glob("building-*")) == []
    urza.close()
    worker.urza.close()
