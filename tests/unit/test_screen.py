"""What is written where: CI's folds and annotations, text as it is, and one envelope with --json."""

from __future__ import annotations

import json
import re

import pytest

from kvpatch import cli
from kvpatch.cli.output import Screen
from kvpatch.errors import CompileError


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTIONS", "GITLAB_CI"):
        monkeypatch.delenv(name, raising=False)


def run_stage(screen: Screen) -> None:
    events = screen.events()
    events.stage_started("compile")
    events.warning("50% of\nit")
    events.stage_finished("compile", "done", 1.0)
    events.stage_finished("smoke", "fresh", 0.0)


def test_github_folds_and_annotations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    screen = Screen(json_mode=False, command="build")
    run_stage(screen)
    assert screen.failure(CompileError("100% broken\nmore", hint="mend it")) == 7
    text = capsys.readouterr()
    assert text.out == ""
    lines = text.err.splitlines()
    assert lines[:2] == ["::group::kvpatch compile", "compile: started"]
    assert "::warning title=kvpatch::50%25 of%0Ait" in lines
    assert lines[-1] == "::error title=kvpatch build::100%25 broken"
    assert lines.count("::endgroup::") == 1
    assert (
        lines.index("compile: done in 1.0 s")
        < lines.index("::endgroup::")
        < lines.index("smoke: nothing to do")
    )


def test_gitlab_folds_have_the_marks_it_looks_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITLAB_CI", "true")
    run_stage(Screen(json_mode=False, command="build"))
    text = capsys.readouterr().err
    assert re.search(r"^\x1b\[0Ksection_start:\d+:kvpatch_compile\r\x1b\[0Kkvpatch compile\n", text)
    assert re.search(r"\n\x1b\[0Ksection_end:\d+:kvpatch_compile\r\x1b\[0K\n", text)
    assert "warning: 50% of\nit\n" in text


def test_messages_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(json_mode=False, command="build")
    message = r"main.c:100:5: error: [bold]x[/] \[1] " + "long " * 50
    screen.failure(CompileError(message, hint="see :1234:"))
    screen.note(":100: [red]")
    screen.events().stage_finished("compile", "failed", 1.0)
    expected = f"error: {message}\nnext: see :1234:\n:100: [red]\ncompile: failed in 1.0 s\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("argv", "code", "command"),
    [
        (["build", "--help", "--json"], 0, "build"),
        (["bench", "build", "--help", "--json"], 0, "bench build"),
        (["versions", "--json"], 0, "versions"),
        (["--json"], 2, "kvpatch"),
        (["nonsense", "--json"], 2, "nonsense"),
        (["bench", "--json"], 2, "bench"),
        (["smoke", "--json"], 2, "smoke"),
        (["compile", "--until", "smoke", "--json"], 2, "compile"),
        (["build", "--jobs", "many", "--json"], 2, "build"),
    ],
)
def test_standard_output_is_one_envelope_whatever_was_asked(
    argv: list[str], code: int, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(argv) == code
    envelope = json.loads(capsys.readouterr().out)
    assert set(envelope) == {"schema", "command", "status", "exit_code", "data", "errors"}
    assert (envelope["exit_code"], envelope["command"]) == (code, command)
    assert (envelope["status"] == "ok") == (code == 0)
    assert bool(envelope["errors"]) == (code != 0)


def test_help_with_json_holds_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["build", "--help", "--json"]) == 0
    assert "--ollama-source" in json.loads(capsys.readouterr().out)["data"]["text"]


def test_no_command_shows_the_commands_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    text = capsys.readouterr()
    assert text.out == ""
    assert "doctor" in text.err
    assert "error: no command was given\nnext: kvpatch --help\n" in text.err
    assert "error: Usage" not in text.err
