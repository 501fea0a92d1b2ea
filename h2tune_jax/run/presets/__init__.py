"""Configs that come with the package: the demo's, and the one that `h2tune init` writes."""

from importlib import resources


def read_preset(name: str) -> str:
    """Return the TOML text of a preset: "demo" or "init"."""
    return resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
