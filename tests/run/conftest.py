"""What tests of runs read."""

import pytest
import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data of `tiny_run`."""
    path = tmp_path_factory.mktemp("data")
    tiny_run.write_data(path)
    return path
