"""The binding says what the public header says: sizes, offsets, values and prototypes."""

from __future__ import annotations

import ctypes
import re
import subprocess
from enum import IntEnum
from pathlib import Path
from typing import Any

from kvpatch.runtime import (
    Backend,
    Command,
    Event,
    Kind,
    LimitResult,
    LogLevel,
    Lookahead,
    structures,
)

ROOT = Path(__file__).resolve().parents[3]
HEADER = ROOT / "vmm" / "include" / "kvcached.h"


def c_program(folder: Path, body: str) -> str:
    """What a C program with this body prints."""
    source = folder / "facts.c"
    source.write_text(
        f'#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{\n{body}  return 0;\n}}\n',
        encoding="utf-8",
    )
    subprocess.run(["cc", "-std=c11", "-o", folder / "facts", source], check=True)
    return subprocess.run([folder / "facts"], check=True, capture_output=True, text=True).stdout


def code_of_header() -> str:
    """The header without comments and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"/\*.*?\*/", " ", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL))


STRUCTS: dict[str, Any] = {
    "kvcached_options_t": structures.OptionsStruct,
    "kvcached_stats_t": structures.StatsStruct,
    "kvcached_limit_t": structures.LimitStruct,
    "kvcached_slot_t": structures.SlotStruct,
    "kvcached_range_t": structures.RangeStruct,
}
ENUMS: dict[str, type[IntEnum]] = {
    "BACKEND_": Backend,
    "LOG_": LogLevel,
    "LOOKAHEAD_": Lookahead,
    "": Kind,
    "LIMIT_": LimitResult,
    "CMD_": Command,
    "EVENT_": Event,
}


def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    body, expected = "", []
    for name, cls in STRUCTS.items():
        body += f'  printf("{name} %zu\\n", sizeof({name}));\n'
        expected.append(f"{name} {ctypes.sizeof(cls)}")
        for field, kind in cls._fields_:
            where = f"offsetof({name}, {field}), sizeof((({name} *)0)->{field})"
            body += f'  printf("{name}.{field} %zu %zu\\n", {where});\n'
            expected.append(f"{name}.{field} {getattr(cls, field).offset} {ctypes.sizeof(kind)}")
    assert c_program(tmp_path, body).splitlines() == expected
    # A field in what is padding now would change no size.
    text = code_of_header()
    found = dict(re.findall(r"typedef struct \w+ \{([^}]*)\} (kvcached_\w+_t);", text))
    declared = {name: fields for fields, name in found.items()}
    assert declared.keys() == STRUCTS.keys()
    for name, fields in declared.items():
        members = re.sub(r"\(\*(\w+)\)\([^)]*\)", r"\1", fields)
        names = re.findall(r"(\w+)(?:\[[^]]*\])? ?[,;]", members)
        assert names == [field for field, _ in STRUCTS[name]._fields_]


def test_constants_are_those_of_the_header(tmp_path: Path) -> None:
    values: dict[str, int] = {
        "ABI_VERSION": structures.ABI,
        "NAME_MAX": structures.NAME_MAX,
        "GROUP_MAX": structures.GROUP_MAX,
        "PATH_MAX": structures.PATH_MAX,
        "DEVICE_HOST": structures.DEVICE_HOST,
        "NO_CONTROL": structures.NO_CONTROL,
    }
    for prefix, enum in ENUMS.items():
        values |= {f"{prefix}{member.name}": int(member) for member in enum}
    body = "".join(f'  printf("{name} %d\\n", (int)KVCACHED_{name});\n' for name in values)
    assert c_program(tmp_path, body).splitlines() == [f"{name} {value}" for name, value in values.items()]
    named = re.findall(r"KVCACHED_(\w+) = ", code_of_header())
    assert sorted(named) == sorted(values.keys() - set(list(values)[:5]))


def test_prototypes_are_those_of_the_header() -> None:
    words: dict[str, Any] = {
        "void": None,
        "int": ctypes.c_int,
        "unsigned": ctypes.c_uint32,
        "uint32_t": ctypes.c_uint32,
        "uint64_t": ctypes.c_uint64,
        "size_t": ctypes.c_size_t,
        "const char *": ctypes.c_char_p,
        "char *": ctypes.c_char_p,
        "void *": ctypes.c_void_p,
        "const void *": ctypes.c_void_p,
        "kvcached_ctx_t": ctypes.c_void_p,
        "kvcached_region_t": ctypes.c_void_p,
        "kvcached_ledger_t": ctypes.c_void_p,
        "kvcached_reload_fn": structures.RELOAD_FUNCTION,
        **STRUCTS,
    }

    def kind(text: str) -> Any:
        text = text.strip()
        if text in words:
            return words[text]
        assert text.endswith("*"), text
        return ctypes.POINTER(words[text.removesuffix("*").removeprefix("const ").strip()])

    declared = {}
    pattern = r"KVCACHED_API ((?:const )?\w+(?: ?\*)?) ?kvcached_(\w+)\(([^)]*)\)"
    for result, name, arguments in re.findall(pattern, code_of_header()):
        types = [re.sub(r"\w+$", "", a.strip()) for a in arguments.split(",") if a.strip() != "void"]
        declared[name] = (kind(result), [kind(text) for text in types])
    assert declared == structures.PROTOTYPES
