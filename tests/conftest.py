"""Options and markers: --slow for the long tiers, gpu for tests that need a GPU."""

import os

import pytest

# Before torch is imported, here and in what is started: the workers share the cores, and the last
# bits of a run depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --slow."""
    parser.addoption("--slow", action="store_true", help="run the long tiers")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers."""
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    config.addinivalue_line("markers", "slow: runs with --slow only")
    config.addinivalue_line("markers", "long: takes 20 s or more, so it starts before the others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the long tests; skip, with the reason, what cannot or should not run here."""
    import torch

    items.sort(key=lambda item: "long" not in item.keywords)  # at the end the others would wait
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA GPU"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="a long tier: tests/run.sh --slow"))
