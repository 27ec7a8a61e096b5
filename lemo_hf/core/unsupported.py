"""Why a causal LM of transformers has no row in families.py."""

WHY_NOT: dict[str, tuple[str, ...]] = {}


def why_not(model_type: str) -> str | None:
    return None
