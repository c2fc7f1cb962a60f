"""llama.cpp out of llama-cpp-python's source distribution, which carries it whole under vendor/llama.cpp.

pip fetches it, from wherever this machine's pip is set up to fetch. pip asks a source distribution for its
metadata even when it only downloads, which runs code of the distribution; the pinned sha256 is therefore
handed to pip, which compares it before that, and compared again here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

from kvpatch.errors import disk_full, guard
from kvpatch.process import ProcessFailure, run
from kvpatch.sources.errors import CorruptArchiveError, NetworkError, PinMismatchError, SpecError
from kvpatch.sources.layout import Layout
from kvpatch.sources.model import LLAMA_CPP, Pin, Progress, Upstream, silent
from kvpatch.sources.names import unknown_ref

PROJECT = "llama-cpp-python"
FOLDER = "vendor/llama.cpp"
_FILE = re.compile(r"llama[_-]cpp[_-]python-(?P<version>[0-9][^/]*?)\.(?:tar\.gz|zip)")
_NETWORK = re.compile(
    r"Could not fetch URL \S+: (?!404)|NewConnectionError|ConnectionError|Connection refused|Max retries exceeded"
    r"|ReadTimeout|ConnectTimeout|name resolution|NameResolutionError|Network is unreachable|ProxyError|SSLError"
    r"|Connection broken"
)


def is_spec(spec: str) -> bool:
    """Whether a source is ``sdist``, ``sdist:VERSION`` or ``sdist:FILE``."""
    return spec == "sdist" or spec.startswith("sdist:")


def file_version(name: str) -> str | None:
    """The version in a source distribution's file name or path, None when it is not called like one."""
    named = _FILE.fullmatch(Path(name).name)
    return named["version"] if named else None


def find(
    layout: Layout, upstream: Upstream, spec: str, pin: Pin, progress: Progress = silent
) -> tuple[Path, str, str]:
    """The source distribution a spec names: file, version and sha256, the last compared with the pin's.

    Raises SpecError, UnknownRefError, PinMismatchError, NetworkError and what reading files raises.
    """
    if upstream.name != LLAMA_CPP.name:
        raise SpecError(
            f"{spec} is a source of {LLAMA_CPP.name}, not of {upstream.name}",
            hint=f"give {upstream.option} a URL or path",
        )
    wanted = spec.partition(":")[2] or pin.ref
    path = Path(wanted).expanduser()
    if "/" in wanted or path.is_file() or _FILE.fullmatch(path.name):
        path = path.absolute()
        if not path.is_file():
            raise SpecError(
                f"there is no file {path}",
                hint=f"download it: pip download --no-deps --no-binary {PROJECT} {PROJECT}",
            )
        digest = layout.sha256(path)
        _compare(pin, digest, path)
        return path, file_version(path.name) or pin.ref, digest
    version = _version(wanted)
    if pin.sha256 is not None and not _same_version(pin.ref, version):
        raise PinMismatchError(
            f"{PROJECT} {version} was asked for, but the pin is {pin.ref}",
            hint=f"use `sdist:{pin.ref}`, or pin {version} in patches/pins.toml",
            data={"expected": pin.ref, "actual": version},
        )
    return _downloaded(layout, upstream, version, pin, progress)


def _same_version(ref: str, version: str) -> bool:
    try:
        return Version(ref) == Version(version)
    except InvalidVersion:
        return False


def _downloaded(
    layout: Layout, upstream: Upstream, version: str, pin: Pin, progress: Progress
) -> tuple[Path, str, str]:
    layout.prepare()
    with layout.lock(f"sdist-{version}", progress):
        folder = layout.root / "sdists"
        kept = folder / f"{PROJECT.replace('-', '_')}-{version}.tar.gz"
        if kept.is_file():
            digest = layout.sha256(kept)
            if pin.sha256 in (None, digest):
                return kept, version, digest
            progress(f"{kept.name} in the cache is not what the pin says; fetching it again")
        with layout.incoming() as incoming:
            progress(f"downloading {PROJECT} {version} with pip")
            path = _pip(incoming, upstream, version, pin, progress)
            digest = layout.sha256(path)
            _compare(pin, digest, path)
            with guard("keep the source distribution", folder):
                folder.mkdir(exist_ok=True)
                path.replace(kept)
        # The rename changed the file's times; hashed once more, so that the next run need not.
        return kept, version, layout.sha256(kept)


