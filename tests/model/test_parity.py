"""Equal to code that no one here wrote: Hugging Face's Qwen3-MoE, SigLIP and Qwen2-VL, with random tiny weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

from keye_model import weights
from keye_model.config import IndexerConfig, KeyeConfig, VisionConfig
from keye_model.model import KeyeVL
from keye_model.moe import MoE
from keye_model.rope import mrope_table
from keye_model.vision import VisionTower

transformers = pytest.importorskip("transformers")
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}  # float32, sums in another order


def qwen3_moe(**changes):
    sizes = {
        "vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "norm_topk_prob": True, "rope_theta": 1e6, "attn_implementation": "eager",
        "tie_word_embeddings": False, "max_position_embeddings": 4096,
    }  # fmt: skip
    config = transformers.Qwen3MoeConfig(**(sizes | changes))
    model = transformers.Qwen3MoeForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (parameter.dim() == 1))
    return model


def imported(model, directory, **parts):
    """Our network with the weights of a Hugging Face model, by way of its checkpoint."""
    model.save_pretrained(directory)
    config = KeyeConfig.from_pretrained(directory)
    config.indexer, config.vision = parts.get("indexer"), parts.get("vision")
    return weights.import_qwen3_moe(directory, config, dtype=torch.float32, progress=False)


@pytest.mark.parametrize("normalize", [True, False])
def test_decoder_equals_qwen3_moe(tmp_path, normalize):
    """Logits and gradients of two packed sequences, against one sequence at a time."""
    theirs = qwen3_moe(norm_topk_prob=normalize)
    ours = imported(theirs, tmp_path)
    lengths = [37, 20]
    ids = torch.randint(0, 300, (sum(lengths),))
    cu_seqlens = torch.tensor([0, 37, 57], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
    logits = ours.head(ours(ids, positions, cu_seqlens, max(lengths)).hidden)
    expected = torch.cat([theirs(part[None]).logits[0] for part in ids.split(lengths)])
    torch.testing.assert_close(logits, expected, **TOLERANCE)

    direction = torch.randn_like(logits)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    views = weights.published_views(ours)
    gradients = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter, source in zip(gradients.parameters(), ours.parameters()):
            parameter.copy_(source.grad)
    grad_views = weights.published_views(gradients)
    of_theirs = copy.deepcopy(theirs)
    with torch.no_grad():
        for parameter, source in zip(of_theirs.parameters(), theirs.parameters()):
            parameter.copy_(source.grad)
    of_theirs.save_pretrained(tmp_path / "gradients")
    expected_views = imported(of_theirs, tmp_path / "gradients")
    for name, want in weights.published_views(expected_views).items():
        torch.testing.assert_close(
            grad_views[name], want, rtol=1e-3, atol=1e-4 * want.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
        )  # fmt: skip
    assert set(views) == set(weights.published_views(expected_views))


def test_an_indexer_changes_nothing_in_sequences_no_longer_than_k(tmp_path):
    theirs = qwen3_moe()
    ours = imported(theirs, tmp_path, indexer=IndexerConfig(4, 64, topk=40))
    ids = torch.randint(0, 300, (40,))
    cu_seqlens, positions = torch.tensor([0, 40], dtype=torch.int32), torch.arange(40).expand(3, -1)
    hidden = ours(ids, positions, cu_seqlens, 40).hidden
    torch.testing.assert_close(ours.head(hidden), theirs(ids[None]).logits[0], **TOLERANCE)
    longer = torch.cat([ids, ids])
    cu_seqlens, positions = torch.tensor([0, 80], dtype=torch.int32), torch.arange(80).expand(3, -1)
    sparse = ours.head(ours(longer, positions, cu_seqlens, 80).hidden)
    dense = ours.head(ours(longer, positions, cu_seqlens, 80, dense=True).hidden)
    torch.testing.assert_close(dense, theirs(longer[None]).logits[0], **TOLERANCE)
    torch.testing.assert_close(sparse[:40], dense[:40], **TOLERANCE)
    assert (sparse[40:] - dense[40:]).abs().max() > 1e-2


def test_moe_block_equals_qwen3_moe_block(tmp_path):
    theirs = qwen3_moe()
    ours = imported(theirs, tmp_path)
    x = torch.randn(50, 128)
    block: MoE = ours.decoder.layers[1].mlp
    expected = theirs.model.layers[1].mlp(x[None])
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(block(x)[0], expected.view(50, 128), **TOLERANCE)


def siglip(**changes):
    sizes = {
        "hidden_size": 144, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 384, "patch_size": 14, "vision_use_head": False, "attn_implementation": "eager",
    }  # fmt: skip
    config = transformers.SiglipVisionConfig(**(sizes | changes))
    model = transformers.SiglipVisionModel(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (parameter.dim() == 1))
    return model


def tower(theirs, directory):
    """Our ViT with the weights of a Hugging Face SigLIP, by way of its checkpoint."""
    theirs.save_pretrained(directory / "siglip")
    language = qwen3_moe()
    language.save_pretrained(directory / "qwen")
    config = KeyeConfig.from_pretrained(directory / "qwen")
    config.vision = VisionConfig(hidden_size=144, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    model = weights.import_qwen3_moe(
        directory / "qwen", config, siglip=directory / "siglip", dtype=torch.float32, progress=False
    )
    return model.visual


def patches_of(image, size=14):
    """[3, H, W] to [N, 3, 14, 14] in raster order."""
    rows = image.unfold(1, size, size).unfold(2, size, size)  # [3, h, w, 14, 14]
    return rows.permute(1, 2, 0, 3, 4).flatten(0, 1)


def test_vision_tower_equals_siglip(tmp_path):
    """Two images of 384 x 384 (27 x 27 patches) packed, without 2D RoPE, which SigLIP has not."""
    theirs = siglip()
    ours: VisionTower = tower(theirs, tmp_path)
    ours.rotate = False
    images = torch.randn(2, 3, 384, 384)
    expected = theirs(images).last_hidden_state
    patches = torch.cat([patches_of(image[:, : 27 * 14, : 27 * 14]) for image in images])
    actual = ours(patches, [(1, 27, 27), (1, 27, 27)])
    torch.testing.assert_close(actual, expected.flatten(0, 1), **TOLERANCE)
    ours.rotate = True
    assert (ours(patches, [(1, 27, 27), (1, 27, 27)]) - actual).abs().max() > 1e-2


@pytest.mark.parametrize("rows, columns", [(27, 27), (10, 44), (60, 32), (1, 2)])
def test_positions_equal_interpolate_pos_encoding(tmp_path, rows, columns):
    """Theirs interpolates bicubically: the call is followed, with the mode that the published model uses."""
    theirs = siglip(num_hidden_layers=1)
    embeddings = (theirs.vision_model if hasattr(theirs, "vision_model") else theirs).embeddings
    ours = VisionTower(VisionConfig(hidden_size=144, num_attention_heads=2, num_hidden_layers=0))
    ours.positions.data.copy_(embeddings.position_embedding.weight)
    original = F.interpolate

    def bilinear(*args, mode, **kwargs):
        return original(*args, mode="bilinear", **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "interpolate", bilinear)
        expected = embeddings.interpolate_pos_encoding(torch.zeros(1, rows * columns, 144), rows * 14, columns * 14)  # fmt: skip
    torch.testing.assert_close(ours.interpolated_positions(rows, columns), expected[0], rtol=1e-5, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("name, interleaved", [("qwen2_vl", False), ("qwen3_vl", True)])
def test_mrope_equals_qwen_vl(name, interleaved):
    """cos and sin: Qwen2-VL's sections follow each other, Qwen3-VL's are interleaved."""
    package = getattr(transformers.models, name)
    prefix = "Qwen2VL" if name == "qwen2_vl" else "Qwen3VL"
    configuration = getattr(package, f"configuration_{name}")
    positions = torch.randint(0, 500, (3, 30))
    section, dim, theta = [16, 24, 24], 128, 1e7
    rope = {
        "rope_type": "default",
        "rope_theta": theta,
        "mrope_section": section,
        "mrope_interleaved": interleaved,
    }
    text = getattr(configuration, f"{prefix}TextConfig")(
        head_dim=dim, hidden_size=2048, num_attention_heads=16, rope_parameters=rope
    )
    modeling = getattr(package, f"modeling_{name}")
    rotary = (
        getattr(modeling, f"{prefix}TextRotaryEmbedding", None) or modeling.Qwen2VLRotaryEmbedding
    )
    expected = rotary(text)(torch.zeros(1, 30, 1), positions[:, None])
    actual = mrope_table(positions, dim, theta, tuple(section), interleaved=interleaved)
    for ours, theirs in zip(actual, expected):
        torch.testing.assert_close(
            torch.cat([ours, ours], -1), theirs.view(30, dim), rtol=1e-5, atol=2e-5
        )


def test_a_perturbed_weight_is_noticed(tmp_path):
    theirs = qwen3_moe()
    ours: KeyeVL = imported(theirs, tmp_path)
    ids, cu = torch.randint(0, 300, (20,)), torch.tensor([0, 20], dtype=torch.int32)
    with torch.no_grad():
        ours.decoder.layers[0].attention.k_norm[3] += 0.2
        logits = ours.head(ours(ids, torch.arange(20).expand(3, -1), cu, 20).hidden)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits, theirs(ids[None]).logits[0], **TOLERANCE)
