"""A round on one server: its clients at once, and the steps beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from tests.soak.schedule import Request, Round, Step
from tests.soak.sides import Answered, Side


def play(side: Side, round_: Round) -> tuple[Answered, ...]:
    """The answers to all requests of a round. What a thread of it raises is raised here, after all have ended."""
    answers: list[Answered] = []
    errors: list[BaseException] = []
    lock = threading.Lock()
    over = threading.Event()

    def guarded(what: Callable[[], None]) -> threading.Thread:
        def body() -> None:
            try:
                what()
            except BaseException as error:
                with lock:
                    errors.append(error)
                over.set()

        return threading.Thread(target=body)

    def client(number: int, asked: Sequence[Request]) -> None:
        slot = number if round_.pinned else None
        for request in asked:
            if over.is_set():
                return
            answer = side.ask(request, slot=slot)
            with lock:
                answers.append(answer)
            if slot is not None and request.after == "reload":
                name = f"slot-{slot}"
                side.slot(slot, "save", name)
                side.slot(slot, "erase")
                side.slot(slot, "restore", name)

    def steps(list_: Sequence[Step]) -> None:
        for step in list_:
            if over.wait(step.wait):
                return
            side.do(step.action, slot=step.slot, http=step.http)

    clients = [guarded(lambda n=n, asked=asked: client(n, asked)) for n, asked in enumerate(round_.clients)]  # type: ignore[misc]
    stepper = guarded(lambda: steps(round_.steps))
    for thread in (*clients, stepper):
        thread.start()
    for thread in clients:
        thread.join()
    stepper.join()
    if errors:
        raise errors[0]
    return tuple(answers)


def rest(side: Side, seconds: float = 0.2) -> None:
    """Between two rounds everything sleeps for a while, conversations included."""
    side.do("sleep")
    time.sleep(seconds)
