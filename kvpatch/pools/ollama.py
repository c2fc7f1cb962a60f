"""Pools as Ollama's /api/ps shows them: to look only, and whoever's they are."""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from kvpatch.pools import errors
from kvpatch.pools.http import AnswerError, exchange
from kvpatch.pools.model import Device, Group, Pool, View, Way

DEFAULT_PORT = 11434
NO_LIMIT = 2**64 - 1
_SECONDS = 5.0
_PORTS = {"http": 80, "https": 443}


def address(text: str) -> tuple[str, str, int]:
    """Scheme, host and port of an OLLAMA_HOST, as Ollama itself reads it. Raises PoolsError."""
    text = text.strip().strip("\"'")
    scheme, found, rest = text.partition("://")
    if not found:
        scheme, rest = "http", text
    scheme = scheme.lower()
    port = _PORTS.get(scheme, DEFAULT_PORT) if found else DEFAULT_PORT
    if scheme not in _PORTS:
        raise errors.PoolsError(
            f"OLLAMA_HOST {text!r} is not reached by http or https", hint="write HOST, HOST:PORT or an URL"
        )
    # One colon is a port's; more are an IPv6 address, which may stand without its brackets.
    netloc = rest.partition("/")[0]
    if netloc.count(":") > 1 and not netloc.startswith("["):
        netloc = f"[{netloc}]"
    try:
        parts = urlsplit(f"//{netloc}")
        host, port = parts.hostname or "127.0.0.1", parts.port or port
    except ValueError:
        raise errors.PoolsError(
            f"OLLAMA_HOST {text!r} is no address", hint="write HOST, HOST:PORT or an URL"
        ) from None
    # A server listens there; a client cannot go there.
    return scheme, {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


class Ollama:
    """A server that is asked for its loaded models."""

    way = Way.OLLAMA

    def __init__(self, host: str) -> None:
        scheme, self._host, self._port = address(host)
        self._tls = scheme == "https"
        shown = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{scheme}://{shown}:{self._port}"

    def close(self) -> None:
        """Nothing is kept open."""

    def look(self) -> View:
        """The loaded models now. Raises PoolsError."""
        models = self._models()
        told = [(model, model["kvcached"]) for model in models if isinstance(model.get("kvcached"), dict)]
        if models and not told:
            raise errors.NoPoolsError(
                f"the Ollama at {self.url} says nothing of elastic memory: it is a stock build, or it is switched off",
                hint="run one that `kvpatch build` made, with OLLAMA_KVCACHED_ENABLED=true",
            )
        try:
            pools = tuple(_pool(model, status) for model, status in told)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._unusable(f"its `kvcached` is not understood ({error})") from error
        notes = ["read only, and without the devices: /api/ps does not tell them apart"]
        group = Group(
            name="",
            limit=pools[0].limit if pools else None,
            charge=sum(pool.charge for pool in pools),
        )
        device = Device(id="all", name=f"Ollama at {self.url}", groups=(group,) if pools else (), pools=pools)
        return View(way=self.way, where=self.url, devices=(device,), notes=tuple(notes))

    def require_pools(self) -> None:
        """Raise NoPoolsError where no model is loaded, PoolsError where nobody answers."""
        if not self.look().pools:
            raise errors.NoPoolsError(
                f"the Ollama at {self.url} has no model loaded", hint="load one: ollama run MODEL"
            )

    def _models(self) -> list[Mapping[str, Any]]:
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        try:
            answer = exchange(kind(self._host, self._port, timeout=_SECONDS), "GET", "/api/ps")
        except AnswerError as error:
            raise self._unusable(str(error)) from error
        models = answer.get("models") if isinstance(answer, dict) else None
        if models is None and isinstance(answer, dict) and "models" in answer:
            models = []
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            raise self._unusable("what answers there is not an Ollama")
        return models

    def _unusable(self, reason: str) -> errors.PoolsError:
        return errors.PoolsError(
            f"cannot read {self.url}/api/ps: {reason}",
            hint="start it (ollama serve), or name another: OLLAMA_HOST=HOST:PORT, --ollama HOST:PORT",
        )


def _pool(model: Mapping[str, Any], status: Mapping[str, Any]) -> Pool:
    limit = status.get("limit")
    return Pool(
        name=str(model.get("name") or model.get("model") or "?"),
        state=str(status.get("state", "?")),
        weights_mapped=int(status.get("weights_mapped") or 0),
        kv_mapped=int(status.get("kv_mapped") or 0),
        kv_reserved=int(status["kv_reserved"]) if "kv_reserved" in status else None,
        host_bytes=int(status.get("host_bytes") or 0),
        context_bytes=int(status.get("context_bytes") or 0),
        lease=int(status.get("lease") or 0),
        charge=int(status.get("charge") or 0),
        limit=None if limit is None or int(limit) == NO_LIMIT else int(limit),
    )
