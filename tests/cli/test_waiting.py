"""The command line lets idle threads sleep, unless its user says otherwise."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_policy_of_waiting_is_set_before_torch_is_loaded(given, found):
    """`care_lens` alone loads no torch, so that the command's first line comes before it."""
    code = (
        "import sys, os, care_lens; assert 'torch' not in sys.modules and 'OMP_WAIT_POLICY' not in os.environ or %r; "
        "import care_lens.cli; assert 'torch' in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
        % (given is not None)
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=os.getcwd()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [found]
