"""Triton kernels as machine code of this CPU, against torch eager, Inductor's C++ and the Triton interpreter.

    .venv/bin/python bench/cpu_backend.py [--kernels softmax,add] [--threads 1,2] [--samples 30] [--output docs]

Contenders are sampled in rounds, in one process, with OMP_WAIT_POLICY=PASSIVE. The order within a round is drawn, and
each begins its turn with a call that is not timed: in a fixed order, whoever comes after the copy would always find its
inputs gone from the cache. Medians are shown, and the spread is that of the middle half of the samples' ratios. All of
them write into the same outputs made before, or all make new outputs each time (marked "new": torch has no `out=`
there, or Inductor would copy a library's result). The C library's allocator is told to keep freed memory, as the
allocators do that torch recommends on CPUs: else most of what is timed of large new outputs is the operating system
clearing their pages, whoever writes them. Each contender is first checked against float64, with poisoned outputs and
inputs that must stay as they are.

A copy by `Tensor.copy_` of buffers of as many bytes as the kernel moves is sampled among the contenders of a kernel
that is no product: "of copy" is the kernel's bytes per second over the copy's. The target for it is that of kernels
which do a few operations an element, on tensors that no cache holds; the others compute exponentials or random numbers,
or never wait for memory. For products, "of MKL" is eager torch's time over Triton's, where eager is one call of MKL.
"checked" is the time with the sanitizer over that without. The interpreter runs in a process of its own, on the first
programs of the same launch: the time of one program, from the difference between two grids, is multiplied by their
number.

With --cpu-time the clock is this thread's CPU time, for a machine that others use as well; one thread only.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cpu_cases
import cpu_costs
import cpu_report
import torch
import triton
from cpu_cases import Case, Tensors
from options import made_folder, names_of, numbers
from rich.console import Console
from rich.progress import Progress
from tables import processor

from esper_triton.cpu.host import last_level_cache_bytes

# Spinning threads of torch take the cores from whoever has work; what glibc gives back to the system has to be cleared
# when it is wanted again. OpenMP and glibc read these once.
SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
SIZES = {"cache": 2**20, "memory": 2**24}  # elements: within the last-level cache of a server's core, and beyond it
LEAST_SAMPLE_NS = 300_000


def poison(outputs: Tensors) -> None:
    """What no kernel has written: NaN, or the least integer."""
    for out in outputs:
        out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)


def contenders(case: Case, made: Tensors) -> dict[str, Callable[[], Tensors]]:
    """Functions without arguments that compute the outputs, as far as they may into those `made` before."""
    compiled = torch.compile(_into if case.preallocated else _new, dynamic=False, fullgraph=True)
    launches = case.launches(made)

    def ours() -> Tensors:
        if case.preallocated:
            for launch in launches:
                launch()
            return made
        outputs = case.outputs()
        for launch in case.launches(outputs):
            launch()
        return outputs

    checked = [launch._replace(blocks={**launch.blocks, "sanitize": "bounds"}) for launch in launches]

    def sanitized() -> Tensors:
        for launch in checked:
            launch()
        return made

    def inductor() -> Tensors:
        if case.preallocated:
            compiled(case.expression, made, case.inputs)
            return made
        return compiled(case.expression, case.inputs)

    return {
        "triton": ours,
        "eager": lambda: case.eager(made, *case.inputs),
        "inductor": inductor,
        "sanitized": sanitized,
    }


def _into(expression, outputs: Tensors, inputs: Tensors) -> None:
    for output, result in zip(outputs, expression(*inputs), strict=True):
        output.copy_(result)


def _new(expression, inputs: Tensors) -> Tensors:
    return expression(*inputs)


def copies(case: Case) -> Callable[[], None]:
    """Copies half of the bytes that the kernel moves: these are read, and written."""
    source = torch.ones(case.bytes_moved // 8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def samples(functions: dict[str, Callable[[], object]], count: int, clock: Callable[[], int]) -> dict[str, list[float]]:
    """Nanoseconds of a call, `count` times for each function; short ones are called many times a sample."""
    calls = {}
    for name, function in functions.items():
        function()
        began = time.perf_counter_ns()
        for _ in range(3):
            function()
        calls[name] = max(1, math.ceil(3 * LEAST_SAMPLE_NS / (time.perf_counter_ns() - began)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, draw = list(functions), random.Random(7)
    for _ in range(count):
        draw.shuffle(order)
        for name in order:
            function, repeats = functions[name], range(calls[name])
            function()
            began = clock()
            for _ in repeats:
                function()
            times[name].append((clock() - began) / calls[name])
    return times


def measure(
    case: Case, rivals: dict[str, Callable[[], Tensors]], made: Tensors, options: argparse.Namespace, threads: int
) -> dict:
    """One row of the table. `made` are the outputs that rivals write into.

    Raises:
        SystemExit: a contender computes something else than float64 does, or changes its inputs.
    """
    before = tuple(x.clone() for x in case.inputs)
    for name, function in rivals.items():
        poison(made)
        if error := case.error(function()):
            raise SystemExit(f"error: {case.name}, {name}: {error}")
        if not all(map(torch.equal, case.inputs, before)):
            raise SystemExit(f"error: {case.name}, {name}: an input was changed")
    functions: dict[str, Callable[[], object]] = dict(rivals)
    if case.bytes_moved:
        functions["copy"] = copies(case)
    times = samples(functions, options.samples, time.thread_time_ns if options.cpu_time else time.perf_counter_ns)
    row = {
        "kernel": case.name,
        "threads": threads,
        "preallocated": case.preallocated,
        "samples": options.samples,
        **{f"{name}_us": statistics.median(values) / 1000 for name, values in times.items()},
    }
    for name in rivals:
        if name != "triton":
            row[f"{name}_ratio"] = row[f"{name}_us"] / row["triton_us"]
            ratios = [theirs / ours for theirs, ours in zip(times[name], times["triton"], strict=True)]
            row[f"{name}_spread"] = statistics.quantiles(ratios, n=4)[::2]
    row["memory_bound"] = not case.functions and case.bytes_moved > 2 * last_level_cache_bytes()
    if case.bytes_moved:
        row["of_copy"] = row["copy_us"] / row["triton_us"]
        row["gb_per_s"] = case.bytes_moved / row["triton_us"] / 1000
    else:
        row["gflop_per_s"] = case.flops / row["triton_us"] / 1000
        if case.library:
            row["of_mkl"] = row["eager_us"] / row["triton_us"]
    return row


def interpreted(name: str, size: int) -> dict[str, float]:
    """Microseconds of each case of one kernel in the interpreter, estimated in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("cpu_interpreter.py")), name, str(size)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the interpreter failed on {name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    every = ",".join(cpu_cases.NAMES)
    parser.add_argument("--kernels", default=every, type=names_of(cpu_cases.NAMES), help="with commas; default: all")
    both = ",".join(SIZES)
    parser.add_argument("--sizes", default=both, type=names_of(SIZES), help=f"of memory-bound kernels; default: {both}")
    parser.add_argument("--threads", default="1,2", type=numbers, help="numbers of threads, default 1,2")
    parser.add_argument("--samples", type=int, default=30, help="of each contender, default 30")
    parser.add_argument("--cpu-time", action="store_true", help="time this thread's CPU time; one thread only")
    parser.add_argument(
        "--no-inductor", action="store_true", help="leave Inductor out, which compiles for seconds a kernel"
    )
    parser.add_argument("--sanitizer", action="store_true", help="time kernels with checked accesses as well")
    parser.add_argument("--interpreter", action="store_true", help="estimate the interpreter's times as well")
    parser.add_argument("--costs", action="store_true", help="launch, compile and load times, and memory, as well")
    parser.add_argument("--launches", type=int, default=10**6, help="launches after which memory is compared")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--output",
        type=made_folder,
        help="a folder: everything, with cpu-speed.md, cpu-backend.json and cpu-backend.png there",
    )
    options = parser.parse_args()
    if options.cpu_time and options.threads != [1]:
        parser.error("--cpu-time counts one thread: add --threads 1")
    if options.samples < 2:
        parser.error("--samples must be at least 2")
    if options.output:
        if not options.output.is_dir():
            parser.error(f"--output {options.output} is no folder")
        options.costs = options.interpreter = options.sanitizer = True
        options.json = options.json or options.output / "cpu-backend.json"
    wanted = {"inductor": not options.no_inductor, "sanitized": options.sanitizer}
    options.leave_out = [name for name, is_wanted in wanted.items() if not is_wanted]
    return options


