"""The kernels of the benchmark are right: a figure of a wrong kernel says nothing."""

import cpu_cases
import pytest
import torch


def poisoned(case):
    """Outputs that no kernel has written yet: NaN, or the least integer."""
    return tuple(
        out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min) for out in case.outputs()
    )


@pytest.mark.parametrize("name", cpu_cases.NAMES)
def test_each_kernel_of_the_benchmark_and_what_torch_does_instead_agree_with_float64(name):
    (case,) = cpu_cases.cases(name, None)
    before = tuple(x.clone() for x in case.inputs)
    outputs = poisoned(case)
    for launch in case.launches(outputs):
        launch()
    assert case.error(outputs) == ""
    assert case.error(case.eager(poisoned(case), *case.inputs)) == ""
    assert all(map(torch.equal, case.inputs, before))


@pytest.mark.parametrize("name", ["add", "dropout", "argmax", "layernorm-backward"])
def test_an_output_that_was_not_written_is_an_error(name):
    (case,) = cpu_cases.cases(name, None)
    assert "output 0" in case.error(poisoned(case))
    assert case.error(tuple(torch.zeros_like(out) for out in case.outputs())) != ""
