"""The llama.cpp series and its glue agree with each other, with libkvcached's header, and with what Ollama reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvpatch import generate

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = {
    "version": "0.0.0",
    "series": "test-0",
    "ollama": {"version": "0.0.0", "commit": "0"},
    "llama_cpp": {"commit": "0", "pin": "b0"},
}


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return {f.dest: f.content.decode() for f in generate.render(ROOT, "llama.cpp", CONTEXT)}


@pytest.fixture(scope="module")
def added() -> list[str]:
    """Lines the series adds, variants included, without the include lines."""
    lines = []
    for patch in sorted((ROOT / "patches" / "llama.cpp").glob("*.patch")):
        diff = patch.read_text(encoding="utf-8").partition("\n---\n")[2]
        lines += [x[1:].strip() for x in diff.splitlines() if x.startswith("+") and not x.startswith("+++")]
    return [x for x in lines if not x.startswith("#include")]


def test_everything_a_hook_calls_is_declared(files: dict[str, str], added: list[str]) -> None:
    for space, folder, least in (
        ("llama_kvcached", "src/llama-", 10),
        ("llama_kvcached_server", "tools/server/", 6),
    ):
        called = {name for line in added for name in re.findall(rf"{space}::(\w+)\(", line)}
        headers = "".join(text for dest, text in files.items() if dest.startswith(folder))
        # A declaration follows a type, a star or a reference; a call follows none of them.
        declared = set(re.findall(r"(?:\w|[>*&]) ?\b(\w+) ?\(", headers))
        assert len(called) >= least
        assert called <= declared, called - declared


def test_a_variant_does_what_its_siblings_do() -> None:
    """Variants of a purpose differ in place and variable names: what they call is the same."""
    calls: dict[str, set[frozenset[str]]] = {}
    for patch in (ROOT / "patches" / "llama.cpp").glob("*.patch"):
        diff = patch.read_text(encoding="utf-8").partition("\n---\n")[2]
        added = "\n".join(re.findall(r"^\+(?!\+\+)(.*)$", diff, re.MULTILINE))
        made = frozenset(re.findall(r"llama_kvcached(?:_server)?::\w+", added))
        assert made or "kvcached" in added, patch.name
        calls.setdefault(patch.stem.partition("@")[0], set()).add(made)
    assert len(calls) >= 16
    assert {stem: sets for stem, sets in calls.items() if len(sets) != 1} == {}


def test_each_added_line_is_one_hook_and_is_listed_in_the_header() -> None:
    for patch in (ROOT / "patches" / "llama.cpp").glob("*.patch"):
        head, _, diff = patch.read_text(encoding="utf-8").partition("\n---\n")
        listed = re.findall(r"^Kvpatch-Hook: [^:]+: (.*)$", head, re.MULTILINE)
        assert listed == [x[1:].strip() for x in diff.splitlines() if re.match(r"\+(?!\+\+)", x)]


def test_functions_taken_from_the_library_are_in_its_header(files: dict[str, str]) -> None:
    table = re.search(
        r"#define LLAMA_KVCACHED_FUNCTIONS\(X\)(.*?)\n\n", files["src/kvcached-internal.h"], re.DOTALL
    )
    assert table
    taken = set(re.findall(r"X\((\w+)\)", table.group(1)))
    offered = set(re.findall(r"\bkvcached_(\w+)\(", files["src/kvcached.h"]))
    assert len(taken) > 10
    assert taken <= offered
    used = {
        name
        for dest, text in files.items()
        if dest.startswith("src/models/")
        for name in re.findall(r"\blib\.(\w+)\(", text)
    }
    assert used - taken == set()
    assert taken - used == {"abi_version"}  # called on the table itself while loading


def test_only_sources_that_upstream_globs_need_to_be_compiled(files: dict[str, str]) -> None:
    assert all(re.fullmatch(r"src/models/[^/]+", dest) for dest in files if dest.endswith(".cpp"))


def test_glue_files_can_be_one_translation_unit(files: dict[str, str]) -> None:
    """Upstream compiles several files of src/models at once, so that a name of two files would be defined twice."""
    defined: dict[str, list[str]] = {}
    for dest, text in files.items():
        if dest.startswith("src/models/"):
            for name in re.findall(
                r"^(?:static|constexpr)\b[^=;({]*?(\w+)(?:\[[^]]*\])?\s*[=;({]", text, re.MULTILINE
            ):
                defined.setdefault(name, []).append(dest)
    assert len(defined) > 20
    assert {name: where for name, where in defined.items() if len(set(where)) > 1} == {}
