"""What a store remembers of requests: bytes by digest, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_triton.contracts.errors import StoreUnavailable
from esper_triton.urza import Urza

REQUEST = "5e" * 32


def test_a_store_that_is_not_there_remembers_nothing_and_is_not_made(tmp_path: Path) -> None:
    store = Urza(tmp_path / "urza")
    assert store.recall(REQUEST) is None
    assert not store.root.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(contents=st.lists(st.binary(max_size=300), min_size=1, max_size=3))
def test_what_was_remembered_last_is_recalled_by_every_object_on_the_directory(
    tmp_path: Path, contents: list[bytes]
) -> None:
    for content in contents:
        Urza(tmp_path / "urza").remember(REQUEST, content)
        assert Urza(tmp_path / "urza").recall(REQUEST) == content
    assert Urza(tmp_path / "urza").recall("00" * 32) is None


def test_a_link_or_a_file_that_is_far_too_large_is_nothing(tmp_path: Path) -> None:
    store = Urza(tmp_path / "urza")
    store.remember(REQUEST, b"kept")
    path = store.root / "requests" / REQUEST
    path.unlink()
    (tmp_path / "outside").write_bytes(b"of somebody else")
    path.symlink_to(tmp_path / "outside")
    assert store.recall(REQUEST) is None
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2 << 20)
    assert store.recall(REQUEST) is None


@pytest.mark.parametrize("request_", ["", "../../escape", "5E" * 32, "5e" * 31])
def test_only_a_digest_is_a_request(tmp_path: Path, request_: str) -> None:
    store = Urza(tmp_path / "urza")
    with pytest.raises(ValueError, match="is not a SHA-256 of 64 hex digits"):
        store.recall(request_)
    with pytest.raises(ValueError, match="is not a SHA-256 of 64 hex digits"):
        store.remember(request_, b"")
    assert not (tmp_path / "escape").exists()


def test_what_is_too_large_to_be_recalled_is_not_remembered(tmp_path: Path) -> None:
    store = Urza(tmp_path / "urza")
    store.remember(REQUEST, b"before")
    with pytest.raises(ValueError, match="1048577 bytes to remember; at most 1048576 are allowed"):
        store.remember(REQUEST, bytes((1 << 20) + 1))
    assert store.recall(REQUEST) == b"before"


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreUnavailable, match="cannot be"):
        Urza(tmp_path / "file" / "urza").remember(REQUEST, b"")
