"""The rows of pages and scales, as the plan reads them."""

import re
from functools import cache
from itertools import product

import nbformat
import pytest
import yaml

from ecmoe import paths
from ecmoe.study import plan
from ecmoe.study.parameters import merge_parameters, parameter_files
from ecmoe.study.protocol import protocol

SCALES = ("smoke", "gpu", "paper")
CENTRE = "EC-CF2 renormalized"


@cache
def values(page, scale):
    return merge_parameters(parameter_files(page, scale))


@cache
def scale_of(name):
    return yaml.safe_load((paths.configs() / f"scale/{name}.yaml").read_text())


@cache
def arms(page, scale):
    """Arm -> its config with the page's first seed."""
    seed = values(page, scale)["seeds"][0]
    return {one.arms[0]: one.config for one in plan.of_page(page, scale, {"seeds": [seed]})}


@cache
def notebook(page):
    return nbformat.read(paths.configs().parent / f"notebooks/{page}.ipynb", as_version=4)


def quoted(page):
    """The strings in the code of the page's notebook."""
    code = (cell.source for cell in notebook(page).cells if cell.cell_type == "code")
    return set(re.findall(r'"([^"\n]*)"', "\n".join(code)))


STUDIES = [page for page in plan.pages("smoke") if "arms" in values(page, "smoke")]
every_study = pytest.mark.parametrize(("page", "scale"), [*product(STUDIES, SCALES)])
CLAIMS = protocol().claims.values()
