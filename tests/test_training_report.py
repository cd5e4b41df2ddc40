"""What is told of a training run that has ended."""

from __future__ import annotations

import pytest

from liftlm.training_report import TrainingReport


@pytest.mark.parametrize(
    ("losses", "told"), [((), ""), ((2.884,), "2.88"), ((2.884, 1.5), "2.88 → 1.50"), ((3.0, 2.0, 1.0), "3.00 → 1.00")]
)
def test_one_epoch_is_one_number(losses: tuple[float, ...], told: str) -> None:
    report = TrainingReport(
        steps=1, tokens=1, seconds=1.0, epoch_losses=losses, tokens_per_second=1.0, peak_memory_bytes=1, processes=1,
        resumed_from=None,
    )  # fmt: skip
    assert report.losses == told
