"""Commands of `motley` that other parts of it bring: found by entry point, listed unopened, loaded when used.

Owns the promise that the light client never imports a server to show its help, and that a missing extra is named. Knows
of the other roots nothing but their names.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperCommand

GROUP = "motley.commands"
_EXTRA_BY_ROOT = {"motley_server": "server", "motley_trainer": "train"}
_HELP = {
    "serve": "Serve a base model, and adapters with it.",
    "worker": "Train adapters for a server's tenants.",
    "base": "Prepare base models.",
}


class MissingExtraError(Exception):
    """Say which extra a command needs, and how to get it."""

    reason = "MISSING_EXTRA"
    field = None

    def __init__(self, command: str, extra: str) -> None:
        super().__init__(command, extra)
        self.message = f"{command} needs the {extra} extra: pip install 'motley[{extra}]'"


class ForeignCommand(TyperCommand):
    """Stand in for a command until somebody uses it."""

    def __init__(self, entry_point: EntryPoint) -> None:
        self.entry_point = entry_point
        root = entry_point.module.partition(".")[0]
        super().__init__(name=entry_point.name, help=_HELP.get(entry_point.name, f"A command of {root}."))

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Load the command and let it read its own arguments.

        Raises: ModuleNotFoundError if the command's root or something that it imports is not installed.
        """
        loaded = self.entry_point.load()
        if not isinstance(loaded, typer.Typer):
            app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            app.command(self.entry_point.name)(loaded)
            loaded = app
        command = typer.main.get_command(loaded)
        command.name = self.entry_point.name
        return command.make_context(info_name, args, parent=parent, **extra)

    def missing_extra(self, error: ModuleNotFoundError) -> MissingExtraError | None:
        """Name the extra whose absence the error shows; None if the error is a fault inside a root of ours."""
        root = self.entry_point.module.partition(".")[0]
        missing = error.name or ""
        if root not in _EXTRA_BY_ROOT or (missing.startswith("motley_") and missing != root):
            return None
        return MissingExtraError(self.entry_point.name, _EXTRA_BY_ROOT[root])


def foreign_commands() -> list[ForeignCommand]:
    """List the commands that installed distributions declare, by name, without importing any."""
    by_name: dict[str, EntryPoint] = {}
    for found in entry_points(group=GROUP):
        by_name.setdefault(found.name, found)  # the first on sys.path, as for modules
    return [ForeignCommand(by_name[name]) for name in sorted(by_name)]
