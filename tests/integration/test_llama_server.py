"""llama-server's own hooks: sleep when idle, /kvcached, gauges, the request that ends for want of room, the router.

Answers of the stock server are the reference for everything that must not change.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import requests

from kvpatch import smoke
from kvpatch.smoke.models import prompt_ids, tiny_embedding, tiny_llama
from kvpatch.smoke.server import Server, ServerSpec, serve
from tests.integration.tiny_projector import TOKENS, image, tiny_projector

pytestmark = [pytest.mark.build, pytest.mark.timeout(900)]

PATCHED, STOCK = "patched", "stock"
ON = {"OLLAMA_KVCACHED_ENABLED": "1", "OLLAMA_KVCACHED_HTTP": "1"}
ONE = ("-np", "1")
SLOTS = {"unified": ("--kv-unified",), "split": ("--no-kv-unified",)}
# Weights that are mapped from the file are the page cache's, and do not sleep.
IN_MEMORY = ("--load-mode", "none")
COMMANDS = ("trim", "sleep", "wake")
ENDED = "This request was ended for want of memory: "
GB = 10.0**9
# What other requests are in the batch, and where cells lie, changes the order in which the CPU adds up: the stock
# server's log-probabilities move by up to 0.014 from run to run, and with them tokens that were nearly as likely.
TIE = 0.05
# One token that was there before is hint enough: nearly every step has a draft.
SHORT = ("--spec-ngram-simple-size-n", "1", "--spec-ngram-simple-size-m", "6")
# Bytes of one 256-cell step of the tiny model in K and V of all layers.
STEP = 256 * 1024
EMBD = 128

Start = Callable[..., "contextlib.AbstractContextManager[Server]"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    one = tiny_llama(folder / "one.gguf", 1)
    tiny_llama(folder / "two.gguf", 2)
    tiny_embedding(folder / "pooling.gguf", 3)
    assert one.shape.embd == EMBD
    return folder


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = (
        tmp_path_factory.mktemp("projector") / "projector.gguf"
    )  # a router takes all files of its folder for models
    tiny_projector(path, EMBD)
    return ("--mmproj", str(path), "--no-mmproj-offload")


@pytest.fixture
def start(tmp_path: Path, models: Path, stock: smoke.Install, patched: smoke.Install) -> Start:
    """Starts a server: a side, command line words, and variables; model "" is a router over the folder of models."""
    executables = {STOCK: stock.llama_server, PATCHED: patched.llama_server}

    def run(
        side: str, *words: str, model: str = "one", env: Mapping[str, str] | None = None
    ) -> contextlib.AbstractContextManager[Server]:
        source = ("--model", models / f"{model}.gguf") if model else ("--models-dir", models)

        def argv(port: int) -> tuple[str | Path, ...]:
            return (
                *(
                    executables[side],
                    *source,
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(port),
                    "-t",
                    "1",
                    "-tb",
                    "1",
                ),
                *("--offline", "--no-webui", "--log-verbosity", "4", "--cache-ram", "0", *IN_MEMORY),
                *("--slot-save-path", f"{tmp_path}/", "--metrics", *words),
            )

        variables = {"KVCACHED_LEDGER": str(tmp_path / "ledger"), **(env or {})}
        return serve(
            ServerSpec(name=side, argv=argv, ready_path="/health", env=lambda port: variables), tmp_path
        )

    return run


def call(
    server: Server, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: Any = None
) -> requests.Response:
    """A request with headers of its own, from any thread."""
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, server.url + path, headers=headers, json=body, timeout=60)


def body(prompt: list[int], answer: int, **more: Any) -> dict[str, Any]:
    wanted = {"n_predict": answer, "temperature": 0, "seed": 1, "cache_prompt": True, "return_tokens": True}
    return {"prompt": prompt, **wanted, **more}


def ask(server: Server, prompt: list[int], answer: int, slot: int = 0) -> dict[str, Any]:
    return server.json("POST", "/completion", json=body(prompt, answer, id_slot=slot), timeout=120)


def work(answer: Mapping[str, Any]) -> tuple[int, int]:
    """Prompt tokens that were processed, and those that were in the cache."""
    return answer["timings"]["prompt_n"], answer["timings"]["cache_n"]


def device(server: Server) -> dict[str, Any]:
    (found,) = server.json("GET", "/kvcached")["devices"]
    assert isinstance(found, dict)
    return found


def mapped(server: Server) -> int:
    return sum(device(server)["mapped_bytes"].values())


def is_sleeping(server: Server) -> bool:
    value = server.json("GET", "/props")["is_sleeping"]
    assert isinstance(value, bool)
    return value


def gauges(server: Server) -> dict[str, float]:
    """Our lines of /metrics, every one of which must have the form of Prometheus."""
    text = call(server, "GET", "/metrics").text
    assert "llamacpp:prompt_tokens_total" in text
    found = {}
    for line in text.splitlines():
        if "kvcached" in line and not re.fullmatch(r"# (HELP|TYPE) llamacpp:kvcached_[a-z_]+ \S.*", line):
            match = re.fullmatch(
                r'(llamacpp:kvcached_[a-z_]+\{device="[^"]+"(?:,kind="[a-z]+")?\}) (\d+)', line
            )
            assert match, line
            found[match[1]] = float(match[2])
    return found


def wait_until(true: Callable[[], bool], seconds: float, *, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(every)


def conversation(server: Server, between: Callable[[], None]) -> list[Any]:
    """A long first turn and its follow-up: tokens, and what of the prompts was processed."""
    first = ask(server, prompt_ids(600, 1), 24)
    between()
    follow_up = [*prompt_ids(600, 1), *first["tokens"], *prompt_ids(6, 2)]
    second = ask(server, follow_up, 24)
    return [first["tokens"], second["tokens"], work(second)]


def test_an_idle_server_sleeps_and_its_conversations_go_on(start: Start) -> None:
    """Scraped every second, with a limit of 3 s: reading figures is no use."""
    words = ("-c", "4096", *ONE, "--slots")
    with start(STOCK, *words) as server:
        expected = conversation(server, lambda: None)
    assert expected[2][0] < 10 < expected[2][1]

    with start(PATCHED, *words, "--sleep-idle-seconds", "3", env=ON) as server:

        def sleep() -> None:
            awake = device(server)
            assert min(awake["mapped_bytes"].values()) > 0
            assert not is_sleeping(server)

            def scrape() -> bool:
                assert [call(server, "GET", path).status_code for path in ("/metrics", "/slots")] == [
                    200,
                    200,
                ]
                return is_sleeping(server)

            wait_until(scrape, 7, every=1)
            asleep = device(server)
            assert asleep["mapped_bytes"] == {"kv": 0, "weights": 0, "compute": 0}
            assert asleep["host_bytes"] >= awake["mapped_bytes"]["weights"]
            for _ in range(2):
                assert scrape()
                time.sleep(0.5)
            after = device(server)
            assert (after["sleeps"], after["wakes"]) == (asleep["sleeps"], awake["wakes"])
            assert after["mapped_bytes"] == asleep["mapped_bytes"]

        assert conversation(server, sleep) == expected
        assert not is_sleeping(server)
        assert min(device(server)["mapped_bytes"].values()) > 0
    log = server.log_text()
    assert "entering sleeping state" not in log, "the model was destroyed"
    assert re.search(r"kvcached: asleep after 3000 ms without use", log)


def test_a_slot_saved_asleep_is_the_slot_saved_awake(start: Start, tmp_path: Path) -> None:
    with start(PATCHED, "-c", "4096", *ONE, env=ON) as server:
        ask(server, prompt_ids(700, 3), 16)
        for name in ("awake", "asleep"):
            if name == "asleep":
                server.json("POST", "/kvcached/sleep")
                assert mapped(server) == 0
            server.json("POST", "/slots/0?action=save", json={"filename": name})
        assert mapped(server) > 0, "reading the state did not wake it"
    assert (tmp_path / "asleep").read_bytes() == (tmp_path / "awake").read_bytes()
    assert (tmp_path / "awake").stat().st_size > 700 * STEP // 256


def test_commands(start: Start) -> None:
    prompt = prompt_ids(700, 4)
    with start(PATCHED, "-c", "4096", *ONE, env=ON) as server:
        first = ask(server, prompt, 24)
        before = device(server)
        assert server.json("POST", "/kvcached/trim")["success"] is True
        assert device(server)["idle_bytes"] == 0
        server.json("POST", "/slots/0?action=erase", json={})
        server.json("POST", "/kvcached/trim")
        assert device(server)["mapped_bytes"]["kv"] == 0

        assert ask(server, prompt, 24)["tokens"] == first["tokens"]
        slept = server.json("POST", "/kvcached/sleep")
        assert slept["freed_bytes"] >= before["mapped_bytes"]["weights"]
        assert (mapped(server), is_sleeping(server), server.json("GET", "/kvcached")["asleep"]) == (
            0,
            True,
            True,
        )
        server.json("POST", "/kvcached/wake")
        assert not is_sleeping(server)
        assert device(server)["mapped_bytes"]["weights"] == before["mapped_bytes"]["weights"]
        again = ask(server, prompt, 24)
        assert again["tokens"] == first["tokens"]
        assert work(again) == (1, 699)


def test_commands_between_the_steps_of_a_running_request(start: Start) -> None:
    words = ("-c", "4096", *ONE)
    wanted = body(prompt_ids(300, 5), 1000, ignore_eos=True)
    with start(STOCK, *words) as server:
        expected = server.json("POST", "/completion", json=wanted)["tokens"]
    with start(PATCHED, *words, env=ON) as server:
        answer: list[requests.Response] = []
        asking = threading.Thread(
            target=lambda: answer.append(call(server, "POST", "/completion", body=wanted))
        )
        asking.start()
        commands = 0
        while asking.is_alive():
            for command in COMMANDS:
                assert call(server, "POST", f"/kvcached/{command}").status_code == 200
                commands += 1
        assert answer[0].json()["tokens"] == expected
        assert commands >= 6
        assert device(server)["sleeps"] >= 2


def test_kvcached_is_off_unless_asked_for(start: Start) -> None:
    requests_of = [("GET", "/kvcached"), *(("POST", f"/kvcached/{name}") for name in COMMANDS)]
    with start(PATCHED, "-c", "512", *ONE, env={"OLLAMA_KVCACHED_ENABLED": "1"}) as server:
        for method, path in requests_of:
            answer = call(server, method, path)
            assert answer.status_code == 501
            assert answer.json()["error"]["type"] == "not_supported_error"
            assert "OLLAMA_KVCACHED_HTTP=1" in answer.json()["error"]["message"]
    answers = []
    for side in (PATCHED, STOCK):  # switched off there is no such path
        with start(side, "-c", "512", *ONE, env={"OLLAMA_KVCACHED_HTTP": "1"}) as server:
            answers.append([(a.status_code, a.content) for a in (call(server, *one) for one in requests_of)])
    assert answers[0] == answers[1]
    assert {status for status, _ in answers[0]} == {404}


def test_kvcached_is_behind_the_key_and_not_for_web_pages(start: Start) -> None:
    key = {"Authorization": "Bearer secret"}
    with start(PATCHED, "-c", "512", *ONE, "--api-key", "secret", env=ON) as server:
        for method, path in (("GET", "/kvcached"), *(("POST", f"/kvcached/{name}") for name in COMMANDS)):
            assert call(server, method, path).status_code == 401
            assert call(server, method, path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert (
                call(server, method, path, headers={**key, "origin": "http://127.0.0.1"}).status_code == 403
            )
            assert call(server, method, path, headers=key).status_code == 200


def test_gauges_are_the_figures(start: Start) -> None:
    with start(PATCHED, "-c", "2048", *ONE, env={**ON, "OLLAMA_KVCACHED_MEMORY_GB": "0.5"}) as server:
        ask(server, prompt_ids(300, 1), 8)
        shown, found = device(server), gauges(server)
        for kind, value in shown["mapped_bytes"].items():
            assert found[f'llamacpp:kvcached_mapped_bytes{{device="CPU",kind="{kind}"}}'] == value > 0
        assert found['llamacpp:kvcached_limit_bytes{device="CPU"}'] == GB / 2
        assert len(found) == 3 + sum(
            value is not None and name not in ("device", "mapped_bytes", "last_sleep_ms", "last_wake_ms")
            for name, value in shown.items()
        )


def test_switched_off_the_server_is_stock(start: Start) -> None:
    with start(
        PATCHED, "-c", "2048", *ONE, "--sleep-idle-seconds", "1", env={"OLLAMA_KVCACHED_HTTP": "1"}
    ) as server:
        first = ask(server, prompt_ids(300, 1), 16)
        assert gauges(server) == {}
        wait_until(lambda: is_sleeping(server), 6, every=0.2)
        again = ask(server, prompt_ids(300, 1), 16)
        assert again["tokens"] == first["tokens"]
        assert work(again) == (300, 0), "stock's sleep forgets prompts"
    assert "server is exiting sleeping state" in server.log_text()


class Stream:
    """A request whose answer is read as it comes."""

    def __init__(self, server: Server, wanted: dict[str, Any]) -> None:
        self.tokens: list[int] = []
        self.likely: list[list[tuple[int, float]]] = []
        self.error: dict[str, Any] | None = None
        self.ended = False
        self._server, self._wanted = server, {**wanted, "stream": True}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with requests.Session() as session:
            session.trust_env = False
            with session.post(
                self._server.url + "/completion", json=self._wanted, stream=True, timeout=120
            ) as answer:
                for line in answer.iter_lines():
                    if line.startswith(b"data: {"):
                        event = json.loads(line[len(b"data: ") :])
                        self.error = event.get("error")
                        self.ended = bool(event.get("stop"))
                        self.tokens += event.get("tokens", [])
                        for token in () if self.ended else event.get("completion_probabilities", []):
                            self.likely.append([(t["id"], t["logprob"]) for t in token["top_logprobs"]])

    def has_begun(self) -> bool:
        return len(self.tokens) > 2

    def must_equal(self, other: Stream) -> None:
        """Up to where two tokens were nearly as likely, if anywhere: from there on they are different texts."""
        assert len(self.tokens) == len(other.tokens) == len(other.likely)
        for mine, theirs, likely in zip(self.tokens, other.tokens, other.likely, strict=True):
            if mine != theirs:
                (_, best), (second, near) = likely
                assert mine == second
                assert best - near < TIE
                return

    def wait(self) -> list[int]:
        self._thread.join()
        return self.tokens


def measured(start: Start, words: tuple[str, ...], use: Callable[[Server], Any]) -> tuple[Any, int]:
    """What `use` gives without a limit, and the most that was mapped meanwhile."""
    with start(PATCHED, *words, env=ON) as server:
        value = use(server)
        return value, device(server)["charge_bytes"]


def limited(bytes_: int) -> dict[str, str]:
    return {**ON, "OLLAMA_KVCACHED_MEMORY_GB": f"{bytes_ / GB:.9f}"}


def is_refusal(error: Mapping[str, Any]) -> bool:
    return (
        (error["code"], error["type"]) == (503, "unavailable_error")
        and error["message"].startswith(ENDED)
        and "limit" in error["message"][len(ENDED) :]
    )


@contextlib.contextmanager
def two_streams(server: Server) -> Iterator[list[Stream]]:
    """Two requests that generate for a while, both past their prompts."""
    streams = [
        Stream(
            server,
            body(prompt_ids(40 + 20 * number, number), 1000, id_slot=number, ignore_eos=True, n_probs=2),
        )
        for number in range(2)
    ]
    wait_until(lambda: min(len(stream.tokens) for stream in streams) > 2, 20, every=0.01)
    yield streams
    for stream in streams:
        stream.wait()


@pytest.mark.parametrize("slots", SLOTS)
def test_no_room_ends_one_request_and_no_other(start: Start, slots: str) -> None:
    words = ("-c", "18432", "-np", "3", "-b", "512", *SLOTS[slots])

    def both(server: Server) -> list[Stream]:
        with two_streams(server) as streams:
            return streams

    expected, charge = measured(start, words, both)
    assert [len(stream.tokens) for stream in expected] == [1000, 1000]
    with start(PATCHED, *words, env=limited(charge + 3 * STEP)) as server:
        with two_streams(server) as streams:
            third = call(server, "POST", "/completion", body=body(prompt_ids(5000, 9), 8, id_slot=2))
            assert not any(stream.ended for stream in streams), "nothing ran beside the third request"
        assert third.status_code == 503
        assert third.headers["Retry-After"] == "5"
        assert is_refusal(third.json()["error"]), third.text
        assert [stream.error for stream in streams] == [None, None]
        for stream, alone in zip(streams, expected, strict=True):
            stream.must_equal(alone)
        # the server goes on, in the slot of the ended request too
        assert len(ask(server, prompt_ids(100, 3), 8, 2)["tokens"]) == 8
        assert device(server)["limit_failures"] > 0


@pytest.mark.parametrize("slots", SLOTS)
def test_a_streamed_request_without_room_ends_with_an_event(start: Start, slots: str) -> None:
    words = ("-c", "12288", "-np", "3", *SLOTS[slots])
    _, charge = measured(start, words, lambda server: ask(server, prompt_ids(200, 1), 8))
    with start(PATCHED, *words, env=limited(charge + 2 * STEP)) as server:
        stream = Stream(server, body(prompt_ids(100, 2), 1500, id_slot=1, ignore_eos=True))
        assert 300 < len(stream.wait()) < 1500
        assert stream.error is not None
        assert is_refusal(stream.error), stream.error


@pytest.mark.parametrize("slots", SLOTS)
def test_answers_to_one_prompt_end_together(start: Start, slots: str) -> None:
    words = ("-c", "12288", "-np", "3", *SLOTS[slots])
    _, charge = measured(start, words, lambda server: ask(server, prompt_ids(200, 1), 8))
    with start(PATCHED, *words, env=limited(charge + 3 * STEP)) as server:
        for prompt, answer in ((300, 1500), (3500, 8)):  # while generating, and before the children began
            refused = call(
                server,
                "POST",
                "/completion",
                body=body(prompt_ids(prompt, 5), answer, n_cmpl=3, ignore_eos=True),
            )
            assert refused.status_code == 503, refused.text
            assert is_refusal(refused.json()["error"])
            wait_until(lambda: not any(s["is_processing"] for s in call(server, "GET", "/slots").json()), 5)
        assert len(ask(server, prompt_ids(200, 1), 8)["tokens"]) == 8


@pytest.mark.parametrize("slots", SLOTS)
def test_prompt_caches_of_idle_slots_go_first(start: Start, slots: str) -> None:
    words = ("-c", "12288", "-np", "3", *SLOTS[slots])
    kept, wanted = prompt_ids(1000, 1), prompt_ids(2000, 2)
    answer, charge = measured(start, words, lambda server: ask(server, wanted, 8, 1)["tokens"])
    with start(PATCHED, *words, env=limited(charge + STEP)) as server:
        ask(server, kept, 8, 0)
        assert ask(server, wanted, 8, 1)["tokens"] == answer
        assert "slot 0 gives up 1007 cached tokens" in server.log_text()
        assert work(ask(server, prompt_ids(300, 1), 8, 0)) == (300, 0)


def test_a_prompt_that_cannot_be_split_is_ended_not_halved(start: Start) -> None:
    """Its halves would be pooled apart, and the answer would be wrong."""
    words = ("-c", "8192", "-np", "4", "--kv-unified", "--embeddings", "-ub", "2048")

    def embed(server: Server) -> list[Any]:
        answers = [
            call(server, "POST", "/embeddings", body={"input": [prompt_ids(count, 1)]})
            for count in (200, 1500, 100)
        ]
        return [a.json() if a.status_code == 200 else a for a in answers]

    with start(STOCK, *words, model="pooling") as server:
        expected = embed(server)
    with start(PATCHED, *words, model="pooling", env=ON) as server:
        assert embed(server) == expected
        kinds = device(server)["mapped_bytes"]
    limit = kinds["weights"] + kinds["compute"] + kinds["kv"] // 2
    with start(PATCHED, *words, model="pooling", env=limited(limit)) as server:
        short, refused, shorter = embed(server)
    assert (short, shorter) == (expected[0], expected[2])
    assert refused.headers["Retry-After"] == "5"
    assert is_refusal(refused.json()["error"])


def test_drafts_are_given_up_before_a_request_is(start: Start) -> None:
    """Speculation from the text itself, while another request exhausts the limit."""
    words = ("-c", "12288", "-np", "2", "-b", "256", "--no-kv-unified")
    drafts = ("--spec-type", "ngram-simple", *SHORT)
    wanted = body(prompt_ids(600, 7), 400, id_slot=0, ignore_eos=True)

    def one(server: Server) -> Stream:
        stream = Stream(server, {**wanted, "n_probs": 2})
        stream.wait()
        return stream

    alone, _ = measured(start, words, one)
    _, charge = measured(start, (*words, *drafts), lambda server: Stream(server, wanted).wait())
    with start(PATCHED, *words, *drafts, env=limited(charge + 4 * STEP)) as server:
        stream = Stream(server, wanted)
        wait_until(stream.has_begun, 20, every=0.01)
        refused = call(server, "POST", "/completion", body=body(prompt_ids(3500, 9), 8, id_slot=1))
        stream.wait()
        assert refused.status_code == 503
        assert "kvcached: drafts are given up" in server.log_text()
        assert stream.error is None
        stream.must_equal(alone)


@pytest.mark.parametrize("slots", SLOTS)
def test_a_draft_model_without_room_ends_one_request(start: Start, models: Path, slots: str) -> None:
    """Its cache grows behind the target's, so which of the two meets the limit is a matter of one step."""
    words = ("-c", "12288", "-np", "2", "-b", "256", *SLOTS[slots])
    drafts = ("--spec-type", "draft-simple", "-md", str(models / "one.gguf"))
    wanted = body(prompt_ids(600, 7), 300, id_slot=0, ignore_eos=True, n_probs=2)

    def one(server: Server) -> Stream:
        stream = Stream(server, wanted)
        stream.wait()
        return stream

    alone, _ = measured(start, words, one)
    _, charge = measured(start, (*words, *drafts), one)
    met = set()
    for steps in (2, 3):
        with start(PATCHED, *words, *drafts, env=limited(charge + steps * STEP)) as server:
            stream = Stream(server, wanted)
            wait_until(stream.has_begun, 20, every=0.01)
            refused = call(server, "POST", "/completion", body=body(prompt_ids(3500, 9), 8, id_slot=1))
            stream.wait()
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "5"
            assert is_refusal(refused.json()["error"])
            assert stream.error is None
            stream.must_equal(alone)
            assert len(ask(server, prompt_ids(40, 3), 8, 1)["tokens"]) == 8
            log = server.log_text()
            met.add("failed to decode draft batch" in log)
            assert len(re.findall(r"kvcached: slot \d ends", log)) == 1
            assert "failed to process speculative batch" not in log
    assert met == {False, True}, "only one of the two contexts has met the limit"


