"""M-RoPE positions of a prompt: by hand, against the rule token by token, against Qwen2-VL for images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2VLConfig, Qwen2VLModel

from keye_model.rope import mrope_positions
from keye_model.tiny import TOKEN_IDS, tiny_config

IMAGE, VIDEO = TOKEN_IDS["<|image_pad|>"], TOKEN_IDS["<|video_pad|>"]


def slow_positions(input_ids, grid_thw):
    """The rule, token by token."""
    rows = iter([(h // 2, w // 2) for _, h, w in grid_thw])
    positions, largest, i = [], -1, 0
    while i < len(input_ids):
        start = largest + 1
        if input_ids[i] in (IMAGE, VIDEO):
            height, width = next(rows)
            block = [(start, start + r, start + c) for r in range(height) for c in range(width)]
        else:
            block = [(start, start, start)]
        positions += block
        largest = max(largest, *(max(p) for p in block))
        i += len(block)
    return torch.tensor(positions).reshape(-1, 3).T


SEGMENTS = st.lists(
    st.tuples(
        st.integers(0, 5), st.sampled_from([IMAGE, VIDEO]), st.integers(1, 6), st.integers(1, 6)
    ),
    max_size=8,
)


@given(SEGMENTS, st.integers(0, 5))
def test_positions_against_the_slow_loop(segments, tail):
    ids, grid = [], []
    for text, token, height, width in segments:  # text may be empty: images that touch
        ids += [7] * text + [token] * (height * width)
        grid.append([1, 2 * height, 2 * width])
    ids += [7] * tail
    input_ids = torch.tensor(ids, dtype=torch.int64)
    grid_thw = torch.tensor(grid, dtype=torch.int64).reshape(-1, 3)
    positions = mrope_positions(input_ids, grid_thw, tiny_config())
    assert positions.dtype == torch.int64 and torch.equal(positions, slow_positions(ids, grid))


def test_positions_by_hand():
    ids = torch.tensor([7, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 7, 7])
    positions = mrope_positions(ids, torch.tensor([[1, 4, 6]]), tiny_config())
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5
    )
)
def test_positions_of_images_are_qwen2_vls(segments):
    ids, grid = [], []
    for text, height, width in segments:
        ids += [7] * text + [IMAGE] * (height * width)
        grid.append([1, 2 * height, 2 * width])
    input_ids, grid_thw = torch.tensor(ids), torch.tensor(grid)
    expected, _ = qwen2_vl().get_rope_index(
        input_ids[None], (input_ids[None] == IMAGE).int(), image_grid_thw=grid_thw
    )
    positions = mrope_positions(input_ids, grid_thw, tiny_config())
    assert torch.equal(positions, expected[:, 0])


def qwen2_vl():
    config = Qwen2VLConfig(
        text_config={"num_hidden_layers": 0, "vocab_size": 8},
        vision_config={"depth": 0, "spatial_merge_size": 2},
    )
    with torch.device("meta"):
        return Qwen2VLModel(config)


@pytest.mark.parametrize(
    ("ids", "grid", "reason"),
    [
        ([7, IMAGE], [], "1 pad tokens in the prompt, 0 in the grid of 0 rows"),
        ([7], [[1, 2, 2]], "0 pad tokens in the prompt, 1 in the grid of 1 rows"),
        ([IMAGE, 7, IMAGE], [[1, 2, 4]], "do not stand together"),
        ([IMAGE] * 2, [[2, 2, 2]], r"expected rows \[1, h, w\]"),
        ([IMAGE], [[1, 3, 2]], "multiples of 2"),
        ([], [[1, 0, 2]], "multiples of 2"),
    ],
)
def test_positions_refuse(ids, grid, reason):
    ids, grid = torch.tensor(ids, dtype=torch.int64), torch.tensor(grid, dtype=torch.int64)
    with pytest.raises(ValueError, match=reason):
        mrope_positions(ids, grid.reshape(-1, 3), tiny_config())
