# fsspec's own suite for filesystems.
from __future__ import annotations

import fsspec.tests.abstract as abstract
import pytest


class Fixtures(abstract.AbstractFixtures):  # type: ignore[misc]
    @pytest.fixture
    def fs_path(self) -> str:
        return "test"

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return False

    # The suite's own `fs` would hide the one of conftest.py.
    @pytest.fixture
    def fs(self, request: pytest.FixtureRequest) -> object:
        from idunno.fs import IdunnoFileSystem

        request.getfixturevalue("fake")
        return IdunnoFileSystem("/fake")


class TestCopy(abstract.AbstractCopyTests, Fixtures):  # type: ignore[misc]
    pass


class TestGet(abstract.AbstractGetTests, Fixtures):  # type: ignore[misc]
    pass


class TestPut(abstract.AbstractPutTests, Fixtures):  # type: ignore[misc]
    pass


class TestPipe(abstract.AbstractPipeTests, Fixtures):  # type: ignore[misc]
    pass


class TestOpen(abstract.AbstractOpenTests, Fixtures):  # type: ignore[misc]
    pass
