"""No text that reaches Ollama's log or API may read like a device that ran out: Ollama would unload every model."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What Ollama looks for, in lower case: `outOfMemorySubstrings` of its llm/status.go.
WORDS = (
    "out of memory",
    "out of device memory",
    "cudamalloc failed",
    "hipmalloc failed",
    "failed to allocate",
    "allocation failed",
    "not enough memory",
    "insufficient memory",
    "vk_error_out_of_device_memory",
    "erroroutofmemory",
)
# Said where the memory itself is used up while a model loads, which is what Ollama is to act on; a limit is not.
MEANT = ("kvcached-alloc.cpp.j2", '"out of memory"')
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_JOIN = re.compile(r'"\s*\n\s*"')


def _sources() -> list[Path]:
    found = [
        *(ROOT / "vmm").glob("*/*.[ch]"),
        *(ROOT / "templates").glob("*/*.[gj]*"),
        *(p for p in (ROOT / "go_shim" / "kvcached").glob("*.go") if not p.name.endswith("_test.go")),
    ]
    assert len(found) > 30
    return found


def _added() -> list[tuple[str, str]]:
    """What the patches add to upstream's sources."""
    found = []
    for path in sorted((ROOT / "patches").rglob("*.patch")):
        lines = path.read_text(encoding="utf-8").partition("\n---\n")[2].splitlines()
        found.append((path.name, "\n".join(x[1:] for x in lines if x.startswith("+") and x[:3] != "+++")))
    assert len(found) > 30
    return found


def _texts(source: str) -> list[str]:
    """String literals in lower case; those that a compiler would join are joined."""
    return [literal.lower() for literal in _STRING.findall(_JOIN.sub("", source))]


def test_no_text_reads_like_a_device_that_ran_out() -> None:
    sources = [(path.name, path.read_text(encoding="utf-8")) for path in _sources()]
    taken = [
        f"{name}: {text}"
        for name, source in (*sources, *_added())
        for text in _texts(source)
        if any(word in text for word in WORDS) and (name, text) != MEANT
    ]
    assert taken == []


def test_a_device_that_ran_out_is_called_so_once() -> None:
    name, text = MEANT
    source = (ROOT / "templates" / "llama.cpp" / name).read_text(encoding="utf-8")
    assert _texts(source).count(text) == 1
    assert f"KVCACHED_E_NOMEM ? {text}" in source


def test_the_look_sees_texts_and_only_texts() -> None:
    assert _texts('f("Out of "\n  "memory"); /* out of memory */') == ['"out of memory"']
