"""A setting under another program's name is answered with ours."""

import pytest

from entrenar.synonyms import elsewhere


@pytest.mark.parametrize(
    ("name", "known", "ours"),
    [
        ("learning_rate", ["lr"], ["lr"]),
        ("load_in_4bit", ["method", "lr"], ["method", "qlora"]),
        ("learning_rate", ["model"], None),
        ("no_such_setting", ["lr"], None),
    ],
)
def test_our_name_is_given_where_it_is_known(name, known, ours):
    """Our name comes with the value that the other name implies, and only where the command has that setting."""
    assert elsewhere(name, known) == ours
