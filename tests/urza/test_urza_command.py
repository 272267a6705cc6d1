"""`python -m esper_triton.urza`: tables, JSON, and exit codes that scripts can use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper_triton.contracts.manifest import KernelStatus
from esper_triton.contracts.record import Figures
from esper_triton.urza import Urza
from esper_triton.urza.__main__ import main

OTHER_ID = "0123456789ab-cpu-standard-ba9876543211"


@pytest.fixture
def first(urza, make_artifact) -> str:
    """Id of a VALIDATED artifact with tags; the store has an unproven one, OTHER_ID, as well."""
    manifest, blobs = make_artifact()
    urza.commit(manifest, blobs)
    urza.set_status(
        manifest.id, KernelStatus.VALIDATED, b"a report", tags=["high_speed"], figures=Figures(latency_us=12.5)
    )
    urza.commit(*make_artifact(OTHER_ID, binary=b"other"))
    return manifest.id


@pytest.fixture
def run(urza, capsys):
    """`run("ls", ...)`: exit code, stdout and stderr of a command on the store."""

    def ran(command: str, *arguments: str, root: Path | None = None) -> tuple[int, str, str]:
        try:
            code = main([command, *arguments, "--urza", str(root or urza.root)])
        except SystemExit as error:
            code = error.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return ran


def test_ls_lists_what_fits(run, first):
    code, out, err = run("ls")
    assert (code, err) == (0, "")
    assert first in out
    assert OTHER_ID in out
    for arguments, ids in (
        ((), [first, OTHER_ID]),
        (("--status", "VALIDATED"), [first]),
        (("--status", "VALIDATED", "--status", "PENDING_BENCHMARKING"), [first, OTHER_ID]),
        (("--tag", "high_speed"), [first]),
        (("--target", "cuda90"), []),
        (("--limit", "1"), [first]),
        (("--blueprint", "f" * 64), []),
        (("--blueprint", "0123456789ab"), [first, OTHER_ID]),
        (("--blueprint", "0123456789ab" + "0" * 20), [first, OTHER_ID]),
        (("--blueprint", "0123456789abc"), []),
        (("--blueprint", "ffffffffffff"), []),
    ):
        code, out, _ = run("ls", "--json", *arguments)
        assert code == 0
        assert [artifact["id"] for artifact in json.loads(out)["artifacts"]] == ids


def test_show_tells_all_of_one_artifact(run, first, urza):
    code, out, _ = run("show", first)
    assert code == 0
    for part in (urza.get(first).digest, "VALIDATED", "high_speed", "12.5", "signed by", "PENDING_BENCHMARKING"):
        assert part in out
    _, out, _ = run("show", first, "--json")
    shown = json.loads(out)
    assert shown["manifest"] == json.loads(urza.get(first).manifest.canonical_bytes())
    assert shown["record"]["tags"] == ["high_speed"]
    assert [change["target"] for change in shown["history"]] == ["PENDING_BENCHMARKING", "VALIDATED"]


def test_verify_is_1_where_something_is_wrong(run, first, urza):
    code, out, _ = run("verify")
    assert (code, out.rsplit(": ", 1)[1]) == (0, "no faults\n")
    urza.object_path(urza.get(first).manifest.kernels["forward"].binary).write_bytes(b"changed")
    code, out, _ = run("verify")
    assert code == 1
    assert "is corrupt" in out
    assert "2 faults" in out
    code, out, _ = run("verify", "--json")
    assert code == 1
    assert {fault["subject"] for fault in json.loads(out)["faults"]} >= {first}


def test_gc_says_what_it_removed_and_pin_keeps(run, first, urza):
    assert run("pin", first)[:2] == (0, f"{first}\n")
    code, out, _ = run("gc", "--max-bytes", "1k", "--dry-run")
    assert code == 0
    assert f"{OTHER_ID} │ would be removed" in out
    assert f"{first} │ kept: pinned" in out
    code, out, _ = run("gc", "--max-bytes", "0", "--json")
    assert json.loads(out)["removed"] == [OTHER_ID]
    assert urza.ids() == [first]
    assert run("pin", first, "--remove")[:2] == (0, "nothing is pinned\n")
    code, out, _ = run("gc", "--max-bytes", "0")
    assert "removed 1 artifact, 6 objects, 0 requests, " in out
    assert "; 0 bytes are left" in out
    assert urza.ids() == []


def test_history_is_of_an_artifact_or_a_blueprint(run, first):
    for subject, count in ((first, 2), (OTHER_ID, 1), ("0123456789ab", 3)):
        code, out, _ = run("history", subject, "--json")
        assert code == 0
        assert len(json.loads(out)["history"]) == count
    code, out, _ = run("history", first)
    assert "VALIDATED" in out


def test_export_and_import_carry_artifacts_from_store_to_store(run, first, urza, tmp_path):
    archive = str(tmp_path / "all.tar")
    assert run("export", archive)[0] == 0
    other = Urza(tmp_path / "other")
    code, _, err = run("import", archive, root=other.root)
    assert code == 1
    assert "which the trust policy does not name" in err
    code, out, _ = run("import", archive, "--resign", "--json", root=other.root)
    assert code == 0
    assert set(json.loads(out)["unproven"]) == set(other.ids()) == {first, OTHER_ID}
    key = urza.record(first).signature.key
    forge = urza.record(OTHER_ID).signature.key
    third = tmp_path / "third"
    code, out, _ = run("import", archive, "--trust", f"keys:local,prover={key},forge={forge}", root=third)
    assert (code, set(out.splitlines())) == (0, {f"{first} stored", f"{OTHER_ID} stored"})
    assert run("export", archive, OTHER_ID)[1] == f"1 artifact, {Path(archive).stat().st_size:,} bytes: {archive}\n"


def test_sign_takes_an_older_releases_artifacts(run, first, urza):
    (urza.root / "refs" / first).write_text(urza.get(first).digest + "\n")
    assert run("show", first)[0] == 1
    assert run("sign")[:2] == (0, f"{first} signed\n")
    assert run("sign")[:2] == (0, "every artifact is signed\n")
    assert run("show", first)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "nonsense"], 1, "'nonsense' is not an artifact id"),
        (["show", "0123456789ab-cpu-standard-000000000000"], 1, "no artifact '0123456789ab-cpu-standard-000000000000'"),
        (["history", "f" * 64], 1, f"no artifact of blueprint {'f' * 64} was ever in /"),
        (["history", "nonsense"], 1, "is not an artifact id"),
        (["pin", "nonsense"], 1, "is not an artifact id"),
        (["pin", "nonsense", "--remove"], 1, "'nonsense' is not pinned in /"),
        (["pin", "--remove"], 2, "--remove needs the ID"),
        (["push", "gopher://nowhere"], 2, "'gopher://nowhere' cannot be opened"),
        (["import", "/nowhere/at/all.tar"], 2, "cannot be read: No such file"),
        (["import", __file__], 1, "it is not a tar file, or is damaged"),
        (["export", "/nowhere/at/all.tar"], 2, "cannot be written: No such file"),
        (["ls", "--limit", "0"], 2, "argument --limit: 0: Input should be greater than or equal to 1"),
        (["ls", "--status", "FINE"], 2, "argument --status: 'FINE': Input should be"),
        (["ls", "--blueprint", "adapter"], 2, "argument --blueprint: 'adapter': String should match"),
        (["ls", "--tag", "A B"], 2, "argument --tag: 'A B': String should match"),
        (["ls", "--trust", "everyone"], 2, "trust policy 'everyone' is none of"),
        (["gc", "--max-bytes", "much"], 2, "'much' is not a number of bytes such as"),
        (["gc", "--max-bytes", "-1"], 2, "'-1' is not a number of bytes"),
        (["frobnicate"], 2, "invalid choice: 'frobnicate'"),
    ],
)
def test_an_error_is_one_line_and_a_code(run, first, arguments, code, message):
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_store_that_is_not_there_is_noted_and_not_made(run, tmp_path):
    nowhere = tmp_path / "nowhere"
    for arguments in (["ls"], ["verify"], ["gc"], ["pin"], ["push", str(tmp_path / "other")]):
        code, _, err = run(*arguments, root=nowhere)
        assert (code, err) == (0, f"note: there is no store at {nowhere} yet\n")
    assert run("pull", str(nowhere), root=tmp_path / "other")[2] == f"note: there is no store at {nowhere} yet\n"
    assert os.listdir(tmp_path) == []


def test_keys_outside_of_the_store_are_named(run, tmp_path, make_artifact):
    manifest, blobs = make_artifact()
    urza = Urza(tmp_path / "apart", keys=tmp_path / "keys")
    urza.commit(manifest, blobs)
    assert run("show", manifest.id, root=urza.root)[0] == 1
    assert run("show", manifest.id, "--keys", str(tmp_path / "keys"), root=urza.root)[0] == 0


def test_a_url_that_nothing_answers_is_2(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPER_CACHE", str(tmp_path / "cache"))
    for url, message in (
        ("https://localhost:1/urza", "https://localhost:1/urza does not answer after 5 attempts"),
        ("http://example.org", "only https is asked on another machine"),
        ("gopher://bucket/prefix", "'gopher://bucket/prefix'"),
    ):
        code, out, err = run("sign", root=url)
        assert (code, out) == (2, "")
        assert err == f"error: {url}: only a directory can be served, and signed for: do it where that is\n"
        code, out, err = run("ls", root=url)
        assert (code, out) == (2, "")
        assert message in err
    assert os.listdir() == []
    Path("tokens").write_text("read 01234567890123456789\n")
    code, _, err = run("ls", "--token-file", "tokens", root="https://localhost:1")
    assert (code, err) == (2, "error: token file tokens: one token was expected, and nothing else\n")


def test_a_store_that_is_no_directory_is_2(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run("verify", root=tmp_path / "file")
    assert code == 2
    assert "cannot be" in err


def test_the_module_runs_and_help_tells_the_exit_codes(first, urza):
    command = [sys.executable, "-m", "esper_triton.urza"]
    done = subprocess.run([*command, "ls", "--urza", str(urza.root)], capture_output=True, text=True, check=True)
    assert f"│ {first} │" in done.stdout
    assert done.stderr == ""
    done = subprocess.run([*command, "gc", "--help"], capture_output=True, text=True, check=True)
    assert "exit codes:" in done.stdout
