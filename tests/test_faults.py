"""The short form of tests/faults.py."""

import faults
import pytest


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return faults.Bench(tmp_path_factory.mktemp("faults"), seed=0)


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_run_survives(bench, name):
    assert faults.FAULTS[name](bench, short=True)
