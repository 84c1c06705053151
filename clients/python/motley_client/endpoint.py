"""Which server, under which key, and whether in the clear.

Owns the rule that nothing travels in the clear but to this very machine, unless asked. Knows no gRPC, so that the
command line can settle where to go before it loads any.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_ADDRESS = "127.0.0.1:8470"
UNREACHABLE = "UNREACHABLE"
"""The reason of an error that no server said, because none could be reached."""

_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server and how to speak to it.

    Semantics: `address` is HOST:PORT, or a gRPC target such as `unix:/run/motley.sock` or `dns:///motley:8470`. With
    `ca_file` the channel is TLS and trusts that file alone; without, it is plain to a loopback address or a Unix
    socket, or with `insecure`, and otherwise TLS by the system's roots.
    Raises: ValueError for an address without a port, a key that cannot travel in a header, or `ca_file` together with
    `insecure`.
    """

    address: str
    key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        match = _HOST_PORT.fullmatch(self.address)
        if ":/" not in self.address and (match is None or int(match["port"]) > 65535):
            raise ValueError(f"server address {self.address!r} is not HOST:PORT")
        if self.key is not None and not (self.key and self.key.isascii() and self.key.isprintable()):
            raise ValueError("the key is empty or holds characters that cannot travel in a header")
        if self.ca_file is not None and self.insecure:
            raise ValueError("a CA file means TLS, and insecure means none: choose one")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what every call carries."""
        return () if self.key is None else (("authorization", f"Bearer {self.key}"),)

    @property
    def uses_tls(self) -> bool:
        """Tell whether the channel is encrypted."""
        return self.ca_file is not None or not (self.insecure or self.is_local)

    @property
    def is_local(self) -> bool:
        """Tell whether the address cannot but be this machine."""
        if self.address.startswith("unix:"):
            return True
        match = _HOST_PORT.fullmatch(self.address)
        if match is None:
            return False
        host = match["host"].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"
