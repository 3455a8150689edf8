"""What public docstrings say holds: their examples run, shapes included, and they name each argument and no other."""

import dataclasses
import doctest
import inspect
import pkgutil
import re
from importlib import import_module

import pytest

import ecmoe
from ecmoe import routing

MODULES = ["ecmoe", "ecmoe.config", "ecmoe.routers"] + [
    module.name
    for room in ("ecmoe.routing", "ecmoe.model")
    for module in pkgutil.iter_modules(import_module(room).__path__, f"{room}.")
]
PUBLIC = {
    f"{module.__name__}.{name}": value
    for module in (ecmoe, routing)
    for name in module.__all__
    if callable(value := getattr(module, name)) and not (isinstance(value, type) and issubclass(value, Exception))
}


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    found = doctest.testmod(import_module(module), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not found.failed and (found.attempted or module != "ecmoe")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_explained(name):
    said = inspect.getdoc(PUBLIC[name])
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(PUBLIC[name]).parameters.values()
    arguments = {parameter.name for parameter in signature}
    listed = set(re.findall(r"\w+", said))
    if dataclasses.is_dataclass(PUBLIC[name]):  # a key of RunConfig carries its own words
        listed |= {field.name for field in dataclasses.fields(PUBLIC[name]) if field.metadata.get("help")}
    unexplained = {parameter.name for parameter in signature if parameter.kind not in kinds} - listed
    assert not unexplained
    section = re.search(r"^Args:\n((?: +.*\n?|\n)+)", said, re.MULTILINE)
    # `n: tokens. e, k: experts, slots.`
    names = re.findall(r"(?:^ {4}|\. )([a-z]\w*(?:, \w+)*): ", section[1], re.MULTILINE) if section else []
    invented = {argument for some in names for argument in some.split(", ")} - arguments
    assert not invented
