"""A way to a server that breaks: passes bytes on, and drops the connection where it is told to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Relay:
    """Pass connections on to a server.

    Semantics: each connection takes the first of `cuts`, if there is one, and is dropped once it has carried that many
    bytes either way. `num_dropped` counts those.
    """

    def __init__(self, server: str, cuts: list[int]) -> None:
        self.cuts = cuts
        self.num_dropped = 0
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Take no more connections, and wait until those that there are have ended."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            left = self.cuts.pop(0) if self.cuts else None
            for source, sink in ((client, server), (server, client)):
                thread = threading.Thread(target=self._pass_on, args=(source, sink, left))
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, left: int | None) -> None:
        with suppress(OSError):
            while part := source.recv(65536 if left is None else max(1, min(65536, left))):
                sink.sendall(part)
                if left is not None and (left := left - len(part)) <= 0:
                    self.num_dropped += 1
                    break
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


@contextmanager
def relaying(server: str, cuts: list[int]) -> Iterator[Relay]:
    """Relay to a server while the block runs."""
    relay = Relay(server, cuts)
    try:
        yield relay
    finally:
        relay.close()
