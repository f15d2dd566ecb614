from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.benchmark_asset import save_model, write_asset


@pytest.fixture(scope="session")
def benchmark_cache(tmp_path_factory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    write_asset(cache)
    return cache


@pytest.fixture
def benchmarks(benchmark_cache, monkeypatch) -> Path:
    """The made-up asset `benchmarks` in place of the real one."""
    monkeypatch.setenv("TRIALIST_CACHE", str(benchmark_cache))
    return benchmark_cache


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), context=2048)


@pytest.fixture(scope="session")
def scored_model(model_folder):
    """(model, tokenizer)"""
    from trialist.data.tokenizers import load_tokenizer
    from trialist.models.loading import load_model

    return load_model(str(model_folder)), load_tokenizer(str(model_folder))
