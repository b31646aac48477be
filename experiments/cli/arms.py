"""Commands that take an arm as an argument: `- qk_norm` is a name, and no option begins with a dash and a space."""

from typing import Any

from typer.core import TyperCommand


class TakesArms(TyperCommand):
    """Arms reach the command as they were typed, but for a space in front of those that begin with a dash."""

    def parse_args(
        self, ctx: Any, args: list[str]
    ) -> list[str]:  # typer names no public context
        return super().parse_args(ctx, [_protected(word) for word in args])


def _protected(word: str) -> str:
    return f" {word}" if word.startswith("- ") else word
