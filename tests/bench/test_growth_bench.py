"""What the benchmark of growing compares is comparable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import growth
import growth_tasks
import pytest
import torch
from growth_tasks import TASKS
from shipped import k_of
from torch import Tensor, nn

import esper_triton as esper
from esper_triton.contracts.blueprint import Blueprint
from esper_triton.tezzeret.reference import reference


def randomised(adapter: nn.Module) -> nn.Module:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter.double()


def named(adapter: nn.Module, **names: str) -> dict[str, Tensor]:
    """The adapter's parameters by the blueprint's names."""
    return {name: adapter.get_parameter(own) for name, own in names.items()}


def test_the_adapter_of_rows_in_plain_torch_is_the_shipped_parallel_adapter() -> None:
    torch.manual_seed(0)
    adapter = randomised(growth_tasks.RowsAdapter(nn.Linear(6, 4), 3))
    x = torch.randn(5, 6, dtype=torch.float64)
    parameters = named(
        adapter, down_weight="down.weight", down_bias="down.bias", up_weight="up.weight", up_bias="up.bias"
    )
    expected = k_of("parallel_adapter", {"d": 4, "d_in": 6, "r": 3}, {"x": x, "h": adapter.host(x)}, parameters)
    assert torch.allclose(adapter(x), expected, rtol=1e-12)


def test_the_normalised_adapter_in_plain_torch_is_the_shipped_residual_mlp() -> None:
    torch.manual_seed(0)
    adapter = randomised(growth_tasks.NormalisedAdapter(nn.Linear(6, 4), 3))
    x = torch.randn(5, 6, dtype=torch.float64)
    parameters = named(
        adapter,
        norm_weight="norm.weight",
        norm_bias="norm.bias",
        in_weight="down.weight",
        in_bias="down.bias",
        out_weight="up.weight",
        out_bias="up.bias",
    )
    expected = k_of("residual_mlp", {"d": 4, "hidden_width": 3}, {"h": adapter.host(x)}, parameters)
    assert torch.allclose(adapter(x), expected, rtol=1e-12)


def residual_of(name: str, adapter: nn.Module, h: Tensor, dims: dict[str, int]) -> Tensor:
    """`name`.toml beside the benchmark, with the adapter's parameters."""
    names = [f"{layer}_{kind}" for layer in ("expand", "depth", "project") for kind in ("weight", "bias")]
    parameters = named(adapter, **{one: one.replace("_", ".") for one in names})
    for one in names:  # a blueprint has no dimensions of 1
        parameters[one] = parameters[one].squeeze()
    blueprint = Blueprint.load(growth_tasks.HERE / f"{name}.toml")
    return reference(blueprint, {"h": h}, parameters, dims=dims)


def test_the_adapter_of_sequences_in_plain_torch_is_the_blueprint_beside_the_benchmark() -> None:
    torch.manual_seed(0)
    adapter = randomised(growth_tasks.SequenceAdapter(nn.Linear(6, 8), 3, w=5))
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    expected = residual_of("sequence_residual", adapter, adapter.host(x), {"d": 8, "r": 3, "w": 5})
    assert torch.allclose(adapter(x), expected, rtol=1e-12)


def test_the_adapter_of_images_in_plain_torch_is_the_blueprint_beside_the_benchmark() -> None:
    torch.manual_seed(0)
    adapter = randomised(growth_tasks.ImageAdapter(nn.Conv2d(2, 4, 3, padding=1), 3))
    x = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    expected = residual_of("inverted_residual", adapter, adapter.host(x).movedim(1, -1), {"d": 4, "r": 3})
    assert torch.allclose(adapter(x).movedim(1, -1), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: growth_tasks.RowsAdapter(nn.Linear(6, 4), 3), (2, 6)),
        (lambda: growth_tasks.NormalisedAdapter(nn.Linear(6, 4), 3), (2, 6)),
        (lambda: growth_tasks.SequenceAdapter(nn.Linear(6, 4), 3), (2, 5, 6)),
        (lambda: growth_tasks.ImageAdapter(nn.Conv2d(6, 4, 3, padding=1), 3), (2, 6, 5, 5)),
    ],
)
def test_a_fresh_adapter_adds_nothing(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    adapter, x = make(), torch.randn(shape)
    assert torch.equal(adapter(x), adapter.host(x))


@pytest.mark.parametrize("name", TASKS)
def test_hosts_differ_in_the_narrow_place_alone(name: str) -> None:
    task = TASKS[name]
    small, large = task.build(task.narrow), task.build(task.wide)
    shapes = {key: parameter.shape for key, parameter in small.named_parameters()}
    differing = [key for key, parameter in large.named_parameters() if parameter.shape != shapes[key]]
    assert differing
    assert all(key.startswith(task.block) for key in differing)
    x, y = (part[:3] for part in task.data(0).train)
    for model in (small, large):
        assert growth.loss_of(model, x, y).isfinite()
        assert model(x).shape[:-1] == y.shape


@pytest.mark.parametrize("name", TASKS)
def test_what_grows_is_no_more_than_a_fifth_of_what_the_wider_host_has_more(name: str) -> None:
    task = TASKS[name]
    small, large = task.build(task.narrow), task.build(task.wide)
    layer = small.get_submodule(task.at)
    (_, dims), *smaller = task.kernels(layer)
    adapter = task.adapter(layer, dims.get("r") or dims["hidden_width"])
    added = growth._parameters(adapter) - growth._parameters(layer)
    assert added == task.parameters
    assert all(sum(other.values()) < sum(dims.values()) for _, other in smaller)
    assert added <= 0.2 * (growth._parameters(large) - growth._parameters(small))
    rival = growth.adapted(task, task.build(task.narrow), task.at, added)
    assert growth._parameters(rival) == growth._parameters(small) + added


def test_no_image_is_in_two_parts_and_the_seed_draws_which_is_in_which() -> None:
    parts = [[x for x, _ in (data.train, data.validation, data.test)] for data in map(growth_tasks.digits, (3, 4))]
    assert [len(x) for x in parts[0]] == [1000, 300, 497]
    first, second = (torch.cat(own) for own in parts)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)  # all of them, each once
    assert torch.equal(growth_tasks.parity(3).test[1], growth_tasks.digits(3).test[1] % 2)


