"""Sizes with their units, and budgets."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from modelyard_server.config import Budget
from modelyard_server.devices.sizes import MAX_SIZE_BYTES, format_size, parse_size

# What a caller without a type checker may pass.
WRONG: Any = object()


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size_bytes"),
        [
            ("0B", 0),
            ("1B", 1),
            ("300MB", 300_000_000),
            ("1kB", 1000),
            ("1KB", 1000),
            ("16MiB", 16 * 2**20),
            ("1.5GiB", 3 * 2**29),
            ("1.5 GiB", 3 * 2**29),
            ("0.1KiB", 102),
            ("0.999999999B", 0),
            ("8191PiB", 8191 * 2**50),
            (f"{MAX_SIZE_BYTES}B", MAX_SIZE_BYTES),
        ],
    )
    def test_sizes_are_read(self, text: str, size_bytes: int) -> None:
        assert parse_size(text) == size_bytes

    @pytest.mark.parametrize(
        ("text", "advice"),
        [
            ("300", "no unit"),
            ("300mb", "write 'MB'"),
            ("1gib", "write 'GiB'"),
            ("1G", "write 'GB'"),
            ("1Gi", "write 'GiB'"),
            ("1EB", "use one of"),
            ("", "no size"),
            ("MB", "no size"),
            ("-1MB", "no size"),
            ("+1MB", "no size"),
            ("1e3MB", "no size"),
            ("1_000MB", "no size"),
            ("1.MB", "no size"),
            (".5MB", "no size"),
            ("1,5MB", "no size"),
            (" 1MB", "no size"),
            ("1  MB", "no size"),
            ("1MB\n", "no size"),
            ("١MB", "no size"),
            ("8192PiB", "more than the largest"),
            (f"{MAX_SIZE_BYTES + 1}B", "more than the largest"),
            ("9" * 10_000 + "B", "no size"),
        ],
    )
    def test_what_is_no_size_is_refused_with_advice(self, text: str, advice: str) -> None:
        with pytest.raises(ValueError, match=advice) as caught:
            parse_size(text)
        assert len(str(caught.value)) < 200

    def test_only_text_is_read(self) -> None:
        with pytest.raises(TypeError):
            parse_size(WRONG)
        with pytest.raises(TypeError):
            Budget.from_str(WRONG)

    @pytest.mark.parametrize(
        ("size_bytes", "rounded", "exact"),
        [
            (0, "0B", "0B"),
            (1023, "1023B", "1023B"),
            (1024, "1KiB", "1KiB"),
            (300_000_000, "286.1MiB", "300MB"),
            (3 * 2**29, "1.5GiB", "1.5GiB"),
            (2**20 - 1, "1023KiB", "1048575B"),
            (MAX_SIZE_BYTES, "8191PiB", "9223372036854775807B"),
        ],
    )
    def test_sizes_are_written(self, size_bytes: int, rounded: str, exact: str) -> None:
        assert format_size(size_bytes) == rounded
        assert format_size(size_bytes, exact=True) == exact

    @pytest.mark.parametrize("size_bytes", [-1, MAX_SIZE_BYTES + 1])
    def test_sizes_out_of_range_are_not_written(self, size_bytes: int) -> None:
        with pytest.raises(ValueError, match="a size is 0 to"):
            format_size(size_bytes)


class TestBudget:
    def test_bytes_are_what_they_are(self) -> None:
        assert Budget.from_str("300MB").resolve(1) == 300_000_000
        assert str(Budget.from_str("300MB")) == "300MB"

    @pytest.mark.parametrize(
        ("text", "total_bytes", "size_bytes"),
        [
            ("50%", 1001, 500),
            ("100%", MAX_SIZE_BYTES, MAX_SIZE_BYTES),
            ("12.5 %", 8, 1),
            ("0.000001%", 10**8, 1),
            ("33%", 0, 0),
        ],
    )
    def test_percentages_are_exact_and_rounded_down(
        self, text: str, total_bytes: int, size_bytes: int
    ) -> None:
        budget = Budget.from_str(text)
        assert budget.resolve(total_bytes) == size_bytes
        assert Budget.from_str(str(budget)) == budget

    def test_a_device_has_no_negative_memory(self) -> None:
        with pytest.raises(ValueError, match="at least 0"):
            Budget.from_str("50%").resolve(-1)

    def test_it_is_bytes_or_a_percentage(self) -> None:
        with pytest.raises(ValueError, match="exactly one"):
            Budget()
        with pytest.raises(ValueError, match="exactly one"):
            Budget(size_bytes=1, percent=Decimal(1))