def main() -> None:
    options = parse()
    if not SETTINGS.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **SETTINGS})
    console = Console(width=150)
    sizes = tuple(SIZES[name] for name in options.sizes)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        triton.knobs.cache.dir = folder
        task = progress.add_task("kernels", total=len(options.kernels) * len(options.threads))
        for name in options.kernels:
            interpreter: dict[str, float] = {}
            if options.interpreter:
                interpreter = interpreted(name, sizes[0])
            for threads in options.threads:
                progress.update(task, description=f"{name}, {threads} thread{'s' * (threads > 1)}")
                torch.set_num_threads(threads)
                for case in cpu_cases.cases(name, sizes):
                    torch.compiler.reset()  # its code has the number of threads in it
                    made = case.outputs()
                    rivals = contenders(case, made)
                    for left_out in options.leave_out:
                        del rivals[left_out]
                    row = measure(case, rivals, made, options, threads)
                    if case.name in interpreter:
                        row["interpreter_us"] = interpreter[case.name]
                        row["interpreter_ratio"] = interpreter[case.name] / row["triton_us"]
                    rows.append(row)
                progress.advance(task)
        costs = cpu_costs.measure(options, progress) if options.costs else {}
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "settings": {name: os.environ.get(name) for name in SETTINGS},
        "clock": "CPU time of the thread" if options.cpu_time else "wall time",
    }
    figures = {"machine": machine, "kernels": rows, "costs": costs, "summary": cpu_report.summary(rows, costs)}
    cpu_report.show(figures, console)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.output:
        cpu_report.plot(rows, options.output / "cpu-backend.png")
        (options.output / "cpu-speed.md").write_text(cpu_report.markdown(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
