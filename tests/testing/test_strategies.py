"""What the strategies draw can be used."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.manifest import KernelStatus
from esper_triton.kasmina.kinds import kind_of
from esper_triton.testing import artifacts, blueprints, inputs, layers, respelled
from esper_triton.urza import Urza


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_layer_takes_its_inputs_and_gives_what_kasmina_knows_of_it(data: st.DataObject) -> None:
    layer = data.draw(layers())
    x = data.draw(inputs(layer))
    out = layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
    kind = kind_of(layer)
    assert out.shape[kind.feature_dim] == kind.width
    assert bool(out.isfinite().all())


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_blueprint_is_one_and_another_spelling_of_it_the_same(data: st.DataObject) -> None:
    blueprint = data.draw(blueprints())
    assert isinstance(blueprint, Blueprint)
    assert data.draw(respelled(blueprint)).id == blueprint.id


@given(data=st.data())
@settings(max_examples=3, deadline=None)
def test_an_artifact_is_validated_and_in_the_store(data: st.DataObject, library_store: Urza) -> None:
    artifact = data.draw(artifacts(library_store, ["lora", "channel_scale"]))
    assert artifact.status is KernelStatus.VALIDATED
    assert library_store.load(artifact.id)[0] == artifact


def test_the_same_draw_gives_the_same_layer_and_leaves_torchs_stream_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)

    @given(layer=layers(["linear"]))
    @settings(max_examples=2, deadline=None, database=None)
    def draw(layer: nn.Module) -> None:
        assert isinstance(layer, nn.Linear)

    draw()
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), expected)
