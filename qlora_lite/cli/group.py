"""A group of commands that distributions add to, by entry points of the kind ``commands`` (``registry``)."""

from collections.abc import Sequence

import click

from qlora_lite.errors import ExtensionError
from qlora_lite.registry import find, names, summary

_KIND = "commands"


class ExtensibleGroup(click.Group):
    """A group of its own commands and of registered ones, which are imported only when they are used.

    Args:
        prefix: with which names of its commands are registered, such as ``recipes.``; that of no group has none.
    """

    def __init__(self, *arguments, prefix: str = "", **options):
        super().__init__(*arguments, **options)
        self.prefix = prefix

    def own(self) -> Sequence[str]:
        """Return the names of the commands that are not registered."""
        return list(self.commands)

    def registered(self) -> list[str]:
        """Return the names of those that are.

        Raises:
            ExtensionError: two have one name.
        """
        parts = (name.rpartition(".") for name in names(_KIND))
        found = [name for group, dot, name in parts if f"{group}{dot}" == self.prefix]
        if taken := sorted(set(found) & set(self.own())):
            raise ExtensionError(
                f"an extension registers the command {self.prefix}{taken[0]}, which qlora-lite has itself; update or "
                "uninstall the extension"
            )
        return found

    def list_commands(self, _ctx):
        return sorted([*self.own(), *self.registered()])

    def get_command(self, ctx, name):
        if name in self.own():
            return super().get_command(ctx, name)
        return find(_KIND, f"{self.prefix}{name}", click.Command) if name in self.registered() else None

    def help_line(self, ctx, name, limit) -> str:
        """Return the line of the group's help about a command."""
        if name in self.own():
            return self.get_command(ctx, name).get_short_help_str(limit)
        return summary(_KIND, f"{self.prefix}{name}")

    def format_commands(self, ctx, formatter):
        known = self.list_commands(ctx)
        limit = formatter.width - 6 - max(map(len, known))  # as click computes it
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.help_line(ctx, name, limit)) for name in known])
