"""The one door to sources: find one, compare it with its pin, and lay it out as a work tree."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from pathlib import Path

from kvpatch.errors import SourceError, guard
from kvpatch.sources import sdist
from kvpatch.sources.archive import SUFFIXES, comment, is_archive
from kvpatch.sources.errors import MissingObjectsError, NetworkError, PinMismatchError, SpecError
from kvpatch.sources.imports import Imports, below
from kvpatch.sources.layout import Layout, short_id
from kvpatch.sources.mirror import Mirror, absent_files, is_repository
from kvpatch.sources.model import LLAMA_CPP, OLLAMA, Pin, Progress, Resolved, Tree, Upstream, silent
from kvpatch.sources.names import check_commit, is_full_commit, ordered
from kvpatch.sources.remote import Remote, is_url
from kvpatch.sources.worktree import Record, Worktree

# Location -> URL with its credentials, for the life of the process: they are written nowhere.
_urls: dict[str, str] = {}
_KNOWN = {upstream.name: upstream for upstream in (OLLAMA, LLAMA_CPP)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Base:
    commit: str
    objects: Path
    missing: tuple[str, ...] = ()


class Store:
    """Sources in a cache folder, which is made on first use and may be shared by any number of builds at
    once.
    """

    def __init__(self, root: Path) -> None:
        self._layout = Layout(root.expanduser().absolute())
        self._upstreams = dict(_KNOWN)

    @property
    def root(self) -> Path:
        """The cache folder."""
        return self._layout.root

    def resolve(
        self, upstream: Upstream, spec: str | None, pin: Pin, *, progress: Progress = silent
    ) -> Resolved:
        """Find a source and compare it with its pin.

        `spec` is a git URL, the path of a repository (bare or not; its uncommitted files do not count), of a
        folder without git (taken as it is) or of an archive, ``sdist``, ``sdist:VERSION`` or ``sdist:FILE``
        for llama.cpp, or None for the upstream's own URL. A URL is asked only when the cache has no commit
        that agrees with the pin. Raises a subclass of SourceError; the cache stays
        usable.
        """
        self._upstreams[upstream.name] = upstream
        spec = upstream.url if spec is None else spec
        if sdist.is_spec(spec):
            return self._sdist(upstream, spec, pin, progress)
        if is_url(spec):
            return self._url(upstream, spec, pin, progress)
        path = self._path(upstream, spec)
        if path.is_file():
            return self._archive(upstream, path, pin)
        if is_repository(path):
            return self._mirror(upstream, path, pin, progress)
        progress(f"importing {path}")
        tree, _ = Imports(self._layout, upstream).folder(path, ref=pin.ref, date=pin.date, progress=progress)
        if pin.tree is not None and tree != pin.tree.lower():
            raise _other_tree(upstream, pin.ref, str(path), pin.tree, tree)
        return Resolved(
            upstream=upstream.name,
            kind="path",
            location=str(path),
            ref=pin.ref,
            commit=(pin.commit or "") if pin.tree is not None else "",
            key=f"tree:{tree}",
            date=pin.date,
            verified=pin.tree is not None,
            tree=pin.tree,
        )

    def materialize(
        self, resolved: Resolved, dest: Path, *, pristine: bool = True, progress: Progress = silent
    ) -> Tree:
        """Make `dest` a git work tree of the source with HEAD at its base commit.

        An existing one is updated in place: unchanged files keep their times, local edits are undone, files
        that are not in the tree are removed, except ``.kvpatch/``. With `pristine` false, a tree that already
        stands on this very source is left as it is, with whatever was committed or changed on top. Raises
        WorkspaceError when `dest` holds something that kvpatch did not make.
        """
        dest = dest.expanduser().absolute()
        with self._layout.lock(f"tree-{short_id(str(dest))}", progress):
            worktree = Worktree(dest)
            worktree.claim()
            known = worktree.record()
            if (
                known is not None
                and known.source_key == resolved.key
                and known.tree == resolved.tree
                and not known.missing
            ):
                if not pristine and worktree.descends(known):
                    return _tree(dest, known)
                if worktree.differences(known) == ():
                    return _tree(dest, known)
            base = self._base(resolved, progress)
            record = Record(
                format=1,
                ready=True,
                upstream=resolved.upstream,
                kind=resolved.kind,
                location=resolved.location,
                source_key=resolved.key,
                key=_key(resolved, base.missing),
                base_commit=base.commit,
                upstream_commit=resolved.commit,
                tree=resolved.tree,
                missing=base.missing,
                objects=str(base.objects),
            )
            if known == record and (
                (not pristine and worktree.descends(known)) or worktree.differences(known) == ()
            ):
                return _tree(dest, known)
            progress(f"writing {resolved.upstream} {resolved.ref} to {dest}")
            worktree.check_out(record)
            return _tree(dest, record)

    def tags(self, upstream: Upstream, spec: str | None, *, progress: Progress = silent) -> tuple[str, ...]:
        """The tags of a URL or repository, oldest release first; nothing for sources without history."""
        spec = upstream.url if spec is None else spec
        if sdist.is_spec(spec):
            return ()
        if is_url(spec):
            progress(f"asking {upstream.name}'s server for its tags")
            return ordered(Remote(self._layout, upstream, spec).tags())
        path = self._path(upstream, spec)
        if path.is_file() or not is_repository(path):
            return ()
        return ordered(Mirror(self._layout, upstream, path).tags())

    def fetch_commit(self, tree: Tree, commit: str, *, progress: Progress = silent) -> bool:
        """Bring a further commit with its files within reach of a work tree; False when it is not to be had.

        `commit` may be a tag or build number; the tree then has a tag of that name. Only a tree that came
        from a URL asks a server; a mirror is searched, and sources without history know no other commit.
        """
        with self._layout.lock(f"tree-{short_id(str(tree.path))}", progress):
            worktree = Worktree(tree.path)
            record = worktree.record()
            if record is None or record.upstream not in self._upstreams:
                return False
            try:
                found = self._further(record, commit, progress)
            except SourceError as error:
                progress(f"{commit} is not to be had: {error.message}")
                return False
            if found is None:
                return False
            worktree.add_base(found, None if found.startswith(commit.lower()) else commit)
            return True

    def _further(self, record: Record, commit: str, progress: Progress) -> str | None:
        upstream = self._upstreams[record.upstream]
        if record.kind == "mirror":
            return Mirror(self._layout, upstream, Path(record.location)).commit(Pin(ref=commit))
        if record.kind != "git":
            return record.base_commit if record.base_commit.startswith(commit.lower()) else None
        remote = Remote(self._layout, upstream, _urls.get(record.location, record.location))
        name = commit if is_full_commit(commit) else remote.view().commit(commit)
        found = remote.cached(Pin(ref=commit, commit=name)) or remote.fetch(
            commit, commit=name, progress=progress
        )
        remote.complete(found, progress)
        return found

    def _path(self, upstream: Upstream, spec: str) -> Path:
        path = Path(spec).expanduser().absolute()
        with guard("read the source", path):
            if not path.exists():
                raise SpecError(
                    f"there is no {path} to take {upstream.name} from",
                    hint=f"{upstream.option} takes a URL, a repository, a folder or an archive"
                    + (", or sdist" if upstream.name == LLAMA_CPP.name else ""),
                )
            if path.is_file() and not is_archive(path):
                raise SpecError(
                    f"{path} is a file, but no archive kvpatch reads ({', '.join(SUFFIXES)})",
                    hint=f"{upstream.option} takes a URL, a repository, a folder or an archive",
                )
        return path

    def _url(self, upstream: Upstream, spec: str, pin: Pin, progress: Progress) -> Resolved:
        if is_archive(Path(spec)):
            raise SpecError(
                f"{spec} is the address of an archive; kvpatch takes archives from this machine",
                hint=f"download it and give its path: {upstream.option} FILE",
            )
        remote = Remote(self._layout, upstream, spec)
        _urls[remote.location] = spec
        commit = remote.cached(pin) if pin.commit is not None else None
        if commit is None:
            progress(f"fetching {upstream.name} {pin.ref} from {remote.location}")
            try:
                commit = remote.fetch(pin.ref, commit=pin.commit, progress=progress)
            except NetworkError as error:
                commit = remote.cached(pin)
                if commit is None:
                    raise
                progress(
                    f"{error.message}; using {upstream.name} {pin.ref} as fetched before ({commit[:12]})"
                )
        verified = check_commit(upstream, pin, commit, remote.location)
        return Resolved(
            upstream=upstream.name,
            kind="git",
            location=remote.location,
            ref=pin.ref,
            commit=commit,
            key=commit,
            date=_day(remote.view().seconds(commit)),
            verified=verified,
        )

    def _mirror(self, upstream: Upstream, path: Path, pin: Pin, progress: Progress) -> Resolved:
        mirror = Mirror(self._layout, upstream, path)
        commit = mirror.commit(pin)
        verified = check_commit(upstream, pin, commit, str(path))
        progress(
            f"reading {upstream.name} {pin.ref} ({commit[:12]}) of {path}; its uncommitted files do not count"
        )
        return Resolved(
            upstream=upstream.name,
            kind="mirror",
            location=str(path),
            ref=pin.ref,
            commit=commit,
            key=commit,
            date=_day(mirror.view().seconds(commit)),
            verified=verified,
        )

    def _archive(self, upstream: Upstream, path: Path, pin: Pin) -> Resolved:
        digest = self._layout.sha256(path)
        if pin.sha256 is not None and digest != pin.sha256.lower():
            raise PinMismatchError(
                f"{path} has sha256 {digest}, but the pin says {pin.sha256}",
                hint="get the file that upstream published; nothing was taken from this one",
                data={"expected": pin.sha256, "actual": digest},
            )
        with guard("read the archive", path), path.open("rb") as stream:
            claimed = comment(stream, path.name)
        if claimed:
            check_commit(upstream, pin, claimed, str(path))
        verified = pin.sha256 is not None or pin.tree is not None
        return Resolved(
            upstream=upstream.name,
            kind="archive",
            location=str(path),
            ref=pin.ref,
            commit=claimed or ((pin.commit or "") if verified else ""),
            key=f"sha256:{digest}",
            date=pin.date,
            verified=verified,
            tree=pin.tree,
        )

    def _sdist(self, upstream: Upstream, spec: str, pin: Pin, progress: Progress) -> Resolved:
        path, version, digest = sdist.find(self._layout, upstream, spec, pin, progress)
        return Resolved(
            upstream=upstream.name,
            kind="sdist",
            location=str(path),
            ref=version,
            commit=pin.commit or "",
            key=f"sha256:{digest}:{sdist.FOLDER}",
            date=pin.date,
            verified=pin.sha256 is not None or pin.tree is not None,
            tree=pin.tree,
        )

    def _base(self, resolved: Resolved, progress: Progress) -> _Base:
        upstream = self._upstreams[resolved.upstream]
        if resolved.kind == "git":
            remote = Remote(self._layout, upstream, _urls.get(resolved.location, resolved.location))
            if remote.view().commit(resolved.commit) is None:  # the cache was emptied in between
                remote.fetch(resolved.commit, progress=progress)
            remote.complete(resolved.commit, progress)
            return _Base(commit=resolved.commit, objects=remote.objects)
        if resolved.kind == "mirror":
            mirror = Mirror(self._layout, upstream, Path(resolved.location))
            view = mirror.view()
            if view.commit(resolved.commit) is None:
                raise MissingObjectsError(
                    f"{mirror.path} no longer has commit {resolved.commit}",
                    hint="run the same command again",
                    data={"missing": [resolved.commit]},
                )
            missing = absent_files(view, upstream.name, resolved.commit, resolved.location)
            for path in missing:
                progress(f"left out, because the mirror lacks it: {path}")
            return _Base(commit=resolved.commit, objects=mirror.objects, missing=missing)
        imports = Imports(self._layout, upstream)
        source = Path(resolved.location)
        if resolved.kind == "path":
            tree, commit = imports.folder(source, ref=resolved.ref, date=resolved.date, progress=progress)
            if f"tree:{tree}" != resolved.key:
                raise SpecError(
                    f"{source} changed while it was being used",
                    hint="run the same command again when nothing writes to it",
                )
        else:
            commit = imports.archive(
                source,
                key=resolved.key,
                sha256=resolved.key.split(":")[1],
                ref=resolved.ref,
                date=resolved.date,
                select=below(sdist.FOLDER) if resolved.kind == "sdist" else None,
                progress=progress,
            )
        if resolved.tree is not None:
            found = imports.tree(commit)
            if found != resolved.tree.lower():
                raise _other_tree(upstream, resolved.ref, resolved.location, resolved.tree, found)
        return _Base(commit=commit, objects=imports.objects)


def _other_tree(upstream: Upstream, ref: str, location: str, expected: str, actual: str) -> PinMismatchError:
    return PinMismatchError(
        f"the files of {upstream.name} {ref} in {location} are tree {actual}, but the pin says {expected}",
        hint="files were added, left out or changed since upstream's commit; take an untouched source",
        data={"expected": expected, "actual": actual},
    )


def _tree(path: Path, record: Record) -> Tree:
    return Tree(
        path=path,
        base_commit=record.base_commit,
        upstream_commit=record.upstream_commit,
        missing=record.missing,
        key=record.key,
    )


def _key(resolved: Resolved, missing: tuple[str, ...]) -> str:
    if not missing:
        return resolved.key
    left_out = hashlib.sha256("\0".join(missing).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{resolved.key}-without-{left_out[:16]}"


def _day(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.timezone.utc).date().isoformat()
