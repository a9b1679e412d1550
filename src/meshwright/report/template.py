"""Renders the templates of the report."""

from __future__ import annotations

from functools import lru_cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from meshwright.text import printable
from meshwright.units import format_bytes, format_seconds


def _shown(value: object) -> object:
    """Removes characters that a page must not contain from a value."""
    return printable(value, lines=True) if isinstance(value, str) else value


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("meshwright.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"seconds": format_seconds, "bytes": format_bytes}
    return environment


def render(template: str, **values: object) -> Markup:
    """Renders a template of this package; values are escaped, except rendered templates."""
    return Markup(_environment().get_template(template).render(**values))


def template_source(template: str) -> Markup:
    """Returns a template as it is, to be included in a page: style sheets and scripts."""
    loader = _environment().loader
    assert loader is not None
    return Markup(loader.get_source(_environment(), template)[0])
