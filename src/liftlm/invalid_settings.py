"""Says in one sentence what is wrong with settings, and which key may have been meant. Knows pydantic, and no single setting."""

from __future__ import annotations

import difflib

from pydantic import BaseModel, ValidationError


def _known_keys(branch: type[BaseModel], prefix: str = "") -> list[str]:
    """Every setting and group of settings, dotted."""
    keys: list[str] = []
    for name, field in branch.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _nearest_key(key: str, tree: type[BaseModel]) -> str | None:
    """What a wrong key may have meant: that name elsewhere, one like it at the same place, or one like it elsewhere."""
    place, _, name = key.rpartition(".")
    known = _known_keys(tree)
    here = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == place}
    anywhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    if name in anywhere:
        return anywhere[name]
    for names, cutoff in ((here, 0.6), (anywhere, 0.75)):
        found = difflib.get_close_matches(name, names, 1, cutoff)
        if found:
            return names[found[0]]
    return None


def explain_invalid(error: ValidationError, origin: str, tree: type[BaseModel]) -> str:
    """One sentence for the first thing that is wrong; `tree` is the class of the whole."""
    first = error.errors()[0]
    modules = "literal['all-linear']"  # how pydantic marks the first of the two forms of adapter.target_modules
    key = ".".join(str(part) for part in first["loc"] if part != modules)
    if first["type"] in ("extra_forbidden", "invalid_key"):
        near = _nearest_key(key, tree)
        return f"Unknown setting '{key}' in {origin}" + (f"; did you mean '{near}'?" if near else ".")
    if first["type"] == "value_error":
        return f"Contradictory settings in {origin}: {first['ctx']['error']}."
    if first["type"] == "model_type":
        return f"'{key}' in {origin} is a group of settings and cannot be {first['input']!r}."
    reason = (
        "input should be 'all-linear' or a list of module names" if modules in first["loc"] else first["msg"].lower()
    )
    return f"Setting '{key}' in {origin} cannot be {first['input']!r}: {reason}."
