"""The config.yaml that `ollama serve` reads: which file it is, and whether the server will take it."""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

SECTION = "kvcached"
UNITS = (
    Path("/etc/systemd/system"),
    Path("/run/systemd/system"),
    Path("/usr/local/lib/systemd/system"),
    Path("/usr/lib/systemd/system"),
    Path("/lib/systemd/system"),
)
_UNIT = "ollama.service"
_SIZE = re.compile(r"[0-9]+(?:\.[0-9]+)?\s*(?P<unit>[A-Za-z]*)")
_ASSIGNMENT = re.compile(r"""(?:^|\s|["'])HOME=(?P<home>[^"'\s]+)""")
_SOCKET_BYTES = 107


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFile:
    """A file that a server reads or would read. `problems`: what the server would end with; none if it is absent."""

    path: str
    reader: str  # whose it is, and how that is known
    exists: bool
    readable: bool  # by this user
    settings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(
    *,
    proc: Path = Path("/proc"),
    units: Iterable[Path] = UNITS,
    environ: Mapping[str, str] = os.environ,
) -> tuple[ConfigFile, ...]:
    """The file of each running `ollama serve`; without one, of the systemd service; without that, of this user."""
    homes = list(dict.fromkeys(_running(proc))) or _service(tuple(units))
    if not homes:
        home = environ.get("HOME", "")
        homes = [(home, "an `ollama serve` that this user starts")]
    return tuple(_file(home, reader) for home, reader in homes)


