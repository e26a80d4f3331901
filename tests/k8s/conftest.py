"""Each combination is rendered once for all files."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .objects import Object
from .render import build_case


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Object]]:
    """The objects of a case of render.CASES; not to be changed."""
    done: dict[str, list[Object]] = {}

    def get(case: str) -> list[Object]:
        if case not in done:
            done[case] = build_case(case, tmp_path_factory.mktemp("case"))
        return done[case]

    return get
