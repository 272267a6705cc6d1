"""Estimates what the cases of one kernel take in Triton's interpreter, and prints that as JSON; TRITON_INTERPRET=1.

    TRITON_INTERPRET=1 python bench/cpu_interpreter.py NAME ELEMENTS

An interpreted launch takes a time that does not depend on its grid (it copies tensors) and some milliseconds for each
program. Both follow from two launches, of the first program and of the first eight. Small grids are run whole.
"""

import json
import math
import sys
import time

import cpu_cases

_FEW, _MORE, _WHOLE, _TIMES = 1, 8, 16, 3


def programs(grid: tuple[int, ...]) -> int:
    return math.prod(grid)


def seconds(launch: cpu_cases.Launch, grid: tuple[int, ...]) -> float:
    """The least of some launches."""
    launch = launch._replace(grid=grid)
    times = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        launch()
        times.append(time.perf_counter() - began)
    return min(times)


def estimate_us(case: cpu_cases.Case) -> float:
    total = 0.0
    for launch in case.launches(case.outputs()):
        if programs(launch.grid) <= _WHOLE:
            total += seconds(launch, launch.grid)
            continue
        few, more = seconds(launch, (_FEW,)), seconds(launch, (_MORE,))
        each = (more - few) / (_MORE - _FEW)
        total += few + each * (programs(launch.grid) - _FEW)
    return total * 1e6


def main() -> None:
    name, size = sys.argv[1], int(sys.argv[2])
    (small,) = cpu_cases.cases(name, None)
    outputs = small.outputs()
    for launch in small.launches(outputs):
        launch()
    if error := small.error(outputs):
        raise SystemExit(f"{small.name}: {error}")
    (case,) = cpu_cases.cases(name, (size,))
    sys.stdout.write(json.dumps({case.name: estimate_us(case)}))


if __name__ == "__main__":
    main()
