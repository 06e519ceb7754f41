"""Models, batches and caches say what they are in a few lines, without the numbers of a tensor."""

import importlib
import pkgutil
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
import zoo

from care_lens.core import Example
from care_lens.core.display import ShortRepr, as_html, as_text, brief, cut, memory
from care_lens.lvlm import HookedLVLM

SPECIMENS = {
    specimen.name: specimen
    for module in pkgutil.iter_modules(zoo.__path__)
    for specimen in getattr(importlib.import_module(f"zoo.{module.name}"), "SPECIMENS", [])
}


class Table(HTMLParser):
    """The tags of some html, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data + "\n"


def short(thing, *, lines=8):
    """Its text, after what holds for every one."""
    text, table = repr(thing), Table(thing._repr_html_())
    assert 1 <= len(text.splitlines()) <= lines and max(map(len, text.splitlines())) <= 120
    assert "tensor(" not in text and "tensor(" not in table.text
    assert {*table.tags} <= {"table", "caption", "b", "tbody", "tr", "th", "td"}
    return text


def value_of(text, heading):
    return re.search(rf"^  {heading} +(.*)$", text, flags=re.MULTILINE).group(1)


@pytest.mark.parametrize("name", SPECIMENS)
def test_a_model_of_every_family_says_what_it_is(name, picture):
    specimen = SPECIMENS[name]
    model, processor = specimen.make()
    parameters = sum(p.numel() for p in model.parameters())
    config = model.config.text_config
    with HookedLVLM.from_hf(model, processor) as lvlm:
        text = short(lvlm)
        assert text.startswith(f"HookedLVLM: {type(model).__name__}\n")
        assert value_of(text, "family") == lvlm.family.name
        assert value_of(text, "language") == f"{config.num_hidden_layers} layers, width {config.hidden_size}"
        assert value_of(text, "vision").startswith(f"{specimen.depth} layers, width ")
        assert f"{parameters:,} parameters, float32, on cpu" in text and value_of(text, "hooks") == "none"
        rows = [
            Example("what is in the picture", image=picture(0, (32, 32))),
            Example("red then blue", image=picture(1, (32, 32))),
        ]
        inputs = lvlm.prepare(rows)
        said = short(inputs)
        assert said.startswith(f"LVLMInputs: 2 rows of {inputs.input_ids.shape[1]} positions, on cpu")
        assert value_of(said, "tokens").startswith(", ".join(str(int(n)) for n in inputs.attention_mask.sum(1)))
        assert f"image {int(inputs.spans.image.sum())}" in value_of(said, "spans")
    assert "closed" in short(lvlm)


def test_a_model_says_what_acts_on_it(lvlm):
    class Loud:
        name = "<b>care</b>"

        def describe(self):
            return {}

        def make(self, inputs):
            return []

    with (
        lvlm.hooks([("blocks.1.hook_resid_post", lambda activation, hook: None)]),
        lvlm.hooks_for_each_batch(Loud().make),
    ):
        text = short(lvlm)
        assert value_of(text, "hooks").startswith("at blocks.1.") and "by <b>care</b>" in value_of(text, "hooks")
        html = lvlm._repr_html_()
        assert "&lt;b&gt;care&lt;/b&gt;" in html and "<b>care" not in html
    assert value_of(short(lvlm), "hooks") == "none"


def test_a_batch_without_pictures_and_with_answers(lvlm, examples):
    inputs = lvlm.prepare(examples, responses=True)
    text = short(inputs)
    assert value_of(text, "pictures").startswith("1, 0, 1 by row") and "response" in value_of(text, "spans")
    assert value_of(text, "of") == "3 examples"
    assert value_of(short(inputs.rows([1])), "pictures") == "none"
    many = inputs.rows([0, 1, 2] * 40)
    assert "and 112 more" in value_of(short(many), "tokens")
    assert "float64" in short(replace(inputs, pixel_values=inputs.pixel_values.double()))


@torch.no_grad()
def test_a_cache_says_how_much_it_holds(lvlm, examples):
    inputs = lvlm.prepare(examples)
    _, cache = lvlm.run_with_cache(inputs, sites=None)
    text = short(cache)
    n_bytes = sum(value.nbytes for value in cache.cache_dict.values())
    assert text.startswith(f"LVLMCache: {len(cache)} activations, {n_bytes / 1024:.1f} KiB")
    assert value_of(text, "rows") == "3"
    assert value_of(text, "vision").startswith(f"{len(lvlm.sites(tower='vision'))}: ")
    _, one = lvlm.run_with_cache(inputs, sites="blocks.0.hook_mlp_out")
    assert "LVLMCache: 1 activation, " in short(one) and "blocks.0.hook_mlp_out" in short(one)
    assert "tensor(" not in repr(lvlm.generate(inputs, max_new_tokens=2, sites=["blocks.0.hook_mlp_out"]))


def test_the_parts_of_a_text():
    class Named(ShortRepr):
        def shown(self):
            return "<i>", {"<u>": "a & b", "left out": ""}

    assert Named()._repr_html_().count("<i>") == 0 and "&lt;u&gt;" in Named()._repr_html_()
    assert "a &amp; b" in Named()._repr_html_() and "left out" not in Named()._repr_html_()
    assert as_text("x\ny", {"a": "1\n2", "bcd": "3"}) == "x y\n  a    1 2\n  bcd  3"
    assert as_html("t", {}).startswith("<table>")
    assert cut("a" * 200) == "a" * 117 + "..." and cut("abc") == "abc"
    assert [memory(n) for n in (0, 1023, 1536, 3 * 2**20, 2**41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "2048.0 GiB",
    ]
    assert brief(torch.zeros(2, 3)) == "[2, 3] float32" and brief({1: 2}) == "{1 entries}" and brief((1, 2)) == "(1, 2)"
