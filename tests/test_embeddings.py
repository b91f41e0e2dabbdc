"""Smaller embeddings: trimmed vocabularies of every kind, factorized tables, and stage 8 with both."""

import json

import pytest
import torch
from conftest import PROSE, bytes_tokenizer, letters_tokenizer, pieces_tokenizer, tiny_bert
from safetensors.torch import load_file, save_file
from scripts import run_distributed, run_elsewhere, run_killed, run_script
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import UnigramTrainer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from compression.checkpoint import load_classifier, save_checkpoint
from compression.classifier.data import DatasetSettings, load_data
from compression.classifier.embeddings import EmbeddingSettings, factorize, table_of, token_counts, trim
from compression.classifier.vocabulary import trimmed
from compression.export.onnx import OnnxClassifier, logit_difference, write_onnx
from compression.flops import count_macs, count_parameters
from compression.inputs import find_all, find_newest
from compression.quantization import Format, pack
from compression.runtime import UserError
from compression.stage_record import read_stage

WORDS = ["good", "bad", "fine", "film", "plot", "dull", "##s", "##ly", "##ful", "goodly", "river", "unused"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = ["The river rises in the town.", "Films: finely dull, 1234 km!", "café and Привет"]
UNSEEN = ["unused zebras", "plotful 987 goodly", "another riverly thing"]


def word_pieces():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return BertTokenizer(vocab={token: place for place, token in enumerate(dict.fromkeys(tokens))})


def roberta():
    model = json.loads(bytes_tokenizer().backend_tokenizer.to_str())["model"]
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokens = [*special, *(token for token in model["vocab"] if token not in special), "<mask>"]
    vocab = {token: place for place, token in enumerate(tokens)}
    return RobertaTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])


