import importlib
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from care_lens.core.forked import in_workers
from care_lens.core.identity import example_fingerprint, model_fingerprint, repair_fingerprint
from care_lens.evaluation import GenerationStore, generate_all
from care_lens.evaluation.generate import Ask, generate_several
from care_lens.lvlm.errors import GenerationOptionError

generating = importlib.import_module("care_lens.evaluation.generate")  # the package has a function of a like name


@pytest.fixture
def asked(suites):
    return [replace(example, channel=name) for name, suite in suites.items() for example in suite]


@pytest.fixture
def counted(small, monkeypatch):
    """The sizes of the batches that are generated."""
    sizes: list[int] = []
    generate = type(small).generate

    def counting(self, inputs, **options):
        sizes.append(inputs.batch_size)
        return generate(self, inputs, **options)

    monkeypatch.setattr(type(small), "generate", counting)
    return sizes


def run(small, asked, store, **options):
    return generate_all(small, asked, **{"store": store, "max_new_tokens": 4, "progress": False} | options)


def test_answers_are_those_of_the_model_one_by_one_in_the_examples_order(small, asked):
    answers = run(small, asked, GenerationStore(), batch_size=5)
    for example, answer in zip(asked, answers, strict=True):
        made = small.generate(small.prepare(example), max_new_tokens=4)
        assert answer.response == made.texts[0]
        ids = made.new_tokens[0].tolist()
        assert answer.tokens == (ids.index(2) + 1 if 2 in ids else len(ids))
        assert (answer.id, answer.channel, answer.harmful) == (example.id, example.channel, example.harmful)
        assert (answer.missing, answer.defence) == ("", "none")


def test_a_defence_is_on_while_it_generates_and_off_afterwards(small, asked, scaled):
    repair = scaled(-2.0)
    answers = run(small, asked, GenerationStore(), repair=repair, defence_name="scaled")
    with repair.on(small):
        expected = [small.generate(small.prepare(example), max_new_tokens=4).texts[0] for example in asked]
    assert [answer.response for answer in answers] == expected
    assert [answer.response for answer in run(small, asked, GenerationStore())] != expected


def test_a_rerun_generates_what_is_missing_only(small, asked, counted, tmp_path):
    path = tmp_path / "answers.jsonl"
    first = run(small, asked[:7], GenerationStore(path), batch_size=4)
    assert counted == [4, 3]
    assert run(small, asked[:9], GenerationStore(path), batch_size=4)[:7] == first
    assert counted == [4, 3, 2]
    run(small, asked[:9], GenerationStore(path), batch_size=4)
    assert counted == [4, 3, 2]


