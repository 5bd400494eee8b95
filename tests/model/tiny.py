"""A tiny network of the model's form, for the tests of this folder."""

import torch

from keye_model import IndexerConfig, KeyeConfig, KeyeVL, VisionConfig

IMAGE, VIDEO, EOS = 290, 291, 299


def config(**changes):
    sizes = {
        "vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "max_position_embeddings": 4096, "eos_token_id": EOS,
        "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]},
        "image_token_id": IMAGE, "video_token_id": VIDEO, "indexer": IndexerConfig(4, 64, topk=32),
        "vision": VisionConfig(hidden_size=144, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2),
    }  # fmt: skip
    return KeyeConfig(**(sizes | changes))


def model(device="cpu", **changes):
    """Random weights, large enough that logits and selections differ from token to token."""
    network = KeyeVL(config(**changes))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    return network.to(device).eval()
