"""Tiny random models and a tiny slice of real-looking data that the tests share."""

import importlib.util
import json
import os
import signal
import sys
from typing import Any

# Two test processes on two cores must not fight over them, and bitwise repeatability needs a fixed thread count.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Split, Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from compression import structures
from compression.checkpoint import save_checkpoint
from compression.least_squares import RIDGE
from compression.llm.repair import repairing
from compression.llm.repair_text import RepairText
from compression.outputs import WRITTEN_FILE
from compression.runtime import ROOT, log

# Tests that a script starts in the background ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

HIDDEN, HEADS, HEAD_SIZE, NEURONS, LAYERS, VOCABULARY = 32, 4, 8, 48, 3, 120
# What stays of the tiny models in most tests: layers of different widths.
KEPT = {
    structures.HEADS: [torch.tensor(row).bool() for row in ([1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0])],
    structures.NEURONS: [torch.arange(48) % 2 == 0, torch.arange(48) < 8, torch.ones(48, dtype=torch.bool)],
}


SIZES = dict(vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=2, initializer_range=0.2)
BERT = dict(hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=NEURONS, num_hidden_layers=LAYERS)
DISTILBERT = dict(dim=HIDDEN, n_heads=HEADS, hidden_dim=NEURONS, n_layers=LAYERS)


def tiny_bert(seed: int = 0, **fields: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SIZES | BERT | fields)).eval()


def tiny_distilbert(seed: int = 0, **fields: Any) -> DistilBertForSequenceClassification:
    torch.manual_seed(seed)
    return DistilBertForSequenceClassification(DistilBertConfig(**SIZES | DISTILBERT | fields)).eval()


DECODERS = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(tie_word_embeddings=True, attention_bias=True)),
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=None)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=8)),
}

DECODER = dict(vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0)
DECODER |= dict(hidden_size=32, num_attention_heads=8, num_key_value_heads=4)
DECODER |= dict(intermediate_size=NEURONS, num_hidden_layers=4)

# Gemma: heads that are not of the hidden size's share, and windows shorter than the tests' texts.
GEMMA = dict(head_dim=8, query_pre_attn_scalar=12, sliding_window=4)
GRANITE = dict(embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3)
# Decoders whose layers are laid out otherwise, that compute more than LLaMA does, or whose positions are stretched.
MORE_DECODERS = {
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, dict(no_rope_layers=[1, 0, 1, 0], bos_token_id=1, eos_token_id=2)),
    "granite": (GraniteConfig, GraniteForCausalLM, GRANITE | dict(attention_bias=True, mlp_bias=True)),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, GEMMA | dict(final_logit_softcapping=3.0, attn_logit_softcapping=2.0)),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, GEMMA | dict(sliding_window_pattern=2)),
    "phi3": (Phi3Config, Phi3ForCausalLM, dict(resid_pdrop=0.1)),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
}


def rope(kind, **fields):
    """A config's field: rotary positions of a kind."""
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10_000.0, **fields))


_STRETCHED = dict(factor=4.0, original_max_position_embeddings=16)
_FACTORS = dict(short_factor=[1.0, 1.5], long_factor=[2.0, 3.0])
# Name -> family and fields: positions beyond the original length, which is shorter than the tests' texts, and biases.
VARIANTS = {
    "llama, llama3 rope": ("llama", rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **_STRETCHED)),
    "llama, yarn": ("llama", rope("yarn", **_STRETCHED)),
    "llama, linear rope": ("llama", rope("linear", factor=4.0)),
    "llama, dynamic rope": ("llama", rope("dynamic", factor=4.0) | dict(max_position_embeddings=16)),
    "phi3, longrope": ("phi3", rope("longrope", **_FACTORS) | dict(original_max_position_embeddings=16)),
    "phi3, partial rope": ("phi3", rope("default", partial_rotary_factor=0.5) | dict(sliding_window=5)),
    "gemma2, biases": ("gemma2", dict(attention_bias=True)),
    "olmo2, biases": ("olmo2", dict(attention_bias=True)),
}

# Qwen2 and Qwen3: layers that attend to a window, shorter than the tests' texts, and layers that attend to all.
MIXED = dict(use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)
# Name -> family and fields: layers that differ in what they attend to, windows shorter than the tests' texts, biases.
LAYOUTS = {
    "qwen2, window first": ("qwen2", MIXED),
    "qwen3, window last": ("qwen3", MIXED | dict(layer_types=["full_attention"] * 3 + ["sliding_attention"])),
    "qwen3, biases": ("qwen3", MIXED | dict(attention_bias=True)),
    "llama, biases": ("llama", dict(mlp_bias=True)),
    "mistral, window": ("mistral", dict(sliding_window=4)),
}


