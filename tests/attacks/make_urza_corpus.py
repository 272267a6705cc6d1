"""Writes the corpus in `urza/`: stores, records, manifests and archives that are wrong, each in one way.

    python tests/attacks/make_urza_corpus.py [FOLDER]

    base/              a sound store without private keys, which the attacks are laid over
    records/*          each in the place of the record of the artifact there
    manifests/*        each as the artifact's manifest, under its true digest, in a store that takes unsigned records
    archives/*.tar     each imported into a store that trusts the keys of the base
    stores/*/          files and links, each laid over the base
    requests/*         each sent to a server of an empty store, as it is

What each is refused with stands in `urza/refusals.json`, and of requests in `urza/request-refusals.json`. The keys are
those of the seeds below, so the same files come out each time.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from urza_requests import requests

from esper_triton.contracts.manifest import KernelStatus, Manifest, sha256
from esper_triton.contracts.record import AuditEntry, Record, Role
from esper_triton.urza.trust import Signer, signed

sys.path.append(str(Path(__file__).resolve().parent.parent / "urza"))
import handmade
from handmade import ARTIFACT_ID, make_artifact

CORPUS = Path(__file__).resolve().parent / "urza"
OTHER_ID = ARTIFACT_ID[:-1] + "1"
BLOBS = make_artifact()[1]
BINARY = sha256(handmade.BINARY)


def signer(role: Role, seed: int) -> Signer:
    private = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    return Signer(role, private, private.public_key().public_bytes_raw().hex())


FORGE, PROVER, STRANGER = signer(Role.FORGE, 1), signer(Role.PROVER, 2), signer(Role.FORGE, 3)
PUBLIC = f"forge {FORGE.public}\nprover {PROVER.public}\n".encode()


def manifest(artifact_id: str = ARTIFACT_ID, status: KernelStatus = KernelStatus.PENDING_BENCHMARKING) -> Manifest:
    return make_artifact(artifact_id, status=status)[0]


def record(of: Manifest | None = None, by: Signer | None = FORGE, **changes: Any) -> Record:
    of = of or manifest()
    unsigned = Record(id=of.id, manifest=of.digest).model_copy(update=changes)
    return unsigned if by is None else signed(unsigned, by)


def edited(content: bytes, **changes: Any) -> bytes:
    """JSON with fields changed, or with None as the value of `drop`, taken out; in the canonical form."""
    body = json.loads(content)
    for path, value in changes.items():
        *outer, last = path.split("__")
        node = body
        for part in outer:
            node = node[part]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def records() -> Iterator[tuple[str, bytes]]:
    good = record().canonical_bytes()
    other = record(manifest(OTHER_ID))
    verdict = manifest(status=KernelStatus.VALIDATED)
    yield "empty", b""
    yield "newline", b"\n"
    yield "null", b"null\n"
    yield "list", b"[]\n"
    yield "garbage", bytes(range(256))
    yield "truncated", good[:-40]
    yield "two_lines", good + good
    yield "utf16", good.decode().encode("utf-16")
    yield "byte_order_mark", b"\xef\xbb\xbf" + good
    yield "deep", b"[" * 5000 + b"]" * 5000
    yield "too_large", good[:-1] + b" " * (1 << 14) + b"\n"
    yield "spaces", json.dumps(json.loads(good), indent=1).encode() + b"\n"
    yield "a_key_twice", b'{"tags":["high_speed"],' + good[1:]
    yield "escaped", good.replace(b'"forge"', b'"\\u0066orge"')
    yield "no_schema", edited(good, schema_version=...)
    yield "schema_is_a_number", edited(good, schema_version=2.0)
    yield "schema_is_newer", edited(good, schema_version="3.0")
    yield "schema_is_newer_by_a_field", edited(good, schema_version="2.9", colour="red")
    yield "schema_is_older", edited(good, schema_version="1.0")
    yield "schema_is_changed", edited(good, schema_version="2.1")
    yield "more_fields", edited(good, exec="import os")
    yield "no_manifest", edited(good, manifest=...)
    yield "manifest_is_a_path", edited(good, manifest="../../../../etc/passwd")
    yield "manifest_is_upper_case", edited(good, manifest="A" * 64)
    yield "manifest_is_another_object", edited(good, manifest=BINARY)
    yield "manifest_is_another_object_signed", record(by=FORGE, manifest=BINARY).canonical_bytes()
    yield "manifest_is_missing", record(by=FORGE, manifest="0" * 64).canonical_bytes()
    yield "id_is_a_path", edited(good, id="../refs/x")
    yield "of_another_artifact", other.canonical_bytes()
    yield "names_another_artifacts_manifest", record(by=FORGE, manifest=manifest(OTHER_ID).digest).canonical_bytes()
    yield "not_signed", record(by=None).canonical_bytes()
    yield "digest_alone", f"{manifest().digest}\n".encode()
    yield "digest_alone_is_a_path", b"../../../../etc/passwd\n"
    yield "signed_by_a_stranger", record(by=STRANGER).canonical_bytes()
    yield "signature_of_another_record", edited(good, signature=other.model_dump(mode="json")["signature"])
    yield "signature_is_zero", edited(good, signature__value="0" * 128)
    yield "signature_is_short", edited(good, signature__value="0" * 126)
    yield "key_is_no_point", edited(good, signature__key="f" * 64)
    yield "key_is_zero", edited(good, signature__key="0" * 64, signature__value="0" * 128)
    yield "role_is_changed", edited(good, signature__role="prover")
    yield "role_is_unknown", edited(good, signature__role="smith")
    yield "verdict_by_the_forge", record(verdict, FORGE).canonical_bytes()
    yield "verdict_by_the_forge_as_prover", record(verdict, signer(Role.PROVER, 1)).canonical_bytes()
    yield "tags_by_the_forge", record(by=FORGE, tags=("high_speed",)).canonical_bytes()
    yield "tag_is_none", edited(good, tags=["High Speed"])
    yield "tags_are_many", edited(good, tags=[f"t{number}" for number in range(33)])
    yield "latency_is_negative", edited(good, figures__latency_us=-1.0)
    yield "latency_is_nan", good.replace(b'"latency_us":null', b'"latency_us":NaN')
    yield "memory_is_huge", edited(good, figures__memory_bytes=1 << 63)


def manifests() -> Iterator[tuple[str, bytes]]:
    good = manifest().canonical_bytes()
    yield "empty", b""
    yield "null", b"null"
    yield "list", b"[]"
    yield "text", b'"text"'
    yield "not_utf8", b"\xff\xfe"
    yield "deep", b"[" * 5000 + b"]" * 5000
    yield "no_fields", b'{"schema_version": "1.1"}'
    yield "schema_is_a_number", b'{"schema_version": 1.1}'
    yield "schema_is_newer", edited(good, schema_version="2.0")
    yield "schema_is_older", edited(good, schema_version="0.9")
    yield "more_fields", edited(good, code="import os")
    yield "of_another_artifact", edited(good, id=OTHER_ID)
    yield "id_is_a_path", edited(good, id="../../escape")
    yield "binary_is_a_path", edited(good, kernels__forward__binary="../../../../etc/passwd")
    yield "binary_is_missing", edited(good, kernels__forward__binary="0" * 64)
    yield "binary_is_python", edited(good, kernels__forward__binary_kind="py")
    yield "status_is_unknown", edited(good, status="FINE")
    yield "status_is_lower_case", edited(good, status="validated")
    yield "dtype_is_unknown", edited(good, dtype="float8")
    yield "dim_is_text", edited(good, dims={"d": "eight"})
    yield "dim_has_thousands_of_digits", good.replace(b'"d": 8', b'"d": ' + b"9" * 5000)
    yield "seconds_are_nan", good.replace(b'"compile_seconds": 0.5', b'"compile_seconds": NaN')
    yield "seconds_are_negative", edited(good, compile_seconds=-1.0)
    yield "blueprint_is_a_path", edited(good, blueprint="../blueprint")
    yield "blueprint_is_missing", edited(good, blueprint="0" * 64)
    yield "report_is_a_path", edited(good, report="../report")
    yield "backend_is_unknown", edited(good, target__backend="abacus")


def entry(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def packed(entries: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for member, content in entries:
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def archives() -> Iterator[tuple[str, bytes]]:
    content = manifest().canonical_bytes()
    begin = entry("esper-urza.json", b'{"schema_version": 1}')
    objects = [entry(f"objects/{sha256(one)}", one) for one in (content, *BLOBS.values())]
    head = entry(f"records/{ARTIFACT_ID}", record().canonical_bytes())

    def end(count: int = 5, heads: int = 1) -> tuple[tarfile.TarInfo, bytes]:
        return entry("end.json", json.dumps({"objects": count, "records": heads}).encode())

    def with_entry(*added: tuple[tarfile.TarInfo, bytes]) -> bytes:
        return packed([begin, *added, *objects, head, end()])

    whole = packed([begin, *objects, head, end()])
    yield "not_a_tar", b"PK\x03\x04" + bytes(2000)
    yield "empty", b""
    yield "zeros", bytes(10240)
    yield "compressed", gzip.compress(whole, mtime=0)
    yield "cut_in_a_member", whole[:2000]
    yield "cut_between_members", whole[: 512 * 4]
    yield "something_after_the_end", whole + b"more"
    yield "no_schema", packed([*objects, head, end()])
    yield "schema_is_newer", packed([entry("esper-urza.json", b'{"schema_version": 2}'), *objects, head, end()])
    yield "schema_is_text", packed([entry("esper-urza.json", b'{"schema_version": "1"}'), *objects, head, end()])
    yield "no_end", packed([begin, *objects, head])
    yield "end_is_wrong", packed([begin, *objects, head, end(4)])
    yield "leads_up", with_entry(entry("../../escape", b"x"))
    yield "leads_up_from_objects", with_entry(entry("objects/../../escape", b"x"))
    yield "is_absolute", with_entry(entry("/etc/escape", b"x"))
    yield "is_a_link", with_entry(entry(f"objects/{'0' * 64}", type=tarfile.SYMTYPE, linkname="/etc/passwd"))
    yield "is_a_hard_link", with_entry(entry(f"objects/{'0' * 64}", type=tarfile.LNKTYPE, linkname="esper-urza.json"))
    yield "is_a_folder", with_entry(entry("objects", type=tarfile.DIRTYPE))
    yield "is_a_device", with_entry(entry(f"objects/{'0' * 64}", type=tarfile.CHRTYPE))
    yield "is_a_pipe", with_entry(entry(f"objects/{'0' * 64}", type=tarfile.FIFOTYPE))
    yield "is_of_unknown_type", with_entry(entry(f"objects/{'0' * 64}", type=b"Z"))
    yield "name_is_long", with_entry(entry("objects/" + "a" * 300, b"x"))
    yield "name_is_upper_case", with_entry(entry(f"objects/{'A' * 64}", b"x"))
    yield "name_is_a_key", with_entry(entry("keys/forge.key", b"0" * 64))
    yield "name_is_no_id", with_entry(entry("records/anything", b"x"))
    extended = entry(f"objects/{sha256(b'x')}", b"x", pax_headers={"comment": "hello"})
    yield "has_extended_headers", packed([begin, extended, *objects, head, end(6)], tarfile.PAX_FORMAT)
    yield "an_object_twice", with_entry(objects[0])
    yield "a_record_twice", packed([begin, *objects, head, head, end(5, 2)])
    yield "object_is_corrupt", packed([begin, entry(f"objects/{BINARY}", b"changed"), *objects, head, end()])
    yield "manifest_is_missing", packed([begin, *objects[1:], head, end(4)])
    yield "blob_is_missing", packed([begin, *objects[:-1], head, end(4)])
    yield "object_of_nobody", packed([begin, entry(f"objects/{sha256(b'x')}", b"x"), *objects, head, end(6)])
    yield "record_is_garbage", packed([begin, *objects, entry(f"records/{ARTIFACT_ID}", b"garbage"), end()])
    other = entry(f"records/{ARTIFACT_ID}", record(manifest(OTHER_ID)).canonical_bytes())
    yield "record_is_of_another", packed([begin, *objects, other, end()])
    names_binary = entry(f"records/{ARTIFACT_ID}", record(manifest=BINARY).canonical_bytes())
    yield "record_names_a_blob", packed([begin, *objects, names_binary, end()])
    for name, by in (("stranger", STRANGER), ("nobody", None)):
        strange = entry(f"records/{ARTIFACT_ID}", record(by=by).canonical_bytes())
        yield f"record_is_signed_by_{name}", packed([begin, *objects, strange, end()])
    yield "record_is_large", packed([begin, *objects, entry(f"records/{ARTIFACT_ID}", bytes(20000)), end()])
    for name, size in (("large", 1 << 32), ("a_lie", 1 << 27), ("negative", -512)):
        header = tarfile.TarInfo(f"objects/{sha256(content)}")
        header.size = size
        yield f"size_is_{name}", whole[:1024] + header.tobuf(tarfile.GNU_FORMAT)[:512] + whole[1536:]


def base() -> dict[str, bytes]:
    stored, other = manifest(), manifest(OTHER_ID)
    files = {"urza.json": b'{"schema_version": "2.0"}\n', "keys/public": PUBLIC}
    verdict = manifest(status=KernelStatus.VALIDATED)  # there is one, and no record names it
    for content in (*(one.canonical_bytes() for one in (stored, other, verdict)), *BLOBS.values()):
        files[f"objects/{sha256(content)[:2]}/{sha256(content)[2:]}"] = content
    lines: list[bytes] = []
    for one in (stored, other):
        head = record(one).canonical_bytes()
        files[f"refs/{one.id}"] = head
        line = AuditEntry(
            sequence=len(lines),
            previous=sha256(lines[-1][:-1]) if lines else "0" * 64,
            when="2025-01-01T00:00:00.000000+00:00",
            what="committed",
            artifact=one.id,
            source=None,
            target=one.status,
            manifest=one.digest,
            before=None,
            after=sha256(head),
        )
        lines.append(signed(line, FORGE).canonical_bytes())
    return files | {"audit.log": b"".join(lines)}


def stores() -> Iterator[tuple[str, dict[str, bytes | Path]]]:
    """Files, and links (paths), by where they lie."""
    blob = f"objects/{BINARY[:2]}/{BINARY[2:]}"
    head = f"refs/{ARTIFACT_ID}"
    yield "of_a_newer_release", {"urza.json": b'{"schema_version": "3.0"}'}
    yield "format_is_garbage", {"urza.json": b"garbage"}
    yield "format_is_a_link", {"urza.json": Path("../outside/urza.json")}
    yield "keys_are_garbage", {"keys/public": b"garbage"}
    yield "keys_are_of_one_role", {"keys/public": f"forge {FORGE.public}\n".encode()}
    yield "keys_are_others", {"keys/public": f"forge {STRANGER.public}\nprover {PROVER.public}\n".encode()}
    yield "keys_are_swapped", {"keys/public": f"forge {PROVER.public}\nprover {FORGE.public}\n".encode()}
    yield "keys_are_a_link", {"keys/public": Path("../../outside/public")}
    yield "record_is_a_link", {head: Path(OTHER_ID)}
    yield "record_is_a_folder", {f"{head}/file": b""}
    yield "records_are_a_link", {"refs": Path("../outside")}
    yield "object_is_changed", {blob: b"\x7fELF forwarD"}
    yield "object_is_cut", {blob: b"\x7fELF"}
    yield "object_is_empty", {blob: b""}
    yield "object_is_longer", {blob: BLOBS[BINARY] + b"\0"}
    yield "object_is_a_link", {blob: Path("../../../outside/binary")}
    yield "object_is_a_folder", {f"{blob}/file": b""}
    yield "objects_are_a_link", {f"objects/{BINARY[:2]}": Path("../../outside")}


def write(folder: Path) -> None:
    """Replaces what is in `folder`, but for the refusals."""
    for name in ("base", "records", "manifests", "archives", "stores", "requests"):
        shutil.rmtree(folder / name, ignore_errors=True)

    def put(path: Path, content: bytes | Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            os.symlink(content, path)
        else:
            path.write_bytes(content)

    for name, content in base().items():
        put(folder / "base" / name, content)
    kinds: list[tuple[str, str, Callable[[], Iterator[tuple[str, bytes]]]]] = [
        ("records", "", records),
        ("manifests", "", manifests),
        ("archives", ".tar", archives),
        ("requests", "", requests),
    ]
    for kind, suffix, made in kinds:
        for name, content in made():
            put(folder / kind / f"{name}{suffix}", content)
    for name, files in stores():
        for path, content in files.items():
            put(folder / "stores" / name / path, content)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else CORPUS)
