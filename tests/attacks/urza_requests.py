"""Malformed requests to a server of a store, as bytes on the wire; `make_urza_corpus.py` writes them to files."""

from __future__ import annotations

import json
from collections.abc import Iterator

TOKENS = {name: f"{name}-01234567890123456789" for name in ("read", "write", "validate")}
_ID = "0123456789ab-cpu-standard-ba9876543210"
_ZEROS = "0" * 64


def _request(line: str, *headers: str, body: bytes = b"", token: str | None = "write", sized: bool = True) -> bytes:
    lines = [f"{line} HTTP/1.1", "Host: localhost", "Connection: close"]
    if token is not None:
        lines.append(f"Authorization: Bearer {TOKENS.get(token, token)}")
    if body and sized:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def requests() -> Iterator[tuple[str, bytes]]:
    """Names and bytes."""

    def post(path: str, body: object, token: str = "write") -> bytes:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return _request(f"POST {path}", body=content, token=token)

    yield "no_token", _request("GET /v1/artifacts", token=None)
    yield "unknown_token", _request("GET /v1/artifacts", token="nobody-01234567890123456789")
    yield "token_in_the_query", _request(f"GET /v1/artifacts?token={TOKENS['read']}", token=None)
    yield "two_tokens", _request("GET /v1/artifacts", token=f"{TOKENS['read']}, Bearer {TOKENS['write']}")
    yield "basic_login", _request("GET /v1/artifacts", "Authorization: Basic d3JpdGU6d3JpdGU=", token=None)
    yield "reader_writes", _request(f"PUT /v1/objects/{_ZEROS}", body=b"x", token="read")
    yield "writer_validates", post(f"/v1/artifacts/{_ID}/status", {"status": "VALIDATED"})
    yield "path_goes_up", _request("GET /v1/objects/../../keys/forge.key")
    yield "path_goes_up_encoded", _request("GET /v1/objects/%2e%2e%2f%2e%2e%2fkeys%2fforge.key")
    yield "path_goes_up_twice_encoded", _request("GET /v1/objects/%252e%252e%252fkeys%252fforge.key")
    yield "path_is_absolute", _request("GET /v1/objects//etc/passwd")
    yield "path_has_a_null", _request("GET /v1/objects/%00")
    yield "digest_in_capitals", _request(f"GET /v1/objects/{'A' * 64}")
    yield "digest_too_short", _request(f"GET /v1/objects/{'a' * 63}")
    yield "digest_with_a_newline", _request(f"GET /v1/objects/{'a' * 64}%0a")
    yield "digest_in_other_digits", _request(f"GET /v1/objects/{'%D9%A0' * 64}")
    yield "id_goes_up", _request("GET /v1/artifacts/..%2furza.json")
    yield "wrong_digest", _request(f"PUT /v1/objects/{_ZEROS}", body=b"not what hashes to zeros")
    yield "compressed", _request(f"PUT /v1/objects/{_ZEROS}", "Content-Encoding: gzip", body=b"x")
    yield "longer_than_it_may_be", _request(f"PUT /v1/objects/{_ZEROS}", "Content-Length: 99999999999999")
    yield "length_is_negative", _request(f"PUT /v1/objects/{_ZEROS}", "Content-Length: -1")
    yield (
        "two_lengths",
        _request(f"PUT /v1/objects/{_ZEROS}", "Content-Length: 1", "Content-Length: 2", body=b"xx", sized=False),
    )
    yield (
        "length_and_chunks",
        _request(
            f"PUT /v1/objects/{_ZEROS}",
            "Content-Length: 3",
            "Transfer-Encoding: chunked",
            body=b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n",
            sized=False,
        ),
    )
    yield (
        "broken_chunks",
        _request(f"PUT /v1/objects/{_ZEROS}", "Transfer-Encoding: chunked", body=b"zz\r\nx\r\n", sized=False),
    )
    yield "header_too_long", _request("GET /v1/artifacts", "X-Long: " + "x" * 20_000)
    yield "header_folded", _request("GET /v1/artifacts", "X-One: a", " b")
    yield "method_unknown", _request("BREW /v1/artifacts")
    yield "method_not_there", _request("DELETE /v1/artifacts")
    yield "http_2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield "not_http", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"
    yield "query_is_no_json", post("/v1/kernels/query", b"{")
    yield "query_is_deep", post("/v1/kernels/query", b"[" * 20_000 + b"]" * 20_000)
    yield "query_has_a_field_too_many", post("/v1/kernels/query", {"order": "id; DROP TABLE artifacts"})
    yield "query_has_nan", post("/v1/kernels/query", b'{"max_latency_us": NaN}')
    yield "query_for_too_many", post("/v1/kernels/query", {"limit": 10_001})
    yield "commit_of_nothing", post("/v1/artifacts", {})
    yield "commit_of_a_path", post("/v1/artifacts", {"manifest": "../keys/forge.key"})
    yield "commit_of_what_is_not_there", post("/v1/artifacts", {"manifest": _ZEROS})
    yield "commit_of_a_newer_schema", post("/v1/artifacts", {"schema_version": "2.0", "manifest": _ZEROS})
    yield "pin_that_says_nothing", post(f"/v1/artifacts/{_ID}/pin", {})
    yield "pin_that_is_perhaps", post(f"/v1/artifacts/{_ID}/pin", {"pinned": "perhaps"})
    yield "pin_of_what_is_not_there", post(f"/v1/artifacts/{_ID}/pin", {"pinned": True})
    yield "pin_goes_up", post("/v1/artifacts/..%2f..%2fkeys/pin", {"pinned": True})
    yield "reader_pins", post(f"/v1/artifacts/{_ID}/pin", {"pinned": True}, "read")
    yield "lineage_goes_up", post("/v1/lineages/..%2f..%2fkeys%2fpublic", {"artifacts": [_ID]})
    yield "lineage_is_hidden", post("/v1/lineages/.name", {"artifacts": [_ID]})
    yield "lineage_of_paths", post("/v1/lineages/model", {"artifacts": ["../../keys/public"]})
    yield "prover_names_a_lineage", post("/v1/lineages/model", {"artifacts": [_ID]}, "validate")
    yield "status_that_is_none", post(f"/v1/artifacts/{_ID}/status", {"status": "PROVEN"}, "validate")
    yield (
        "status_with_a_wrong_tag",
        post(f"/v1/artifacts/{_ID}/status", {"status": "VALIDATED", "tags": ["A B"]}, "validate"),
    )
