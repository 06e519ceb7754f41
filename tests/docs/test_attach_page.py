"""The page on attaching runs as it stands; its code for harnesses runs with them where they are installed, else with what stands in.

What stands in has the names, the signatures and the calls of the model that the harness has, and nothing else of it.
"""

import asyncio
import base64
import importlib.util
import io
import re
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from care_lens import organism
from care_lens.lvlm import HookedLVLM

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "attach.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def run(blocks, names):
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.fixture(scope="module")
def page():
    """The names after the sections that need no harness."""
    return run([block for block in BLOCKS if "installed" not in block.splitlines()[0]], {})


def blocks_of(harness):
    return [block for block in BLOCKS if f"{harness} installed" in block.splitlines()[0]]


def installed(name):
    return importlib.util.find_spec(name) is not None


def modules(monkeypatch, **contents):
    """Modules by name ("inspect_ai.model") with these contents, in place of packages that are not installed."""
    for name, held in contents.items():
        module: Any = types.ModuleType(name)
        module.__dict__.update(held)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def seen(monkeypatch):
    """What the Hugging Face model is asked to generate from, call by call, with its answers."""
    from transformers import GenerationMixin

    calls, original = [], GenerationMixin.generate

    def generate(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        calls.append((kwargs, made))
        return made

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    return calls


def check(seen, repair):
    """Every call was answered as a HookedLVLM with the repair on it answers, and otherwise than without."""
    assert seen
    bridge = HookedLVLM.from_pretrained(organism.path())
    differs = False
    for kwargs, made in list(seen):
        with repair.on(bridge):
            assert torch.equal(bridge.hf_model.generate(**kwargs), made)
        plain = bridge.hf_model.generate(**kwargs)
        differs = differs or plain.shape != made.shape or not torch.equal(plain, made)
    assert differs


def test_the_code_of_the_page_runs(page):
    assert not page["plain"].equal(page["repaired"]) and page["handle"].active is False
    assert page["certificate"].largest_logit_change > 0.1


class LlavaHfLike:
    """The part of lmms-eval's LlavaHf that meets the model."""

    def __init__(self, pretrained, device="cuda", batch_size=1, **kwargs):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._model = AutoModelForImageTextToText.from_pretrained(pretrained)
        self._image_processor = AutoProcessor.from_pretrained(pretrained)
        self._image_processor.tokenizer.padding_side = "left"
        self._device, self.task_dict = torch.device(device), {}

    @property
    def model(self):
        return self._model

    def generate_until(self, requests):
        answers = []
        for request in requests:
            context, options, doc_to_visual, doc_id, task, split = request.args
            pictures = doc_to_visual(self.task_dict[task][split][doc_id])
            batch = self._image_processor(images=pictures, text=f"<image>\n{context}", return_tensors="pt")
            end = self._image_processor.tokenizer.eos_token_id
            made = self.model.generate(
                **batch.to(self._device, self.model.dtype), do_sample=False, temperature=None, top_p=None, num_beams=1,
                max_new_tokens=options["max_new_tokens"], use_cache=True, pad_token_id=end, eos_token_id=end,
            )  # fmt: skip
            answers.append(self._image_processor.tokenizer.decode(made[0, batch["input_ids"].shape[1] :]))
        return answers


def asked(n):
    return organism.examples("typographic", "test", n=n)


def test_lmms_eval(page, seen, monkeypatch):
    (block,) = blocks_of("lmms-eval")

    def simple_evaluate(model, tasks, limit, **kwargs):
        examples = asked(2)
        model.task_dict = {"made": {"test": examples}}
        requests = [
            SimpleNamespace(args=(e.prompt, {"max_new_tokens": 6}, lambda doc: [doc.images[0]], i, "made", "test"))
            for i, e in enumerate(examples)
        ]
        return model.generate_until(requests)

    if installed("lmms_eval"):
        monkeypatch.setattr("lmms_eval.evaluator.simple_evaluate", simple_evaluate)  # its tasks download their data
    else:
        modules(
            monkeypatch,
            **{
                "lmms_eval.evaluator": {"simple_evaluate": simple_evaluate},
                "lmms_eval.models.simple.llava_hf": {"LlavaHf": LlavaHfLike},
            },
        )
    names = run([block.replace('"cuda"', '"cpu"')], dict(page))
    assert len(names["results"]) == 2
    check(seen, page["repair"])


class VLMEvalBaseLike:
    """The interface of VLMEvalKit's BaseModel."""

    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)