def _pip(incoming: Path, upstream: Upstream, version: str, pin: Pin, progress: Progress) -> Path:
    requirement = f"{PROJECT}=={version}" + (f" --hash=sha256:{pin.sha256}" if pin.sha256 else "")
    with guard("write in the cache folder", incoming):
        (incoming / "requirements.txt").write_text(requirement + "\n", encoding="utf-8")
        (incoming / "tmp").mkdir()
    argv = [
        sys.executable,
        "-m",
        "pip",
        "-vv",  # without it pip does not say why it has found nothing
        "--disable-pip-version-check",
        "--no-input",
        "download",
        "--no-deps",
        "--no-binary",
        PROJECT,
        "--progress-bar",
        "off",
        "--dest",
        str(incoming / "got"),
        "--requirement",
        str(incoming / "requirements.txt"),
    ]
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if line.strip().startswith(("Downloading ", "Using cached ", "WARNING: Retrying")):
            progress(line.strip())

    try:
        run(argv, env={"TMPDIR": str(incoming / "tmp")}, on_line=on_line)
    except ProcessFailure as failure:
        text = "\n".join(lines) or failure.tail
        raise _explained(text, incoming, upstream, version, pin) from failure
    found = sorted(path for path in (incoming / "got").iterdir() if _FILE.fullmatch(path.name))
    if len(found) != 1 or not found[0].name.endswith(".tar.gz"):
        raise CorruptArchiveError(
            f"pip brought no source distribution of {PROJECT} {version} as .tar.gz",
            hint=f"give the file yourself: {upstream.option} sdist:FILE",
        )
    return found[0]


def _explained(text: str, where: Path, upstream: Upstream, version: str, pin: Pin) -> Exception:
    offline = f"{upstream.option} sdist:FILE takes a downloaded file, {upstream.option} PATH a source folder"
    if "No module named pip" in text:
        return SpecError(
            f"{sys.executable} has no pip to download {PROJECT} with",
            hint=f"{sys.executable} -m ensurepip, or {offline}",
        )
    if "No space left" in text or "Errno 28" in text or "Errno 122" in text or "Errno 27" in text:
        return disk_full(f"download {PROJECT}", where, "pip found no room")
    got = re.search(r"Got\s+([0-9a-f]{64})", text)
    if got is not None:
        return PinMismatchError(
            f"{PROJECT} {version} has sha256 {got[1]}, but the pin says {pin.sha256}",
            hint="the index serves another file than upstream published; check pip's index settings",
            data={"expected": pin.sha256, "actual": got[1]},
        )
    if _NETWORK.search(text):
        return NetworkError(
            f"pip cannot reach its package index to download {PROJECT} {version}: {_errors(text)}",
            hint=offline,
        )
    listed = re.search(r"from versions: ([^)]*)\)", text)
    if listed is not None:
        names = [name.strip() for name in listed[1].split(",") if name.strip() not in ("", "none")]
        return unknown_ref(
            upstream,
            f"{PROJECT} {version}" if not names else version,
            names,
            f"pip's package index ({PROJECT})",
            what="version",
        )
    return SpecError(f"pip could not download {PROJECT} {version}: {_errors(text)}", hint=offline)


def _errors(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join([line for line in lines if line.startswith("ERROR")][-2:] or lines[-2:])


def _version(text: str) -> str:
    try:
        return str(Version(text))
    except InvalidVersion:
        raise SpecError(
            f"{text!r} is neither a version of {PROJECT} nor a file",
            hint="write sdist, sdist:0.3.35 or sdist:FILE.tar.gz",
        ) from None


def _compare(pin: Pin, digest: str, path: Path) -> None:
    if pin.sha256 is not None and digest != pin.sha256.lower():
        raise PinMismatchError(
            f"{path.name} has sha256 {digest}, but the pin says {pin.sha256}",
            hint="get the file that upstream published; nothing was taken from this one",
            data={"expected": pin.sha256, "actual": digest},
        )
