"""A small upstream with two releases, and a server for it on loopback that can misbehave on demand."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvpatch.sources import Pin, Resolved, Store, Tree, Upstream

FAKE = Upstream(name="ollama", url="http://127.0.0.1:9/unreachable.git")
LLAMA = Upstream(name="llama.cpp", url="http://127.0.0.1:9/unreachable.git")


def git(repository: Path, *args: str, text: str | None = None) -> str:
    """Run git in a repository, with no settings but a name to commit under."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
        **{
            f"GIT_{who}_{what}": value
            for who in ("AUTHOR", "COMMITTER")
            for what, value in (
                ("NAME", "Up Stream"),
                ("EMAIL", "up@stream.invalid"),
                ("DATE", "2026-08-18T23:30:00+00:00"),
            )
        },
    }
    done = subprocess.run(
        ["git", "-C", str(repository), *args],
        env=env,
        input=text,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@dataclass
class FakeUpstream:
    """A work repository to commit in and a bare one that is served."""

    work: Path
    bare: Path
    commits: dict[str, str] = field(default_factory=dict)

    def release(self, tag: str, files: dict[str, str | bytes | None], *, annotated: bool = False) -> str:
        for name, content in files.items():
            path = self.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        git(self.work, "add", "-A", "-f")
        git(self.work, "commit", "-q", "-m", tag)
        git(self.work, "tag", *(("-a", "-m", tag) if annotated else ()), tag)
        git(self.work, "push", "-q", str(self.bare), "main", tag)
        self.commits[tag] = git(self.work, "rev-parse", "HEAD")
        return self.commits[tag]

    def blob(self, ref: str, path: str) -> str:
        return git(self.bare, "rev-parse", f"{ref}:{path}")

    def pin(self, tag: str) -> Pin:
        return Pin(ref=tag, commit=self.commits[tag])


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> FakeUpstream:
    folder = tmp_path_factory.mktemp("template")
    work, bare = folder / "upstream-work", folder / "upstream.git"
    work.mkdir()
    git(work, "init", "-q", "-b", "main")
    # The files below are to be committed as they are, whatever their .gitattributes say.
    (work / ".git/info/attributes").write_text("* -text !eol !filter !ident !working-tree-encoding\n")
    git(folder, "init", "-q", "--bare", "-b", "main", str(bare))
    for name, value in (("uploadpack.allowFilter", "true"), ("uploadpack.allowAnySHA1InWant", "true")):
        git(bare, "config", name, value)
    made = FakeUpstream(work, bare)
    (work / "run.sh").write_text("#!/bin/sh\n")
    (work / "run.sh").chmod(0o755)
    (work / "link").symlink_to("docs/read me.txt")
    made.release(
        "v0.1.0",
        {
            "main.go": "package main\n",
            "docs/read me.txt": "hello\n",
            "crlf.txt": b"one\r\ntwo\r\n",
            "mixed.txt": b"one\r\ntwo\nthree",
            ".gitattributes": "* text=auto eol=crlf\n*.bin filter=lfs diff=lfs\n*.id ident\n"
            "*.u16 working-tree-encoding=UTF-16\n",
            ".gitignore": "ignored/\n*.o\n",
            "ignored/kept.o": b"\0tracked although ignored",
            "weights.bin": b"\1\2\3",
            "version.id": "$Id$\n",
            "wide.u16": "plain\n",
            "big.dat": os.urandom(300_000),
        },
    )
    made.release("v0.2.0-rc1", {"main.go": "package main // rc\n"})
    made.release(
        "v0.2.0",
        {"main.go": "package main // two\n", "docs/new.txt": "new\n", "mixed.txt": None},
        annotated=True,
    )
    return made


@pytest.fixture
def upstream(_template: FakeUpstream, tmp_path: Path) -> FakeUpstream:
    """Upstream with releases v0.1.0, v0.2.0-rc1 and v0.2.0 (an annotated tag), free to be changed."""
    work, bare = tmp_path / "upstream-work", tmp_path / "upstream.git"
    shutil.copytree(_template.work, work, symlinks=True)
    shutil.copytree(_template.bare, bare)
    return FakeUpstream(work, bare, dict(_template.commits))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


class Server(http.server.ThreadingHTTPServer):
    """Serves bare repositories through git's own CGI program, `git http-backend`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[str] = []
        self.cut_after: int | None = None  # close the connection after so many bytes of the next pack
        self.stall_after: int | None = None  # send so many bytes of the next pack, then nothing
        self.stalled = threading.Event()
        self.resume = threading.Event()
        self.status: int | None = None  # answer everything with this

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def url(self, name: str = "upstream.git") -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self._serve(body)

    def _serve(self, body: bytes) -> None:
        server = self.server
        plain = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        fetch = b"command=fetch" in plain
        server.requests.append(f"{self.command} {self.path}{' fetch' if fetch else ''}")
        if server.status is not None:
            self.send_error(server.status)
            return
        path, _, query = self.path.partition("?")
        env = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": str(server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_NOSYSTEM": "1",
            "HOME": "/nonexistent",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REMOTE_ADDR": "127.0.0.1",
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(plain)),
            "HTTP_GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
        }
        out = subprocess.run(
            ["git", "http-backend"], env=env, input=plain, capture_output=True, check=False
        ).stdout
        head, _, content = out.partition(b"\r\n\r\n")
        headers = [line.split(": ", 1) for line in head.decode().split("\r\n") if line]
        status = next((int(v.split()[0]) for k, v in headers if k == "Status"), 200)
        self.send_response(status)
        for name, value in headers:
            if name != "Status":
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        limit = None
        if fetch and server.cut_after is not None:
            limit, server.cut_after = server.cut_after, None
            content = content[:limit]
        elif fetch and server.stall_after is not None:
            limit, server.stall_after = server.stall_after, None
            self.wfile.write(content[:limit])
            self.wfile.flush()
            server.stalled.set()
            server.resume.wait(60)
            content = content[limit:]
        with contextlib.suppress(OSError):
            self.wfile.write(content)
        if limit is not None:
            self.close_connection = True


@pytest.fixture
def server(upstream: FakeUpstream) -> Iterator[Server]:
    running = Server(upstream.bare.parent)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield running
    running.resume.set()
    running.shutdown()
    running.server_close()


def fingerprint(root: Path) -> str:
    """A hash over everything below a folder: names, kinds, modes, times and contents."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        digest.update(
            repr((str(path), status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)).encode()
        )
        if path.is_file() and not path.is_symlink():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def times(root: Path) -> dict[str, int]:
    """Modification time of each file of a work tree."""
    return {
        str(p.relative_to(root)): p.lstat().st_mtime_ns
        for p in root.rglob("*")
        if ".git" not in p.relative_to(root).parts and not (p.is_dir() and not p.is_symlink())
    }


