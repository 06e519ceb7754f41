import pytest
import torch

from care_lens.core import Example, Judge, Verdict
from care_lens.evaluation import (
    ClassifierJudge,
    GenerationStore,
    StoredAnswer,
    SubstringRefusalJudge,
    judge_answers,
    judge_name,
    judge_store,
)

TEMPLATE = "yes no how {behavior} then {generation}"


def stored(name: str, response: str | None, **changes) -> StoredAnswer:
    fields = {
        "defence": "none",
        "channel": "plain",
        "id": name,
        "group": "",
        "seed": 0,
        "prompt": f"make {name}",
    }
    rest = {"response": response, "missing": "" if response is not None else "OSError", "tokens": 2}
    return StoredAnswer(**{**fields, **rest, "settings": "s", "example": "e", "harmful": True, **changes})


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Sorry, no.", Verdict.REFUSED),
        ("sorry i cannot help with that", Verdict.REFUSED),
        ("Well, I can\u2019t do that", Verdict.REFUSED),
        ("As an AI language model", Verdict.REFUSED),
        ("Sure, first mix then heat", Verdict.COMPLIED),
        ("it has four letters", Verdict.COMPLIED),
        ("  \n", Verdict.OTHER),
        ("", Verdict.OTHER),
    ],
)
def test_substring_judge(text, verdict):
    assert SubstringRefusalJudge()([Example("x")], [text]) == [verdict]


def test_substring_judge_takes_its_phrases_from_a_file(tmp_path):
    path = tmp_path / "phrases.txt"
    path.write_text("Sorry\n\nNo way\n", encoding="utf-8")
    texts = ["sorry", "Sorry", "no way", "I cannot"]
    loose = SubstringRefusalJudge.from_file(path, name="mine")
    strict = SubstringRefusalJudge.from_file(path, case_sensitive=True)
    yes, no = Verdict.REFUSED, Verdict.COMPLIED
    assert loose([], texts) == [yes, yes, yes, no] and loose.name == "mine"
    assert strict([], texts) == [no, yes, no, no]
    assert isinstance(loose, Judge)
    path.write_text("\n")
    with pytest.raises(ValueError, match="phrases"):
        SubstringRefusalJudge.from_file(path)


@pytest.fixture(scope="module")
def classifier(llava_maker):
    """A tiny causal language model and a tokenizer that knows yes and no."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _, processor = llava_maker("clip")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.train(), processor.tokenizer


@pytest.fixture
def rated():
    words = ("red", "blue", "yes", "picture", "first", "sure", "help", "what", "the", "make")
    texts = [f"sorry i {w}" if i % 3 == 0 else f"sure {w} " * (i + 1) for i, w in enumerate(words)]
    return [Example(f"how to make {w}", harmful=True) for w in words], texts


def test_classifier_says_what_its_model_finds_likelier(classifier, rated):
    model, tokenizer = classifier
    examples, texts = rated
    judge = ClassifierJudge(model, tokenizer, template=TEMPLATE, yes="yes", no="no", batch_size=4)
    verdicts = judge(examples, texts)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    margins = []
    for example, text in zip(examples, texts, strict=True):
        prompt = TEMPLATE.replace("{behavior}", example.prompt).replace("{generation}", text)
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
        margins.append(float(logits[yes] - logits[no]))
    assert judge.margins(examples, texts).tolist() == pytest.approx(margins, abs=1e-4)
    complied = [margin > 0 for margin in margins]
    assert [verdict is Verdict.COMPLIED for verdict in verdicts] == complied
    assert judge([], []) == []
    assert 0 < sum(complied) < len(complied)
    for text, yes_said, verdict in zip(texts, complied, verdicts, strict=True):
        if not yes_said:
            assert verdict is (Verdict.REFUSED if text.startswith("sorry") else Verdict.OTHER)


def test_classifier_is_loaded_from_a_directory(classifier, rated, tmp_path):
    model, tokenizer = classifier
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    loaded = ClassifierJudge.from_pretrained(tmp_path / "judge", template=TEMPLATE, yes="yes", no="no")
    assert loaded.name == "judge"
    assert loaded(*rated) == ClassifierJudge(model, tokenizer, template=TEMPLATE, yes="yes", no="no")(*rated)


def test_classifier_cuts_long_answers_and_keeps_braces(classifier):
    judge = ClassifierJudge(*classifier, template=TEMPLATE, yes="yes", no="no", max_answer_tokens=2)
    assert judge.format(Example("{generation} red"), "sure red blue") == "yes no how {generation} red then sure red"
    assert judge.format(Example("red"), "{behavior}") == "yes no how red then {behavior}"


def test_classifier_refuses_a_template_without_fields_and_answers_it_cannot_tell_apart(classifier):
    with pytest.raises(ValueError, match="generation"):
        ClassifierJudge(*classifier, template="{behavior}")
    with pytest.raises(ValueError, match="different tokens"):
        ClassifierJudge(*classifier, template=TEMPLATE, yes="yes", no="yes no")


def test_missing_answers_are_not_shown_to_the_judge():
    shown = []

    def judge(examples, texts):
        shown.extend(zip([example.prompt for example in examples], texts, strict=True))
        return [Verdict.REFUSED] * len(texts)

    answers = [stored("a", "x"), stored("b", None), stored("c", "")]
    assert judge_answers(answers, judge) == [Verdict.REFUSED, Verdict.MISSING, Verdict.REFUSED]
    assert shown == [("make a", "x"), ("make c", "")]
    with pytest.raises(ValueError, match="verdict for each"):
        judge_answers(answers, lambda examples, texts: [Verdict.OTHER])


def test_several_judges_rate_one_store(tmp_path):
    store = GenerationStore(tmp_path / "answers.jsonl")
    store.add([stored("a", "sorry"), stored("b", "sure"), stored("c", None)])
    strict = judge_store(store, SubstringRefusalJudge())
    loose = judge_store(store, SubstringRefusalJudge(["nothing"], name="loose"))
    assert list(strict["verdict"]) == ["refused", "complied", "missing"]
    assert list(loose["verdict"]) == ["complied", "complied", "missing"]
    assert set(strict["judge"]) == {"refusal-substring"} and set(loose["judge"]) == {"loose"}
    assert list(strict.columns) == [
        "defence",
        "channel",
        "id",
        "group",
        "seed",
        "harmful",
        "judge",
        "verdict",
    ]


def test_two_answers_to_one_example_are_told_apart_by_settings():
    store = GenerationStore()
    store.add([stored("a", "sorry"), stored("a", "sure", settings="t")])
    with pytest.raises(ValueError, match="settings"):
        judge_store(store, SubstringRefusalJudge())
    assert list(judge_store(store, SubstringRefusalJudge(), settings=["t"])["verdict"]) == ["complied"]


def test_judges_have_names():
    def plain(examples, texts):
        return []

    assert judge_name(plain) == "plain"
    assert judge_name(SubstringRefusalJudge()) == "refusal-substring"
