"""A gauntlet that nothing fails proves nothing: every broken variant of a kernel is rejected."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, Mutant, blueprint_of, forged

from esper_triton.urabrask import examine


def test_there_are_many_and_each_is_another() -> None:
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_kernel_is_rejected(mutant: Mutant) -> None:
    made = forged(mutant)
    report = examine(made.manifest, made.blobs, blueprint_of(mutant.blueprint), level=mutant.level, seed=11)
    assert report.verdict == "REJECTED", mutant.name
    assert report.reasons