def check_exact(tree: Tree, bare: Path, ref: str) -> None:
    """The work tree has exactly the files of a commit, byte for byte, and git finds it clean."""
    listed = {}
    for line in git(bare, "ls-tree", "-r", "-z", ref).split("\0"):
        if line:
            meta, path = line.split("\t", 1)
            listed[path] = meta.split()
    assert set(times(tree.path)) == set(listed) - set(tree.missing)
    for path, (mode, _, oid) in listed.items():
        if path in tree.missing:
            continue
        place = tree.path / path
        content = str(place.readlink()).encode() if mode == "120000" else place.read_bytes()
        assert hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == oid, path
        if mode != "120000":
            assert bool(place.stat().st_mode & 0o100) == (mode == "100755"), path
    assert git(tree.path, "status", "--porcelain", "--ignored") == ""
    assert git(tree.path, "rev-parse", "HEAD") == tree.base_commit
    assert (tree.path / ".git" / "HEAD").read_text().strip() == tree.base_commit  # detached


def fetch(store: Store, spec: str, pin: Pin, dest: Path) -> tuple[Resolved, Tree]:
    """Both steps at once."""
    resolved = store.resolve(FAKE, spec, pin)
    return resolved, store.materialize(resolved, dest)


def run_as_nobody(action: object) -> str:
    """Run a function in a child process without privileges; what it raises comes back as "Class: message"."""
    assert callable(action)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "done"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            action()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode()[:60000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read().decode()
    os.waitpid(child, 0)
    return answer