def unigram():
    """As XLM-RoBERTa's: <mask> has the last id."""
    words = Tokenizer(Unigram())
    words.pre_tokenizer = Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    words.train_from_iterator([*PROSE, *TEXTS, *UNSEEN] * 3, trainer)
    words.add_special_tokens(["<mask>"])
    pair = "<s> $A </s> </s> $B </s>"
    words.post_processor = TemplateProcessing(single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>")
    names |= dict(unk_token="<unk>", pad_token="<pad>", mask_token="<mask>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


TOKENIZERS = {
    "WordPiece": word_pieces,
    "BPE of bytes": bytes_tokenizer,
    "BPE of bytes, RoBERTa": roberta,
    "BPE with byte fallback": pieces_tokenizer,
    "Unigram": unigram,
}


def pieces(tokenizer, *texts):
    return tokenizer.convert_ids_to_tokens(tokenizer(*texts)["input_ids"])


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizers(request):
    """A tokenizer, the trimmed one and which ids stay."""
    whole = TOKENIZERS[request.param]()
    return whole, *trimmed(whole, TEXTS)


def test_texts_are_split_as_before_alone_and_in_pairs(tokenizers):
    whole, small, _ = tokenizers
    assert len(small) < len(whole)
    assert [pieces(small, text) for text in TEXTS] == [pieces(whole, text) for text in TEXTS]
    assert pieces(small, *TEXTS[:2]) == pieces(whole, *TEXTS[:2])


def test_any_other_text_is_spelt_with_what_is_left(tokenizers):
    whole, small, _ = tokenizers
    assert any(pieces(small, text) != pieces(whole, text) for text in UNSEEN)
    for text in UNSEEN:
        assert pieces(small, text).count(small.unk_token) == pieces(whole, text).count(whole.unk_token)
        assert "".join(pieces(small, text)).replace("##", "") == "".join(pieces(whole, text)).replace("##", "")


def test_ids_have_no_holes_and_keep_their_order(tokenizers):
    whole, small, places = tokenizers
    assert sorted(small.get_vocab().values()) == list(range(len(places))) == sorted(places.values())
    before, after = (list(values) for values in zip(*places.items(), strict=True))
    assert sorted(before) == before and sorted(after) == after
    assert whole.convert_ids_to_tokens(before) == small.convert_ids_to_tokens(after)
    assert small.special_tokens_map == whole.special_tokens_map


SPLIT_ELSEWHERE = """
import json, sys
from transformers import AutoTokenizer
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(json.dumps([tokenizer(text)["input_ids"] for text in json.loads(sys.argv[1])]))
"""


def test_trimmed_tokenizers_load_elsewhere(tmp_path):
    expected = []
    for name, make in TOKENIZERS.items():
        small, _ = trimmed(make(), TEXTS)
        small.save_pretrained(tmp_path / name)
        expected.append([small(text)["input_ids"] for text in [*TEXTS, *UNSEEN]])
    folders = [tmp_path / name for name in TOKENIZERS]
    said = run_elsewhere(SPLIT_ELSEWHERE, tmp_path, json.dumps([*TEXTS, *UNSEEN]), *folders).check().stdout
    assert [json.loads(line) for line in said.splitlines()] == expected


class Slow(PreTrainedTokenizer):
    """One that has no fast form."""

    vocab_size = 1

    def get_vocab(self):
        return {"a": 0}


@pytest.mark.parametrize(("make", "found"), [(letters_tokenizer, "WordLevel"), (Slow, "Slow, which has no fast form,")])
def test_other_tokenizers_are_refused(make, found):
    line = f"--trim_vocabulary: the tokenizer is {found}; allowed are WordPiece, BPE, Unigram; leave the flag out"
    with pytest.raises(UserError, match=f"^{line}$"):
        trimmed(make(), TEXTS)


def test_a_text_that_would_be_split_otherwise_is_named():
    """'ab' has no piece for '!' and is unknown; without 'ab' it could be spelt."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "ab", "##!b", "##bc"]
    vocab = {token: place for place, token in enumerate(tokens)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BertTokenizer(vocab=vocab).backend_tokenizer)
    with pytest.raises(UserError, match="^--trim_vocabulary: the training text 'abc' would be split otherwise; leave"):
        trimmed(tokenizer, ["abc", "a##bc"], needed=[tokens.index("##bc")])


# The model.


@torch.no_grad()
def logits(model, tokenizer, *texts):
    return model(**tokenizer(*texts, return_tensors="pt")).logits


def bert_of(tokenizer, **fields):
    return tiny_bert(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **fields)


@pytest.mark.parametrize("rank", [None, 6])
def test_a_trimmed_model_computes_the_same_on_its_texts(rank):
    tokenizer = word_pieces()
    model = bert_of(tokenizer)
    if rank:
        factorize(model, rank, torch.ones(len(tokenizer)))
    before = [logits(model, tokenizer, text, "a film") for text in TEXTS]
    small = trim(model, tokenizer, [*TEXTS, "a film"])
    assert model.config.vocab_size == table_of(model).num_embeddings == len(table_of(model).weight) == len(small)
    for text, expected in zip(TEXTS, before, strict=True):
        torch.testing.assert_close(logits(model, small, text, "a film"), expected, atol=1e-6, rtol=0)
    assert count_parameters(model)["embeddings"] == sum(
        parameter.numel() for parameter in model.bert.embeddings.parameters()
    )


def test_positions_behind_the_padding_stay_where_they_are():
    tokenizer = roberta()
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, num_attention_heads=4, intermediate_size=48)
    config = AutoConfig.for_model("roberta", **sizes, num_hidden_layers=2, pad_token_id=1, initializer_range=0.2)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    expected = logits(model, tokenizer, TEXTS[0])
    small = trim(model, tokenizer, TEXTS)
    assert (model.config.pad_token_id, model.config.eos_token_id, small.pad_token_id) == (1, 2, 1)
    torch.testing.assert_close(logits(model, small, TEXTS[0]), expected, atol=1e-6, rtol=0)


def test_factors_have_the_least_weighted_error():
    model = tiny_bert()
    table = model.get_input_embeddings().weight.detach().clone()
    weights = torch.arange(1, len(table) + 1)
    factorize(model, 6, weights)
    factors = model.get_input_embeddings()
    assert factors.table.weight.shape == (len(table), 6) and factors.projection.weight.shape == (table.shape[1], 6)
    found = factors(torch.arange(len(table)))
    roots = weights.sqrt()[:, None]
    u, s, v = torch.linalg.svd(roots * table, full_matrices=False)
    torch.testing.assert_close(roots * found, (u[:, :6] * s[:6]) @ v[:6], atol=1e-4, rtol=0)


def test_a_factorized_table_is_factorized_again_from_its_product():
    model, other = tiny_bert(), tiny_bert()
    ones = torch.ones(model.config.vocab_size)
    factorize(model, 9, ones)
    factorize(model, 6, ones)
    factorize(other, 6, ones)
    ids = torch.arange(model.config.vocab_size)
    torch.testing.assert_close(model.get_input_embeddings()(ids), other.get_input_embeddings()(ids), atol=1e-5, rtol=0)
    assert model.config.embedding_rank == 6


def test_tokens_count_as_often_as_they_are_used():
    tokenizer = word_pieces()
    counts = token_counts(tokenizer, ["good film", "good good"], len(tokenizer))
    found = {token: int(counts[place]) for token, place in tokenizer.get_vocab().items() if counts[place]}
    assert found == {"[CLS]": 2, "[SEP]": 2, "good": 3, "film": 1} and len(counts) == len(tokenizer)


def test_the_projections_products_are_counted():
    model = tiny_bert()
    before = count_macs(model, 8)
    factorize(model, 6, torch.ones(model.config.vocab_size))
    after = count_macs(model, 8)
    assert after.total - before.total == after.classifier - before.classifier == 8 * 6 * 32


def test_texts_of_pairs_count_apart():
    tokenizer = word_pieces()
    model = bert_of(tokenizer)
    small = EmbeddingSettings(trim_vocabulary=True).apply(model, tokenizer, [("good film", "dull plot")])
    assert set(WORDS) & small.get_vocab().keys() == {"good", "film", "dull", "plot", "##s"}


# Stage 8 and what follows.


SCRIPT = "8_pruning_with_finetuning.py"
BOTH = ["--embedding_rank", 6, "--trim_vocabulary"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher and a student without dropout, whose draws differ between processes."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), word_pieces()
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for name, stage, seed in (("teacher_model", "teacher", 1), ("student_model", "student", 0)):
        save_checkpoint(folder / name, bert_of(tokenizer, seed=seed, **still), tokenizer, {"stage": stage})
    return folder


@pytest.fixture(scope="module")
def common(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train.tsv", 60), ("dev.tsv", 20)):
        rows = [f"{'good' if i % 2 else 'bad'} film{'s' * (i % 3)} {LETTERS[i % 26]}\t{i % 2}" for i in range(count)]
        if name == "dev.tsv":
            rows += ["a dull river plotful unused\t0"]
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    inputs = ["--student_path", models / "student_model", "--teacher_path", models / "teacher_model"]
    epochs = ["--num_epochs", 2, "--pruning_start_epoch", 1, "--pruning_end_epoch", 1, "--batch_size", 8]
    return ["--data_dir", folder, *inputs, *epochs, "--max_length", 16, "--learning_rate", 1e-3]


@pytest.fixture(scope="module")
def pruned(common, tmp_path_factory):
    """What stage 8 makes of the student with a trimmed vocabulary and factors."""
    folder = tmp_path_factory.mktemp("pruned")
    said = run_script(SCRIPT, *common, "--models_dir", folder, *BOTH, "--embedding_rank", 8).stdout
    assert "tokens stay" in said
    return find_newest(folder, "pruned")


def rows_of(common, name):
    return (common[1] / name).read_text().splitlines()[1:]


def test_stage_8_saves_smaller_embeddings_and_their_tokenizer(pruned, common, models):
    model, tokenizer = load_classifier(pruned)
    _, whole = load_classifier(models / "student_model")
    assert set(WORDS) & tokenizer.get_vocab().keys() == {"good", "bad", "film", "##s"}
    assert model.config.vocab_size == len(tokenizer) == len(whole) - len(WORDS) + 4
    assert model.config.embedding_rank == 8
    weights = load_file(pruned / "model.safetensors")
    assert weights["bert.embeddings.word_embeddings.table.weight"].shape == (len(tokenizer), 8)
    assert weights["bert.embeddings.word_embeddings.projection.weight"].shape == (32, 8)
    for text in (row.split("\t")[0] for row in rows_of(common, "train.tsv")):
        assert pieces(tokenizer, text) == pieces(whole, text)
    stage = read_stage(pruned)
    assert (stage["config"]["embedding_rank"], stage["config"]["trim_vocabulary"]) == (8, True)
    card = (pruned / "README.md").read_text()
    assert f"| tokens | {len(tokenizer)} | {len(whole)} |" in card and "| rank of the embeddings | 8 |" in card


def test_the_factors_are_trained(pruned, common, models):
    model, tokenizer = load_classifier(models / "student_model")
    texts = load_data(DatasetSettings(data_dir=str(common[1]))).train.sentences
    EmbeddingSettings(embedding_rank=8, trim_vocabulary=True).apply(model, tokenizer, texts)
    trained = load_classifier(pruned)[0].get_input_embeddings().state_dict()
    for name, before in model.get_input_embeddings().state_dict().items():
        assert 0 < (trained[name] - before).abs().max() < 0.1


COMPUTED_ELSEWHERE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    logits = model(**tokenizer("good films and unused rivers", return_tensors="pt")).logits
    print((logits - load_file(folder.with_suffix(".expected"))["logits"]).abs().max().item())
"""


def expect(folder):
    """Note a model's logits for `COMPUTED_ELSEWHERE`."""
    save_file({"logits": logits(*load_classifier(folder), "good films and unused rivers")}, f"{folder}.expected")
    return folder


def test_later_stages_take_the_model(pruned, common, models, tmp_path):
    """4 bits after and while training, with a teacher that reads the same tokens; each computes elsewhere as here."""
    fp32 = ["--compute_dtype", "float32"]
    run_script("9_quantize_pruned_model.py", "--pruned_model_path", pruned, "--output_dir", tmp_path / "packed", *fp32)
    inputs = ["--pruned_model_path", pruned, "--teacher_path", models / "teacher_model", *common[:2]]
    training = ["--models_dir", tmp_path, "--max_length", 16, "--num_epochs", 1, "--learning_rate", 1e-3, *fp32]
    run_script("10_qat_kd_4bit.py", *inputs, *training)
    trained = find_newest(tmp_path, "pruned_qkd4bit")
    assert "hidden_state_loss" in json.loads((trained / "training_history.json").read_text())[0]
    folders = [expect(folder) for folder in (pruned, tmp_path / "packed", trained)]
    empty = tmp_path / "empty"
    empty.mkdir()
    said = run_elsewhere(COMPUTED_ELSEWHERE, empty, *folders).check().stdout
    assert all(float(line) < 1e-6 for line in said.splitlines()) and len(said.splitlines()) == 3
    for folder in folders[1:]:
        assert json.loads((folder / "config.json").read_text())["embedding_rank"] == 8
        tables = load_file(folder / "model.safetensors")
        assert tables["bert.embeddings.word_embeddings.table.codes"].shape[1] == 4  # two numbers in a byte
        assert tables["bert.embeddings.word_embeddings.projection.weight"].dtype == torch.float32


def test_onnx_has_the_same_logits(pruned, tmp_path):
    """Of the 4-bit model, whose narrow factor is packed and whose projection is not."""
    model, tokenizer = load_classifier(pruned)
    packed = pack(model, Format(), torch.float32)
    write_onnx(packed, tmp_path, "nf4")
    packed.config.save_pretrained(tmp_path)
    batch = tokenizer(["good films", "a bad film and unused rivers"], padding=True, return_tensors="pt")
    assert logit_difference(packed, OnnxClassifier(tmp_path, threads=1), [batch]) < 1e-4


def test_the_model_is_pruned_again_with_other_embeddings(pruned, common, tmp_path):
    again = [*common, "--student_path", pruned, "--models_dir", tmp_path]
    run_script(SCRIPT, *again, *BOTH)
    model, _ = load_classifier(find_newest(tmp_path, "pruned"))
    assert model.config.embedding_rank == table_of(model).embedding_dim == 6
    assert model.config.vocab_size == load_classifier(pruned)[0].config.vocab_size
    refused = run_script(SCRIPT, *again, "--embedding_rank", 8, expect=2).stderr
    rows = model.config.vocab_size
    assert f"--embedding_rank 8: allowed is 1 to 7, the table of word embeddings is {rows} x 8" in refused


def test_the_teachers_logits_are_its_own(pruned, common):
    """With its own tokenizer and table: they are kept once, whatever the student has."""
    run_script(SCRIPT, *common, "--models_dir", pruned.parent)
    assert len(list(pruned.parent.glob(".teacher_logits*"))) == 1 and len(find_all(pruned.parent, "pruned")) == 2


def same_results(*folders):
    one, other = (find_newest(folder, "pruned") for folder in folders)
    names = ("model.safetensors", "training_history.json", "tokenizer.json", "config.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_killed_run_goes_on_to_the_undisturbed_result(common, tmp_path):
    flags = [*common, *BOTH, "--save_steps", 2]
    run_script(SCRIPT, *flags, "--models_dir", tmp_path / "whole")
    killed = [*flags, "--models_dir", tmp_path / "killed", "--resume"]
    run_killed(SCRIPT, *killed, at="compression.training.seed_step", call=11)
    assert "Resumed at" in run_script(SCRIPT, *killed).stdout
    assert same_results(tmp_path / "whole", tmp_path / "killed")


def test_two_processes_agree_with_one(common, tmp_path):
    run_script(SCRIPT, *common, *BOTH, "--models_dir", tmp_path / "one")
    run_distributed(SCRIPT, *common, *BOTH, "--models_dir", tmp_path / "two")
    folders = [find_newest(tmp_path / name, "pruned") for name in ("one", "two")]
    one, two = (json.loads((folder / "training_history.json").read_text()) for folder in folders)
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], abs=1e-3)
    assert (folders[0] / "tokenizer.json").read_bytes() == (folders[1] / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--embedding_rank", 0], "--embedding_rank 0: allowed is at least 1"),
        (["--embedding_rank", 32], "--embedding_rank 32: allowed is 1 to 31, the table of word embeddings is 68 x 32"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(common, tmp_path, flags, line):
    result = run_script(SCRIPT, *common, "--models_dir", tmp_path, *flags, expect=2)
    assert result.stderr.strip() == f"error: {line}" and not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(common, tmp_path):
    run_script(SCRIPT, *common, "--models_dir", tmp_path, *BOTH, "--dry_run")
    assert not list(tmp_path.iterdir())
