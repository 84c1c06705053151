"""What must be true for `motley demo` to succeed: of the replies, and of what the server counted meanwhile.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from motley_client.demo_scene import Scene
from motley_client.demo_wave import BASE_SKILL, Reply
from motley_client.exposition import Exposition

DISTINCT_ADAPTERS = "motley_batch_distinct_adapters"


def find_failures(scene: Scene, replies: Sequence[Reply], counted: Exposition) -> Iterable[str]:
    """Name every promise that the replies or the server's own counters break."""
    own = {(reply.skill, reply.asked_of): reply for reply in replies}
    for reply in replies:
        asked = "+".join(name for name, _ in reply.asked_of)
        if not _is_served_as_asked(scene, reply):
            yield f"`{reply.skill}` was asked of {asked or 'the base'}, and {', '.join(reply.answered_by)} answered"
        if reply.skill in asked.split("+"):
            if not reply.is_right:
                yield f"{asked} answers {reply.answer!r} to `{reply.skill}`, not {reply.right_answer!r}"
            if reply.answer == own[reply.skill, ()].answer:
                yield f"{asked} answers `{reply.skill}` as the base does"
    if not own[BASE_SKILL, ()].is_right:
        yield f"the base answers {own[BASE_SKILL, ()].answer!r} to `{BASE_SKILL}`"
    served = {reply.served_by.base_fingerprint for reply in replies}
    if scene.base_fingerprint is not None and served != {scene.base_fingerprint}:
        yield f"the base {scene.base_fingerprint} was to answer, and {', '.join(sorted(served))} did"
    mixed = sum(count for bound, count in counted.bounds(DISTINCT_ADAPTERS) if bound >= len(scene.kinds))
    if not mixed:
        yield f"no forward pass held {len(scene.kinds)} adapters"


def _is_served_as_asked(scene: Scene, reply: Reply) -> bool:
    """Tell whether exactly the adapters that were named answered, with their weights and of their kinds."""
    served = sorted((adapter.name, adapter.weight, adapter.kind) for adapter in reply.served_by.adapters)
    return served == sorted((name, weight, scene.kinds[name]) for name, weight in reply.asked_of)
