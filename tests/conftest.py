"""What every test relies on: GPU tests skip visibly without a GPU, property tests give the same verdict twice.

And no test writes calibrations where its user keeps them, or finds those of an earlier run.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import hypothesis
import pytest

# A fixed seed and no time limit per example: a shared machine must not turn a property into a flaky test.
hypothesis.settings.register_profile("pipeline", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("pipeline")

# What a script starts in the background ignores Ctrl-C, and so does what that starts; programs of the tests must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none here"))


@pytest.fixture(scope="session", autouse=True)
def own_calibrations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of calibrations for this process and those that it starts; downloaded data are not kept there."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PIPELINE_CACHE", str(tmp_path_factory.mktemp("calibrations")))
        yield
