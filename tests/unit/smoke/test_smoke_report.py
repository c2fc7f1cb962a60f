from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvpatch.errors import SmokeError, UsageError
from kvpatch.process import ProcessFailure
from kvpatch.smoke import Install, run
from kvpatch.smoke.report import Check, CheckFailed, Outcome, Recorder, SmokeReport


def _fail() -> Outcome:
    raise CheckFailed("1 found, 2 expected", figures={"found": 1}, logs={"llama-server": "last\nlines"})


def _crash() -> Outcome:
    raise ProcessFailure(["llama-server"], None, "no such file", None)


def test_recorder_keeps_what_checks_say() -> None:
    seen: list[str] = []
    recorder = Recorder(seen.append)
    assert recorder.run("good", lambda: Outcome("as expected", {"bytes": 4096}))
    assert not recorder.run("bad", _fail)
    assert not recorder.run("not started", _crash)
    assert seen == ["good", "bad", "not started"]
    good, bad, crashed = recorder.checks
    assert good.ok
    assert good.figures == {"bytes": 4096}
    assert bad.logs == {"llama-server": "last\nlines"}
    assert "could not be started" in crashed.detail


def test_a_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        Recorder().run("bug", lambda: Outcome(str(1 // 0)))


def test_report_as_json_and_text() -> None:
    recorder = Recorder()
    recorder.run("good", lambda: Outcome("as expected", {"bytes": 4096}))
    recorder.run("bad", _fail)
    report = SmokeReport(root="/x", kind="llama.cpp", checks=tuple(recorder.checks))
    assert not report.ok
    value = json.loads(json.dumps(report.to_json()))
    assert value["ok"] is False
    assert [c["name"] for c in value["checks"]] == ["good", "bad"]
    assert value["checks"][1]["logs"] == {"llama-server": "last\nlines"}
    assert "logs" not in value["checks"][0]
    text = "\n".join(report.lines())
    assert "FAILED bad" in text
    assert "last lines of llama-server" in text
    assert "found = 1" in text
    assert "1 of 2 checks passed" in text


def test_a_report_without_checks_is_not_ok() -> None:
    assert not SmokeReport(root="/x", kind="ollama", checks=()).ok
    check = Check(name="a", ok=True, seconds=0.0, detail="")
    assert SmokeReport(root="/x", kind="ollama", checks=(check,)).ok


def _program(path: Path, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    path.chmod(mode)
    return path


def test_detect_llama(tmp_path: Path) -> None:
    server = _program(tmp_path / "bin" / "llama-server")
    install = Install.detect(tmp_path)
    assert (install.kind, install.llama_server, install.ollama) == ("llama.cpp", server, None)
    assert not install.patched
    (tmp_path / "bin" / "libkvcached.so").write_bytes(b"")
    assert install.patched


def test_detect_ollama(tmp_path: Path) -> None:
    ollama = _program(tmp_path / "bin" / "ollama")
    with pytest.raises(UsageError, match="lib/ollama/llama-server is missing"):
        Install.detect(tmp_path)
    server = _program(tmp_path / "lib" / "ollama" / "llama-server", 0o644)
    with pytest.raises(UsageError, match="not executable"):
        Install.detect(tmp_path)
    server.chmod(0o755)
    install = Install.detect(tmp_path)
    assert (install.kind, install.llama_server, install.ollama) == ("ollama", server, ollama)


def test_detect_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no install in"):
        Install.detect(tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        Install.detect(tmp_path / "missing")


def test_smoke_of_a_stock_install_fails_and_says_why(tmp_path: Path) -> None:
    _program(tmp_path / "out" / "bin" / "llama-server")
    report = run(Install.detect(tmp_path / "out"), workdir=tmp_path / "work")
    assert not report.ok
    assert "libkvcached.so is missing" in report.checks[0].detail


def test_a_failed_report_raises_with_everything_and_a_passed_one_does_not() -> None:
    good = Check(name="a", ok=True, seconds=0.0, detail="fine")
    bad = Check(name="b", ok=False, seconds=0.0, detail="broken", logs={"server": "last words"})
    SmokeReport(root="r", kind="llama.cpp", checks=(good,)).require_ok("look here")
    with pytest.raises(SmokeError, match="1 of 2 smoke checks failed: b") as caught:
        SmokeReport(root="r", kind="llama.cpp", checks=(good, bad)).require_ok("look here")
    assert "last words" in caught.value.message
    assert caught.value.hint == "look here"
    assert caught.value.data["report"]["ok"] is False
    with pytest.raises(SmokeError, match="none ran"):
        SmokeReport(root="r", kind="llama.cpp", checks=()).require_ok("look here")
