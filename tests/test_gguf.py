"""A language model as a GGUF file computes in llama.cpp what it computes in PyTorch, and reads text the same way."""

import json
import os
import shutil
import signal
from pathlib import Path

import gguf
import pytest
import torch
from conftest import SPLITS, bytes_tokenizer, letters_tokenizer, pieces_tokenizer, save_decoder, tiny_decoder
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import AutoTokenizer

from compression.checkpoint import load_language_model
from compression.export import gguf as export
from compression.export.gguf import PRECISIONS, check_exportable, check_gguf, write_gguf
from compression.export.llama_cpp import LlamaCpp
from compression.llm.perplexity import perplexity
from compression.runtime import UserError
from compression.sources import LLM_FOLDER
from compression.structures import CHANNELS, GROUPS
from compression.surgery import shrink_decoder

# Sizes that llama.cpp's blocks of 32 fit into; rows of embeddings that the tokenizer has no tokens for.
SIZES = dict(vocab_size=340, hidden_size=64, num_attention_heads=8, intermediate_size=64, max_position_embeddings=128)
# The first layer's attention is gone, and the third's, and the second's MLP.
MIXED = {
    GROUPS: [torch.tensor(row).bool() for row in ([0, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1])],
    CHANNELS: [torch.arange(64) < 32, torch.arange(64) < 0, torch.arange(64) % 2 == 0, torch.arange(64) < 64],
}
ALIKE = {GROUPS: [torch.tensor([1, 0, 1, 0]).bool()] * 4, CHANNELS: [torch.arange(64) < 32] * 4}
KEPT = {"dense": None, "alike": ALIKE, "mixed": MIXED}
SCALED = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
ROTARY = {
    "llama3": dict(rope_type="llama3", rope_theta=500.0, factor=8.0, **SCALED),
    "linear": dict(rope_type="linear", rope_theta=1000.0, factor=4.0),
    "yarn": dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=32),
}
PLAIN = dict(attention_bias=False)
# Family, fields, what is left of it -> architecture.
MODELS = [
    ("llama", PLAIN, "dense", "llama"),
    ("llama", PLAIN, "alike", "llama"),
    ("llama", PLAIN, "mixed", "deci"),
    ("llama", dict(mlp_bias=True, tie_word_embeddings=False), "dense", "llama"),
    ("llama", dict(mlp_bias=True, tie_word_embeddings=False), "mixed", "deci"),
    ("llama", dict(head_dim=16) | PLAIN, "mixed", "deci"),
    ("mistral", {}, "dense", "llama"),
    ("mistral", {}, "mixed", "deci"),
    ("qwen2", {}, "dense", "qwen2"),
    ("qwen2", {}, "alike", "deci"),
    ("qwen2", dict(tie_word_embeddings=True), "mixed", "deci"),
    ("qwen3", dict(head_dim=16), "dense", "qwen3"),
    ("qwen3", dict(head_dim=16), "alike", "qwen3"),
    ("llama", dict(rope_parameters=ROTARY["llama3"]) | PLAIN, "dense", "llama"),
    ("llama", dict(rope_parameters=ROTARY["llama3"]) | PLAIN, "mixed", "deci"),
    ("llama", dict(rope_parameters=ROTARY["linear"]) | PLAIN, "mixed", "deci"),
    ("llama", dict(rope_parameters=ROTARY["yarn"]) | PLAIN, "dense", "llama"),
    ("qwen2", dict(rope_parameters=ROTARY["yarn"]), "dense", "qwen2"),
    ("qwen2", dict(rope_parameters=ROTARY["yarn"] | dict(attention_factor=1.5)), "dense", "qwen2"),
]


@pytest.fixture(scope="module")
def llama():
    with LlamaCpp(1) as running:
        yield running


