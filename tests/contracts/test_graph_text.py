"""A graph as text, TOML and JSON: what is read, what is refused, and that what is written reads back the same."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_triton.contracts.blueprint import Blueprint
from esper_triton.contracts.errors import BlueprintError
from esper_triton.contracts.files import write_toml
from esper_triton.contracts.graph import Op, attributes
from esper_triton.contracts.graph_text import read_graph, write_graph
from esper_triton.testing.graphs import blueprints

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # half of a surrogate pair is no text


def op(name: str, kind: str, *inputs: str | float, **attrs: object) -> Op:
    return Op.model_validate({"name": name, "op": kind, "inputs": inputs, "attrs": attrs})


def test_nested_calls_and_operators_become_ops_in_order():
    assert read_graph("z = linear(h, w, b)\nk = h + linear(gelu(z), u)  # a comment\n") == (
        op("z", "linear", "h", "w", "b"),
        op("k_1", "gelu", "z"),
        op("k_2", "linear", "k_1", "u"),
        op("k", "add", "h", "k_2"),
    )


def test_numbers_signs_comparisons_and_names_alone():
    assert read_graph("m = h >= -2\nk = -h / +3 @ w\ny = k\nz = 1e-3\n") == (
        op("m", "ge", "h", -2.0),
        op("k_1", "neg", "h"),
        op("k_2", "div", "k_1", 3.0),
        op("k", "matmul", "k_2", "w"),
        op("y", "identity", "k"),
        op("z", "identity", 0.001),
    )


def test_a_fresh_name_is_none_that_is_used():
    assert [o.name for o in read_graph("k_1 = relu(h)\nk = tanh(relu(k_1)) + k_2\n")] == ["k_1", "k_3", "k_4", "k"]


def test_attributes_by_keyword_after_the_arguments_and_as_expressions():
    ops = read_graph(
        "a = leaky_relu(h, 0.25)\nb = reshape(a, shape=[heads, d//heads, 2])\nc = slice(b, stop=2*r)\n"
        "e = layernorm(h, weight=w, bias=v, eps=1)\nf = clamp(h, min=None, max=2)\ng = gelu(h, approximate='tanh')\n"
    )
    assert [o.attrs for o in ops] == [
        {"slope": 0.25},
        {"shape": ("heads", "d // heads", "2")},
        {"stop": "2 * r"},
        {"eps": 1.0},
        {"max": 2.0},
        {"approximate": "tanh"},
    ]
    assert ops[3].inputs == ("h", "w", "v")
    assert attributes(ops[2]) == {"start": "0", "stop": "2 * r"}
    assert attributes(ops[4]) == {"min": None, "max": 2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k = gelo(h)", "graph line 1: unknown operation 'gelo'; did you mean 'gelu'"),
        ("k = h +", "graph line 1: invalid syntax"),
        ("k = h\nimport os", "graph line 2: 'import os' is no assignment"),
        ("k, l = h", "is no assignment to one name"),
        ("k = __import__('os')", "unknown operation '__import__'"),
        ("k = h.relu()", "is not taken"),
        ("k = h ** 2", "is not taken"),
        ("k = [h]", "is not taken"),
        ("k = add(*h)", r"\* and \*\* are not taken"),
        ("k = relu(h, 1)", "too many arguments for relu"),
        ("k = dropout(h, 0.1, p=0.2)", "p is given twice"),
        ("k = h + True", "'True' is not taken"),
        ("k = h + 1e999", "neither a name nor a finite number"),
        ("k = h + 1" + "0" * 400, "too large"),
        ("k = " + "-(" * 500 + "h" + ")" * 500, "graph"),
        ("", "graph has no assignment"),
        ("k = h\n" * 30000, "at most 100000 are allowed"),
    ],
)
def test_what_is_no_graph_is_refused_with_its_line(text: str, message: str):
    with pytest.raises(BlueprintError, match=message):
        Blueprint.from_text(json.dumps({"name": "a", "input": "h", "dims": {"d": {}}, "graph": text}))


def test_every_line_that_is_wrong_is_told():
    with pytest.raises(BlueprintError) as caught:
        Blueprint.from_text('name = "a"\ninput = "h"\ngraph = """a = gelo(h)\nb = h ** 2\n"""\n[dims]\nd = {}\n')
    assert "line 1" in str(caught.value)
    assert "line 2" in str(caught.value)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(blueprints(), TEXT, st.sampled_from([None, "torch.nn.Linear"]))
def test_what_is_written_reads_back_the_same(blueprint: Blueprint, prose: str, equal: str | None):
    body = blueprint.model_dump() | {"description": prose, "introduced_by": prose + "\n", "equivalent_to": equal}
    blueprint = Blueprint.model_validate(body)
    assert Blueprint.from_text(blueprint.to_toml()) == blueprint
    assert Blueprint.from_text(blueprint.to_json()) == blueprint
    assert read_graph(write_graph(blueprint.ops)) == blueprint.ops


@given(st.dictionaries(TEXT, st.recursive(TEXT | st.integers() | st.booleans(), st.lists), max_size=4))
def test_toml_that_is_written_is_read_by_pythons_own_parser(body: dict[str, object]):
    assert tomllib.loads(write_toml(body)) == body


def test_both_kinds_of_file_load(tmp_path: Path):
    blueprint = Blueprint.from_text('name = "a"\ninput = "h"\ngraph = "k = relu(h)"\n[dims]\nd = { default = 8 }\n')
    for name, text in (("a.json", blueprint.to_json()), ("a.toml", blueprint.to_toml())):
        (tmp_path / name).write_text(text, encoding="utf-8")
        loaded = Blueprint.load(tmp_path / name)
        assert loaded.model_copy(update={"path": None}) == blueprint
        assert loaded.dims["d"].default == 8
    with pytest.raises(BlueprintError, match=r"no such file; did you mean '(a\.json|a\.toml)'"):
        Blueprint.load(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("[", encoding="utf-8")
    with pytest.raises(BlueprintError, match="not valid JSON"):
        Blueprint.load(tmp_path / "c.json")


def test_a_hand_written_source_keeps_its_id_and_reads_back_beside_it(adapter_path: Path, tmp_path: Path):
    blueprint = Blueprint.load(adapter_path)
    (tmp_path / blueprint.source).write_text(blueprint.source_text, encoding="utf-8")
    for name, text in (("a.json", blueprint.to_json()), ("a.toml", blueprint.to_toml())):
        (tmp_path / name).write_text(text, encoding="utf-8")
        again = Blueprint.load(tmp_path / name)
        assert again.id == blueprint.id
        assert again.model_copy(update={"path": blueprint.path}) == blueprint
    with pytest.raises(BlueprintError, match=r"read it with Blueprint\.load"):
        Blueprint.from_text(blueprint.to_toml())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "has neither a graph nor a source"),
        ({"graph": "k = h", "source": "a.py"}, "has a graph, and so no 'source'"),
        ({"graph": "k = h", "ops": [{"name": "k", "op": "relu", "inputs": ["h"]}]}, "both 'graph' and 'ops'"),
        ({"graph": 3}, "graph is int, expected text"),
        ({"graph": "k = h", "output": "kk"}, "output 'kk' is no op's value; did you mean 'k'"),
        ({"graph": "k = h", "feature_dim": "e"}, "feature_dim 'e' is not a dim"),
        ({"graph": "k = h", "dims": {"d": {"min": 4, "default": 2}}}, "default 2 is not within 4 to 65536"),
        ({"graph": "k = h", "grap": ""}, "unknown key 'grap'; did you mean 'graph'"),
        ({"graph": "k = h", "schema_version": "2.0"}, "this release reads 1.x"),
    ],
)
def test_a_blueprint_has_one_form(body: dict[str, object], message: str):
    with pytest.raises(BlueprintError, match=message):
        Blueprint.validated("blueprint", {"name": "a", "input": "h", "dims": {"d": {}}} | body)
