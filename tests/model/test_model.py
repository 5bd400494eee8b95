"""The network as a module: training, packing, vision chunks, compilation."""

import pytest
import tiny
import torch

from keye_model.attention import Attention
from keye_model.model import in_chunks
from keye_model.rope import grid_table, mrope_table, scaled_section

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def packed(lengths, device="cpu"):
    ids = torch.randint(0, 280, (sum(lengths),), device=device)
    cu = torch.tensor(
        [0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device
    )
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1).to(device)
    return ids, positions, cu, max(lengths)


@pytest.mark.parametrize("device", DEVICES)
def test_packed_equals_alone(device):
    model = tiny.model(device)
    lengths = [100, 20, 1, 64]
    ids, positions, cu, longest = packed(lengths, device)
    hidden = model(ids, positions, cu, longest).hidden
    for part, expected in zip(ids.split(lengths), hidden.split(lengths)):
        alone = model(*(lambda n: (part, torch.arange(n, device=device).expand(3, -1), torch.tensor([0, n], dtype=torch.int32, device=device), n))(len(part))).hidden  # fmt: skip
        torch.testing.assert_close(alone, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_it_trains(device):
    """A few steps on one batch, everything trainable, the indexer by its own loss: both losses fall."""
    model = tiny.model(device)
    ids, positions, cu, longest = packed([90, 60], device)
    ids[3:9] = tiny.IMAGE
    pixels = torch.randn(24, 3, 14, 14, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(8):
        output = model(ids, positions, cu, longest, pixel_values=pixels, grids=[(1, 4, 6)], index_loss=True)  # fmt: skip
        loss = model.loss(output.hidden, ids.roll(-1))
        index_loss = sum(stats.index_loss.mean() for stats in output.stats)
        (loss + index_loss).backward()
        assert all(p.grad is not None for p in model.parameters())
        history.append((loss.item(), index_loss.item()))
        optimizer.step()
        optimizer.zero_grad()
    assert history[-1][0] < 0.7 * history[0][0] and history[-1][1] < history[0][1]


def test_the_indexer_learns_from_its_loss_alone():
    model = tiny.model()
    batch = packed([90])
    output = model(*batch, index_loss=True)
    model.loss(output.hidden, batch[0].roll(-1)).backward(retain_graph=True)
    indexer = [p for n, p in model.named_parameters() if ".indexer." in n]
    others = [
        p for n, p in model.named_parameters() if ".indexer." not in n and "decoder.layers" in n
    ]
    assert all(p.grad is None or not p.grad.any() for p in indexer)
    before = [p.grad.clone() for p in others]
    sum(stats.index_loss.sum() for stats in output.stats).backward()
    assert all(p.grad.any() for p in indexer)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, others))


def test_warm_up_loss_is_over_every_visible_key():
    model = tiny.model()
    batch = packed([90])
    losses = [torch.stack([s.index_loss for s in model(*batch, index_loss=True, dense=d).stats]) for d in (False, True)]  # fmt: skip
    torch.testing.assert_close(losses[0][0, :32], losses[1][0, :32])  # up to k keys: the same set
    assert (losses[0][0, 40:] < losses[1][0, 40:]).float().mean() > 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [1, 20, 40, 1000])
def test_vision_chunks_change_nothing(device, chunk):
    model = tiny.model(device)
    grids = [(1, 4, 6), (3, 2, 8), (1, 2, 2)]
    pixels = torch.randn(24 + 48 + 4, 3, 14, 14, device=device)
    with torch.no_grad():
        whole = model.encode(pixels, grids)
        torch.testing.assert_close(model.encode(pixels, grids, chunk=chunk), whole, rtol=1e-4, atol=1e-4)  # fmt: skip
    assert whole.shape == (76 // 4, 128)


def test_chunks_of_frames():
    frames = [(1, 2, 2)] * 5 + [(1, 10, 10)]
    assert in_chunks(frames, None) == [frames]
    assert [len(part) for part in in_chunks(frames, 8)] == [2, 2, 1, 1]
    assert in_chunks(frames, 1) == [[frame] for frame in frames]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length, dense", [(20, False), (70, False), (70, True)])
def test_a_layer_compiles_without_a_graph_break(device, length, dense):
    model = tiny.model(device)
    layer = model.decoder.layers[0]
    _, positions, cu, longest = packed([length, 12], device)
    step = model.step(positions, cu, cu, longest, dense=dense, index_loss=True)
    x = torch.randn(length + 12, 128, device=device, requires_grad=True)

    def run(layer):
        out, stats = layer(x, step)
        return out, stats.index_loss, *torch.autograd.grad(out.square().sum() + stats.index_loss.sum(), [x, *layer.parameters()])  # fmt: skip

    expected = run(layer)
    torch._dynamo.reset()
    for ours, theirs in zip(run(torch.compile(layer, fullgraph=True)), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_sections_of_mrope():
    """Text has three equal positions and then plain RoPE; a section turns with its axis alone."""
    positions = torch.arange(50).expand(3, -1)
    plain = mrope_table(positions, 128, 1e7, ())
    for interleaved in (False, True):
        table = mrope_table(positions, 128, 1e7, (16, 24, 24), interleaved=interleaved)
        assert all(torch.equal(a, b) for a, b in zip(plain, table))
    only_h = positions.clone()
    only_h[0], only_h[2] = 0, 0
    cos, sin = mrope_table(only_h, 128, 1e7, (16, 24, 24))
    assert torch.equal(cos[:, 16:40], plain[0][:, 16:40]) and (sin[:, :16] == 0).all() and (sin[:, 40:] == 0).all()  # fmt: skip
    assert scaled_section((16, 24, 24), 128, 64) == (8, 12, 12)


def test_grid_table_rotates_rows_and_columns():
    cos, sin = grid_table([(2, 3, 4), (1, 1, 2)], 72, 1e4, torch.device("cpu"))
    assert cos.shape == sin.shape == (26, 36)
    frequencies = 1e4 ** -(torch.arange(18) / 18)
    for patch, (row, column) in {0: (0, 0), 7: (1, 3), 12 + 9: (2, 1), 25: (0, 1)}.items():
        angle = torch.cat([row * frequencies, column * frequencies])
        torch.testing.assert_close(cos[patch], angle.cos())
        torch.testing.assert_close(sin[patch], angle.sin())


def test_selection_is_used_only_past_k():
    model = tiny.model()
    attention: Attention = model.decoder.layers[0].attention
    _, positions, cu, _ = packed([33])
    assert not attention.selects(model.step(positions, cu, cu, 32))
    assert attention.selects(model.step(positions, cu, cu, 33))
    assert not attention.selects(model.step(positions, cu, cu, 33, dense=True))


def test_pixels_without_a_vision_tower():
    model = tiny.model(vision=None)
    with pytest.raises(ValueError, match="no vision tower"):
        model.encode(torch.zeros(4, 3, 14, 14), [(1, 2, 2)])
