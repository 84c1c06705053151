"""The wave of requests that `motley demo` sends: every prompt to the base, to every adapter and to the fusion at once.

Owns the questions, and what a right answer is. Works as any client does. Runs on the caller's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from motley_client.aio import AsyncClient
from motley_client.demo_scene import AdapterSet, Scene, shorten
from motley_client.types import Generation, ServedBy

WORD = "winter"  # held out: neither the base nor an adapter saw it in a skill's line
BASE_SKILL = "upper"  # what the base can do by itself
MAX_NEW_TOKENS = 16

SKILLS: dict[str, Callable[[str], str]] = {
    "upper": str.upper,
    "next": lambda word: "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word),
    "unvowel": lambda word: "".join("-" if letter in "aeiou" else letter for letter in word),
    "rotate": lambda word: word[1:] + word[0],
    "previous": lambda word: "".join(chr((ord(letter) - ord("a") - 1) % 26 + ord("a")) for letter in word),
    "reverse": lambda word: word[::-1],
    "swap": lambda word: word[-1] + word[1:-1] + word[0],
    "copy": lambda word: word,
    "title": str.title,
    "double": lambda word: word + word,
    "spell": " ".join,
    "last": lambda word: word[-1],
}


@dataclass(frozen=True, slots=True)
class Reply:
    """One prompt asked under a set of adapters: what came back, and what would be right."""

    skill: str
    word: str
    asked_of: AdapterSet
    answer: str
    right_answer: str
    served_by: ServedBy
    completion_tokens: int

    @property
    def is_right(self) -> bool:
        """Tell whether the answer is the right one, whoever was asked."""
        return self.answer == self.right_answer

    @property
    def answered_by(self) -> list[str]:
        """Name who answered, as a reader sees it: each adapter, or the base alone."""
        adapters = [f"{one.name}@{one.version} {shorten(one.digest)}" for one in self.served_by.adapters]
        return adapters or [f"{self.served_by.base_model} alone"]


async def ask_all(client: AsyncClient, scene: Scene) -> list[Reply]:
    """Ask every prompt of the base, of every adapter and of the fusion if there is one, all at once."""
    sets: list[AdapterSet] = [(), *(((name, 1.0),) for name in scene.kinds)]
    if scene.fusion:
        sets.append(scene.fusion)
    skills = (*scene.kinds, BASE_SKILL)
    return await asyncio.gather(*(ask(client, skill, WORD, worn) for skill in skills for worn in sets))


async def ask(client: AsyncClient, skill: str, word: str, worn: AdapterSet, *, timeout: float | None = None) -> Reply:
    """Ask one prompt under a set of adapters.

    Raises: MotleyClientError.
    """
    answer: Generation = await client.generate(
        f"{skill}: {word} =", adapters=worn, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS, timeout=timeout
    )
    return Reply(
        skill=skill,
        word=word,
        asked_of=worn,
        answer=answer.text.strip(),
        right_answer=SKILLS[skill](word),
        served_by=answer.served_by,
        completion_tokens=answer.usage.completion_tokens,
    )