def test_a_draft_model_without_room_takes_prompt_caches_first(start: Start, models: Path) -> None:
    words = ("-c", "12288", "-np", "2", "-b", "256", "--no-kv-unified")
    drafts = ("--spec-type", "draft-simple", "-md", str(models / "one.gguf"))
    wanted = prompt_ids(2000, 2)
    answer, charge = measured(start, (*words, *drafts), lambda server: ask(server, wanted, 8, 1)["tokens"])
    met = set()
    for steps in (1, 2):
        with start(PATCHED, *words, *drafts, env=limited(charge + steps * STEP)) as server:
            ask(server, prompt_ids(1000, 1), 8, 0)
            assert ask(server, wanted, 8, 1)["tokens"] == answer
            log = server.log_text()
            assert "slot 0 gives up 1007 cached tokens" in log
            assert "ends, " not in log
            met.add("failed to decode draft batch" in log)
    assert True in met, "the draft's context has not met the limit"


def look(server: Server, salt: int, slot: int) -> requests.Response:
    """A question about an image."""
    parts = [
        {"type": "text", "text": "ba be"},
        {"type": "image_url", "image_url": {"url": image(salt)}},
        {"type": "text", "text": "bi bo"},
    ]
    wanted = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "temperature": 0, "seed": 1}
    return call(server, "POST", "/v1/chat/completions", body={**wanted, "id_slot": slot})


