from collections.abc import Iterator

import pytest

from tests.ops.case import ISAS, using_isa


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine can run, in use."""
    with using_isa(request.param):
        yield request.param
