"""A llama-server in a slot that its parent leased: the lease's limit, what is charged, and waits for room."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvpatch import smoke
from kvpatch.runtime import CallError, Command, Ledger, Slot, load
from kvpatch.smoke.models import prompt_ids
from kvpatch.smoke.server import ServerSpec, start_and_wait_end
from tests.integration import llama_server
from tests.integration.llama_pair import ONE, PATCHED, STEP, STOCK, command, completion
from tests.integration.llama_server import ON, Start, ask, call, device, mapped, wait_until

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]
files, start = llama_server.files, llama_server.start  # fixtures

GROUP = "parent"
WORDS = ("-c", "4096", *ONE)
MIB = 1 << 20
FOR_EVER = (2**63 - 1) // 10**6  # milliseconds, as Go writes a wait without an end


class Parent:
    """Leases a slot for the server, and holds memory of the same group as another child would."""

    def __init__(self, ledger: Ledger, limit: int, fixed: int = 0) -> None:
        self.ledger, self.limit = ledger, limit
        self.slot = ledger.lease(GROUP, "server", fixed, fixed=fixed, limit=limit)

    def env(self, wait_ms: int = 0) -> dict[str, str]:
        # The settings of single use are wrong on purpose: leases go before them.
        wrong = {"KVCACHED_SLOT": "77", "KVCACHED_LIMIT": "1", "KVCACHED_LEDGER": "/nonexistent/ledger"}
        lease = f"host,{self.slot},{self.limit},{self.ledger.path}"
        other = f"0000:ff:00.0,3,1,{self.ledger.path}.gpu"
        return {
            **ON,
            **wrong,
            "KVCACHED_LEASES": f"{other};{lease}",
            "KVCACHED_ROOM_WAIT_MS": str(wait_ms),
            "KVCACHED_GROUP": GROUP,
        }

    def view(self) -> Slot:
        (found,) = (slot for slot in self.ledger.slots() if slot.slot == self.slot)
        return found

    @contextlib.contextmanager
    def another(self, size: int) -> Iterator[None]:
        slot = self.ledger.lease(GROUP, "another", size, limit=self.limit)
        try:
            yield
        finally:
            self.ledger.unlease(slot)


@pytest.fixture
def parent(patched: smoke.Install, tmp_path: Path) -> Iterator[Callable[..., Parent]]:
    with Ledger(tmp_path / "leases", library=load(patched.llama_server.parent)) as ledger:
        yield lambda limit, fixed=0: Parent(ledger, limit, fixed)


def test_the_lease_goes_before_the_settings_for_one_device(
    start: Start, parent: Callable[..., Parent]
) -> None:
    """And what stays outside the library, predicted wrong, is charged as it is: nothing, in memory of its own."""
    leased = parent(64 * MIB, 9 * MIB)
    with start(PATCHED, *WORDS, env=leased.env()) as server:
        slot = leased.view()
        assert slot.attached
        assert device(server)["limit_bytes"] == 64 * MIB
        assert slot.fixed == 0
        assert slot.claim == mapped(server) > 0


def test_weights_that_are_mapped_from_the_file_are_charged_as_fixed(
    start: Start, parent: Callable[..., Parent], files: Path, patched: smoke.Install
) -> None:
    leased = parent(64 * MIB, 1 * MIB)
    mmap = smoke.options.if_known(patched.llama_server, "--load-mode", "mmap") or ("--mmap",)
    with start(PATCHED, *WORDS, *mmap, env=leased.env()):
        size = (files / "one.gguf").stat().st_size
        assert 0.5 * size < leased.view().fixed <= size


def test_more_weights_outside_than_the_limit_is_a_line_in_the_log(
    start: Start, parent: Callable[..., Parent], files: Path, patched: smoke.Install, tmp_path: Path
) -> None:
    """The lease's figure holds, and the start goes on: here to compute buffers, which do not fit either."""
    mmap = smoke.options.if_known(patched.llama_server, "--load-mode", "mmap") or ("--mmap",)
    leased = parent(64 * MIB)
    with start(PATCHED, *WORDS, *mmap, env=leased.env()):
        outside = leased.view().fixed
    leased.ledger.unlease(leased.slot)

    tight = parent(outside // 2)

    def argv(port: int) -> tuple[str | Path, ...]:
        binary = patched.llama_server
        return (*command(binary, port, tmp_path), "--model", files / "one.gguf", *WORDS, *mmap)

    spec = ServerSpec(name="tight", argv=argv, ready_path="/health", env=lambda port: tight.env())
    status, text = start_and_wait_end(spec, tmp_path, seconds=60.0)
    assert status > 0, text
    assert f"{outside} bytes of weights are outside the library, more than was set aside" in text
    assert "of compute on CPU" in text
    assert tight.view().fixed == 0


@pytest.mark.parametrize("sleeps", [False, True])
def test_a_decode_waits_for_room_and_goes_on(
    start: Start, parent: Callable[..., Parent], sleeps: bool
) -> None:
    """Put to sleep in the middle of it as well: its batch is placed, its cells so far and its weights come back."""
    with start(STOCK, *WORDS) as server:
        expected = ask(server, prompt_ids(200, 1), 600)["tokens"]

    limit = 64 * MIB
    leased = parent(limit)
    answers: list[Any] = []
    with start(PATCHED, *WORDS, env=leased.env(60_000)) as server:
        thread = threading.Thread(target=lambda: answers.append(ask(server, prompt_ids(200, 1), 600)))
        room = limit - leased.view().charge - 3 * STEP // 2  # one step, not three
        with leased.another(room):
            thread.start()
            wait_until(lambda: leased.view().wants > 0, 60)
            assert leased.view().parked == 1
            if sleeps:
                leased.ledger.command(leased.slot, Command.SLEEP, wait_ms=5000)
                assert leased.view().asleep > 0
                assert mapped(server) == 0
        if sleeps:

            def woken() -> bool:
                try:
                    leased.ledger.command(leased.slot, Command.WAKE, wait_ms=5000)
                except CallError:
                    return False
                return True

            wait_until(woken, 30)
        thread.join(60)
        assert not thread.is_alive()
        assert leased.view().wants == 0
        assert "no room" not in server.log_text()
    assert answers[0]["tokens"] == expected


def test_a_wait_that_is_refused_ends_the_request_at_once(start: Start, parent: Callable[..., Parent]) -> None:
    limit = 64 * MIB
    leased = parent(limit)
    statuses: list[int] = []
    with start(PATCHED, *WORDS, env=leased.env(FOR_EVER)) as server:

        def request() -> None:
            wanted = completion(prompt_ids(200, 1), 600)
            statuses.append(call(server, "POST", "/completion", body=wanted).status_code)

        thread = threading.Thread(target=request)
        with leased.another(limit - leased.view().charge - 3 * STEP // 2):
            thread.start()
            wait_until(lambda: leased.view().wants > 0, 60)
            leased.ledger.command(leased.slot, Command.REFUSE, wait_ms=5000)
            thread.join(20)
            assert not thread.is_alive()
    assert statuses == [503]


def test_a_start_waits_for_room(start: Start, parent: Callable[..., Parent]) -> None:
    """Weights, cache and compute buffers: the server is ready once the other has gone."""
    limit = 64 * MIB
    leased = parent(limit)
    seen: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(leased.another(limit - 256 * 1024))
        gone = stack.pop_all()

        def make_room() -> None:
            wait_until(lambda: leased.view().wants > 0, 60)
            seen.append(leased.view().wants)
            gone.close()

        thread = threading.Thread(target=make_room)
        thread.start()
        try:
            with start(PATCHED, *WORDS, env=leased.env(60_000)) as server:
                thread.join()
                assert ask(server, prompt_ids(100, 1), 4)["tokens"]
        finally:
            gone.close()
    assert seen[0] > 0
