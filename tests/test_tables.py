"""Tables escape texts, and align columns."""

from dcmdp_jax.report import tables
from support.pages import Page


def test_a_text_is_escaped():
    shown = Page(tables.html_table(["<b>"], [["<i>&"]]))
    assert shown.text == "<b><i>&" and shown.count("b") == shown.count("i") == 0


def test_a_cell_is_markup():
    assert Page(tables.html_table(["a"], [[tables.Cell("<b>x</b>")]])).count("b") == 1


def test_a_cell_may_have_a_style():
    assert '<td class="text">x</td>' in tables.html_table(["a"], [[tables.Cell("x", "text")]])


def test_texts_of_cells_are_escaped():
    cells = [
        tables.with_note("<b>", "<b>"),
        tables.with_note("<b>", "<b>", below=True),
        tables.with_dot("#000", "<b>"),
    ]
    assert Page(tables.html_table(["a", "b", "c"], [cells])).count("b") == 0


def test_control_characters_have_signs_but_lines_and_tabs_are_kept():
    assert tables.visible("a\0\x1b\r\x7f\n\tb") == "a␀␛␍␡\n\tb"


def test_a_table_can_be_scrolled_with_the_keyboard():
    assert '<div class="scroll" tabindex="0">' in tables.html_table(["a"], [["x"]])


def test_a_bar_has_its_share_of_the_width():
    assert 'style="width:25.0%;background:#000"' in tables.bar(0.25, "#000").html


def test_columns_of_text_are_aligned():
    rows = [("name", "set", "value"), ("a", "long one", "1.5"), ("bcd", "x", "10")]
    assert tables.aligned_text(rows, left=2).split("\n") == [
        "name  set       value",
        "a     long one    1.5",
        "bcd   x            10",
    ]