def test_the_labels_of_the_text_are_where_its_blanks_were_and_no_window_is_in_two_parts() -> None:
    data = growth_tasks.words(0)
    text, letters = growth_tasks.corpus(), growth_tasks.alphabet()
    x, y = data.test
    read = "".join(letters[c] + " " * int(blank) for c, blank in zip(x[-1].tolist(), y[-1].tolist(), strict=True))
    assert read.strip() in " ".join(text.split())  # the last window, with its blanks put back
    other = growth_tasks.words(1)
    assert torch.equal(other.test[0], x)
    assert torch.equal(other.validation[0], data.validation[0])
    assert not torch.equal(other.train[0], data.train[0])
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [12800, 1000, 1000]


def test_an_epoch_has_every_example_once() -> None:
    data = growth_tasks.Data(torch.arange(12.0)[:, None], torch.arange(12), (7, 3, 2), batch=3)
    batches = list(data.epoch(torch.Generator().manual_seed(0)))
    assert len(batches) == data.steps == 3
    assert torch.cat([y for _, y in batches]).sort().values.tolist() == list(range(7))
    assert all(torch.equal(x[:, 0].long(), y) for x, y in batches)
    noisy = growth_tasks.Data(torch.zeros(500, 8), torch.zeros(500), (500, 0, 0), batch=500, noise=0.4)
    ((x, _),) = noisy.epoch(torch.Generator().manual_seed(0))
    assert float(x.std()) == pytest.approx(0.4, rel=0.05)  # of 4,000 numbers


def run_of(validation: list[float], under_way: list[bool], accuracy: float, parameters: int) -> growth.Run:
    return growth.Run(accuracy, validation[-1], parameters, 1.0, 0.9, 10, validation, under_way, [accuracy])


def test_the_summary_counts_steps_dips_and_shares_as_it_says() -> None:
    quiet = [False] * 4
    runs = {
        "host": [run_of([1.0, 0.8, 0.9, 0.7], quiet, 0.8, 100)],
        "grown": [run_of([1.0, 0.7, 0.75, 0.6], [False, False, True, True], 0.89, 120)],
        "adapter": [run_of([1.0, 0.9, 0.9, 0.9], quiet, 0.85, 120)],
        "wide": [run_of([0.6, 0.5, 0.4, 0.3], quiet, 0.9, 200)],
    }
    rows = {row["contestant"]: row for row in growth.summary(runs)}
    assert rows["grown"]["steps to the host's best"] == "20 (1 of 1)"
    assert rows["adapter"]["steps to the host's best"] == "never"
    assert rows["grown"]["dip"] == "0.050 ± 0.000 (host: 0.100 ± 0.000)"
    found = {row["wanted"]: row["found"] for row in growth.verdict(runs)}
    assert found["90 % of the wider host's gain"] == "90%"
    assert found["at most 20 % of its added parameters"] == "20%"
    assert found["better with every seed"] == "1 of 1"


def test_what_other_parts_have_in_the_folder_is_kept_and_its_tables_are_made_again(tmp_path: Path) -> None:
    sizes = {"host": 100, "grown": 120, "adapter": 120, "wide": 200}
    runs = {who: [vars(run_of([1.0, 0.5], [False, True], 0.8, size))] for who, size in sizes.items()}
    circumstances = {"runs at a time": 1, "load of the machine": 0.5}
    figures = {
        "runs": {"mlp": runs, "cnn": runs},
        "tables": {"decisions": {"a decision": [{"it": "waits", "seeds": 3}]}},
        "circumstances": {"mlp": circumstances, "decisions": circumstances},
    }
    path = tmp_path / "growth.json"
    assert growth.kept(path, ["mlp"]) == {"runs": {}, "tables": {}, "circumstances": {}}
    path.write_text(json.dumps(figures), encoding="utf-8")
    kept = growth.kept(path, ["cnn"])
    assert kept == figures | {"runs": {"mlp": runs}}
    tables = growth.tables_of(kept)
    assert list(tables) == ["mlp", "mlp: what was wanted", "a decision", "the circumstances"]
    assert [row["part"] for row in tables["the circumstances"]] == ["mlp", "decisions"]


def test_before_anything_grows_the_wrapped_host_trains_as_the_bare_one(tmp_path: Path) -> None:
    urza = esper.Urza(tmp_path / "urza")
    runs = growth.contest(TASKS["mlp"], 0, 2, urza)
    assert list(runs) == ["host", "grown", "adapter", "wide"]
    assert runs["grown"].validation == runs["host"].validation  # bit for bit: the warm-up is longer
    assert runs["adapter"].parameters == runs["host"].parameters + TASKS["mlp"].parameters


def test_the_halves_that_the_gates_see_are_drawn_anew() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.randint(2, (40,))
    model = nn.Linear(3, 2)
    seen = {growth.loss_on_half(model, (x, y)) for _ in range(5)}
    assert len(seen) == 5
    each = nn.functional.cross_entropy(model(x), y, reduction="none").detach().sort().values
    assert all(float(each[:20].mean()) <= loss <= float(each[20:].mean()) for loss in seen)
