"""What the tests of recipes share."""

import textwrap

import pytest
from compress.calibrate.errors import InputError

from compress.recipe import Recipe

SHIPPED = [
    "act",
    "duo",
    "echoatt",
    "gptq",
    "heads",
    "hip",
    "kvsharer",
    "moa",
    "rsq",
    "rsq-paper",
    "rsq-tuned",
    "rtn",
    "sea",
    "zipcache",
    "zipcache-plus",
]


def refusal(source, *overrides):
    with pytest.raises(InputError) as caught:
        Recipe.load(source, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(folder, name, text):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)