def test_a_kill_in_the_middle_costs_the_batch_that_was_being_written(small, asked, counted, tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = run(small, asked[:6], GenerationStore(path), batch_size=2)
    path.write_bytes(path.read_bytes()[:-10])
    assert run(small, asked[:6], GenerationStore(path), batch_size=2) == whole
    assert counted == [2, 2, 2, 1]


def test_whatever_changes_the_answer_is_generated_anew(small, asked, counted, scaled, picture):
    store = GenerationStore()
    example = next(example for example in asked if example.image is not None)
    run(small, [example], store)
    run(small, [replace(example, image=picture(77))], store)
    run(small, [replace(example, prompt="what is red")], store)
    run(small, [example], store, max_new_tokens=5)
    run(small, [example], store, generation={"do_sample": True})
    run(small, [example], store, seed=1)
    run(small, [example], store, repair=scaled(1.5), defence_name="d")
    run(small, [example], store, repair=scaled(1.6), defence_name="d")
    assert len(counted) == len(store) == 8
    run(small, [example], store, repair=scaled(1.6), defence_name="d")
    run(small, [replace(example, image=example.image.copy())], store)
    assert len(counted) == 8


def test_a_failed_answer_is_missing_and_tried_again(small, asked, counted, monkeypatch, tmp_path, caplog):
    bad = {asked[2].id + asked[2].channel, asked[9].id + asked[9].channel}
    prepare = type(small).prepare

    def failing(self, examples, **options):
        if any(example.id + example.channel in bad for example in examples):
            raise KeyError("no such word")
        return prepare(self, examples, **options)

    path = tmp_path / "answers.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(type(small), "prepare", failing)
        answers = run(small, asked, GenerationStore(path), batch_size=8)
    assert [i for i, answer in enumerate(answers) if answer.missing] == [2, 9]
    assert answers[2].missing == "KeyError" and answers[2].response is None
    assert "no such word" in caplog.text
    done = sum(counted)
    again = run(small, asked, GenerationStore(path), batch_size=8)
    assert sum(counted) == done + 2
    assert not any(answer.missing for answer in again)
    assert len(GenerationStore(path)) == len(asked)


def test_a_prompt_that_cannot_be_read_is_missing_and_the_others_are_answered(small, asked):
    """Half of a character beyond the basic plane, as broken exports have it."""
    some = [asked[0], replace(asked[1], prompt="what is red \ud83d"), asked[2]]
    answers = run(small, some, GenerationStore())
    assert [answer.missing for answer in answers] == ["", "ExampleError", ""]


def test_a_kill_is_not_a_missing_answer(small, asked, monkeypatch):
    def killed(self, inputs, **options):
        raise KeyboardInterrupt

    store = GenerationStore()
    monkeypatch.setattr(type(small), "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(small, asked[:2], store)
    assert len(store) == 0


def test_sampling_is_repeatable_and_leaves_the_generator_alone(small, asked):
    state = torch.get_rng_state()
    options = {"generation": {"do_sample": True, "temperature": 3.0}, "batch_size": 4}
    first = run(small, asked, GenerationStore(), **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == run(small, asked, GenerationStore(), **options)
    other = run(small, asked, GenerationStore(), seed=1, **options)
    assert [answer.response for answer in first] != [answer.response for answer in other]


def test_ids_are_needed_and_must_differ_within_a_channel(small, asked):
    with pytest.raises(ValueError, match="ids"):
        run(small, [replace(asked[0], id="")], GenerationStore())
    with pytest.raises(ValueError, match="twice"):
        run(small, [asked[0], asked[0]], GenerationStore())


def test_fingerprints_see_what_matters(llava_maker, picture, scaled):
    model, _ = llava_maker("clip", seed=5)
    before = model_fingerprint(model)
    assert (
        before == model_fingerprint(llava_maker("clip", seed=5)[0]) != model_fingerprint(llava_maker("clip", seed=6)[0])
    )
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.5)
    assert model_fingerprint(model) != before
    assert repair_fingerprint(scaled(1.0)) == repair_fingerprint(scaled(1.0)) != repair_fingerprint(scaled(1.1))
    from care_lens.core import Example

    plain = Example("what", image=picture(1))
    assert example_fingerprint(plain) == example_fingerprint(replace(plain, id="x", response="y"))
    assert len({example_fingerprint(e) for e in (plain, Example("what"), Example("what", image=picture(2)))}) == 3


def test_options_of_generation_are_used_as_given_and_the_settings_tell_them(small, asked, monkeypatch):
    config = GenerationConfig(max_new_tokens=3, do_sample=True, temperature=2.0)
    store = GenerationStore()
    answers = run(small, asked[:2], store, max_new_tokens=None, generation={"generation_config": config}, seed=5)
    ((_, settings),) = store.settings.items()
    said = {"max_new_tokens": 3, "do_sample": True, "temperature": 2.0}
    assert settings["max_new_tokens"] == 3 and said.items() <= settings["generation"].items()
    assert all(answer.missing == "" and answer.tokens <= 3 for answer in answers)
    by_hand = run(
        small, asked[:2], GenerationStore(), max_new_tokens=3, generation=dict(list(said.items())[1:]), seed=5
    )
    assert [answer.response for answer in answers] == [answer.response for answer in by_hand]
    total = run(small, asked[:2], GenerationStore(), max_new_tokens=None, generation={"max_length": 60})
    assert all(answer.missing == "" for answer in total)


def test_the_models_own_configuration_counts_and_is_told(small, asked, monkeypatch):
    monkeypatch.setattr(small.hf_model.generation_config, "max_new_tokens", 2)
    store = GenerationStore()
    run(small, asked[:2], store, max_new_tokens=None)
    monkeypatch.setattr(small.hf_model.generation_config, "do_sample", True)
    run(small, asked[:2], store, max_new_tokens=None)
    first, second = store.settings.values()
    assert first["max_new_tokens"] == second["max_new_tokens"] == 2
    assert (first["generation"]["do_sample"], second["generation"]["do_sample"]) == (False, True)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 4, "generation": {"max_new_tokens": 5}},
        {"max_new_tokens": 4, "generation": {"max_length": 50}},
        {"generation": {"generation_config": GenerationConfig(max_new_tokens=9)}},
        {"generation": {"num_return_sequences": 2, "do_sample": True}},
    ],
)
def test_contradictions_are_refused_before_anything_is_generated(small, asked, counted, options):
    store = GenerationStore()
    with pytest.raises(GenerationOptionError):
        run(small, asked[:2], store, **options)
    assert counted == [] and store.settings == {}


def test_a_kept_answer_takes_the_labels_that_its_example_has_now(lvlm, examples, tmp_path):
    path = tmp_path / "answers.jsonl"
    options = {"max_new_tokens": 2, "progress": False}
    before = generate_all(lvlm, examples, store=GenerationStore(path), **options)
    changed = [replace(examples[0], harmful=True, group="new", meta={"noun": "x"}, response="other"), *examples[1:]]
    after = generate_all(lvlm, changed, store=GenerationStore(path), **options)
    assert [row.response for row in after] == [row.response for row in before]
    assert (after[0].harmful, after[0].group, after[0].meta, after[0].reference) == (
        True,
        "new",
        {"noun": "x"},
        "other",
    )
    assert after[1:] == before[1:]
    assert GenerationStore(path).get(after[0].key) == after[0]


