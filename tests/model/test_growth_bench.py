"""What the benchmark of growing compares is comparable."""

from __future__ import annotations

import growth
import pytest
import torch
from shipped import k_of
from torch import nn


@pytest.mark.parametrize("name", growth.HOSTS)
def test_the_adapter_in_plain_torch_is_the_shipped_one(name: str) -> None:
    build, narrow, _ = growth.HOSTS[name]
    torch.manual_seed(0)
    host = build(narrow)[int(build.at)].double()
    adapted = growth.Adapted(host, 3).double()
    for parameter in adapted.up.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, host.in_features, dtype=torch.float64)
    parameters = {
        "down_weight": adapted.down.weight,
        "down_bias": adapted.down.bias,
        "up_weight": adapted.up.weight,
        "up_bias": adapted.up.bias,
    }
    dims = {"d": narrow, "d_in": host.in_features, "r": 3}
    expected = k_of("parallel_adapter", dims, {"x": x, "h": host(x)}, parameters)
    assert torch.allclose(adapted(x), expected, rtol=1e-12)


@pytest.mark.parametrize("name", growth.HOSTS)
def test_hosts_differ_in_the_narrow_layer_and_in_what_reads_it_alone(name: str) -> None:
    build, narrow, wide = growth.HOSTS[name]
    small, large = build(narrow), build(wide)
    differing = [
        k
        for k, (a, b) in enumerate(zip(small, large, strict=True))
        if [p.shape for p in a.parameters()] != [p.shape for p in b.parameters()]
    ]
    assert len(differing) == 2
    assert differing[0] == int(build.at)
    assert small(torch.randn(2, 64)).shape == large(torch.randn(2, 64)).shape == (2, 10)


def test_no_image_is_in_two_parts() -> None:
    images = growth.Digits(3)
    parts = [x for x, _ in (images.train, images.validation, images.test)]
    assert [len(x) for x in parts] == [1000, 300, 497]
    digits = torch.cat(parts).sort(0).values
    again = torch.cat([x for x, _ in (growth.Digits(4).train, growth.Digits(4).validation, growth.Digits(4).test)])
    assert torch.equal(digits, again.sort(0).values)  # all of them, each once
