"""Skip what needs a GPU where torch can use none."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder; where others are collected beside them, theirs stay."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.add_marker(pytest.mark.skip(reason="no GPU that torch can use"))
