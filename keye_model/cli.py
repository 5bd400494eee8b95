"""keye-vl: generate, inspect, init."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .cache import bytes_per_token
from .config import KeyeConfig
from .weights import (  # fmt: skip
    checkpoint_files,
    empty_model,
    expert_views,
    fused_name,
    names_in,
    published_views,
)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return args.run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"keye-vl: {error}", file=sys.stderr)
        return 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="keye-vl", description="Keye-VL-2.0 on dsa_kernels.")
    commands = parser.add_subparsers(required=True)

    generate = commands.add_parser("generate", help="answer a question about pictures and videos")
    generate.add_argument("question")
    generate.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    generate.add_argument("--image", action="append", default=[], metavar="FILE")
    generate.add_argument("--video", action="append", default=[], metavar="FILE")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--dense", action="store_true", help="attend to every token")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    generate.add_argument("--device", default=best, help=f"cpu, cuda, ... (here: {best})")
    generate.set_defaults(run=run_generate)

    inspect = commands.add_parser("inspect", help="configuration, parameters and files of a checkpoint")  # fmt: skip
    inspect.add_argument("model", metavar="DIR")
    inspect.set_defaults(run=run_inspect)

    init = commands.add_parser("init", help="write a random checkpoint")
    init.add_argument("directory", metavar="DIR")
    init.add_argument("--tiny", action="store_true", required=True, help="2 M parameters, with a tokenizer")  # fmt: skip
    init.set_defaults(run=run_init)
    return parser.parse_args(argv)


def run_generate(args: argparse.Namespace) -> int:
    from .engine import Engine
    from .processor import KeyeProcessor
    from .sampling import SamplingParams
    from .weights import from_pretrained

    processor = KeyeProcessor.from_pretrained(args.model)
    content = [{"type": "image", "image": path} for path in args.image]
    content += [{"type": "video", "video": path} for path in args.video]
    content.append({"type": "text", "text": args.question})
    prompt = processor([{"role": "user", "content": content}])
    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    model = from_pretrained(args.model, device=args.device, dtype=dtype).eval()
    length = len(prompt.input_ids)
    print(f"{length} prompt tokens, {len(prompt.grids)} pictures and frames", file=sys.stderr)
    params = SamplingParams(args.max_new_tokens, args.temperature, top_p=args.top_p, seed=args.seed)
    pages = -(-(length + args.max_new_tokens) // 64)
    engine = Engine(model, pages, tokenizer=processor.tokenizer, dense=args.dense)
    engine.submit(prompt, params)
    for delta in engine.stream():
        print(delta.text, end="", flush=True)
        if delta.finish is not None and delta.finish.startswith("error"):
            raise ValueError(delta.finish)
    print()
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    config, console = KeyeConfig.from_pretrained(args.model), Console()
    model = empty_model(config, "meta", torch.bfloat16)
    table = Table(title=str(args.model), title_justify="left")
    for column, justify in (("part", "left"), ("parameters", "right"), ("what", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, number, what in parts(model, config):
        table.add_row(name, f"{number:,}", what)
    console.print(table)
    size = bytes_per_token(config)
    context = config.max_position_embeddings
    console.print(
        f"cache: {size:,} bytes a token, {size * context / 2**30:.3g} GiB for {context:,}"
    )
    views = published_views(model)
    separate = expert_views(views)
    found = {name for path in checkpoint_files(Path(args.model)) for name in names_in(path)}
    whole = {fused_name(name) for name in found & separate.keys()}
    missing = sorted(views.keys() - found - whole)
    console.print(f"tensors: {len(found):,} in the files, {len(missing):,} missing")
    for name in missing:
        console.print(f"  missing: {name}")
    return 1 if missing else 0


def parts(model: torch.nn.Module, config: KeyeConfig) -> list[tuple[str, int, str]]:
    """(part, parameters, description) of the network."""
    numbers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        numbers[part] = numbers.get(part, 0) + parameter.numel()
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads} heads of {config.head_dim}"
    experts = f"{config.num_experts} of width {config.moe_intermediate_size}"
    what = {
        "embeddings, head": f"{config.vocab_size:,} x {config.hidden_size}",
        "attention": f"{config.num_hidden_layers} layers, {heads}",
        "experts, router": f"{experts}, top-{config.num_experts_per_tok}",
    }
    if (indexer := config.indexer) is not None:
        heads = f"{indexer.indexer_num_heads} heads of {indexer.indexer_head_dim}"
        what["indexer"] = f"{heads}, top-{indexer.topk}"
    if (vision := config.vision) is not None:
        what["ViT"] = f"{vision.num_hidden_layers} layers of {vision.hidden_size}"
        side = vision.spatial_merge_size
        what["projector"] = f"{side} x {side} patches a token"
    rows = [(part, number, what.get(part, "")) for part, number in numbers.items()]
    return [*rows, ("all", sum(numbers.values()), "")]


def part_of(name: str) -> str:
    """The part of the network that a parameter belongs to."""
    beginnings = {"visual.": "ViT", "projector.": "projector", "lm_head.": "embeddings, head", "decoder.embed.": "embeddings, head"}  # fmt: skip
    inside = {".indexer.": "indexer", ".attention.": "attention", ".mlp.": "experts, router"}
    for beginning, part in beginnings.items():
        if name.startswith(beginning):
            return part
    return next((part for infix, part in inside.items() if infix in name), "decoder norms")


def run_init(args: argparse.Namespace) -> int:
    from .tiny import demo_image, demo_video, save_tiny_checkpoint

    directory = Path(args.directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tiny_checkpoint(directory)
    demo_image(directory / "picture.png")
    demo_video(directory / "clip.mp4")
    print(f"{directory}: a random tiny checkpoint, picture.png and clip.mp4")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
