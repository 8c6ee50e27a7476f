"""Fixtures for every test: one thread, fixed seeds, the shared real data when it lies beside the project."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights, tokenizers and texts; the test is skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at ../shared/data (looked in {SHARED_DATA})")
    return SHARED_DATA
