"""Templates to files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpatch import generate
from kvpatch.errors import GenerateError

HEADER = """
#define KVCACHED_ABI_VERSION 3
#define KVCACHED_ERROR_MAP(XX) \\
  XX(OK, 0, "success") \\
  XX(E_LIMIT, -4, "over the limit")
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "vmm" / "include").mkdir(parents=True)
    (root / "vmm" / "include" / "kvcached.h").write_text(HEADER, encoding="utf-8")
    (root / "templates" / "up").mkdir(parents=True)
    return root


def manifest(data: Path, text: str) -> None:
    (data / "templates" / "up" / "manifest.toml").write_text(text, encoding="utf-8")


def test_templates_see_the_header_and_the_context(data: Path) -> None:
    manifest(data, '[[file]]\ntemplate = "a.j2"\ndest = "src/a.c"\n')
    (data / "templates" / "up" / "a.j2").write_text(
        "{{ abi }} {{ version }}{% for e in errors %} {{ e.name }}={{ e.value }}{% endfor %}.\n",
        encoding="utf-8",
    )
    (file,) = generate.render(data, "up", {"version": "v"})
    assert file.dest == "src/a.c"
    assert file.content == b"3 v OK=0 E_LIMIT=-4.\n"


def test_folders_are_copied_with_exclusions(data: Path) -> None:
    folder = data / "go_shim" / "pkg"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.go").write_bytes(b"package a\r\n")
    (folder / "a_test.go").write_bytes(b"")
    (folder / "sub" / "b.go").write_bytes(b"b")
    manifest(data, '[[file]]\nsource = "go_shim/pkg"\ndest = "pkg"\nexclude = ["*_test.go"]\n')
    files = generate.render(data, "up", {})
    assert [(f.dest, f.content) for f in files] == [("pkg/a.go", b"package a\r\n"), ("pkg/sub/b.go", b"b")]


@pytest.mark.parametrize(
    ("text", "template", "expected"),
    [
        ('[[file]]\ntemplate = "a.j2"\ndest = "a"\n', "{{ missing }}", "missing"),
        ('[[file]]\ntemplate = "a.j2"\ndest = "a"\n', "\n{% if %}", "a.j2:2"),
        ('[[file]]\ntemplate = "b.j2"\ndest = "a"\n', "", "b.j2"),
        ('[[file]]\ntemplate = "a.j2"\ndest = "../a"\n', "", "outside the tree"),
        ('[[file]]\nsource = "nowhere"\ndest = "a"\n', "", "nowhere"),
        ("files = 1\n", "", "manifest.toml"),
    ],
)
def test_bad_input_is_named(data: Path, text: str, template: str, expected: str) -> None:
    manifest(data, text)
    (data / "templates" / "up" / "a.j2").write_text(template, encoding="utf-8")
    with pytest.raises(GenerateError, match=expected) as caught:
        generate.render(data, "up", {})
    assert caught.value.exit_code == 6


def test_a_header_without_error_table_is_refused(data: Path) -> None:
    (data / "vmm" / "include" / "kvcached.h").write_text("#define KVCACHED_ABI_VERSION 1\n", encoding="utf-8")
    manifest(data, '[[file]]\nsource = "vmm/include/kvcached.h"\ndest = "k.h"\n')
    with pytest.raises(GenerateError, match="KVCACHED_ERROR_MAP"):
        generate.render(data, "up", {})


def test_the_shipped_header_is_understood() -> None:
    root = Path(__file__).resolve().parents[2]
    facts = generate.header_facts(root / "vmm" / "include" / "kvcached.h")
    names = [error["name"] for error in facts["errors"]]
    assert facts["abi"] >= 1
    assert "OK" in names
    assert any(name.endswith("E_LIMIT") for name in names)


def test_only_files_that_differ_are_written(tmp_path: Path) -> None:
    files = (generate.Generated(dest="a", content=b"1"), generate.Generated(dest="d/b", content=b"2"))
    assert generate.write(files, tmp_path) == ("a", "d/b")
    before = (tmp_path / "a").stat().st_mtime_ns
    changed = (files[0], generate.Generated(dest="d/b", content=b"3"))
    assert generate.write(changed, tmp_path) == ("d/b",)
    assert (tmp_path / "a").stat().st_mtime_ns == before


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("a file", encoding="utf-8")
    with pytest.raises(GenerateError, match="cannot write generated file"):
        generate.write((generate.Generated(dest="d/b", content=b""),), tmp_path)
