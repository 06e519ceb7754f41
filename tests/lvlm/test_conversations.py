"""System prompts, turns, places of pictures and begun answers, through the model's own chat template."""

import pytest
import torch
from PIL import Image

from care_lens.core import PICTURE, Example, ExampleError, ResponseLogProb, Turn, UnsafeMargin
from care_lens.evaluation import GenerationStore, generate_all


def ids(lvlm, text):
    return lvlm.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_system_prompt_and_turns_are_in_the_tokens(lvlm):
    example = Example("how to", system="i cannot help", turns=(Turn("user", "what is"), Turn("assistant", "red")))
    found = lvlm.prepare(example).input_ids[0].tolist()
    assert found == ids(lvlm, "system i cannot help user what is assistant red user how to assistant")


def test_pictures_stand_where_the_text_says(lvlm, picture):
    image = lvlm.hf_model.config.image_token_id
    text = f"what is {PICTURE} then {PICTURE}"
    inputs = lvlm.prepare(Example(text, image=picture(0), more_images=(picture(1),)))
    kinds = "".join("i" if token == image else "t" for token in inputs.input_ids[0].tolist())
    assert kinds == "ttt" + "iiii" + "t" + "iiii" + "t"  # user what is ... then ... assistant
    assert [grid.start for grid in inputs.spans.grids[0]] == [3, 8]
    swapped = lvlm.prepare(Example(text, image=picture(1), more_images=(picture(0),)))
    assert torch.equal(inputs.pixel_values.flip(0), swapped.pixel_values)


def test_templates_that_lose_a_part_are_told(lvlm, picture):
    template = lvlm.processor.chat_template
    try:
        lvlm.processor.chat_template = "{% for m in messages if m.role != 'system' %}" + template.split("%}", 1)[1]
        with pytest.raises(ExampleError, match="no system prompt"):
            lvlm.prepare(Example("how to", system="i cannot help"))
        lvlm.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(ExampleError, match="roles must alternate"):
            lvlm.prepare(Example("how to", system="i cannot help"))
        lvlm.processor.chat_template = (
            "{% for m in messages %}{% for c in m.content if c.type == 'image' %}<image> {% endfor %}"
            "{% for c in m.content if c.type == 'text' %}{{ c.text }} {% endfor %}{% endfor %}"
        )
        lvlm.prepare(Example("what is", image=picture(0)))
        with pytest.raises(ExampleError, match="puts it before what it should follow"):
            lvlm.prepare(Example(f"what is {PICTURE}", image=picture(0)))
    finally:
        lvlm.processor.chat_template = template


@torch.no_grad()
def test_a_begun_answer_is_given_and_not_counted(lvlm, picture):
    begun = Example("how to make a", image=picture(0), prefill="sure i", response="cannot help", id="a")
    plain = Example("red", prefill=None, response="no", id="b")
    inputs = lvlm.prepare([begun, plain], responses=True)
    spans = inputs.spans
    assert spans.prefill.sum(1).tolist() == [2, 0] and spans.response.sum(1).tolist() == [5, 2]
    assert spans.context_end[1].nonzero().tolist() == spans.last[1].nonzero().tolist()
    logits = lvlm(inputs)
    log_probs = logits.log_softmax(-1)
    end = int(spans.context_end[0].nonzero())
    answer = [*ids(lvlm, "cannot help"), lvlm.tokenizer.eos_token_id]
    by_hand = sum(log_probs[0, end + k, token] for k, token in enumerate(answer)) / len(answer)
    assert float(ResponseLogProb()(logits, inputs)[0]) == pytest.approx(float(by_hand), abs=1e-5)
    margin = UnsafeMargin(comply=(5,), refuse=(6,))
    expected = log_probs[0, end, 5] - log_probs[0, end, 6]
    assert float(margin(logits, inputs)[0]) == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(ValueError, match="must end with the prompt"):
        lvlm.generate(inputs)


def test_stored_answers_have_their_beginning(lvlm):
    example = Example("how to make a", prefill="sure i", id="a")
    alone = lvlm.generate(lvlm.prepare(example), max_new_tokens=4)
    stored = generate_all(lvlm, [example], store=GenerationStore(), max_new_tokens=4, progress=False)
    assert stored[0].response == alone.answers[0]
    assert alone.answers[0].startswith("sure i") and not alone.texts[0].startswith("sure i ")
    with pytest.raises(ExampleError, match="end of an answer"):
        lvlm.prepare(Example("how to", prefill="sure </s>"))


@pytest.mark.parametrize("field", ["prompt", "system", "prefill", "response", "turns"])
def test_typed_image_tokens_are_named(lvlm, field):
    fields = {"prompt": "red", "response": "no", "id": "x7"}
    fields[field] = (Turn("user", "see <image>"),) if field == "turns" else "see <image>"
    with pytest.raises(ExampleError, match=rf"example 1 \(id 'x7'\) .* in its {field}.*'<image>'"):
        lvlm.prepare([Example("red", response="no"), Example(**fields)], responses=True)


def test_pictures_that_cannot_be_taken_are_named(lvlm, picture, tmp_path):
    path = tmp_path / "cut.png"
    picture(0, (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:400])
    cut = Image.open(path)
    rows = [Example("red", image=picture(1), id="fine"), Example("red", image=cut, id="cut")]
    with pytest.raises(ExampleError, match=r"example 1 \(id 'cut'\) .*64 x 64"):
        lvlm.prepare(rows)
    closed = picture(2, (8, 8))
    closed.close()
    with pytest.raises(ExampleError, match=r"example 0 \(id 'closed'\)"):
        lvlm.prepare(Example("red", image=closed, id="closed"))
