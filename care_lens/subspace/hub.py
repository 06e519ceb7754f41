"""Subspaces on the Hugging Face hub: the two files of a saved subspace and a card.

Access is huggingface_hub's: log in with its own means; nothing here asks for or keeps a token.
"""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from care_lens.subspace.card import make_card
from care_lens.subspace.errors import SubspaceError, SubspaceFileError
from care_lens.subspace.storage import MANIFEST_FILE, TENSORS_FILE

if TYPE_CHECKING:
    from care_lens.subspace.safety_subspace import SafetySubspace

CARD_FILE = "README.md"

_STRANGE = re.compile(r"[\\:*?\[\]<>|\x00-\x1f]")


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
    check_subfolder(subfolder)
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
        SubspaceFileError: If the repository cannot be had or holds no subspace there, or the folder leads out of it.
        SubspaceError: If the subfolder is no plain path within the repository.
    """
    check_subfolder(subfolder)
    local = Path(name_or_dir)
    if local.is_file():
        raise SubspaceFileError(
            f"name_or_dir must be a directory or a repository, got the file {local}; give its folder"
        )
    if not local.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        prefix = f"{subfolder}/" if subfolder else ""
        patterns = [prefix + name for name in (TENSORS_FILE, MANIFEST_FILE)]
        try:
            local = Path(snapshot_download(str(name_or_dir), revision=revision, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            raise SubspaceFileError(
                f"{name_or_dir} must be a directory, or a repository on the hub that can be read"
                f"{'' if revision is None else f' at revision {revision}'}; the hub says: {error}"
            ) from error
    directory = local / subfolder if subfolder else local
    if not directory.resolve().is_relative_to(local.resolve()):
        raise SubspaceFileError(
            f"subfolder must lie within {local}, got {subfolder!r}, which leads to {directory.resolve()}"
        )
    if not (directory / MANIFEST_FILE).is_file():
        raise SubspaceFileError(
            f"{name_or_dir} must hold {MANIFEST_FILE}{f' in {subfolder}' if subfolder else ''}; give the subfolder, "
            "or a directory that SafetySubspace.save wrote"
        )
    return directory


def check_subfolder(subfolder: str | None) -> None:
    """Refuse what is no plain relative path of a repository.

    Raises:
        SubspaceError: If it is empty, absolute, leads up, or holds characters that a pattern or another system reads otherwise.
    """
    if subfolder is None:
        return
    parts = subfolder.split("/") if isinstance(subfolder, str) else [""]
    if any(part in ("", ".", "..") or _STRANGE.search(part) for part in parts):
        raise SubspaceError(
            f"subfolder must be folders within the repository, such as 'blocks.12/visual', got {subfolder!r}; give a relative path "
            "with / between its folders and without '..', wildcards or backslashes"
        )
