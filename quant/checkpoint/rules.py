"""Which layers a configuration means by the names in it, as each tool reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from operator import itemgetter

from torch import nn

from .formats import Format

Rule = Callable[[str, nn.Module], bool]


def _regular(pattern: str, where: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where} has {pattern!r}, which is no regular expression: {error}") from None


def only(*paths: str) -> Rule:
    known = frozenset(paths)
    return lambda path, _: path in known


def _of_class(*names: str) -> Rule:
    known = frozenset(names)
    return lambda _, module: any(kind.__name__ in known for kind in type(module).__mro__ if issubclass(kind, nn.Module))


def _beginning(name: str, where: str) -> Rule:
    match = _regular(name.removeprefix("re:"), where).match
    return lambda path, _: match(path) is not None


def by_name_or_class(names: tuple[str, ...], where: str) -> Rule:
    """As compressed-tensors: a layer's path, "re:" and an expression that its path begins with, or a class's name."""
    rules = [only(*names), *(_beginning(name, where) for name in names if name.startswith("re:")), _of_class(*names)]
    return lambda path, module: any(rule(path, module) for rule in rules)


def by_precedence(groups: list[tuple[tuple[str, ...], str, Format]]) -> Iterator[tuple[Rule, Format]]:
    """Of (names, where they are, format), as compressed-tensors: paths, expressions by the alphabet, then classes."""
    for names, _, form in groups:
        yield only(*names), form
    each = sorted(((name, where, form) for names, where, form in groups for name in names), key=itemgetter(0))
    for name, where, form in each:
        if name.startswith("re:"):
            yield _beginning(name, where), form
    for name, _, form in each:
        if name.isidentifier():
            yield _of_class(name), form


def by_part_of_name(names: tuple[str, ...], where: str) -> Rule:
    """As transformers: the path of a layer or of what contains it, its end, or an expression for either.

    There every name is an expression, whose dots fit anything; here one of letters, digits and dots is itself.
    """
    ends = tuple(f".{name}" for name in names)
    plain = [re.escape(name) if re.fullmatch(r"[\w.]*", name) else name for name in names]
    starts = [_regular(f"(?:{name})(?=[.]|$)", where) for name in plain if not name.startswith("re:")]
    starts += [_regular(name[3:], where) for name in plain if name.startswith("re:")]
    return lambda path, _: path.endswith(ends) or any(start.match(path) for start in starts)


def by_wildcard(names: Iterable[str]) -> Rule:
    """As ModelOpt: wildcards for paths; older versions give the path of what contains the layer, or the end of one."""
    ends = tuple(f".{name}" for name in names)
    wildcards = [*names, *(f"{name}.*" for name in names)]
    return lambda path, _: path.endswith(ends) or any(fnmatchcase(path, each) for each in wildcards)


def every(path: str, module: nn.Module) -> bool:
    return True
