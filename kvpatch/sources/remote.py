"""Source from a git URL: one bare repository a URL in the cache, shallow and blob-filtered, shared by all
builds.

A release costs one fetch of its commit and trees and one of the file contents that no earlier release had.
Files are fetched together and only when a work tree needs them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from kvpatch.errors import GitError
from kvpatch.gitrun import Git
from kvpatch.sources.errors import MissingObjectsError, NetworkError, SpecError
from kvpatch.sources.layout import Layout, short_id
from kvpatch.sources.model import Pin, Progress, Upstream, silent
from kvpatch.sources.names import check_ref, is_commit, is_full_commit, unknown_ref
from kvpatch.sources.objects import ObjectView

_SCP_LIKE = re.compile(r"(?:[\w.-]+@)?[\w.-]+:(?!//)[^\\]+")
_SCHEMES = ("https", "http", "ssh", "git", "file")
_KEPT = "refs/kvpatch"
_PARTIAL = (
    ("core.repositoryformatversion", "1"),
    ("extensions.partialClone", "origin"),
    ("remote.origin.promisor", "true"),
    ("remote.origin.partialCloneFilter", "blob:none"),
)
_NO_SUCH = ("couldn't find remote ref", "no such remote ref", "not our ref", "unadvertised object")
_NOT_FOUND = re.compile(
    r"repository '[^']*' not found|does not appear to be a git repository|returned error: 404"
)
_NETWORK = re.compile(
    r"unable to access|(?:could not|couldn't) resolve|connection (?:refused|reset|timed out|closed)"
    r"|failed to connect|couldn't connect|early eof|rpc failed|hung up|unexpected disconnect|transfer closed"
    r"|operation too slow|network is unreachable|no route to host|returned error: \d+|unable to connect"
    r"|could not read from remote|invalid index-pack output|expected flush|protocol error|bad line length"
    r"|http/2 stream|ssl|tls|timed? ?out"
    r"|could not read (?:username|password)|terminal prompts disabled|unable to look up"
    r"|remote end|empty reply|expected packfile|bad pack header|premature end",
    re.IGNORECASE,
)


def is_url(spec: str) -> bool:
    """Whether a source names a git URL (``https://...``, ``git@host:path``) and not a local path."""
    return "://" in spec or (_SCP_LIKE.fullmatch(spec) is not None and not Path(spec).exists())


def redacted(url: str) -> str:
    """A URL without password or token, fit for messages and manifests."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    user, host = parts.netloc.rsplit("@", 1)
    kept = f"{user.split(':', 1)[0]}@" if parts.scheme == "ssh" else ""
    return urlunsplit(parts._replace(netloc=kept + host))


class Remote:
    """A git URL and its repository in the cache."""

    def __init__(self, layout: Layout, upstream: Upstream, url: str) -> None:
        scheme = url.split("://", 1)[0].lower() if "://" in url else "ssh"
        if url.startswith("-") or "::" in url.split("/", 1)[0] or scheme not in _SCHEMES:
            raise SpecError(
                f"{redacted(url)!r} is not a git URL that kvpatch reads",
                hint=f"{upstream.option} takes https://, http://, ssh://, git:// and file:// URLs, or a path",
            )
        self.upstream = upstream
        self.location = redacted(url)
        self._layout = layout
        self._url = url
        self._name = f"{upstream.name}-{short_id(self.location.rstrip('/').removesuffix('.git'))}"

    @property
    def git_dir(self) -> Path:
        """The bare repository; made when it does not exist yet."""
        return self._layout.repository("git", self._name)

    @property
    def objects(self) -> Path:
        """The folder with everything fetched so far."""
        return self.git_dir / "objects"

    def view(self) -> ObjectView:
        """Reader of what was fetched so far."""
        return ObjectView(self._layout.view(), self.objects)

    def tags(self) -> tuple[str, ...]:
        """All tags of the server. Raises NetworkError."""
        listed = self._list("refs/tags/*")
        return tuple(sorted({name.removeprefix("refs/tags/").removesuffix("^{}") for name in listed}))

    def cached(self, pin: Pin) -> str | None:
        """Commit of an earlier fetch of the pin's ref, as far as it agrees with the pin."""
        commit = self._kept(pin.ref)
        if commit is None and pin.commit is not None and is_full_commit(pin.commit.lower()):
            commit = self._kept(pin.commit.lower())
        if commit is None or (pin.commit is not None and not commit.startswith(pin.commit.lower())):
            return None
        return commit

    def fetch(self, ref: str, *, commit: str | None = None, progress: Progress = silent) -> str:
        """Bring the commit that a tag, branch or commit name stands for, with its trees; returns its full
        name.

        `commit` is the full name of a shortened `ref`, when known. Raises UnknownRefError, NetworkError.
        """
        check_ref(ref)
        source = self._server_name(ref, commit)
        kept = _kept_name(ref)
        self._fetch(["--depth=1", f"+{source}:{kept}"], progress=progress, ref=ref)
        found = self._kept(ref)
        if found is None:
            raise MissingObjectsError(
                f"{self.location} sent no commit for {ref}",
                hint="it may be the tag of something else than a commit",
                data={"missing": [ref]},
            )
        return found

    def complete(self, commit: str, progress: Progress = silent) -> None:
        """Bring the contents of all files of a fetched commit that are not there yet, in one fetch.

        Raises NetworkError, or MissingObjectsError when the server does not have them.
        """
        files = self.view().files(commit)
        wanted = self.view().absent(tuple(files.values()))
        if not wanted:
            return
        progress(f"fetching the contents of {len(wanted)} files")
        self._fetch(
            ["--stdin"], progress=progress, ref=commit, stdin="".join(f"{oid}\n" for oid in sorted(wanted))
        )
        lost = self.view().absent(tuple(wanted))
        if lost:
            paths = sorted(path for path, oid in files.items() if oid in lost)
            raise MissingObjectsError(
                f"{self.location} did not send the contents of {len(paths)} files of {commit[:12]}, "
                f"e.g. {paths[0]}",
                hint=f"use another repository: {self.upstream.option} PATH|URL",
                data={"missing": paths},
            )

    def _kept(self, ref: str) -> str | None:
        local = Git(self.git_dir)
        status, out, _ = local.attempt("rev-parse", "--quiet", "--verify", f"{_kept_name(ref)}^{{commit}}")
        if status != 0:
            return None
        commit = out.decode().strip()
        # Its trees come with it in one pack, so a commit that is there is whole up to file contents.
        return commit if self.view().commit(commit) else None

    def _server_name(self, ref: str, commit: str | None) -> str:
        listed = self._list(f"refs/tags/{ref}", f"refs/heads/{ref}")
        for name in (f"refs/tags/{ref}", f"refs/heads/{ref}"):
            if name in listed:
                return name
        lowered = ref.lower()
        if is_full_commit(lowered):
            return lowered
        if is_commit(lowered):
            if commit is not None and is_full_commit(commit.lower()) and commit.lower().startswith(lowered):
                return commit.lower()
            hits = {oid for oid in self._list().values() if oid.startswith(lowered)}
            if len(hits) == 1:
                return hits.pop()
        raise unknown_ref(self.upstream, ref, self.tags(), self.location)

    def _list(self, *patterns: str) -> dict[str, str]:
        runner = self._network()
        status, out, stderr = runner.attempt("ls-remote", "--quiet", "origin", *patterns)
        if status != 0:
            raise self._explained(runner.failure(("ls-remote",), status, stderr), "list the tags")
        pairs = (
            line.split("\t", 1)
            for line in out.decode("utf-8", "surrogateescape").splitlines()
            if "\t" in line
        )
        return {name: oid for oid, name in pairs}

    def _fetch(self, wants: Sequence[str], *, progress: Progress, ref: str, stdin: str | None = None) -> None:
        git_dir = self.git_dir
        with self._layout.lock(f"git-{self._name}", progress):
            self._layout.sweep(git_dir)
            local = Git(git_dir)
            for name, value in _PARTIAL:
                local.run("config", name, value)
            negotiation = ("-c", "fetch.negotiationAlgorithm=noop") if stdin is not None else ()
            options, refspecs = (
                [w for w in wants if w.startswith("--")],
                [w for w in wants if not w.startswith("--")],
            )
            try:
                self._network().watched(
                    *negotiation,
                    "fetch",
                    "--progress",
                    "--no-tags",
                    "--no-write-fetch-head",
                    "--no-auto-maintenance",
                    "--recurse-submodules=no",
                    "--filter=blob:none",
                    *options,
                    "origin",
                    *refspecs,
                    on_line=_reporter(progress, self.upstream.name),
                    stdin=None if stdin is None else stdin.encode(),
                )
            except GitError as error:
                self._layout.sweep(git_dir)
                if any(words in error.stderr for words in _NO_SUCH):
                    if stdin is not None:
                        raise MissingObjectsError(
                            f"{self.location} lacks file contents of {ref[:12]}",
                            hint=f"use another repository: {self.upstream.option} PATH|URL",
                            data={"missing": [ref]},
                        ) from error
                    raise unknown_ref(self.upstream, ref, self.tags(), self.location) from error
                raise self._explained(error, f"fetch {ref}") from error

    def _network(self) -> Git:
        # The URL is given to each command and written nowhere, because it may hold a token.
        return Git(self.git_dir, network=True, config={"remote.origin.url": self._url})

    def _explained(self, error: Exception, action: str) -> Exception:
        if isinstance(error, GitError) and _NOT_FOUND.search(error.stderr):
            return SpecError(
                f"there is no git repository at {self.location}: {_tail(error.stderr)}",
                hint=f"check the address given with {self.upstream.option}",
            )
        if not isinstance(error, GitError) or not _NETWORK.search(error.stderr):
            return error
        detail = error.message.rsplit(": ", 1)[-1] if not error.stderr else _tail(error.stderr)
        detail = detail.replace(self._url, self.location)
        alternatives = "PATH, or sdist" if self.upstream.name == "llama.cpp" else "PATH"
        return NetworkError(
            f"cannot {action} of {self.upstream.name} from {self.location}: {detail}",
            hint="run the same command again (what was fetched before is kept), or work without the network: "
            f"{self.upstream.option} {alternatives}",
            data={"location": self.location},
        )


def _kept_name(ref: str) -> str:
    # Quoted, because refs "a" and "a/b" cannot both exist as files.
    return f"{_KEPT}/{quote(ref, safe='')}"


def _tail(stderr: str) -> str:
    lines = [line.strip() for line in stderr.replace("\r", "\n").splitlines()]
    telling = [line for line in lines if line.startswith(("fatal:", "error:", "remote:"))] or [
        line for line in lines if line
    ]
    return "; ".join(telling[-3:])


def _reporter(progress: Progress, name: str) -> Callable[[str], None]:
    last = 0.0

    def report(line: str) -> None:
        nonlocal last
        # git rewrites its counters many times a second; two lines a second are enough for people and logs.
        if "%" in line and time.monotonic() - last >= 0.5:
            last = time.monotonic()
            progress(f"{name}: {line.removeprefix('remote: ').strip()}")

    return report
