"""The plain part of YAML that recipes are written in: what is read, and what is refused with line and column."""

from __future__ import annotations

import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmreg.errors import RecipeError
from llmreg.recipes import load_recipe
from llmreg.recipes.document import MAX_BYTES, PlainDumper, parse, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2.0e-3", 0.002),
        ("-7", -7),
        ("007", 7),
        ("true", True),
        ("yes", "yes"),
        ("no", "no"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'16'", "16"),
        ("2026-01-01", "2026-01-01"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("all-linear", "all-linear"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_a_scalar_is_what_it_looks_like(text, value):
    found = parse_value(text, "argument")
    assert found == value
    assert type(found) is type(value)


def test_places_of_keys_and_values_are_kept():
    document = parse("a: 1\nb:\n  c: [x,\n   y]\n", "r.yaml")
    assert document.values == {"a": 1, "b": {"c": ["x", "y"]}}
    assert document.keys["b", "c"] == "r.yaml:3:3"
    assert document.places["b", "c", 1] == "r.yaml:4:4"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "r.yaml: a recipe is a mapping"),
        ("# nothing\n", "is empty"),
        ("- a\n- b", "holds a list"),
        ("just words", "holds a single text"),
        ("3", "holds a single number"),
        ("a: [1, 2", "r.yaml:1:9: not valid YAML"),
        ("a: 1\n\tb: 2", "r.yaml:2:1: not valid YAML"),
        ("a: \x01", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "r.yaml:1:4: YAML tags are not supported"),
        ("a: !!str 3", "YAML tags are not supported"),
        ("a: !custom {}", "YAML tags are not supported"),
        ("a: &x 1\nb: *x", "r.yaml:1:4: anchors and aliases"),
        ("a: 1\nb: {c: 2}\na: 3", "r.yaml:3:1: 'a' is given twice"),
        ("? [a, b]\n: c", "a key must be a word"),
        ("a: .nan", "r.yaml:1:4: '.nan' is not a finite number"),
        ("a: -.inf", "is not a finite number"),
        ("a: 1e999", "is not a finite number"),
        ("a: " + "9" * 10_000, "is not a finite number"),
        ("[" * 10_000, "nested deeper than"),
        ("a: " + "{b: " * 100, "nested deeper than"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_place(text, said):
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_alias_bomb_is_refused_at_once():
    bomb = "a: &a [x, x]\n" + "".join(f"k{i}: &k{i} [*a, *a]\n" for i in range(50))
    start = time.monotonic()
    with pytest.raises(RecipeError, match="anchors and aliases"):
        parse(bomb, "r.yaml")
    assert time.monotonic() - start < 1


def test_a_merge_key_is_an_unknown_key(complaint):
    assert "unknown key '<<'" in complaint(text="<<: {model: {name: pocket}}\n")


def test_a_file_of_ten_megabytes_is_refused_at_once(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text("a: 1\n" * 2_000_000)
    start = time.monotonic()
    with pytest.raises(RecipeError, match=f"larger than {MAX_BYTES // 1000:,} kB"):
        load_recipe(path)
    assert time.monotonic() - start < 1


def test_a_missing_file_a_folder_and_binary_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"nothing\.yaml does not exist"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load_recipe(tmp_path / "weights.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe("nul\x00.yaml")


@given(value=st.text(max_size=12) | st.sampled_from(["1e5", "08", "-3", ".5", "null", "~", "true", "no", "", "1_0"]))
def test_text_that_is_dumped_is_read_again_as_the_same_text(value):
    dumped = yaml.dump({"key": value}, Dumper=PlainDumper, allow_unicode=True)
    assert parse(dumped, "recipe").values == {"key": value}