@pytest.mark.parametrize("drafts", [False, True])
def test_an_image_without_room_is_refused_like_text(
    start: Start, models: Path, projector: tuple[str, ...], drafts: bool
) -> None:
    words: tuple[str, ...] = ("-c", "18432", "-np", "3", "-b", "512", "--no-kv-unified", *projector)
    if drafts:
        words = (*words, "--spec-type", "draft-simple", "-md", str(models / "one.gguf"))

    with start(STOCK, *words) as server:
        expected = [look(server, salt, salt).json()["choices"] for salt in (0, 1)]
    first, charge = measured(start, words, lambda server: look(server, 0, 0).json()["choices"])
    assert first == expected[0]
    with start(PATCHED, *words, env=limited(charge)) as server:
        assert look(server, 0, 0).json()["choices"] == expected[0]
        assert look(server, 1, 1).json()["choices"] == expected[1]
        assert re.search(r"slot 0 gives up \d{4} cached tokens", server.log_text())
        running = Stream(server, body(prompt_ids(TOKENS // 2, 7), 700, id_slot=0, ignore_eos=True))
        wait_until(running.has_begun, 20, every=0.01)
        # more often than upstream suffers steps without a token
        for _ in range(6):
            refused = look(server, 2, 1)
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "5"
            assert is_refusal(refused.json()["error"]), refused.text
        assert not running.ended, "nothing was in the way"
        assert len(running.wait()) == 700
        assert running.error is None
        assert look(server, 0, 2).json()["choices"] == expected[0]


def test_an_image_that_never_fits_ends_no_server(start: Start, projector: tuple[str, ...]) -> None:
    words = ("-c", "4096", *ONE, "-b", "512", *projector)
    _, charge = measured(start, words, lambda server: look(server, 0, 0))
    with start(PATCHED, *words, env=limited(charge - 3 * STEP)) as server:
        for salt in range(6):
            refused = look(server, salt, 0)
            assert refused.status_code == 503
            assert is_refusal(refused.json()["error"]), refused.text
        assert len(ask(server, prompt_ids(100, 1), 8)["tokens"]) == 8


def test_a_sleeper_that_cannot_wake_refuses_and_keeps_its_prompts(start: Start) -> None:
    """Two servers of one group, whose limit holds one: the other is busy, so nobody's memory can be taken."""
    words = ("-c", "4096", *ONE)
    prompt = prompt_ids(600, 1)
    first, charge = measured(start, words, lambda server: ask(server, prompt, 8)["tokens"])
    env = {**limited(charge + 12 * STEP), "KVCACHED_GROUP": "both"}
    with start(PATCHED, *words, env=env) as sleeper:
        assert ask(sleeper, prompt, 8)["tokens"] == first
        sleeper.json("POST", "/kvcached/sleep")
        with start(PATCHED, *words, env=env) as other:
            stream = Stream(other, body(prompt_ids(100, 2), 2500, ignore_eos=True))
            wait_until(stream.has_begun, 20, every=0.01)
            refused = call(sleeper, "POST", "/completion", body=body([*prompt, *first], 8))
            assert not stream.ended, "nothing was in the way"
            assert refused.status_code == 503
            assert is_refusal(refused.json()["error"]), refused.text
            assert is_sleeping(sleeper)
            assert len(stream.wait()) == 2500
        again = ask(sleeper, [*prompt, *first, *prompt_ids(5, 3)], 8)
        assert work(again)[1] == 607


def status_of(router: Server, model: str) -> str:
    (found,) = (m for m in router.json("GET", "/models")["data"] if m["id"] == model)
    value = found["status"]["value"]
    assert isinstance(value, str)
    return value


def test_a_router_does_not_count_sleepers(start: Start) -> None:
    words = ("--models-max", "1", "--sleep-idle-seconds", "1", "-c", "1024", *ONE)
    wanted = {
        "messages": [{"role": "user", "content": "ba be bi"}],
        "max_tokens": 8,
        "temperature": 0,
        "seed": 1,
    }

    def chat(router: Server, model: str) -> str:
        answer = router.json("POST", "/v1/chat/completions", json={**wanted, "model": model}, timeout=90)
        text = answer["choices"][0]["message"]["content"]
        assert isinstance(text, str)
        assert text
        return text

    with start(PATCHED, *words, model="", env=ON) as router:
        first = chat(router, "one")
        wait_until(lambda: status_of(router, "one") == "sleeping", 8, every=0.2)
        (figures,) = router.json("GET", "/kvcached?model=one")["devices"]
        assert sum(figures["mapped_bytes"].values()) == 0
        assert status_of(router, "one") == "sleeping"
        other = chat(router, "two")
        assert status_of(router, "one") == "sleeping", "the sleeper had to go for the second model"
        assert chat(router, "one") == first
        assert status_of(router, "one") in ("loaded", "sleeping")
        assert chat(router, "two") == other
        answer = router.json("POST", "/kvcached/sleep", json={"model": "two"})
        assert answer["success"] is True
        assert call(router, "GET", "/kvcached?model=one", headers={"Origin": "http://x"}).status_code == 403


def test_a_child_that_sleeps_ends_well(start: Start) -> None:
    """Its memory goes last, when who told the router has gone."""
    words = ("--models-max", "1", "--sleep-idle-seconds", "1", "-c", "1024", *ONE)
    wanted = {"model": "one", "messages": [{"role": "user", "content": "ba"}], "max_tokens": 4}
    with start(PATCHED, *words, model="", env=ON) as router:
        for _ in range(3):
            router.json("POST", "/v1/chat/completions", json=wanted, timeout=90)
            wait_until(lambda: status_of(router, "one") == "sleeping", 8)
            before = len(router.log_text())
            router.json("POST", "/models/unload", json={"model": "one"})
            wait_until(lambda: status_of(router, "one") == "unloaded", 8)
            assert "instance name=one exited with status 0" in router.log_text()[before:]