def small_model(family="llama", kept="dense", **fields):
    model = tiny_decoder(family, **SIZES | fields)
    return model if KEPT[kept] is None else shrink_decoder(model, KEPT[kept])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A model with layers that differ, for tests that only read it."""
    folder = tmp_path_factory.mktemp("mixed") / "model"
    return save_decoder(folder, small_model(kept="mixed", head_dim=32), tokenizer=bytes_tokenizer())


@pytest.mark.parametrize("family, fields, kept, architecture", MODELS)
def test_logits_in_llama_cpp_are_the_models(family, fields, kept, architecture, llama, tmp_path):
    model = small_model(family, kept, **fields)
    folder, target = save_decoder(tmp_path / "model", model, tokenizer=bytes_tokenizer()), tmp_path / "model.gguf"
    metrics = write_gguf(check_exportable(folder), target, "f32")
    assert (metrics["architecture"], metrics["bytes"]) == (architecture, target.stat().st_size)
    ids = torch.randint(SIZES["vocab_size"], (100,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0]
    found = torch.from_numpy(llama.logits(target, ids.tolist()))
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_stores_the_weights_but_for_rounding(precision, tmp_path, mixed):
    target = tmp_path / "model.gguf"
    metrics = write_gguf(check_exportable(mixed), target, precision)
    found = check_gguf(check_exportable(mixed), target, precision)
    assert metrics["in_f16_instead"] == []
    assert found["engine"] == "llama.cpp"
    assert (found["weight_difference"] == 0) == (precision == "f32")
    assert found["relative_difference_same_weights"] < PRECISIONS[precision].tolerance
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
    assert kinds["blk.0.ffn_up.weight"] == precision.upper()
    assert kinds["blk.0.ffn_norm.weight"] == kinds["blk.3.attn_q.bias"] == "F32"
    # Tied: they are the head too.
    assert kinds["token_embd.weight"] == ("Q8_0" if precision.startswith("q") else precision.upper())


def test_rows_that_blocks_do_not_fit_into_are_named_and_stored_in_f16(tmp_path):
    model = small_model("mistral", intermediate_size=40)
    folder, target = save_decoder(tmp_path / "model", model, tokenizer=bytes_tokenizer()), tmp_path / "model.gguf"
    metrics = write_gguf(check_exportable(folder), target, "q4_0")
    assert metrics["in_f16_instead"] == [f"blk.{index}.ffn_down.weight" for index in range(4)]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
    assert [kinds[name] for name in ("token_embd.weight", "output.weight")] == ["Q4_0", "Q8_0"]
    assert check_gguf(check_exportable(folder), target, "q4_0")["engine"] == "llama.cpp"


def test_context_is_no_longer_than_the_window_that_layers_attend_to(llama, tmp_path):
    model = small_model("mistral", sliding_window=16)
    folder, target = save_decoder(tmp_path / "model", model, tokenizer=bytes_tokenizer()), tmp_path / "model.gguf"
    assert write_gguf(check_exportable(folder), target, "f32")["context_length"] == 16
    assert check_gguf(check_exportable(folder), target, "f32")["logit_difference"] < 1e-3


def test_perplexity_in_llama_cpp_is_the_models(llama, mixed, tmp_path):
    target = tmp_path / "model.gguf"
    write_gguf(check_exportable(mixed), target, "f32")
    model, _ = load_language_model(mixed)
    windows = torch.randint(SIZES["vocab_size"], (2, 60), generator=torch.Generator().manual_seed(2))
    assert llama.perplexity(target, windows) == pytest.approx(perplexity(model, windows), rel=1e-3)
    assert all(speed > 0 for speed in llama.speed(target, 16, 4))


# Tokenizers.

TEXTS = [
    *export.TEXTS,
    "  leading and trailing spaces   ",
    "\n\nlines\n \n  and\r\n tabs\t\t.",
    "1 12 123 1234 12345 3.14 1,000",
    "I'LL we'Re it's DON'T 'tis",
    "ümlaut ñ 漢字かな 🙂👩‍👩‍👧 Ελλάδα ١٢٣",
    "",
]
TOKENIZERS = {name: (bytes_tokenizer, (splits,), name) for name, splits in SPLITS.items()}
TOKENIZERS |= {f"pieces, {prefix}": (pieces_tokenizer, (prefix,), "default") for prefix in ("always", "never")}
TOKENIZERS |= {f"pieces, {prefix}": (pieces_tokenizer, (prefix,), "default") for prefix in ("first", "normalizer")}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_is_split_in_llama_cpp_as_by_the_tokenizer(name, llama, tmp_path):
    make, arguments, pre = TOKENIZERS[name]
    tokenizer = make(*arguments, chat_template="{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    model = small_model(vocab_size=600, num_hidden_layers=1)
    folder, target = save_decoder(tmp_path / "model", model, tokenizer=tokenizer), tmp_path / "model.gguf"
    write_gguf(check_exportable(folder), target, "f16")
    # To a text that begins with a space llama.cpp adds another, the tokenizers of these two names do not.
    texts = [text.lstrip(" ") if name in ("pieces, always", "pieces, first") else text for text in TEXTS]
    for text in texts:
        assert llama.tokenize(target, text) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert llama.tokenize(target, text, add_special=True) == tokenizer(text)["input_ids"], text
    turn = "<s>a question</s><s>an answer</s>"
    if name != "pieces, first":  # llama.cpp puts the space behind every special token
        assert (
            llama.tokenize(target, turn, parse_special=True) == tokenizer(turn, add_special_tokens=False)["input_ids"]
        )
    assert llama.chat_template(target) == tokenizer.chat_template
    fields = gguf.GGUFReader(target).fields
    found = {key: fields[f"tokenizer.ggml.{key}"].contents() for key in ("pre", "bos_token_id", "eos_token_id")}
    assert found == {"pre": pre, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    assert len(fields["tokenizer.ggml.tokens"].data) == 600


@pytest.mark.skipif(not (LLM_FOLDER / "tokenizer.json").is_file(), reason="no language model was fetched")
def test_the_fetched_models_text_is_split_in_llama_cpp_as_by_its_tokenizer(llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(LLM_FOLDER)
    model = small_model(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1)
    folder, target = save_decoder(tmp_path / "model", model, tokenizer=tokenizer), tmp_path / "model.gguf"
    write_gguf(check_exportable(folder), target, "f16")
    for text in TEXTS:
        assert llama.tokenize(target, text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_other_ways_to_split_text_are_named_by_the_user(tmp_path):
    lines = Split(Regex(r"\n"), "isolated")
    odd = bytes_tokenizer([lines, ByteLevel(add_prefix_space=False, use_regex=False)])
    folder = save_decoder(tmp_path / "model", small_model(num_hidden_layers=1), tokenizer=odd)
    with pytest.raises(UserError, match="splits text in a way that is not one of gpt-2, .*: --tokenizer_pre NAME"):
        check_exportable(folder)
    target = tmp_path / "model.gguf"
    write_gguf(check_exportable(folder, "gpt-2"), target, "f16")
    with pytest.raises(UserError, match="llama.cpp splits .* into other tokens than the tokenizer does"):
        check_gguf(check_exportable(folder, "gpt-2"), target, "f16")
    write_gguf(check_exportable(folder, "nonsense"), target, "f16")
    with pytest.raises(UserError, match="llama.cpp cannot run it .*unknown pre-tokenizer type: 'nonsense'"):
        check_gguf(check_exportable(folder, "nonsense"), target, "f16")


# What is refused.


def test_values_in_another_order_are_not_let_through(mixed, tmp_path, monkeypatch):
    target = tmp_path / "model.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(export, "to_pairs", lambda rows, heads: rows)
        write_gguf(check_exportable(mixed), target, "q8_0")
    with pytest.raises(UserError, match="q_proj.weight was written with other values"):
        check_gguf(check_exportable(mixed), target, "q8_0")


@pytest.mark.parametrize("precision", ["f32", "bf16", "q4_0"])
def test_a_file_that_computes_otherwise_is_not_let_through(precision, mixed, tmp_path, monkeypatch):
    # Consistent with itself: only llama.cpp can tell.
    for name in ("to_pairs", "to_halves"):
        monkeypatch.setattr(export, name, lambda rows, heads: rows)
    target = tmp_path / "model.gguf"
    write_gguf(check_exportable(mixed), target, precision)
    with pytest.raises(UserError, match=f"llama.cpp's logits differ .* with --precision {precision}"):
        check_gguf(check_exportable(mixed), target, precision)


def test_without_llama_cpp_the_values_are_compared(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "is_installed", lambda: False)
    target = tmp_path / "model.gguf"
    write_gguf(check_exportable(mixed), target, "q8_0")
    found = check_gguf(check_exportable(mixed), target, "q8_0")
    assert found.keys() == {"engine", "weight_difference"}
    assert (found["engine"], 0 < found["weight_difference"] < 0.01) == ("none", True)


def quantized(folder: Path) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {}}))
    return folder


def adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    return folder


REFUSED = {
    "norms": (
        lambda: small_model("qwen3", "mixed", head_dim=16),
        "which llama.cpp has no architecture for; .*--uniform",
    ),
    "biases": (lambda: small_model("qwen3", head_dim=16, attention_bias=True), "its projections have biases"),
    "activation": (lambda: small_model(hidden_act="gelu"), "its activation is gelu"),
    "rotary": (
        lambda: small_model(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
        "no rotary embeddings of type 'dynamic' for llama; allowed are default, linear, yarn, llama3",
    ),
    "factors": (
        lambda: small_model("qwen2", rope_parameters=ROTARY["llama3"]),
        "no rotary embeddings of type 'llama3' for qwen2; allowed are default, linear, yarn$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_llama_cpp_does_not_have_are_refused(name, tmp_path):
    make, message = REFUSED[name]
    folder = save_decoder(tmp_path / "model", make(), tokenizer=bytes_tokenizer())
    with pytest.raises(UserError, match=message):
        check_exportable(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (quantized, "is quantized already; name the model it was made from"),
        (adapter, "is a LoRA adapter; merge it first: python merge_and_save_lora.py"),
        (lambda folder: folder / "nothing", "no checkpoint there"),
    ],
)
def test_folders_that_hold_no_plain_language_model_are_refused(change, message, mixed, tmp_path):
    folder = change(Path(shutil.copytree(mixed, tmp_path / "model")))
    with pytest.raises(UserError, match=message):
        check_exportable(folder)


def test_other_tokenizers_are_refused(tmp_path):
    folder = save_decoder(tmp_path / "model", small_model(num_hidden_layers=1), tokenizer=letters_tokenizer())
    with pytest.raises(UserError, match=r"its tokenizer \(WordLevel\) cannot be written to GGUF"):
        check_exportable(folder)


def test_values_beyond_float16_are_refused(tmp_path):
    model = small_model(num_hidden_layers=1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    folder = save_decoder(tmp_path / "model", model, tokenizer=bytes_tokenizer())
    with pytest.raises(UserError, match="up_proj.weight has values beyond float16's range; use --precision bf16"):
        write_gguf(check_exportable(folder), tmp_path / "model.gguf", "f16")


def test_what_llama_cpp_says_is_one_line(tmp_path):
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with LlamaCpp(1) as llama:
        with pytest.raises(UserError, match=r"model.gguf: llama.cpp cannot run it \(.*it does not load\)"):
            llama.chat_template(broken)
        os.kill(llama.process.pid, signal.SIGABRT)
        with pytest.raises(UserError, match="model.gguf: llama.cpp cannot run it .it ended with status -6"):
            llama.chat_template(broken)
