"""Source from a repository on this machine, bare or not: read through alternates, never written.

Only its refs are read by opening it (with no network, optional locks off); objects are read from its object
folder by a repository of our own. Work trees point to that folder too, so nothing is copied. Uncommitted
changes of a repository with a work tree are not used: what counts is the commit that the asked-for ref names.
"""

from __future__ import annotations

from pathlib import Path

from kvpatch.errors import AccessError, GitError, guard
from kvpatch.gitrun import Git
from kvpatch.sources.errors import MissingObjectsError, SpecError
from kvpatch.sources.layout import Layout
from kvpatch.sources.model import Pin, Upstream
from kvpatch.sources.names import check_ref, is_commit, is_full_commit, unknown_ref
from kvpatch.sources.objects import ObjectView

_SPACES = ("refs/tags/", "refs/heads/", "refs/remotes/origin/")
# More missing than this share of all files is no mirror with some large files left out but a blob-filtered clone.
_TOLERATED = 0.05


def is_repository(path: Path) -> bool:
    """Whether `path` itself (not a folder above it) is a git repository, bare or with a work tree."""
    with guard("read", path):
        if (path / ".git").exists():
            return True
        return (path / "HEAD").is_file() and (path / "objects").is_dir() and (path / "refs").is_dir()


class Mirror:
    """A repository of the user's. Raises SpecError or AccessError when it cannot be read as one."""

    def __init__(self, layout: Layout, upstream: Upstream, path: Path) -> None:
        self.upstream = upstream
        self.path = path
        self._layout = layout
        self._git = Git(path / ".git" if (path / ".git").exists() else path)
        try:
            answer = self._git.text(
                "rev-parse",
                "--path-format=absolute",
                "--git-path",
                "objects",
                "--show-object-format",
                "--git-common-dir",
            ).splitlines()
        except GitError as error:
            raise SpecError(
                f"{path} looks like a git repository, but git cannot read it: {error.stderr.strip()}",
                hint=f"check it with `git -C {path} status`, or name another source",
            ) from error
        if answer[1] != "sha1":
            raise SpecError(
                f"{path} uses {answer[1]} object names; {upstream.name} is identified by sha1 commits",
                hint="use a clone of upstream's own repository",
            )
        self.objects = Path(answer[0])
        if not self.objects.is_dir():
            raise SpecError(f"{path} looks like a git repository, but {self.objects} is not a folder")

    def view(self) -> ObjectView:
        """Reader of its objects."""
        return ObjectView(self._layout.view(), self.objects)

    def tags(self) -> tuple[str, ...]:
        """Names of all tags."""
        return tuple(name.removeprefix("refs/tags/") for name in self._refs("refs/tags"))

    def commit(self, pin: Pin) -> str:
        """Full name of the commit that the pin's ref names here.

        A ref that is absent is no obstacle when the pin gives its whole commit and the mirror has that.
        Raises UnknownRefError, or MissingObjectsError when the ref is there and its commit is not.
        """
        check_ref(pin.ref)
        view = self.view()
        for space in _SPACES:
            oid = self._refs(space + pin.ref).get(space + pin.ref)
            if oid is not None:
                found = view.commit(oid)
                if found is None:
                    raise MissingObjectsError(
                        f"{self.path} has {pin.ref}, but not the commit it names ({oid[:12]})",
                        hint=f"repair the mirror (`git -C {self.path} fsck`) or use another source",
                        data={"missing": [oid]},
                    )
                return found
        if is_commit(pin.ref):
            found = view.commit(pin.ref.lower())
            if found is not None:
                return found
        if pin.commit is not None and is_full_commit(pin.commit.lower()):
            found = view.commit(pin.commit.lower())
            if found is not None:
                return found
        raise unknown_ref(self.upstream, pin.ref, self.tags(), str(self.path))

    def _refs(self, prefix: str) -> dict[str, str]:
        try:
            listed = self._git.run("for-each-ref", "--format=%(objectname) %(refname)", prefix)
        except (GitError, AccessError) as error:
            raise SpecError(f"the refs of {self.path} cannot be read: {error.message}") from error
        pairs = (line.split(" ", 1) for line in listed.decode("utf-8", "surrogateescape").splitlines())
        return {name: oid for oid, name in pairs}


def absent_files(view: ObjectView, upstream: str, commit: str, location: str) -> tuple[str, ...]:
    """Paths of a commit whose contents a mirror lacks, sorted.

    Raises MissingObjectsError when folders are missing too, or so many files that it is not a mirror with a
    few left out.
    """
    try:
        files = view.files(commit)
    except GitError as error:
        raise MissingObjectsError(
            f"{location} lacks folders of {upstream} {commit[:12]}: {error.stderr.strip().splitlines()[-1:]}",
            hint="repair the mirror (`git fsck` tells more) or use another source",
            data={"missing": [commit]},
        ) from error
    lost = view.absent(tuple(files.values()))
    paths = tuple(sorted(path for path, oid in files.items() if oid in lost))
    if len(paths) > max(1.0, _TOLERATED * len(files)) and len(paths) > 2:
        raise MissingObjectsError(
            f"{location} lacks the contents of {len(paths)} of {len(files)} files of {upstream} "
            f"{commit[:12]}, "
            f"e.g. {paths[0]}: it is a blob-filtered clone, not a mirror",
            hint="give kvpatch the repository's URL, or complete the clone: git fetch --refetch --no-filter",
            data={"missing": list(paths)},
        )
    return paths
