"""Checkpoints: published names and shapes, both ways; what is wrong with one is named."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from keye_model import KeyeConfig, from_pretrained, import_qwen3_moe, save_pretrained
from keye_model.model import KeyeVL
from keye_model.weights import INDEX, published_views


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(a, b):
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def saved(directory, shard_bytes=1 << 40, **changes):
    model = tiny.model(**changes)
    save_pretrained(model, directory, shard_bytes=shard_bytes, progress=False)
    return model


def load(directory, **how):
    return from_pretrained(directory, dtype=torch.float32, progress=False, **how)


@pytest.mark.parametrize("shard_bytes", [1 << 40, 300_000])
@pytest.mark.parametrize("changes", [{}, {"vision": None}, {"indexer": None}, {"tie_word_embeddings": True}])  # fmt: skip
def test_what_is_saved_is_loaded(tmp_path, shard_bytes, changes):
    model = saved(tmp_path, shard_bytes, **changes)
    assert (tmp_path / INDEX).exists() == (shard_bytes < 1 << 40)
    again = load(tmp_path)
    assert_same(model, again)
    assert again.config == KeyeConfig.from_dict(model.config.to_dict())
    if changes == {"tie_word_embeddings": True}:
        assert again.lm_head.weight is again.decoder.embed.weight


def test_names_and_shapes_are_the_published_ones():
    """Every tensor of Keye-VL-2.0-30B-A3B, and the number of parameters that its weights are known to have."""
    with torch.device("meta"):
        model = KeyeVL(KeyeConfig())
    views = {name: list(view.shape) for name, view in published_views(model).items()}
    expected = {
        "model.embed_tokens.weight": [151936, 2048], "lm_head.weight": [151936, 2048], "model.norm.weight": [2048],
        "model.layers.47.input_layernorm.weight": [2048], "model.layers.0.self_attn.q_proj.weight": [4096, 2048],
        "model.layers.0.self_attn.k_proj.weight": [512, 2048], "model.layers.0.self_attn.o_proj.weight": [2048, 4096],
        "model.layers.0.self_attn.q_norm.weight": [128], "model.layers.3.self_attn.sa_indexer.q_proj.weight": [1040, 2048],
        "model.layers.3.self_attn.sa_indexer.k_proj.weight": [64, 2048], "model.layers.3.self_attn.sa_indexer.q_norm.weight": [64],
        "model.layers.3.self_attn.sa_indexer.k_norm.bias": [64], "model.layers.9.mlp.gate.weight": [128, 2048],
        "model.layers.9.mlp.experts.gate_up_proj": [128, 2048, 1536], "model.layers.9.mlp.experts.down_proj": [128, 768, 2048],
        "visual.vision_model.embeddings.patch_embedding.weight": [1152, 3, 14, 14],
        "visual.vision_model.embeddings.position_embedding.weight": [729, 1152],
        "visual.vision_model.encoder.layers.26.self_attn.out_proj.bias": [1152],
        "visual.vision_model.encoder.layers.0.mlp.fc1.weight": [4304, 1152], "visual.vision_model.post_layernorm.bias": [1152],
        "mlp_AR.pre_norm.weight": [4608], "mlp_AR.linear_1.weight": [4608, 4608], "mlp_AR.linear_2.weight": [2048, 4608],
    }  # fmt: skip
    assert {name: views.get(name) for name in expected} == expected
    unused = 32768 * 1152  # packing_position_embedding
    assert sum(p.numel() for p in model.parameters()) + unused == 31_122_082_160
    assert sum(v.numel() for v in published_views(model).values()) + unused == 31_122_082_160


def edit(directory, change):
    """Applies change(tensors) to a checkpoint of one file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def test_experts_may_be_separate(tmp_path):
    def separate(tensors):
        for name in [n for n in tensors if ".experts." in n]:
            fused = tensors.pop(name).transpose(1, 2)  # [E, out, in]
            prefix = name.rsplit(".", 1)[0]
            for e, weight in enumerate(fused):
                if name.endswith("down_proj"):
                    tensors[f"{prefix}.{e}.down_proj.weight"] = weight
                else:
                    gate, up = weight.chunk(2)
                    tensors |= {
                        f"{prefix}.{e}.gate_proj.weight": gate,
                        f"{prefix}.{e}.up_proj.weight": up,
                    }

    model = saved(tmp_path)
    edit(tmp_path, separate)
    assert_same(model, load(tmp_path))
    edit(tmp_path, lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load(tmp_path)


def test_tensors_without_a_use_are_ignored(tmp_path):
    model = saved(tmp_path)
    vision = "visual.vision_model."
    edit(tmp_path, lambda t: t.update({
        f"{vision}embeddings.packing_position_embedding.weight": torch.zeros(5, 144),
        f"{vision}head.probe": torch.zeros(1), f"{vision}head.attention.in_proj_weight": torch.zeros(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3),
    }))  # fmt: skip
    assert_same(model, load(tmp_path))


BROKEN = {
    r"missing: lm_head\.weight": lambda t: t.pop("lm_head.weight"),
    r"surplus: model\.layers\.7\.x": lambda t: t.update({"model.layers.7.x": torch.zeros(1)}),
    r"misshapen: model\.norm\.weight: expected \[128\], got \[5\] in model.safetensors": lambda t: t.update(
        {"model.norm.weight": torch.zeros(5)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_broken_checkpoints_are_described(tmp_path, message):
    saved(tmp_path)
    edit(tmp_path, BROKEN[message])
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_truncated_and_missing_files(tmp_path):
    saved(tmp_path, 300_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=re.escape(f"{files[1]}: truncated")):
        load(tmp_path)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(files[1]))):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path / "nowhere")


def test_a_tensor_that_the_index_promises_is_missed(tmp_path):
    saved(tmp_path, 300_000)
    index = json.loads((tmp_path / INDEX).read_text())
    name, file = next((n, f) for n, f in index["weight_map"].items() if "q_norm" in n)
    tensors = load_file(tmp_path / file)
    tensors.pop(name)
    save_file(tensors, tmp_path / file)
    with pytest.raises(ValueError, match=f"missing: {re.escape(name)}"):
        load(tmp_path)


def test_dtype_and_indexer_import(tmp_path):
    """A plain decoder's checkpoint, to which import_qwen3_moe adds an indexer and a vision tower."""
    plain = saved(tmp_path, vision=None, indexer=None)
    config = tiny.config()
    model = import_qwen3_moe(tmp_path, config, dtype=torch.float32, progress=False)
    ours, theirs = published_views(model), published_views(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    added = ours.keys() - theirs.keys()
    assert any("sa_indexer" in name for name in added) and any("mlp_AR" in name for name in added)
    assert all(ours[name].isfinite().all() for name in added)
    half = from_pretrained(tmp_path, dtype=torch.bfloat16, progress=False)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


PEAK = """
import sys, threading, time, torch
import keye_model.weights

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while not done:
        seen.append(anonymous())
        time.sleep(0.002)

keye_model.weights.empty_model(keye_model.KeyeConfig(), "meta", torch.bfloat16)  # imports torch's meta kernels, 80 MB
before, seen, done = anonymous(), [], False
thread = threading.Thread(target=watch)
thread.start()
model = keye_model.from_pretrained(sys.argv[1], dtype=torch.float32, progress=False)
done = True
thread.join()
print(max(seen) - before)
"""


def test_memory_is_that_of_the_checkpoint(tmp_path):
    """The most memory of its own (not mapped from files) that a fresh process takes while it loads 450 MB."""
    model = saved(tmp_path, 40 << 20, hidden_size=512, moe_intermediate_size=512, num_experts=8, num_hidden_layers=16)  # fmt: skip
    size = sum(p.nbytes for p in model.parameters())
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, cwd=root)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0.9 * size <= int(done.stdout) <= 1.1 * size, (int(done.stdout), size)


def test_config_keeps_what_it_does_not_know(tmp_path):
    published = KeyeConfig().to_dict() | {
        "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "x"},
    }
    published["vision_config"] |= {"tokens_per_second": 2}
    published["sa_config"] |= {"q_chunk_size": 512, "indexer_num_kv_heads": 1}
    published["rope_scaling"] |= {"type": "default"}
    config = KeyeConfig.from_dict(json.loads(json.dumps(published)))
    assert config.to_dict() == published
    assert config.indexer.indexer_num_heads == 16 and config.mrope_section == (16, 24, 24)


@pytest.mark.parametrize("changes, message", [
    ({"num_attention_heads": 30}, "multiple of num_key_value_heads"),
    ({"num_experts_per_tok": 200}, "at most num_experts"),
    ({"rope_scaling": {"mrope_section": [16, 24, 20]}}, "sum of head_dim / 2"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type"),
])  # fmt: skip
def test_configs_that_do_not_fit_together(changes, message):
    with pytest.raises(ValueError, match=message):
        KeyeConfig.from_dict(KeyeConfig().to_dict() | changes)