def read(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a file sets, as `key: value`, and what is wrong with it, by the server's own rules. Raises OSError."""
    raw = path.read_bytes()
    try:
        loader = yaml.SafeLoader(raw)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        return (), (f"not valid YAML ({' '.join(str(error).split())})",)
    if root is None or _is_null(root):
        return (), ()
    if not isinstance(root, yaml.MappingNode):
        return (), (f"{_line(root)}: the file must hold `key: value` pairs",)
    sections = [(key, value) for key, value in root.value if key.value == SECTION]
    settings: list[str] = []
    problems = [f"{_line(key)}: the section {SECTION} is there a second time" for key, _ in sections[1:]]
    for _, section in sections[:1]:
        if isinstance(section, yaml.MappingNode):
            _section(section, settings, problems)
        elif not _is_null(section):
            problems.append(
                f"{_line(section)}: {SECTION} must be a section: indented lines, as `enabled: true`"
            )
    return tuple(settings), tuple(problems)


def _section(section: yaml.MappingNode, settings: list[str], problems: list[str]) -> None:
    seen: set[str] = set()
    for key, value in section.value:
        name = str(key.value)
        where = f"{_line(key)}, {SECTION}.{name}"
        if name in seen:
            problems.append(f"{where}: is set twice")
        elif name not in CHECKS:
            problems.append(f"{where}: no such key; there are {', '.join(CHECKS)}")
        elif not isinstance(value, yaml.ScalarNode) or _is_null(value):
            problems.append(f"{where}: needs a single value")
        else:
            wrong = CHECKS[name](value.value)
            settings.append(f"{name}: {value.value}")
            if wrong:
                problems.append(f"{where}: {value.value!r} {wrong}")
        seen.add(name)


def _boolean(value: str) -> str:
    known = ("1", "true", "yes", "on", "0", "false", "no", "off")
    return "" if value.lower() in known else "is neither true nor false"


def _size(value: str) -> str:
    found = _SIZE.fullmatch(value)
    if found is None or found["unit"].lower() not in ("mb", "gb", "mib", "gib"):
        return "is no size with a unit, such as 20GB or 19.5GiB"
    number = float(value[: found.start("unit")])
    return "" if number > 0 else "is less than one byte"


def _whole(least: int, most: int) -> Callable[[str], str]:
    def check(value: str) -> str:
        # Go's ParseUint: digits alone.
        if re.fullmatch(r"[0-9]+", value) and least <= int(value) <= most:
            return ""
        return f"is not a whole number from {least} to {most}"

    return check


def _socket(value: str) -> str:
    if not value.startswith("/"):
        return "is not an absolute path"
    if len(os.fsencode(value)) > _SOCKET_BYTES:
        return f"is longer than {_SOCKET_BYTES} bytes"
    return "is there, but not a socket" if Path(value).exists() and not Path(value).is_socket() else ""


def _policy(value: str) -> str:
    return "" if value.lower() == "lru" else "is no policy: lru is"


def _group(value: str) -> str:
    try:
        grp.getgrnam(value)
    except KeyError:
        return "is no group of this system"
    return ""


# The keys of go_shim/kvcached/settings.go, in its order: "" for a value that it takes, else what is wrong with it.
CHECKS: dict[str, Callable[[str], str]] = {
    "enabled": _boolean,
    "memory_limit": _size,
    "socket": _socket,
    "eviction_policy": _policy,
    "host_memory_limit": _size,
    "idle_seconds": _whole(0, 10**9),
    "sleep_seconds": _whole(1, 10**9),
    "max_ctx": _whole(1, 2**30),
    "group": _group,
}


def _file(home: str, reader: str) -> ConfigFile:
    if not home:
        return ConfigFile(
            path="", reader=f"{reader}: without HOME it reads no file", exists=False, readable=False
        )
    path = Path(home) / ".ollama" / "config.yaml"
    try:
        settings, problems = read(path)
    except FileNotFoundError:
        return ConfigFile(path=str(path), reader=reader, exists=False, readable=True)
    except PermissionError:
        # Whether it is there is not known either: the folder may be closed.
        return ConfigFile(path=str(path), reader=reader, exists=True, readable=False)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        return ConfigFile(path=str(path), reader=reader, exists=True, readable=False, problems=(problem,))
    return ConfigFile(
        path=str(path), reader=reader, exists=True, readable=True, settings=settings, problems=problems
    )


def _running(proc: Path) -> Iterable[tuple[str, str]]:
    """Home and description of each `ollama serve`. Its HOME is shown to its own user and root alone."""
    for folder in sorted(proc.glob("[0-9]*"), key=lambda folder: int(folder.name)):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            owner = folder.stat().st_uid
        except OSError:
            continue
        if words[1:2] != [b"serve"] or Path(os.fsdecode(words[0])).name != "ollama":
            continue
        name, home = _user(owner)
        reader = f"the running `ollama serve`, pid {folder.name}, of {name}"
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            yield home, f"{reader} (by the user's home: its HOME cannot be seen by this user)"
            continue
        told = [os.fsdecode(entry[5:]) for entry in variables if entry.startswith(b"HOME=")]
        yield (told[-1] if told else ""), reader


def _service(units: tuple[Path, ...]) -> list[tuple[str, str]]:
    """Home and description of the systemd service."""
    unit = next((folder / _UNIT for folder in units if (folder / _UNIT).is_file()), None)
    if unit is None:
        return []
    texts = [unit]
    for folder in reversed(units):
        texts.extend(sorted((folder / f"{_UNIT}.d").glob("*.conf")))
    user, home = "root", None
    for line in (line.strip() for text in texts for line in _lines(text)):
        name, _, value = line.partition("=")
        if name.strip() == "User":
            user = value.strip() or "root"
        elif name.strip() == "Environment":
            found = _ASSIGNMENT.search(value.strip())
            home = found["home"] if found else home
    if home is None:
        try:
            known = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
            home = known.pw_dir
        except KeyError:
            home = ""
    return [(home, f"{unit}, which runs as {user} (it does not run now)")]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _user(uid: int) -> tuple[str, str]:
    """A user's name and home."""
    try:
        known = pwd.getpwuid(uid)
    except KeyError:
        return f"uid {uid}", ""
    return known.pw_name, known.pw_dir


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
