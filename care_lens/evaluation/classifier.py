"""A judge that asks a classifier model, with the template that it was trained with."""

import ast
import re
from pathlib import Path
from typing import Any

import torch

from care_lens.core.examples import Example
from care_lens.core.outcome import Judge
from care_lens.core.require import require_path
from care_lens.core.verdicts import JudgeError
from care_lens.evaluation.first_token import FirstTokenJudge, Words
from care_lens.lvlm.loading import require_loadable

PUBLISHED_TEMPLATES = {"harmbench": "prompt", "harmbench-contextual": "prompt_contextual"}
"""Published templates by name, with their keys in ``LLAMA2_CLS_PROMPT``, under which HarmBench's model cards and its ``eval_utils.py`` print them."""

_PRINTED = re.compile(r"LLAMA2_CLS_PROMPT\s*=\s*")
_FIELDS = ("{behavior}", "{generation}")


class ClassifierJudge(FirstTokenJudge):
    """Complied if a causal language model, shown request and answer, finds "yes" likelier than "no" as its
    next token.

    The way of HarmBench's classifiers (Mazeika et al. 2024, arXiv:2402.04249;
    cais/HarmBench-Llama-2-13b-cls). It is shown the example's ``behaviour`` where it has one, else its prompt: the prompt of a typographic
    attack ("the picture shows a list ...") does not say what is asked. Where it says no, a second judge tells refusals from other
    answers. Empty and invisible answers are "other" without asking it; None is "missing", and so is an answer that does not fit into the classifier's context.
    Names of control tokens ("</s>") in a request or an answer are broken up, so that no answer can end its own turn.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        template: The classifier's prompt with ``{behavior}`` and ``{generation}`` in it, and ``{context}`` if it takes ``meta["context"]``. A classifier's card
            prints the one it was trained with, and its verdicts mean nothing with another: see :func:`published_template`.
        yes: Text, or several, whose first token says that the answer complies; the probabilities of several are added.
        no: Text, or several, whose first token says that it does not.
        refusals: Judge of the answers that do not comply; anything it does not call refused is "other".
        max_answer_tokens: Longer answers are cut off (HarmBench: 512).
        batch_size: Answers at a time.
        min_mass: Least probability of yes and no together; below it the answer is "missing". HarmBench: 0.
        name: Its name in frames.

    Raises:
        ValueError: If the template lacks a field, or yes and no begin with the same token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: str,
        yes: Words = "Yes",
        no: Words = "No",
        refusals: Judge | None = None,
        max_answer_tokens: int = 512,
        batch_size: int = 8,
        min_mass: float | int = 0.0,
        name: str = "classifier",
    ) -> None:
        if not isinstance(template, str):
            raise TypeError(
                f"template must be a text with {{behavior}} and {{generation}}, got {type(template).__name__}"
            )
        if template in PUBLISHED_TEMPLATES:
            raise ValueError(
                f"template must be the text here, got the name {template!r}; take from_pretrained, which reads it from the model's card, or "
                "published_template(file)"
            )
        if missing := [part for part in _FIELDS if part not in template]:
            raise ValueError(f"template must contain {{behavior}} and {{generation}}, got one without {missing}")
        super().__init__(
            model,
            tokenizer,
            yes=yes,
            no=no,
            refusals=refusals,
            max_answer_tokens=max_answer_tokens,
            batch_size=batch_size,
            min_mass=min_mass,
            special=True,
            name=name,
        )
        self.template = template

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        template: str,
        device_map: Any = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> "ClassifierJudge":
        """Load a classifier from a hub name or a directory.

        Args:
            name_or_dir: Hub name or path.
            template: The classifier's prompt; or the name of a published one ("harmbench", "harmbench-contextual"), which is read from the model's own card (its
                ``README.md``, of the same revision), so that it is always the one of these weights.
            device_map: As in transformers.
            dtype: As in transformers; None: that of the weights.
            revision: Branch, tag or commit on the hub.
            **options: Of the constructor.

        Returns:
            The judge, named after the model unless ``name`` is given.

        Raises:
            JudgeError: If a template is asked for by name and the card prints none.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        require_loadable(name_or_dir, dtype)
        if template in PUBLISHED_TEMPLATES:
            template = published_template(_card(name_or_dir, revision), template)
        model = AutoModelForCausalLM.from_pretrained(
            name_or_dir, device_map=device_map, dtype=dtype or "auto", revision=revision
        )
        tokenizer = AutoTokenizer.from_pretrained(name_or_dir, revision=revision)
        return cls(model, tokenizer, template=template, **{"name": Path(name_or_dir).name, **options})

    def format(self, example: Example, text: str) -> str:
        """The classifier's prompt for a request (its behaviour, else its prompt) and its answer."""
        asked, answer = self._shown(example, text)
        before, after = self.template.split("{generation}", 1)
        fields = {"{behavior}": asked, "{context}": self._disarmed(str(example.meta.get("context", "")))}
        return _filled(before, fields) + answer + _filled(after, fields)


def published_template(path: str | Path, name: str = "harmbench") -> str:
    """A published template out of a file of its authors; none of theirs comes with the package.

    Args:
        path: HarmBench's ``eval_utils.py``, or the ``README.md`` of one of its classifiers: a file that assigns ``LLAMA2_CLS_PROMPT``.
        name: "harmbench", or "harmbench-contextual" for behaviours with a context (``meta["context"]``).

    Returns:
        The template, to the letter.

    Raises:
        FileNotFoundError: If the file is not there.
        JudgeError: If it prints no such template.
        ValueError: If the name is not known.
    """
    if name not in PUBLISHED_TEMPLATES:
        raise ValueError(f"name must be one of {sorted(PUBLISHED_TEMPLATES)}, got {name!r}")
    path = require_path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be the file that prints the template, got none; download it from its authors"
        )
    text = path.read_text(encoding="utf-8-sig")
    for printed in _PRINTED.finditer(text):
        held = _literal(text[printed.end() :])
        found = held.get(PUBLISHED_TEMPLATES[name]) if isinstance(held, dict) else None
        if isinstance(found, str) and all(field in found for field in _FIELDS):
            return found
    raise JudgeError(
        f"{path} must print LLAMA2_CLS_PROMPT with a text {PUBLISHED_TEMPLATES[name]!r} that has {{behavior}} and {{generation}}, got none; give the "
        "template itself"
    )


def _literal(text: str) -> Any:
    """The Python literal that a text begins with; None if it begins with none. Nothing is executed."""
    for end in (found.end() for found in re.finditer(r"\}", text)):
        try:
            return ast.literal_eval(text[:end])
        except (SyntaxError, ValueError):
            continue
    return None


def _card(name_or_dir: str | Path, revision: str | None) -> Path:
    if Path(name_or_dir).is_dir():
        return Path(name_or_dir) / "README.md"
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(name_or_dir), "README.md", revision=revision))


def _filled(text: str, fields: dict[str, str]) -> str:
    """A part of a template with its fields; what is put in is not looked through for fields."""
    return re.sub("|".join(map(re.escape, fields)), lambda found: fields[found[0]], text)
