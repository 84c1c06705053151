"""One way to ask by either client, so that a test of what both do is written once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from motley_client import AsyncClient, Client

Ask = Callable[..., Any]


def ask_blocking(address: str, call: str, *args: Any, key: str | None = None, **kwargs: Any) -> Any:
    """Make one call, and read to its end what it yields."""
    with Client(address, key) as client:
        result = getattr(client, call)(*args, **kwargs)
        return list(result) if isinstance(result, Iterator) else result


def ask_asyncio(address: str, call: str, *args: Any, key: str | None = None, **kwargs: Any) -> Any:
    """Make one call on a loop of its own, and read to its end what it yields."""

    async def run() -> Any:
        async with AsyncClient(address, key) as client:
            result = getattr(client, call)(*args, **kwargs)
            return [one async for one in result] if isinstance(result, AsyncIterator) else await result

    return asyncio.run(run())


BOTH = {"params": [ask_blocking, ask_asyncio], "ids": ["blocking", "asyncio"]}
