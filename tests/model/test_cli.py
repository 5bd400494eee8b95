"""The command line and the text stream, on a tiny checkpoint as `keye-vl init --tiny` writes it."""

import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye_model import Engine, SamplingParams, cli, from_pretrained
from keye_model.processor import KeyeProcessor
from keye_model.text import TextStream
from keye_model.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    assert cli.main(["init", "--tiny", str(directory)]) == 0
    return directory


def test_generate(checkpoint, capsys):
    command = ["generate", "--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "12"]
    media = ["--image", str(checkpoint / "picture.png"), "--video", str(checkpoint / "clip.mp4")]
    assert cli.main([*command, *media, "What moves?"]) == 0
    first = capsys.readouterr()
    assert "9 pictures and frames" in first.err  # 32 frames at 8 a second: 8 of them
    assert cli.main([*command, *media, "What moves?"]) == 0
    assert capsys.readouterr().out == first.out != ""
    assert cli.main([*command, "--image", str(checkpoint / "config.json"), "What?"]) == 1
    assert "images[0]" in capsys.readouterr().err


def test_inspect(checkpoint, capsys, tmp_path):
    assert cli.main(["inspect", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    model = from_pretrained(checkpoint, progress=False)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in out and "0 missing" in out
    assert "1,160 bytes a token" in out  # 2 layers x (2 x 2 heads x 64 x 2 bytes + 64 + 4)
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def test_stop_strings_and_streaming(checkpoint):
    processor = KeyeProcessor.from_pretrained(checkpoint)
    model = from_pretrained(checkpoint, dtype=torch.float32, progress=False).eval()
    prompt = processor("Tell me.")
    params = {"max_new_tokens": 40, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    engine = Engine(model, 4, tokenizer=processor.tokenizer)
    ((free,),) = engine.generate([prompt], SamplingParams(**params))
    assert free.text == processor.tokenizer.decode(free.tokens, skip_special_tokens=True).rstrip("\ufffd") or free.text  # fmt: skip
    stop = free.text[8:10]
    engine.submit(prompt, SamplingParams(**params, stop=(stop,)))
    deltas = list(engine.stream())
    text = "".join(delta.text for delta in deltas)
    assert text == free.text[: free.text.index(stop)] and deltas[-1].finish == "stop"


TOKENIZER = tiny_tokenizer(tempfile.mkdtemp())


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_streams_are_cut_at_the_first_stop_string(text, stop):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    stream = TextStream(TOKENIZER, tuple(stop))
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        assert not any(s in "".join(pieces) for s in stop)
        if stream.stopped:
            break
    pieces.append(stream.flush())
    ends = [whole.index(s) for s in stop if s in whole]
    if not ends:
        assert "".join(pieces) == whole and not stream.stopped
    else:
        assert stream.stopped and whole.startswith("".join(pieces))
        assert len("".join(pieces)) <= max(ends)
