"""Segments cover a document, overlap exactly, are as few as can be, and none is a sliver."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liftlm.config import load_config
from liftlm.segments import Segment, split_into_segments

CUTS = st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1)))
LENGTHS = st.integers(0, 300)


def tokens_of(count: int) -> list[int]:
    return [7 * position % 1000 + position for position in range(count)]


def fewest(count: int, size: int, overlap: int) -> int:
    """By trying: how many full segments it takes to reach the end."""
    pieces, reached = 0, 0
    while reached < count:
        reached = size if pieces == 0 else reached - overlap + size
        pieces += 1
    return pieces


@settings(deadline=None)
@given(LENGTHS, CUTS)
def test_segments_are_runs_of_the_document_in_order(count: int, cut: tuple[int, int]) -> None:
    tokens = tokens_of(count)
    segments = split_into_segments(tokens, *cut)
    assert [segment.index for segment in segments] == list(range(len(segments)))
    for segment in segments:
        assert list(segment.tokens) == tokens[segment.start : segment.end]
        assert 0 < len(segment.tokens) <= cut[0]


@settings(deadline=None)
@given(LENGTHS, CUTS)
def test_every_token_is_covered(count: int, cut: tuple[int, int]) -> None:
    segments = split_into_segments(tokens_of(count), *cut)
    covered = {position for segment in segments for position in range(segment.start, segment.end)}
    assert covered == set(range(count))


@settings(deadline=None)
@given(LENGTHS, CUTS)
def test_neighbours_share_exactly_the_overlap(count: int, cut: tuple[int, int]) -> None:
    segments = split_into_segments(tokens_of(count), *cut)
    for left, right in itertools.pairwise(segments):
        shared = set(range(left.start, left.end)) & set(range(right.start, right.end))
        assert len(shared) == cut[1]
        assert left.start < right.start and left.end < right.end


@settings(deadline=None)
@given(LENGTHS, CUTS)
def test_lengths_are_even(count: int, cut: tuple[int, int]) -> None:
    lengths = [len(segment.tokens) for segment in split_into_segments(tokens_of(count), *cut)]
    assert not lengths or max(lengths) - min(lengths) <= 1


@settings(deadline=None)
@given(LENGTHS, CUTS)
def test_the_number_is_minimal(count: int, cut: tuple[int, int]) -> None:
    assert len(split_into_segments(tokens_of(count), *cut)) == fewest(count, *cut)


@settings(deadline=None)
@given(LENGTHS, CUTS)
def test_none_is_a_sliver(count: int, cut: tuple[int, int]) -> None:
    """Each brings at least half of what a full segment brings.

    Why: k > 1 segments share out f = n - overlap tokens where k is the least number with f <= k * step, so
    f >= (k - 1) * step + 1, and the smallest share is floor(f / k) >= floor((step + 1) / 2), met at k = 2.
    """
    step = cut[0] - cut[1]
    segments = split_into_segments(tokens_of(count), *cut)
    for left, right in itertools.pairwise(segments):
        assert 2 * (right.end - left.end) >= step
        assert 2 * (right.start - left.start) >= step


@settings(deadline=None)
@given(CUTS)
def test_the_bound_is_tight(cut: tuple[int, int]) -> None:
    size, overlap = cut
    left, right = split_into_segments(tokens_of(size + 1), size, overlap)
    assert min(right.end - left.end, right.start - left.start) == (size - overlap + 1) // 2


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16])
def test_a_document_that_fits_is_one_segment_and_an_empty_one_none(count: int) -> None:
    tokens = tokens_of(count)
    expected = [Segment(0, 0, tuple(tokens))] if count else []
    assert split_into_segments(tokens, 16, 6) == expected


def test_a_long_document_with_the_papers_numbers() -> None:
    count = 1_000_003
    segments = split_into_segments(range(count))
    assert len(segments) == fewest(count, 2048, 768) == 781
    assert segments[0].start == 0 and segments[-1].end == count
    assert all(left.end - right.start == 768 for left, right in itertools.pairwise(segments))
    assert {len(segment.tokens) for segment in segments} == {2047, 2048}


def test_the_authors_stride() -> None:
    """Segments that start every 768 tokens: each token is in up to three of them (2048 / 768 = 2.67 on average)."""
    settings = load_config(None, ["segments.stride_tokens=768"]).segments
    count = 2048 + 20 * 768  # a length at which their cut comes out even, so ours must be the same
    segments = split_into_segments(range(count), settings.segment_tokens, settings.overlap_tokens)
    assert [segment.start for segment in segments] == list(range(0, 21 * 768, 768))
    assert {len(segment.tokens) for segment in segments} == {2048}
    for extra in (1, 300, 767):
        uneven = split_into_segments(range(count + extra), settings.segment_tokens, settings.overlap_tokens)
        assert len(uneven) == 22
        assert all(384 <= right.start - left.start <= 768 for left, right in itertools.pairwise(uneven))


@pytest.mark.parametrize(("size", "overlap"), [(16, 16), (16, 17), (16, -1), (0, 0), (-3, 0), (0, -1)])
def test_impossible_cuts_are_refused(size: int, overlap: int) -> None:
    for count in (0, 5, 50):
        with pytest.raises(ValueError, match="overlap_tokens < segment_tokens"):
            split_into_segments(tokens_of(count), size, overlap)
