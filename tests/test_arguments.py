"""`arguments`: messages that advise flags are said in a Python caller's words."""

import pytest

from entrenar.arguments import as_arguments

ARGUMENTS = {"resume": True, "max_steps": False, "ignore_fields": False, "bits": False}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("continue with --resume", "continue with resume=True"),
        ("raise --max-steps or --epochs", "raise max_steps or --epochs"),
        ("name it (--ignore-fields a,b)", "name it (ignore_fields=['a', 'b'])"),
        ("name it (--ignore-fields a)", "name it (ignore_fields='a')"),
        ("--bits must be >= 2", "bits must be >= 2"),
        ("with `entrenar convert a --bits 2`; or set `--bits`", "with `entrenar convert a --bits 2`; or set `bits`"),
        ("(--ignore-fields a,b) `run --resume` --resume", "(ignore_fields=['a', 'b']) `run --resume` resume=True"),
        ("a--resume, --resumes and --max-steps-x stay", "a--resume, --resumes and --max-steps-x stay"),
        ("(--other a)", "(--other a)"),
        ("", ""),
    ],
)  # fmt: skip
def test_only_what_the_caller_can_pass_is_changed(text, said):
    """Flags of commands in quotes and of other commands stay."""
    assert as_arguments(text, ARGUMENTS) == said
