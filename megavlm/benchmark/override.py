"""Overrides of the command line that may be meant for a file of this package or for the recipes that it names."""

import difflib
from collections.abc import Callable, Sequence

from megavlm.config import Config
from megavlm.recipe import Recipe


def share_out(
    overrides: Sequence[str], schema: type[Config], what: str, check: Callable[[str, str], None]
) -> tuple[list[str], list[str]]:
    """Share out overrides by the first word of their keys.

    A key that begins with a part of a recipe (``model``, ``training`` ...) is for the recipes, one that begins with a
    key of the file (``save`` ...) for the file.

    Args:
        overrides: ``key=value``.
        schema: of the file; has no key that a recipe has.
        what: the file, in errors.
        check: called with ``command line`` and each override of the recipes; raises if it may not be set.

    Returns:
        Those of the file, and those of the recipes.

    Raises:
        ValueError: one belongs to neither; names the nearest valid key.
    """
    own, recipes = [], []
    for override in overrides:
        head = override.partition("=")[0].split(".")[0]
        if head in Recipe.model_fields:
            check("command line", override)
            recipes.append(override)
        elif head in schema.model_fields:
            own.append(override)
        else:
            near = difflib.get_close_matches(head, [*schema.model_fields, *Recipe.model_fields], n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"A {what} has {', '.join(schema.model_fields)}."
            raise ValueError(f"override={override!r}: {head!r} is no key of a {what} or a recipe. {hint}")
    return own, recipes
