"""A gauntlet that nothing fails proves nothing: every broken variant of a kernel is rejected."""

from __future__ import annotations

import dataclasses

import pytest
from mutants import MUTANTS, Mutant, blueprint_of, forged

from esper_triton.urabrask import examine
from esper_triton.urabrask.gauntlet import LEVELS


def test_there_are_many_and_each_is_another() -> None:
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_kernel_is_rejected(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    # Those that `fast` does not show are of rows far apart: of `standard`, as much is done here as looks at these.
    far = dataclasses.replace(LEVELS["standard"], groups=4, relations=1, repeats=1, checked=1)
    monkeypatch.setitem(LEVELS, "standard", far)
    made = forged(mutant)
    report = examine(made.manifest, made.blobs, blueprint_of(mutant.blueprint), level=mutant.level, seed=11)
    assert report.verdict == "REJECTED", mutant.name
    assert report.reasons
