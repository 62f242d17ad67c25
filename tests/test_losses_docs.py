"""docs/losses.md is what the docstrings say, and its example runs."""

import doctest
import importlib.util
import pathlib

import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_losses", DOCS / "make_losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(maker):
    assert maker.page() == maker.PAGE.read_text(encoding="utf-8"), "run python -m docs.make_losses"


def test_every_public_function_has_a_row(maker):
    page = maker.page()
    for module in maker.modules():
        section = page.split(f"## {module.__name__.removeprefix('dcmdp_jax.')}\n")[1].split(
            "\n## "
        )[0]
        assert maker.functions(module)
        for name in maker.functions(module):
            assert f"\n| `{name}`: " in section


def test_only_measures_have_an_empty_cell(maker):
    """What no field of the configuration takes, by name."""
    left_out = {
        f"{short}.{name}"
        for module in maker.modules()
        for short in [module.__name__.removeprefix("dcmdp_jax.")]
        for name, function in maker.functions(module).items()
        if not maker.trains_with(short, name, function)
    }
    assert all(name.startswith(maker.MEASURES) for name in left_out)


def test_a_docstring_that_does_not_say_what_it_needs_is_refused(maker):
    def lacking():
        """Something.

        Formula: x
        Paper: y
        """

    with pytest.raises(ValueError, match="some.lacking has no line `Needs:`"):
        maker.fields("some.lacking", lacking)


def test_a_field_left_out_is_an_empty_cell(maker):
    def brief():
        """Something.

        Formula: x
        Needs: y
        """

    stated = maker.fields("some.brief", brief)
    assert stated == {"Summary": "Something.", "Formula": "x", "Needs": "y"} | dict.fromkeys(
        ("Default", "Paper"), ""
    )


def test_the_page_runs():
    result = doctest.testfile(str(DOCS / "losses.md"), module_relative=False)
    assert result.attempted >= 15 and result.failed == 0


def test_the_ablation_example_is_fifteen_lines():
    example = (
        (DOCS / "losses.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    )
    assert sum(line.startswith((">>>", "...")) for line in example.splitlines()) <= 15
