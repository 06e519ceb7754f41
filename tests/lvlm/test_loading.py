"""Loading from a directory, on devices and dtypes, and what is said when something is missing."""

import pytest
import torch
from transformers import AutoProcessor
from zoo.tiny import make_llava

from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, processor = make_llava("clip")
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out, model


@torch.no_grad()
@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_device_maps(saved, examples, device_map):
    out, model = saved
    with HookedLVLM.from_pretrained(out, device_map=device_map) as lvlm:
        inputs = lvlm.prepare(examples)
        assert torch.equal(lvlm(inputs), model(**inputs.model_kwargs()).logits)


@torch.no_grad()
def test_dtype(saved, examples):
    out, _ = saved
    with HookedLVLM.from_pretrained(out, dtype=torch.bfloat16) as lvlm:
        assert lvlm.dtype == torch.bfloat16 and lvlm(lvlm.prepare(examples)).dtype == torch.bfloat16


def test_loading_never_calls_pip(saved, monkeypatch):
    import subprocess

    def refuse(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    HookedLVLM.from_pretrained(saved[0]).close()


def test_a_missing_package_is_named_and_nothing_is_installed(saved, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("This processor requires the Torchvision library")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", missing)
    with pytest.raises(ImportError, match=r"often torchvision.*nothing was installed"):
        HookedLVLM.from_pretrained(saved[0])


def test_a_tokenizer_in_place_of_a_processor_is_refused(saved, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved[0])
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(OSError, match=r"processor of text and images.*from_hf"):
        HookedLVLM.from_pretrained(saved[0])


def test_an_unknown_family_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText, BlipConfig

    BlipConfig(architectures=["BlipForConditionalGeneration"]).save_pretrained(tmp_path)
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: pytest.fail("weights were read")
    )
    with pytest.raises(ValueError, match=r"BlipForConditionalGeneration.*register_family"):
        HookedLVLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"device": "cuda"}, "takes no device; write device_map="),
        ({"torch_dtype": torch.float16}, "takes no torch_dtype; write dtype="),
        ({"load_in_4bit": True}, "takes no load_in_4bit; write quantization_config="),
        ({"fold_ln": True}, "takes no fold_ln; load the model with transformers"),
    ],
)
def test_options_of_others_are_told(option, words):
    with pytest.raises(TypeError, match=words):
        HookedLVLM.from_pretrained("anywhere", **option)
