"""The inside of a sandbox: what the forked process does, from giving up its rights to its last answer.

A cell trusts what it is told and is trusted with nothing: it runs what it was given where it was told to, in memory
that it shares with whoever judges the results. It prints nothing, and answers on one pipe.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from esper_triton.urabrask import seccomp, wire

__all__ = ["main", "prepare"]

_PR_SET_PDEATHSIG = 1
_SIGSYS_EXIT = 159  # as a shell would say it: 128 + 31
STATUS_BYTES = 4096
"""At the start of the shared memory, before the tensors: the number of the system call that ended the cell, plus 1."""

# siginfo_t of SIGSYS on 64-bit Linux: signo, errno, code, padding, the address of the call, its number.
_HANDLER = """
declare void @_exit(i32)
@where = global ptr null
define void @on_sigsys(i32 %signal, ptr %info, ptr %context) {
  %at = getelementptr i8, ptr %info, i64 24
  %number = load i32, ptr %at
  %shown = add i32 %number, 1
  %word = load ptr, ptr @where
  store volatile i32 %shown, ptr %word
  call void @_exit(i32 EXIT)
  ret void
}
""".replace("EXIT", str(_SIGSYS_EXIT))


def prepare() -> None:
    """Imports what cells need and makes what they share, in the process that they are forked from."""
    import llvmlite.binding  # noqa: F401
    import torch
    import triton
    import triton.language

    import esper_triton.cpu.native as native
    from esper_triton.cpu import launcher, stock  # noqa: F401
    from esper_triton.urabrask import oracle

    torch.manual_seed(0)
    torch.set_num_threads(1)  # a fork is whole only if there is one thread
    _without_devices()
    oracle.warm_up()
    launcher.unavailable()  # the machine code that launches
    native._openmp()
    _handler()
    assert triton.__version__
    if others := _threads():
        raise RuntimeError(f"a library has started threads, {', '.join(others)}; sandboxes cannot be forked")
    gc.collect()
    gc.freeze()  # a child that collects would copy every page


def _without_devices() -> None:
    """Lets torch's autograd find that there is no accelerator, whatever the machine has.

    The first backward of a process counts the devices of every backend that torch was built with, and starts a thread
    for each. The count alone loads the GPU's driver, which starts a thread of its own and opens devices that no cell
    may have. Where no file can be opened, no driver is found, and torch keeps that answer.
    """
    import torch

    float(torch.nn.functional.gelu(torch.ones(4, 4) @ torch.ones(4, 4)).sum())  # opens what the CPU's kernels read
    leaf = torch.ones(1, requires_grad=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        leaf.sum().backward()  # type: ignore[no-untyped-call]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _threads() -> list[str]:
    """Names of the threads of this process besides the one that asks."""
    tasks = Path("/proc/self/task")
    return [(task / "comm").read_text().strip() for task in tasks.iterdir() if task.name != str(os.getpid())]


def main(told: dict[str, Any], descriptors: Sequence[int]) -> int:
    """Runs a cell to its end; returns the exit status. `descriptors`: commands, answers, the shared memory."""
    commands, answers, memory = _settle(descriptors, told["folder"])
    try:
        shared = mmap.mmap(memory, told["memory_bytes"])
        os.close(memory)
        _limit(told["cpu_s"], told["limit_bytes"])
        from esper_triton.cpu.forking import begin_anew

        begin_anew()
        import torch

        torch.set_num_threads(2)
        base = ctypes.addressof(ctypes.c_char.from_buffer(shared))
        serve = _SERVANTS[told["kind"]](told, shared, base)
        confined = "" if told["confined"] else "not asked for"
        if told["confined"]:
            confined = _confine(base, answers, told["kind"])
        wire.send(answers, {"ready": True, "degraded": confined})
    except Exception as error:
        wire.send(answers, _failure(error))
        return 0
    while True:
        try:
            message = wire.receive(commands)
        except wire.Silence:
            return 0
        try:
            answer = serve(message)
        except Exception as error:
            answer = _failure(error)
        wire.send(answers, answer)


def _failure(error: BaseException) -> dict[str, Any]:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    text = f"{error}"[:2000]
    found: dict[str, Any] = {"failed": type(error).__name__, "message": text, "memory": "MemoryError" in kinds}
    found["trap"] = "KernelTrap" in kinds
    return found


def _settle(descriptors: Sequence[int], folder: str) -> list[int]:
    """Into a group and a folder of its own, with no files but those it was given. Returns their new numbers."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    high = [os.dup2(descriptor, 100 + index) for index, descriptor in enumerate(descriptors)]
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.closerange(3, 100)
    os.closerange(100 + len(descriptors), 1024)
    found = [os.dup2(descriptor, 3 + index) for index, descriptor in enumerate(high)]
    os.closerange(100, 100 + len(descriptors))
    os.chdir(folder)
    for name in ("TMPDIR", "HOME", "TRITON_CACHE_DIR"):
        os.environ[name] = folder
    return found


def _limit(cpu_s: float, limit_bytes: int) -> None:
    from esper_triton.tezzeret.worker import limit_process

    limit_process(limit_bytes, cpu_s)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def _confine(base: int, answers: int, kind: str) -> str:
    """Why the cell is not confined; empty where it is."""
    reason = seccomp.unavailable()
    if reason is None:
        _arm(base)
        try:
            # 1 is where a kernel prints to.
            seccomp.confine(write_to=(1, answers), is_python=kind == "reference")
        except OSError as error:
            reason = f"{error.strerror}"
    return reason or ""


