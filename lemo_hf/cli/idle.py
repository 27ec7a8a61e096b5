"""Options that were given and change nothing are refused."""

from collections.abc import Collection

import typer


def refuse_idle(
    context: typer.Context,
    why: str,
    names: Collection[str] = (),
    but: Collection[str] | None = None,
    way_out: str = "leave it out",
) -> None:
    """Refuse options of a command that have no effect.

    Args:
        context: Of the command.
        why: When they have none, in words that follow "has no effect".
        names: Of its parameters.
        but: Instead of them: all but these.
        way_out: What to do.

    Raises:
        ValueError: One of them was given.
    """
    for option in context.command.params:
        name = option.name or ""
        idle = name in names if but is None else name not in but
        source = context.get_parameter_source(name)
        if idle and source is not None and source.name == "COMMANDLINE":
            off = context.params.get(name) is False and option.secondary_opts
            said = option.secondary_opts[0] if off else option.opts[0]
            raise ValueError(f"{said} has no effect {why}: {way_out}.")
