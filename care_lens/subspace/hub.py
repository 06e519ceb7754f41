"""Subspaces on the Hugging Face hub: the two files of a saved subspace and a card.

Access is huggingface_hub's: log in with its own means; nothing here asks for or keeps a token.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from care_lens.subspace.card import make_card
from care_lens.subspace.errors import SubspaceFileError
from care_lens.subspace.storage import MANIFEST_FILE, TENSORS_FILE

if TYPE_CHECKING:
    from care_lens.subspace.safety_subspace import SafetySubspace

CARD_FILE = "README.md"


def push(
    subspace: "SafetySubspace",
    repo_id: str,
    *,
    subfolder: str | None,
    private: bool,
    revision: str | None,
    message: str | None,
    license: str | None,
    description: str,
) -> str:
    """Upload; see ``SafetySubspace.push_to_hub``."""
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as made:
        folders = [subfolder] if subfolder else []
        directory = subspace.save(Path(made, *folders))
        card = make_card(subspace, repo_id=repo_id, license=license, description=description, folders=folders)
        (directory / CARD_FILE).write_text(card, encoding="utf-8")
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=made,
            revision=revision,
            commit_message=message or f"Safety subspace of rank {subspace.rank} at {subspace.site or 'no site'}",
            allow_patterns=[f"*{name}" for name in (TENSORS_FILE, MANIFEST_FILE, CARD_FILE)],
        )
    return str(commit.commit_url)


def fetch(name_or_dir: str | Path, *, subfolder: str | None, revision: str | None) -> Path:
    """The local directory of a subspace, downloaded if it is not one already.

    Raises:
        SubspaceFileError: If the repository holds no subspace there.
    """
    local = Path(name_or_dir)
    if not local.is_dir():
        from huggingface_hub import snapshot_download

        prefix = f"{subfolder}/" if subfolder else ""
        patterns = [prefix + name for name in (TENSORS_FILE, MANIFEST_FILE)]
        local = Path(snapshot_download(str(name_or_dir), revision=revision, allow_patterns=patterns))
    directory = local / subfolder if subfolder else local
    if not (directory / MANIFEST_FILE).is_file():
        raise SubspaceFileError(
            f"{name_or_dir} must hold {MANIFEST_FILE}{f' in {subfolder}' if subfolder else ''}; give the subfolder, "
            "or a directory that SafetySubspace.save wrote"
        )
    return directory
