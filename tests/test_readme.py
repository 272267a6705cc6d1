"""Figures that the README and the page on growing a model quote are those of the pages that benches wrote."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def rows_of(page: str, section: str) -> list[dict[str, str]]:
    """The first table below a heading, as the page has it."""
    text = (ROOT / "docs" / page).read_text("utf-8").partition(f"\n## {section}\n")[2]
    lines = re.search(r"^\|.*?(?=\n\n|\n?\Z)", text, re.DOTALL | re.MULTILINE)[0].splitlines()
    head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in body]


def first_number(cell: str) -> float:
    return float(cell.split()[0])


def test_the_comparison_of_the_readme_says_what_was_measured():
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    kernels = rows_of("cpu-speed.md", "Kernels")
    interpreter = [first_number(row["interpreter"]) for row in kernels if row["interpreter"]]
    assert f"{min(interpreter):.0f} to {max(interpreter):.0f} times as fast" in text
    checked = [first_number(row["sanitizer"]) for row in kernels if row["sanitizer"]]
    assert f"at {min(checked)} to {max(checked)} times the time" in text
    inductor = sorted(first_number(row["over Inductor C++"]) for row in kernels if row["over Inductor C++"])
    assert f"1/{inductor[-1]:.1f} to 1/{inductor[0]:.2f} of the time" in text
    assert inductor[len(inductor) // 2] > 2.0
    dormant = rows_of("kasmina-speed.md", "dormant")
    for what, said in (("wrapped", "cost {} to {} times"), ("PEFT, disabled", "adapters cost {} to {}")):
        ratios = [first_number(row["ratio"]) for row in dormant if row["model"] == what]
        ends = (f"{min(ratios):.2f}", f"{max(ratios):.2f}")
        assert said.format(*ends) in text, (what, ends)
    cache = {row["what"]: row["value"] for row in rows_of("kasmina-speed.md", "cache")}
    assert f"{float(cache['load from Urza on a miss, p50, us']) / 1000:.1f} ms in the median" in text
    for host, name in {"mlp": "an MLP", "cnn": "a CNN", "transformer": "a transformer"}.items():
        found = {row["contestant"]: first_number(row["accuracy"]) for row in rows_of("growth.md", host)}
        assert f"{found['grown']:.3f} against {found['adapter']:.3f} for {name}" in text


def test_what_the_page_on_growing_a_model_says_it_costs_is_what_was_measured():
    section = (ROOT / "docs" / "kasmina.md").read_text("utf-8").partition("\n## What it costs\n")[2]
    text = " ".join(section.partition("\n## ")[0].split())
    measured = "kasmina-speed.md"
    ends = {}
    for model in ("wrapped", "again", "PEFT, disabled"):
        ratios = [first_number(row["ratio"]) for row in rows_of(measured, "dormant") if row["model"] == model]
        ends[model] = (f"{min(ratios):.2f}", f"{max(ratios):.2f}")
    assert "{} to {} times the bare model".format(*ends["wrapped"]) in text
    assert "a copy of it measures {} to {};".format(*ends["again"]) in text
    assert "disabled adapters take {} to {} times".format(*ends["PEFT, disabled"]) in text
    active = {row["what"]: row for row in rows_of(measured, "active")}
    beyond = [first_number(active[what]["beyond_us"]) for what in ("no_grad", "autograd")]
    assert f"{beyond[0]:.1f} us beside the kernel and the host without gradients, {beyond[1]:.1f} us with" in text
    bound = [first_number(row["bound_beyond_kernel_us"]) for row in active.values()]
    assert f"{min(bound):.2f} to {max(bound):.2f} us more than the kernel's own" in text
    adapter = {row["threads"]: row for row in rows_of(measured, "adapter") if row["d"] == "512"}
    alone, hosted = ([f"{first_number(adapter[n][key]):.2f}" for n in "12"] for key in ("without host", "eager/ours"))
    assert f"is {alone[0]} times as fast as in eager torch on one thread and {alone[1]} on two" in text
    assert f"with its host, which is the larger part, {hosted[0]} and {hosted[1]}." in text
    tables = ("cache", "state", "pause")
    value = {row["what"]: float(row["value"]) for section in tables for row in rows_of(measured, section)}
    load = value["load from Urza on a miss, p50, us"] / 1000
    assert f"{value['hit, us']:.1f} us from the cache, {load:.1f} ms from the store" in text
    without, during = value["step p50 without, ms"], value["step p50 while 100 kernels load, ms"]
    later = 100 * (value["p99 with / without"] - 1)
    assert f"a training step of {without:.0f} ms takes {100 * (during / without - 1):.1f} % longer" in text
    assert f"and its 99th percentile {later:.1f} %" in text
    moves = "transitions of 10,000 seeds: the boundary, ms, median of four"
    assert f"{value[moves]:.0f} ms for a transition of 10,000 seeds" in text
    assert f"and {value['asking for them one by one, ms']:.0f} ms to ask" in text
