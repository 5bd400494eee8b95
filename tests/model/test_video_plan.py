"""Videos: the token budget and the choice of frames, by hand and by property."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from keye_model.video import FrameList, VideoBudget, plan_frames

BUDGET = VideoBudget()


@pytest.mark.parametrize(
    ("num_frames", "fps", "expected_n", "expected_tokens"),
    [
        (300, 30.0, 20, 256),  # 10 s at 2 frames a second
        (10, 1.0, 10, 256),  # the source is slower than 2 a second
        (7, 30.0, 2, 256),  # int(0.47) = 0 frames, at least 2
        (1, 30.0, 1, 256),  # there is no second one
        (30 * 600, 30.0, 1200, 153),  # 184320 / 1200 = 153.6
        (30 * 7200, 30.0, 2880, 64),  # two hours: no more than 184320 / 64
        (100, None, 100, 256),
        (10_000, None, 2880, 64),
    ],
)
def test_number_and_size_of_frames(num_frames, fps, expected_n, expected_tokens):
    indices, (height, width) = plan_frames(num_frames, fps, 5600, 5600, BUDGET)
    assert len(indices) == expected_n
    side = math.isqrt(expected_tokens)  # of a square frame, rounded down
    assert (height, width) == (28 * side, 28 * side)
    assert indices[0] == 0 and (indices[-1] == num_frames - 1 or expected_n == 1)


def test_indices_by_hand():
    # 31 frames at 5 a second are 6.2 s: 12 frames, a step of 30 / 11 = 2.727
    indices, _ = plan_frames(31, 5.0, 100, 100, BUDGET)
    assert indices == [0, 3, 5, 8, 11, 14, 16, 19, 22, 25, 27, 30]


def test_small_frames_rounded_up_past_the_budget_cost_frames():
    # 90 x 160 at 64 tokens a frame: scaled by 1.867 to 168 x 298.7, rounded up to 6 x 11 = 66 tokens.
    indices, size = plan_frames(30 * 7200, 30.0, 90, 160, BUDGET)
    assert size == (168, 308) and len(indices) == 184_320 // 66


@pytest.mark.parametrize(
    ("seconds", "share"),
    [
        (1, 0.125),
        (256, 0.125),
        (257, 0.25),
        (512, 0.25),
        (513, 0.5),
        (1024, 0.5),
        (1025, 1),
        (9e9, 1),
    ],
)
def test_adaptive_budget(seconds, share):
    adaptive = VideoBudget(adaptive=True)
    assert adaptive.tokens_for(seconds, 1) == 184_320 * share
    assert BUDGET.tokens_for(seconds, 1) == adaptive.tokens_for(None, 1) == 184_320
    assert adaptive.tokens_for(seconds, 2) == 92_160  # of one video only


@given(
    st.integers(1, 400_000),
    st.none() | st.floats(0.1, 240),
    st.tuples(st.integers(20, 2000), st.integers(20, 2000)),
    st.integers(1, 8),
    st.booleans(),
)
def test_plan_properties(num_frames, fps, size, num_videos, adaptive):
    budget = VideoBudget(adaptive=adaptive)
    indices, (height, width) = plan_frames(num_frames, fps, *size, budget, num_videos=num_videos)
    total = budget.tokens_for(fps and num_frames / fps, num_videos)
    tokens = height * width // 28**2
    assert len(indices) * tokens <= total
    assert height % 28 == width % 28 == 0
    assert indices[0] >= 0 and indices[-1] <= num_frames - 1
    assert all(a < b for a, b in itertools.pairwise(indices))
    if fps is not None:
        assert len(indices) <= max(2, num_frames / fps * 2)


def test_a_budget_that_holds_no_frame():
    with pytest.raises(ValueError, match="63 tokens hold no frame"):
        plan_frames(10, 1.0, 100, 100, VideoBudget(total_tokens=63))


@pytest.mark.parametrize("fps", [0.0, -1.0, math.nan, math.inf])
def test_absurd_rates(fps):
    with pytest.raises(ValueError, match="fps: expected a positive"):
        VideoBudget(fps=fps)
    with pytest.raises(ValueError, match="fps: expected a positive"):
        FrameList([Image.new("RGB", (8, 8))], fps=fps)
