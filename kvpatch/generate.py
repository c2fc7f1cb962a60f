"""New files for the upstream trees: rendered from templates/ or copied from vmm/ and go_shim/.

Patches hold call sites only; everything they call comes from here. What goes where is in
templates/<upstream>/manifest.toml: `[[file]]` tables with `dest` (inside the tree) and either `template` (a Jinja2 file
beside the manifest) or `source` (a file or folder of kvpatch's data).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from kvpatch import hashing, paths
from kvpatch.errors import GenerateError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_ERROR_ENTRY = re.compile(
    r"""XX\(\s*(?P<name>[A-Z0-9_]+)\s*,\s*(?P<value>-?\d+)\s*,\s*"(?P<text>[^"]*)"\s*\)"""
)
_ABI = re.compile(r"#define\s+KVCACHED_ABI_VERSION\s+(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One file to be written: path inside the tree, and its bytes."""

    dest: str
    content: bytes


def render(data: Path, upstream: str, context: Mapping[str, Any]) -> tuple[Generated, ...]:
    """Everything that templates/<upstream>/manifest.toml asks for, in its order, nothing written yet.

    Raises GenerateError for a malformed manifest, an undefined variable, or a source that is not there.
    """
    folder = data / "templates" / upstream
    manifest = folder / "manifest.toml"
    try:
        entries = tomllib.loads(manifest.read_text(encoding="utf-8"))["file"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise GenerateError(f"{manifest}: {error!r}") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    values = {**header_facts(data / "vmm" / "include" / "kvcached.h"), **context}
    generated: list[Generated] = []
    for entry in entries:
        dest = entry["dest"]
        if Path(dest).is_absolute() or ".." in Path(dest).parts:
            raise GenerateError(f"{manifest}: dest {dest!r} is outside the tree")
        if "template" in entry:
            try:
                text = environment.get_template(entry["template"]).render(values)
            except jinja2.TemplateError as error:
                where = getattr(error, "lineno", None)
                raise GenerateError(
                    f"{folder / entry['template']}{f':{where}' if where else ''}: {type(error).__name__}: {error}"
                ) from error
            generated.append(Generated(dest=dest, content=text.encode()))
        else:
            generated.extend(_copies(data / entry["source"], dest, entry.get("exclude", ())))
    return tuple(generated)


def write(files: tuple[Generated, ...], tree: Path) -> tuple[str, ...]:
    """Write the files whose bytes differ (so the rest keep their mtimes); returns the paths that changed.

    Raises GenerateError when a file cannot be written.
    """
    changed = []
    for file in files:
        path = tree / file.dest
        try:
            if path.is_file() and path.read_bytes() == file.content:
                continue
            paths.write_whole(path, file.content)
        except OSError as error:
            raise GenerateError(f"cannot write generated file {path}: {error.strerror or error}") from error
        changed.append(file.dest)
    return tuple(changed)


def header_facts(header: Path) -> dict[str, Any]:
    """`abi` and `errors` (name, value, text) as the public header of libkvcached states them.

    Raises GenerateError when the header has neither, so that glue never disagrees with the library unnoticed.
    """
    try:
        text = header.read_text(encoding="utf-8")
    except OSError as error:
        raise GenerateError(f"cannot read {header}: {error.strerror or error}") from error
    abi = _ABI.search(text)
    errors = [
        {"name": match["name"], "value": int(match["value"]), "text": match["text"]}
        for match in _ERROR_ENTRY.finditer(text)
    ]
    if abi is None or not errors:
        raise GenerateError(f"{header} defines no KVCACHED_ABI_VERSION or no KVCACHED_ERROR_MAP entries")
    return {"abi": int(abi.group(1)), "errors": errors}


def _copies(source: Path, dest: str, exclude: tuple[str, ...]) -> list[Generated]:
    if source.is_file():
        return [Generated(dest=dest, content=source.read_bytes())]
    if not source.is_dir():
        raise GenerateError(f"{source} is to be copied to {dest} but is not there")
    return [
        Generated(dest=f"{dest.rstrip('/')}/{file.relative_to(source).as_posix()}", content=file.read_bytes())
        for file in hashing.files_under(source)
        if not any(file.match(pattern) for pattern in exclude)
    ]
