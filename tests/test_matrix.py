"""What `make test-matrix` makes of pytest's reports."""

import pytest
from matrix import HEADING, REPORT, Outcomes, Result, outcomes, with_results

JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites name="pytest tests"><testsuite name="pytest" tests="4">
<testcase classname="tests.cpu.test_a" name="test_one" time="0.1" />
<testcase classname="tests.cpu.test_a" name="test_two[x]" time="0.1"><failure message="assert 1 == 2&#10;more">at
</failure></testcase>
<testcase classname="tests.cpu.test_b" name="test_three" time="0.1"><error message="no setup">at</error></testcase>
<testcase classname="tests.cpu.test_b" name="test_four" time="0.1"><skipped message="of x86-64">at</skipped></testcase>
</testsuite></testsuites>"""


def result(triton: str, **tests: object) -> Result:
    made = Outcomes(**{"passed": 7, "failed": (), "skipped": (), **tests})
    return Result(triton=triton, torch="2.13.0", tests=made, seconds=12.6, date="2026-01-31")


def test_a_test_that_failed_is_told_with_its_reason():
    found = outcomes(JUNIT)
    assert found.passed == 1
    assert found.failed == (
        "failure: tests.cpu.test_a::test_two[x]: assert 1 == 2",
        "error: tests.cpu.test_b::test_three: no setup",
    )
    assert found.skipped == ("skipped: tests.cpu.test_b::test_four: of x86-64",)


def test_a_release_without_failures_is_one_line():
    assert result("3.8.0").lines() == "triton 3.8.0: 7 passed in 13 s"
    first, *more = result("3.8.0", failed=("failure: a", "error: b")).lines().splitlines()
    assert first == "triton 3.8.0: 2 FAILED, 7 passed in 13 s"
    assert [line.strip() for line in more[:2]] == ["failure: a", "error: b"]
    assert "3.8.0.log" in more[2]


def test_results_take_the_place_of_those_before_them_in_the_order_of_releases():
    once = with_results(f"# Title\n\ntext\n\n{HEADING}\n\nold\n", [result("3.10.0"), result("3.9.0", failed=("a",))])
    assert once == (
        f"# Title\n\ntext\n\n{HEADING}\n\n"
        "| triton | torch | passed | failed | skipped | seconds | date |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| 3.9.0 | 2.13.0 | 7 | 1 | 0 | 13 | 2026-01-31 |\n"
        "| 3.10.0 | 2.13.0 | 7 | 0 | 0 | 13 | 2026-01-31 |\n"
    )
    assert with_results(once, [result("3.9.0")]).count("3.9.0") == 1


def test_the_document_has_the_section_that_is_replaced():
    assert f"\n{HEADING}\n" in REPORT.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no section"):
        with_results("# Title\n", [])
