"""What clients ask: made from a seed, and the same for every server."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvpatch.smoke.models import prompt_text
from tests.ollama_e2e.zoo import BATCH, Member

Way = Literal["generate", "chat", "embed"]

LONGEST = 700  # words of a prompt, each of them a token
# A request's context so small that it is full before the answer ends: the prompt is cut, or cells are shifted out.
CRAMPED = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A request but for how it is sent. `words` of prompt, `answer` tokens to generate; `turns` of a chat, each
    with so many words."""

    model: str
    way: Way
    salt: int
    words: int
    answer: int
    num_ctx: int
    turns: int = 1

    @property
    def cramped(self) -> bool:
        return self.num_ctx == CRAMPED

    def path(self) -> str:
        return f"/api/{self.way}"

    def body(self) -> dict[str, Any]:
        """The request, without `stream` and `keep_alive`."""
        options: dict[str, Any] = {"num_ctx": self.num_ctx, "num_batch": BATCH, "num_thread": 1}
        if self.way == "embed":
            texts = [prompt_text(self.words, self.salt + turn) for turn in range(self.turns)]
            return {"model": self.model, "input": texts, "options": options}
        options |= {"num_predict": self.answer, "temperature": 0, "seed": 1}
        if self.way == "generate":
            prompt = prompt_text(self.words, self.salt)
            return {"model": self.model, "prompt": prompt, "raw": True, "options": options}
        messages = []
        for turn in range(self.turns):
            messages.append({"role": "user", "content": prompt_text(self.words, self.salt + turn)})
            if turn < self.turns - 1:
                messages.append({"role": "assistant", "content": prompt_text(8, self.salt + 500 + turn)})
        return {"model": self.model, "messages": messages, "options": options}


def questions(rng: random.Random, members: Sequence[Member], each: int) -> tuple[Question, ...]:
    """`each` of a model, all different."""
    return tuple(_question(rng, member, number) for member in members for number in range(each))


def _question(rng: random.Random, member: Member, number: int) -> Question:
    salt = rng.randrange(1, 2**20)
    # Many short prompts and some long ones: lengths are spread evenly over their logarithm.
    words = round(8 * (LONGEST / 8) ** rng.random())
    if member.embeds:
        return Question(
            model=member.name,
            way="embed",
            salt=salt,
            words=words,
            answer=0,
            num_ctx=member.contexts[0],
            turns=rng.randint(1, 3),
        )
    chat = rng.random() < 0.4
    # One in six is cramped, so that each model has some.
    if number % 6 == 5:
        longer = rng.random() < 0.5  # than the context: cut before it is sent
        return Question(
            model=member.name,
            way="generate",
            salt=salt,
            words=CRAMPED + rng.randint(20, 300) if longer else CRAMPED - rng.randint(10, 40),
            answer=rng.randint(50, 90),
            num_ctx=CRAMPED,
        )
    return Question(
        model=member.name,
        way="chat" if chat else "generate",
        salt=salt,
        words=max(8, words // 3) if chat else words,
        answer=rng.randint(4, 40),
        num_ctx=rng.choice(member.contexts),
        turns=rng.randint(1, 3) if chat else 1,
    )