def test_drawn_answers_depend_on_the_batch_size_and_resume_to_the_same_bytes(lvlm, examples, tmp_path):
    options = {"max_new_tokens": 4, "progress": False, "generation": {"do_sample": True}, "batch_size": 2}
    path = tmp_path / "answers.jsonl"
    generate_all(lvlm, examples, store=GenerationStore(path), **options)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:9])
        generate_all(lvlm, examples, store=GenerationStore(path), **options)
        assert path.read_bytes() == whole
    found = generate_all(lvlm, examples, store=GenerationStore(path), **{**options, "batch_size": 1})
    assert {row.settings for row in found}.isdisjoint(row.settings for row in GenerationStore(path).answers()[:3])


@pytest.mark.parametrize("options", [{}, {"generation": {"do_sample": True, "temperature": 2.0}}])
def test_several_processes_write_the_file_of_one(small, asked, scaled, tmp_path, options, counted):
    written = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the copies have it: the last bits are those of the number of threads
    try:
        for n in (1, 3):
            path = tmp_path / f"{n}.jsonl"
            with in_workers(n):
                run(small, asked, GenerationStore(path), batch_size=3, **options)
                run(small, asked, GenerationStore(path), batch_size=3, repair=scaled(-2.0), defence_name="s", **options)
            written.append(path.read_bytes())
            assert bool(counted) is (n == 1)  # with several, nothing is generated in this process
            counted.clear()
    finally:
        torch.set_num_threads(before)
    assert written[0] == written[1] and len(written[0].splitlines()) > 2 * len(asked)


def test_a_failed_answer_is_missing_in_several_processes_too(small, asked, monkeypatch):
    generate = type(small).generate

    def failing(self, inputs, **options):
        if any(example.id == asked[4].id and example.channel == asked[4].channel for example in inputs.examples):
            raise RuntimeError("no")
        return generate(self, inputs, **options)

    monkeypatch.setattr(type(small), "generate", failing)
    with in_workers(2):
        answers = run(small, asked, GenerationStore(), batch_size=4)
    assert [answer.missing for answer in answers] == ["" if i != 4 else "RuntimeError" for i in range(len(asked))]


@pytest.mark.parametrize("n", [1, 3])
def test_several_defences_at_once_are_asked_as_one_after_the_other(
    small, asked, scaled, tmp_path, n, counted, monkeypatch
):
    defences = [("none", None), ("half", scaled(0.5)), ("back", scaled(-2.0))]
    one, several = GenerationStore(tmp_path / "one.jsonl"), GenerationStore(tmp_path / "several.jsonl")
    expected = [run(small, asked, one, repair=repair, defence_name=name, batch_size=5) for name, repair in defences]
    counted.clear()
    put: list[str] = []
    on = scaled.on
    monkeypatch.setattr(scaled, "on", lambda self, lvlm: put.append("on") or on(self, lvlm))
    options = {"max_new_tokens": 4, "batch_size": 5, "progress": False}
    asks = [Ask(asked, name, repair) for name, repair in defences]
    with in_workers(n):
        found = generate_several(small, asks, store=several, **options)
        assert found == expected and {*map(len, found)} == {len(asked)}
        assert len(put) == (
            2 if n == 1 else 0
        )  # once for all batches, since it may change weights; in copies, not here
        assert generate_several(small, asks, store=several, **options) == expected
    assert sum(counted) == (3 * len(asked) if n == 1 else 0)

    # In the same order; what the lines begin with, the settings, comes at once.
    assert [answer.key for answer in one.answers()] == [answer.key for answer in several.answers()]
    assert len(one) == len(several) == 3 * len(asked)


def test_a_batch_is_cut_for_several_processes_alone(small, asked, monkeypatch):
    many = [replace(asked[i % len(asked)], id=f"{i}") for i in range(80)]
    dealt: list[list[int]] = []

    def no_answers(function, jobs):
        dealt.append([len(batch) for _, batch in jobs])
        yield from ()

    def none_in_turn(parts):
        dealt.append([len(batch) for _, batches in parts for batch in batches])
        yield from ()

    monkeypatch.setattr(generating, "forked", no_answers)
    monkeypatch.setattr(generating, "_in_turn", none_in_turn)
    for n, asks in ((1, 1), (2, 1), (2, 4), (4, 1), (8, 1)):
        with in_workers(n), pytest.raises(ValueError, match="shorter"):  # nothing is answered here
            generate_several(
                small,
                [Ask([replace(e, channel=str(k)) for e in many]) for k in range(asks)],
                store=GenerationStore(),
                batch_size=64,
                max_new_tokens=1,
                progress=False,
            )
    assert dealt == [[64, 16], [20] * 4, [40, 40] * 4, [20] * 4, [16] * 5]


def test_what_two_ask_alike_is_generated_once(small, asked, scaled, counted):
    asks = [Ask(asked), Ask(asked[::-1]), Ask(asked, "scaled", scaled(-2.0))]
    options = {"store": GenerationStore(), "max_new_tokens": 4, "batch_size": 5, "progress": False}
    first, again, other = generate_several(small, asks, **options)
    assert again == first[::-1] and sum(counted) == 2 * len(asked) and other != first
