"""docs/vmm.md names tests that exist and leaves no public function out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvpatch import generate

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "vmm" / "include" / "kvcached.h"
PAGE = ROOT / "docs" / "vmm.md"
PROMISES = "## Every promise, and the test that holds it"


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def rows() -> list[tuple[str, str]]:
    """The promises: what is promised, and the cell that names the tests."""
    found = []
    for line in page().split(PROMISES, 1)[1].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("|") and not line.startswith(("|---", "| promise |")):
            assert len(cells) == 2, line
            found.append((cells[0], cells[1]))
    return found


def existing() -> set[str]:
    """suite.name of every C test, module.function of the Python tests that the page may name, paths of programs."""
    programs = [*(ROOT / "tests" / "gpu").glob("*.c"), *(ROOT / "tests" / "vmm").glob("fuzz_*.c")]
    names = {path.relative_to(ROOT).as_posix() for path in programs}
    for path in (ROOT / "tests" / "vmm").glob("*.c"):
        text = path.read_text(encoding="utf-8")
        for suite, name in re.findall(r"^TEST(?:_[A-Z]+)?\((\w+), (\w+)\)", text, re.MULTILINE):
            names.add(f"{suite}.{name}")
    modules = (ROOT / "tests" / "unit" / "runtime").glob("test_*.py")
    for path in (ROOT / "tests" / "vmm" / "test_vmm.py", *modules):
        text = path.read_text(encoding="utf-8")
        names |= {f"{path.stem}.{name}" for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    return names


def test_every_promise_has_a_test_that_exists() -> None:
    known = existing()
    assert len(rows()) >= 80
    assert len({name.split(".")[0] for name in known}) >= 10
    wrong = []
    for promise, tests in rows():
        named = re.findall(r"`([^`]+)`", tests)
        if not named:
            wrong.append(f"no test: {promise}")
        wrong += [f"{name} does not exist: {promise}" for name in named if name not in known]
    assert wrong == []


def test_every_function_and_error_is_there() -> None:
    text = page()
    header = HEADER.read_text(encoding="utf-8")
    functions = set(re.findall(r"KVCACHED_API[^;{]*?\b(kvcached_\w+)\(", header))
    assert len(functions) >= 45
    promised = " ".join(promise for promise, _ in rows())
    assert sorted(name for name in functions if f"`{name}`" not in promised) == []
    errors = {f"KVCACHED_{error['name']}" for error in generate.header_facts(HEADER)["errors"]} - {
        "KVCACHED_OK"
    }
    assert sorted(name for name in errors if name.removeprefix("KVCACHED_") not in promised) == []
    kinds = set(re.findall(r"\b(KVCACHED_(?:KV|WEIGHTS|SCRATCH|CMD_\w+|LIMIT_\w+|LOOKAHEAD_\w+)) = ", header))
    assert kinds
    assert sorted(n for n in kinds if not re.search(rf"(?<![A-Z]){n.split('_', 2)[-1]}\b", text)) == []


def test_what_the_page_says_of_the_header_is_in_it() -> None:
    header = HEADER.read_text(encoding="utf-8")
    for name in set(re.findall(r"\b(?:kvcached|KVCACHED)_\w+", page())):
        assert name in header or name == "KVCACHED_BACKEND", name


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)", page()) if PAGE.is_file() else [])
def test_links_lead_somewhere(link: str) -> None:
    assert link.startswith("https://") or (PAGE.parent / link).exists()


def test_every_option_is_explained() -> None:
    header = HEADER.read_text(encoding="utf-8")
    struct = header.split("typedef struct kvcached_options {", 1)[1].split("} kvcached_options_t;", 1)[0]
    code = re.sub(r"\(\*(\w+)\)\([^)]*\)", r"\1", re.sub(r"/\*.*?\*/", " ", struct, flags=re.DOTALL))
    fields = set(re.findall(r"(\w+) ?;", code)) - {"struct_size"}
    assert len(fields) >= 15
    table = page().split("## Options", 1)[1].split("\n## ", 1)[0]
    assert sorted(field for field in fields if f"`{field}`" not in table) == []