def test_vlmevalkit(page, seen, monkeypatch, tmp_path):
    (block,) = blocks_of("VLMEvalKit")
    if installed("vlmeval"):
        from vlmeval.vlm.base import BaseModel as Base
    else:
        Base = VLMEvalBaseLike

    class OnTheCPU(Base):
        """Its LLaVA_Next asks for a GPU; this one does the same without."""

        def __init__(self, model_path, **kwargs):
            from transformers import AutoModelForImageTextToText, AutoProcessor

            super().__init__()
            self.model = AutoModelForImageTextToText.from_pretrained(organism.path())
            self.processor = AutoProcessor.from_pretrained(organism.path())

        def generate_inner(self, message, dataset=None):
            from PIL import Image

            content = [{"type": m["type"], **({"text": m["value"]} if m["type"] == "text" else {})} for m in message]
            pictures = [Image.open(m["value"]).convert("RGB") for m in message if m["type"] == "image"]
            chat = [{"role": "user", "content": content}]
            prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)
            batch = self.processor(text=prompt, images=pictures, return_tensors="pt")
            made = self.model.generate(**batch, max_new_tokens=6, do_sample=False)
            return self.processor.decode(made[0], skip_special_tokens=True)

    table = {}
    modules(monkeypatch, **{"vlmeval.config": {"supported_VLM": table}, "vlmeval.vlm": {"LLaVA_Next": OnTheCPU}})
    run([block], dict(page))
    vlm = table["llava_next_repaired"]()
    for i, example in enumerate(asked(2)):
        path = tmp_path / f"{i}.png"
        example.images[0].save(path)
        message = [{"type": "image", "value": str(path)}, {"type": "text", "value": example.prompt}]
        assert isinstance(vlm.generate(message=message, dataset="made"), str)
    check(seen, page["repair"])


def uri(picture):
    held = io.BytesIO()
    picture.save(held, format="PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def test_inspect(page, seen, monkeypatch, tmp_path):
    provider, task = blocks_of("inspect_ai")
    page["repair"].save(tmp_path)
    provider = provider.replace(', device_map="auto"', "")
    examples = asked(3)
    if installed("inspect_ai"):
        from inspect_ai.dataset import Sample
        from inspect_ai.model import ChatMessageUser, ContentImage, ContentText

        monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path / "logs"))
        names = run([provider], {**page, "repair_folder": str(tmp_path)})
        samples = [
            Sample(input=[ChatMessageUser(content=[ContentImage(image=uri(e.images[0])), ContentText(text=e.prompt)])])
            for e in examples
        ]
        task = task.replace('[Sample(input=example.prompt, target="sorry")]', "samples")
        logs = run([task], {**names, "samples": samples})["logs"]
        assert logs[0].status == "success", logs[0].error
        assert len(seen) == 3
    else:

        class ContentImage:
            def __init__(self, image):
                self.image = image

        class ModelAPI:
            def __init__(self, model_name, base_url=None, api_key=None, api_key_vars=(), config=None):
                self.model_name = model_name

        class ModelOutput:
            from_content = staticmethod(lambda model, content: SimpleNamespace(completion=content))

        held = {
            "ContentImage": ContentImage,
            "GenerateConfig": SimpleNamespace,
            "ModelAPI": ModelAPI,
            "ModelOutput": ModelOutput,
            "modelapi": lambda name: lambda made: made,
        }
        modules(monkeypatch, **{"inspect_ai": {}, "inspect_ai.model": held})
        names = run([provider], dict(page))
        api = names["Repaired"](str(organism.path()), repair_folder=str(tmp_path))
        chats = [
            [SimpleNamespace(role="user", content=[ContentImage(uri(e.images[0])), SimpleNamespace(text=e.prompt)])]
            for e in examples
        ]

        async def every():
            config = SimpleNamespace(max_tokens=6)
            made = await asyncio.gather(*(api.generate(chat, [], "none", config) for chat in chats))
            await api.aclose()
            return made

        assert all(isinstance(output.completion, str) for output in asyncio.run(every()))
        assert len(seen) == 3 and not api.handle.active
    check(seen, page["repair"])
