"""The package itself."""

import subprocess
import sys

import pytest

import care_lens


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, care_lens; print({'torch', 'transformers', 'pandas', 'plotly'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_names_come_when_they_are_asked_for():
    assert care_lens.Site("language", 0, "hook_mlp_out").layer == 0
    assert {"HookedLVLM", "SafetySubspace", "HybridFusion", "Correction"} <= set(dir(care_lens))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        care_lens.Nothing  # noqa: B018