def tiny_decoder(family: str = "llama", seed: int = 0, **fields):
    """A language model with two query heads for each of four key-value heads."""
    torch.manual_seed(seed)
    config_class, model_class, more = (DECODERS | MORE_DECODERS)[family]
    model = model_class(config_class(**DECODER | more | fields)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # as a trained model's, not zero
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name and family in MORE_DECODERS:  # so that it matters whose weights are whose
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


# What a checkpoint of a pruned language model holds.
DECODER_FILES = "config.json generation_config.json model.safetensors stage.json tokenizer.json tokenizer_config.json"
DECODER_FILES = (*DECODER_FILES.split(), "pruned_decoder.py", "README.md")
WORDS = "abcdefghijklmnopqrstuvwxyz"


def save_decoder(folder, model, stage=None, tokenizer=None, **options):
    """Save a language model with a tokenizer, by default one whose words are letters (a is id 4)."""
    return save_checkpoint(folder, model, tokenizer or letters_tokenizer(), stage or {"stage": "dense"}, **options)


def letters_tokenizer():
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


PROSE = [
    "The river rises in the hills above the town and flows 1234 km to the sea. They'd said it's 20,000 years old.",
    "Un café à Zürich coûte 4,50 €. Привет, мир!\n\n  def area(r):\n\treturn 3.14159 * r ** 2  \n",
]
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
# As the tokenizer.json of models of that name splits text.
SPLITS = {
    "gpt-2": [ByteLevel(add_prefix_space=False)],
    "smollm": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
    "llama-bpe": [Split(Regex(_WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)],
    "qwen2": [
        Split(Regex(_WORDS.replace("{1,3}", "")), "isolated"),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
TOKENIZER_SIZE = 330


def bytes_tokenizer(splits=SPLITS["gpt-2"], **options):
    """A tokenizer of GPT-2's kind, with a few merges, which begins a text with <s>."""
    words = Tokenizer(BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.Sequence(splits), decoders.ByteLevel()
    return _wrapped(_trained(words, ["<s>", "</s>"], ByteLevel.alphabet()), **options)


def pieces_tokenizer(prefix="always", **options):
    """A tokenizer of SentencePiece's kind, with byte fallback, which begins a text with <s>.

    Args:
        prefix: where a space is put before a text: always, first or never; normalizer: by Llama 2's older way.
    """
    words = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prefix == "normalizer":
        words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        words.pre_tokenizer = Metaspace(prepend_scheme=prefix, split=False)
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = _trained(words, ["<unk>", "<s>", "</s>"], [])
    described = json.loads(words.to_str())
    model = described["model"]
    model["vocab"] |= {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    # Every pair that makes a token: SentencePiece merges any two pieces whose whole is one.
    cuts = ((token[:place], token[place:]) for token in model["vocab"] for place in range(1, len(token)))
    model["merges"] = [pair for pair in cuts if model["vocab"].keys() >= set(pair)]
    return _wrapped(Tokenizer.from_str(json.dumps(described)), unk_token="<unk>", **options)


def _trained(words, special, alphabet):
    trainer = BpeTrainer(
        vocab_size=TOKENIZER_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(PROSE, trainer)
    return words


def _wrapped(words, **options):
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", **options)


def letters(count, seed=0):
    """A text of random letters."""
    draw = torch.randint(0, 26, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[letter] for letter in draw)


@pytest.fixture
def windows():
    """Token ids that repairs are fitted to."""
    return torch.randint(3, 120, (40, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=sorted(DECODERS))
def model(request):
    return tiny_decoder(request.param)


def write_zero_shot(folder, task, *rows):
    """A file of zero-shot data; a row that is text is written as it is."""
    path = folder / "zeroshot" / task / "validation.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def everything(model):
    """For each kind of structure of a model one mask per layer, after which all stay."""
    layers = structures.layers_of(model)
    return {kind: [torch.ones(parts.count(kind)).bool() for parts in layers] for kind in layers[0].kinds}


def repair(model, kept, windows, batch_size=1, choice=None, error_share=0.0, mlp_rounds=0, ridge=RIDGE):
    """Repair all layers of a model before any is cut down."""
    step = repairing(model, kept, RepairText(model, windows, batch_size, error_share, ridge), choice, mlp_rounds)
    for index in range(len(kept[structures.GROUPS])):
        step(index)


def pruning_flags(base, output):
    """Flags of both pruning scripts that let them prune `base` in no time, on the text beside it."""
    text = base.parent / "text.txt"
    places = ["--base_model", base, "--results_dir", output, "--dataset", text, "--eval_ppl_datasets", text]
    lengths = ["--sequence_length", "32", "--analysis_length", "16", "--eval_length", "32", "--agreement_text", "none"]
    return [*places, *lengths, "--fast", "--dtype", "float32"]


def leftovers(folder):
    """What is hidden in a folder of results, but for the list of the files that were written there."""
    return [path for path in folder.glob(".*") if path.name != WRITTEN_FILE]


def load_script(name):
    """The module of a script whose name begins with a digit, so that no import statement can name it."""
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    return sys.modules[name]


MODELS = {"bert": tiny_bert, "distilbert": tiny_distilbert}


@pytest.fixture(params=sorted(MODELS))
def tiny_model(request):
    """A tiny dense classifier of each supported family."""
    return MODELS[request.param]()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A BERT tokenizer whose words are the letters a (id 5) to z."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def batch():
    """Token ids [5, 9] with padding of different lengths."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, VOCABULARY, (5, 9), generator=generator)
    attention_mask = (torch.arange(9) < torch.tensor([9, 7, 4, 9, 2])[:, None]).long()
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A language model whose words are letters, and beside it a text of them."""
    folder = save_decoder(tmp_path_factory.mktemp("base") / "model", tiny_decoder(max_position_embeddings=128))
    (folder.parent / "text.txt").write_text(letters(30_000))
    return folder


@pytest.fixture(autouse=True)
def logging_as_it_was(monkeypatch):
    """A script's main sets up logging for its whole process: here that is every later test's process too."""
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(log, name, getattr(log, name))
