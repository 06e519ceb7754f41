"""The card of a shared subspace: a README that says what it is, how sure it is, and how it is loaded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from care_lens.subspace import display

if TYPE_CHECKING:
    from care_lens.subspace.safety_subspace import SafetySubspace

_TITLES = {
    "heldout_ratio": "malicious / benign energy on rows not used for the fit",
    "first_eigenvalue": "first eigenvalue",
    "largest_angle_between_halves": "largest principal angle between fits of two halves of the items (radians)",
}


def make_card(
    subspace: "SafetySubspace",
    *,
    repo_id: str | None = None,
    license: str | None = None,
    description: str = "",
    folders: Sequence[str] = (),
) -> str:
    """The text of a README.md with the front matter that the hub reads.

    Args:
        subspace: What it describes.
        repo_id: Where it is shared, for the lines that load it.
        license: Hub identifier of a license; None: not stated.
        description: What it is for, in the author's words.
        folders: Folder within the repository that holds it, or none.

    Returns:
        Markdown.
    """
    from huggingface_hub import ModelCardData

    model = subspace.model
    tags = ["care_lens", "safety-subspace", "interpretability", *([subspace.modality] if subspace.modality else [])]
    front = ModelCardData(
        library_name="care_lens",
        tags=tags,
        license=license,
        base_model=None if model is None else model.hub_name,
    )
    checks = {
        "site": None if subspace.site is None else str(subspace.site),
        "modality": subspace.modality,
        "width": subspace.width,
        **({"subfolder": folders[0]} if folders else {}),
    }
    given = "".join(f", {name}={value!r}" for name, value in checks.items() if value is not None)
    rows = [f"| {heading} | {_cell(value)} |" for heading, value in subspace.summary().items()]
    if model is not None:
        known = {"model": model.label, "revision": model.revision, "architecture": model.architecture}
        rows += [f"| {name} | {_cell(value)} |" for name, value in known.items() if value]
    measured = subspace.diagnostics.get("uncertainty")
    return (
        "\n".join(
            [
                f"---\n{front.to_yaml()}\n---",
                "# Safety subspace",
                *([description] if description else []),
                "Directions along which activations of unsafe requests stand out from those of ordinary ones, made with "
                "`care_lens` (generalised eigenvectors of malicious against benign activations; Fu et al. 2026, "
                "arXiv:2603.27240).",
                "\n".join(["| | |", "| --- | --- |", *rows]),
                f"Eigenvalues: {display.spectrum(subspace.eigenvalues)}",
                "## How sure it is",
                _measured(measured)
                if measured
                else "Not measured: no interval, stability or held-out energy is known.",
                "## Use",
                f"```python\nfrom care_lens.subspace import SafetySubspace\n\nsubspace = SafetySubspace.from_pretrained({repo_id or '...'!r}{given})\n"
                "repaired = subspace.apply(activations)\n```",
                "Loading refuses another site, modality, width or model than these. The files are safetensors and JSON; "
                "nothing in them is executed.",
                "## Limits",
                "It describes the activations it was fitted on. That it separates or removes unsafe behaviour elsewhere, or "
                "under attacks that know of it, is not implied: compare with a random subspace of the same rank and edit "
                "norm, and measure benign behaviour too.\n",
            ]
        )
        .replace("\n## ", "\n\n## ")
        .replace("\n# ", "\n\n# ")
    )


def _measured(summary: dict) -> str:
    lines = []
    for name, title in _TITLES.items():
        value, low, high = summary[name]
        lines.append(f"- {title}: {value:.3g} [{low:.3g}, {high:.3g}]")
    percent = 100 * summary["confidence"]
    items = summary["items"]
    return "\n".join(
        [
            *lines,
            f"\nBrackets are {percent:g} % ranges: of {summary['n_boot']} resamples of items, and of {summary['n_halves']} "
            f"halvings for the angle (there beside the median). {items[0]} benign and {items[1]} malicious items, seed "
            f"{summary['seed']}. The mean of the resampled first eigenvalue lies {summary['first_eigenvalue_bias']:+.3g} "
            "from the fit's.",
        ]
    )


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
