"""The process runner: output, failures, environment, and that nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from kvpatch import process


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, seconds: float = 10.0) -> bool:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_standard_output_is_returned() -> None:
    assert process.run([sys.executable, "-c", "print('hello')"]).stdout == "hello\n"


def test_the_log_repeats_the_command_and_holds_both_streams(tmp_path: Path) -> None:
    log = tmp_path / "sub" / "stage.log"
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    process.run([sys.executable, "-c", code], log=log)
    process.run([sys.executable, "-c", "print('second')"], log=log)
    text = log.read_text(encoding="utf-8")
    assert text.startswith(f"+ {sys.executable} -c")
    assert "out\n" in text
    assert "err\n" in text
    assert text.endswith("second\n")


def test_failure_carries_status_and_last_lines() -> None:
    code = "import sys; [print(i) for i in range(100)]; sys.exit('broken')"
    with pytest.raises(process.ProcessFailure) as caught:
        process.run([sys.executable, "-c", code])
    assert caught.value.returncode == 1
    assert caught.value.tail.endswith("broken")
    assert "\n50\n" not in caught.value.tail


def test_a_missing_program_is_a_failure_without_status() -> None:
    with pytest.raises(process.ProcessFailure) as caught:
        process.run(["no-such-program-here"])
    assert caught.value.returncode is None
    assert "no-such-program-here" in str(caught.value)


def test_variables_that_would_steer_a_build_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    monkeypatch.setenv("LD_PRELOAD_X", "x.so")
    monkeypatch.setenv("OLLAMA_HOST", "example")
    monkeypatch.setenv("CGO_ENABLED", "0")
    monkeypatch.setenv("DESTDIR", "/elsewhere")
    monkeypatch.setenv("KEEP_ME", "1")
    names = ("GIT_DIR", "LD_PRELOAD_X", "OLLAMA_HOST", "CGO_ENABLED", "DESTDIR", "KEEP_ME", "MINE")
    code = f"import os; print(*sorted(k for k in os.environ if k in {names!r}))"
    assert process.run([sys.executable, "-c", code], env={"MINE": "1"}).stdout.split() == ["KEEP_ME", "MINE"]


def test_a_timeout_ends_the_whole_group(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import subprocess; p = subprocess.Popen(['sleep', '60']);"
        f"open({str(pid_file)!r}, 'w').write(str(p.pid)); p.wait()"
    )
    with pytest.raises(process.ProcessFailure, match="no end within"):
        process.run([sys.executable, "-c", code], timeout=1.0)
    grandchild = int(pid_file.read_text(encoding="utf-8"))
    assert wait_for(lambda: not alive(grandchild))


def test_impatience_leaves_no_child_either(tmp_path: Path) -> None:
    """A second Ctrl-C while the first one waits; the grandchild is in a group of its own, as under ninja."""
    pid_file = tmp_path / "pid"
    grandchild = "import os, time; os.setpgid(0, 0); print(os.getpid(), flush=True); time.sleep(60)"
    child = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"p = subprocess.Popen([sys.executable, '-c', {grandchild!r}], stdout=open({str(pid_file)!r}, 'w'));"
        "p.wait()"
    )
    main = f"import sys; from kvpatch import process; process.run([sys.executable, '-c', {child!r}])"
    parent = subprocess.Popen([sys.executable, "-c", main], stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: pid_file.is_file() and pid_file.read_text(encoding="utf-8").strip())
        pid = int(pid_file.read_text(encoding="utf-8"))
        os.kill(parent.pid, signal.SIGINT)
        time.sleep(0.5)
        assert parent.poll() is None, "still in its grace period"
        os.kill(parent.pid, signal.SIGINT)
        parent.wait(timeout=4)
        assert wait_for(lambda: not alive(pid))
    finally:
        parent.kill()
        parent.wait()


def test_a_timeout_that_was_not_needed_is_called_off(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run(["echo", "line"], timeout=60, on_line=stop)
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert wait_for(lambda: not any(timer.is_alive() for timer in timers), 5.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_child(tmp_path: Path, number: int) -> None:
    pid_file = tmp_path / "pid"
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(f"""
        import signal, sys
        from kvpatch import process
        def stop(*_): raise KeyboardInterrupt
        signal.signal(signal.SIGTERM, stop)
        child = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);" \\
                "open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        process._GRACE_SECONDS = 0.2
        process.end.__kwdefaults__["grace"] = 0.2
        try:
            process.run([sys.executable, "-c", child])
        except KeyboardInterrupt:
            sys.exit(130)
        """),
        encoding="utf-8",
    )
    parent = subprocess.Popen([sys.executable, script])
    try:
        assert wait_for(lambda: pid_file.is_file() and pid_file.read_text(encoding="utf-8"))
        child = int(pid_file.read_text(encoding="utf-8"))
        os.kill(parent.pid, number)
        assert parent.wait(timeout=10) == 130
        assert wait_for(lambda: not alive(child))
    finally:
        parent.kill()
        parent.wait()


def test_start_ends_the_program_when_the_block_ends(tmp_path: Path) -> None:
    with process.start(["sleep", "60"], output=tmp_path / "log") as child:
        assert alive(child.pid)
    assert not alive(child.pid)
