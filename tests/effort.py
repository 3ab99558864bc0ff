"""How hard the tests try: `make test-all` takes hypothesis' profile "all", `make test` does not."""

from typing import Any

from hypothesis import settings

settings.register_profile("all")


def thorough() -> bool:
    """Whether tests that have a long version run it; known once the options of pytest are read."""
    return settings.get_current_profile_name() == "all"


def examples(many: int, **options: Any) -> settings:
    """Settings for as many examples, of which `make test` draws the first fifth."""
    number = many if thorough() else many // 5
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, **options)
