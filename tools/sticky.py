"""A pytest hook: after an illegal access nothing runs in a CUDA process any more, so its session ends there."""

from collections.abc import Generator
from typing import Any

import pytest
import torch


def lost() -> str:
    """Why this process can no longer use its GPU, or nothing. Such an error is told again by whatever asks next."""
    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and (why := lost()):
        item.session.shouldfail = f"the GPU is lost to this process, the tests behind this one did not run: {why}"
    return report
