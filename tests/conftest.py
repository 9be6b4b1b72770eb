"""Fixtures that several test files share."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("project", deadline=None)  # a busy machine is not a failure
settings.load_profile("project")


@pytest.fixture(scope="module")
def one_thread():
    """Many small operations: more threads are slower, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
