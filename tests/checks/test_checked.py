"""The checks of types and shapes that every test runs under do refuse what is wrong, in every kind of function."""

import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from care_lens.core import Site
from care_lens.plots.paper import short_site
from care_lens.subspace import ModelIdentity, Moments, SafetySubspace
from care_lens.subspace.affine import along

ROWS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: along(ROWS, write=torch.ones(4, 2), left=torch.ones(4, 3)),  # a function: k is 2 and 3
        lambda: SafetySubspace.fit(ROWS, ROWS[:, :3]),  # a class method: d is 4 and 3
        lambda: ModelIdentity("a", revision=3),  # a dataclass
        lambda: short_site(3),  # a signature without arrays
        lambda: Site.parse("blocks.1.hook_mlp_out").__class__("language", "1", "hook_mlp_out"),
    ],
)
def test_what_is_wrong_is_refused(call):
    with pytest.raises((jaxtyping.TypeCheckError, TypeError)) as caught:
        call()
    assert "Type-check error" in str(caught.value) or "violates" in str(caught.value)


def test_what_is_right_passes_and_every_module_is_checked():
    assert isinstance(SafetySubspace.fit(ROWS, 3 * ROWS.flip(0), rank=1), SafetySubspace)
    for name in [name for name in sys.modules if name.partition(".")[0] == "care_lens"]:
        file = getattr(sys.modules[name], "__file__", None)
        assert file is None or "__checked_function__" in vars(sys.modules[name]), name
    assert hasattr(Moments.__init__, "__wrapped__") and Path(sys.modules["care_lens"].__file__).is_file()
