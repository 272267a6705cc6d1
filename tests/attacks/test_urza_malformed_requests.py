"""Malformed requests, kept as files, and the status and code that a server refuses each with."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from make_urza_corpus import CORPUS
from urza_requests import TOKENS

from esper_triton.urza import Urza

sys.path.append(str(Path(__file__).resolve().parent.parent / "urza"))
import loopback

REFUSALS = json.loads((CORPUS / "request-refusals.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loopback.Loopback]:
    folder = tmp_path_factory.mktemp("requests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loopback, "TOKENS", {**TOKENS, "all": "all-01234567890123456789"})
        running = loopback.Loopback(Urza(folder / "urza"), folder, tls=False)
        yield running
        running.stop()


def test_every_file_has_its_refusal():
    assert sorted(path.name for path in (CORPUS / "requests").iterdir()) == sorted(REFUSALS)
    assert len(REFUSALS) >= 40


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_a_malformed_request_is_refused(server: loopback.Loopback, name: str):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
        plain.sendall((CORPUS / "requests" / name).read_bytes())
        answer = b""
        while piece := plain.recv(1 << 16):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    code = json.loads(body)["error"]["code"] if b"application/json" in head else None
    assert [status, code] == REFUSALS[name]
    assert 400 <= status < 500
    assert not (server.store.root / "refs").exists()
    assert not (server.store.root / "objects").exists()
