"""kvcachedd: how the external service is built beside ollama, found in a build, and handed to systemd.

It is the Go module in go_shim/ with the same generated glue to libkvcached as the package in Ollama's tree.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpatch import __version__, generate, hashing, manifest
from kvpatch.errors import UsageError, VerifyError
from kvpatch.stages.output import MANIFEST

SERVICE = "kvcachedd"
PLACE = f"bin/{SERVICE}"
SOCKET = Path("/run/kvcachedd/kvcachedd.sock")
# -w -s: no debug information, which would hold the temporary folder that cgo compiles in.
LINKED = "-s -w"
_GLUE = ("kvcached/kvcached.h", "kvcached/zz_generated_cgo_linux.go")
_UNIT_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a service is started with. `limit` is text such as 20GB; empty values are left out."""

    socket: Path | None = None
    limit: str | None = None
    group: str | None = None
    devices: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The options of kvcachedd that say so."""
        given = [("--socket", str(self.socket) if self.socket else None), ("--limit", self.limit)]
        given += [("--group", self.group), *(("--device", device) for device in self.devices)]
        return [word for name, value in given if value for word in (name, value)]


def module(data: Path, context: Mapping[str, Any]) -> tuple[generate.Generated, ...]:
    """The files of the Go module, tests left out, with its glue. `context`: what templates may use.

    Raises GenerateError.
    """
    folder = data / "go_shim"
    files = [
        generate.Generated(dest=path.relative_to(folder).as_posix(), content=path.read_bytes())
        for path in hashing.files_under(folder)
        if not path.name.endswith("_test.go")
    ]
    glue = [file for file in generate.render(data, "ollama", context) if file.dest in _GLUE]
    return (*files, *glue)


def write_module(files: tuple[generate.Generated, ...], folder: Path) -> None:
    """Make `folder` hold these files and no other; those that are right already keep their times."""
    wanted = {file.dest for file in files}
    if folder.is_dir():
        for path in hashing.files_under(folder):
            if path.relative_to(folder).as_posix() not in wanted:
                path.unlink()
    generate.write(files, folder)


def build_command(go: Path, target: Path, series: str) -> list[str | Path]:
    """The command that builds the service in the module's folder. Modules come as Go's settings say, held to go.sum."""
    linked = f"{LINKED} -X main.version={__version__}+{series}"
    return [go, "build", "-trimpath", "-mod=readonly", f"-ldflags={linked}", "-o", target, "./cmd/kvcachedd"]


def of_build(build: Path) -> Path:
    """The service of a build, which has to be the file that its manifest lists.

    Raises UsageError when there is none, VerifyError when it is another one.
    """
    path = build / PLACE
    if not path.is_file():
        if (build / MANIFEST).is_file():
            text = f"the build in {build} has no {SERVICE}: it is of llama.cpp alone, stock, or of an older kvpatch"
        else:
            text = f"{build} has no {PLACE}"
        raise UsageError(
            text,
            hint="`kvpatch build --ollama vX.Y.Z --out DIR` builds one; name that folder by --build DIR",
        )
    if (build / MANIFEST).is_file():
        listed = {row["path"]: row.get("sha256") for row in manifest.read(build)["artifacts"]}
        if listed.get(PLACE) != hashing.of_file(path):
            raise VerifyError(
                f"{path} is not the one that {MANIFEST} lists",
                hint=f"`kvpatch verify {build}` says what else is changed; build again",
            )
    return path.absolute()


def units(data: Path, program: Path, options: Options, user: str) -> tuple[generate.Generated, ...]:
    """systemd's units for a service of the whole machine. The socket is systemd's, the group too.

    Raises UsageError for a value that has no place in a unit file.
    """
    for name, value in (("--user", user), ("--group", options.group)):
        if value is not None and not _UNIT_NAME.fullmatch(value):
            raise UsageError(f"{name} {value!r} is no name", hint="name a user or group of the system")
    socket = options.socket or SOCKET
    if not socket.is_absolute() or re.search(r"[\s%$\"'\\]", str(socket)):
        raise UsageError(f"--socket {socket}: a unit needs an absolute path without blanks or quotes")
    own = Options(limit=options.limit, group=options.group, devices=options.devices)
    words = [str(program), *own.arguments()]
    return generate.render(
        data,
        SERVICE,
        {
            "version": __version__,
            "socket": socket,
            "user": user,
            "group": options.group,
            "command": " ".join(_word(word) for word in words),
        },
    )


def _word(word: str) -> str:
    """A word of ExecStart: % and $ stand for something else there, by systemd.service(5)."""
    escaped = word.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$")
    if shlex.quote(word) == word:
        return escaped
    return '"' + escaped.replace('"', '\\"') + '"'


def installed(user: str, socket: Path) -> str:
    """What to type once the units are written."""
    return (
        f"copy them to /etc/systemd/system, then: systemctl enable --now kvcachedd.socket kvcachedd.service; "
        f"give Ollama (user {user}) OLLAMA_KVCACHED_SOCKET={socket}"
    )