@lru_cache(maxsize=1)
def _handler() -> Any:
    import llvmlite.binding as llvm

    from esper_triton.cpu.place import place

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(opt=1, reloc="static", codemodel="large")
    module = llvm.parse_assembly(_HANDLER, llvm.create_context())
    module.triple, module.data_layout = llvm.get_default_triple(), str(machine.target_data)
    module.verify()
    return place(bytes(machine.emit_object(module)), ("on_sigsys", "where"))


class _Action(ctypes.Structure):
    """`struct sigaction` of glibc."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def _arm(base: int) -> None:
    """A forbidden system call writes its number to the shared memory and ends the process."""
    placed = _handler()
    ctypes.c_void_p.from_address(placed.addresses["where"]).value = base
    action = _Action(handler=placed.addresses["on_sigsys"], flags=4)  # SA_SIGINFO
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sigaction(int(signal.SIGSYS), ctypes.byref(action), None):
        raise OSError(ctypes.get_errno(), "no handler for SIGSYS")


# ---- kernels

Servant = Callable[[dict[str, Any]], dict[str, Any]]


def _kernels(told: dict[str, Any], shared: mmap.mmap, base: int) -> Servant:
    """Object code as it is stored, launched on addresses."""
    from esper_triton.cpu.native import LoadedCode, NativeKernel

    launchers: dict[str, dict[str, Callable[..., None]]] = {"one": {}, "two": {}, "usual": {}}
    for name, kernel in told["kernels"].items():
        binary = Path(kernel["file"]).read_bytes()
        for mode, found in launchers.items():
            code = LoadedCode.load(binary, symbol=kernel["symbol"])
            if mode == "two":
                code.programs_per_thread = 1  # shared among threads however little there is to do
            loaded = NativeKernel(code, kernel["signature"])
            found[name] = loaded.launcher({"one": 1, "two": 2, "usual": None}[mode])

    def address(value: Any) -> int:
        return base + value[0] if isinstance(value, list) else int(value)

    def serve(message: dict[str, Any]) -> dict[str, Any]:
        chosen = launchers[message["threads"]]
        launches = [(chosen[name], (*grid, *map(address, arguments))) for name, grid, arguments in message["launches"]]
        if "samples" in message:
            return {"ns": _timed(launches, message["samples"], message["inner"])}
        for launch, arguments in launches:
            launch(*arguments)
        return {"done": True}

    return serve


def _timed(launches: list[tuple[Callable[..., None], tuple[int, ...]]], samples: int, inner: int) -> list[int]:
    found = []
    for _ in range(samples):
        began = time.perf_counter_ns()
        for _ in range(inner):
            for launch, arguments in launches:
                launch(*arguments)
        found.append((time.perf_counter_ns() - began) // inner)
    return found


def _checked(told: dict[str, Any], shared: mmap.mmap, base: int) -> Servant:
    """The stored Triton IR compiled so that it checks every access, launched on tensors whose storages end where they
    do."""
    import torch
    from triton._C.libtriton import ir

    from esper_triton.cpu.compiler import CPUBackend, CPUOptions
    from esper_triton.cpu.native import LoadedCode, NativeKernel

    kernels = {}
    for name, kernel in told["kernels"].items():
        context = ir.context()
        ir.load_dialects(context)
        module = ir.parse_mlir_module(kernel["file"], context)
        module.context = context
        backend = CPUBackend(_target(told["arch"]))
        options = backend.parse_options({"sanitize": told["sanitize"]})
        assert isinstance(options, CPUOptions)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, options)
        metadata: dict[str, Any] = {}
        source = stages["llir"](module, metadata)
        binary = stages["o"](source, metadata)
        code = LoadedCode.load(binary, symbol=metadata["name"])
        kernels[name] = NativeKernel(code, kernel["signature"], told["sanitize"])

    def tensor(value: Any) -> Any:
        # Its storage is the part of the memory that is its own.
        return torch.frombuffer(shared, dtype=torch.uint8, count=value[1], offset=value[0]) if value[1] else None

    def serve(message: dict[str, Any]) -> dict[str, Any]:
        for name, grid, arguments in message["launches"]:
            values = [tensor(value) if isinstance(value, list) else value for value in arguments]
            kernels[name].launch(tuple(grid), values, 1)
        return {"done": True}

    return serve


def _target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cpu", arch, 1)


def _reference(told: dict[str, Any], shared: mmap.mmap, base: int) -> Servant:
    """A blueprint's own reference, which is Python that came with it: run as the kernels are."""
    from esper_triton.contracts.blueprint import Blueprint
    from esper_triton.urabrask import oracle

    blueprint = Blueprint.model_validate_json(Path(told["blueprint"]).read_bytes())
    found: list[oracle.LocalOracle] = []

    def serve(message: dict[str, Any]) -> dict[str, Any]:
        if not found:  # not before the process is confined
            found.append(oracle.LocalOracle.of_blueprint(blueprint, told["dims"], told["dtype"]))
        return oracle.answer_in(found[0], message, shared)

    return serve


_SERVANTS = {"kernels": _kernels, "checked": _checked, "reference": _reference}
