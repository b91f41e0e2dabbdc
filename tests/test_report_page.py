"""The report as a page: what it shows, what it survives, and that a browser draws it without a network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from scripts import run_script

from compression.classifier.models import EVALUATED, looks
from compression.files import write_json
from compression.page import PAGE, charts, update_page, write_page
from compression.page.commands import command_of
from compression.page.records import Checkpoint, dig, read_records
from compression.page.render import build
from compression.plots import COLOURS
from compression.runtime import UserError

EVIL = "<script>alert(1)</script>"
LARGEST = 6_000_000
MODELS = 30


class Parsed(HTMLParser):
    """What a page holds: text, tags with their attributes, the charts' specifications."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.scripts = [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())
        self.charts = json.loads(next(script for script in self.scripts if script.startswith('{"charts"')))["charts"]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        (self.scripts if self.tags and self.tags[-1][0] in ("script", "style") else self.words).append(data)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.tags.append(("/" + tag, {}))


def entry(name, folder, place):
    """An entry of the report, as stage 7 writes it."""
    accuracy, macs = 0.9 - 0.003 * place, 1_400_000_000 - 30_000_000 * place
    disagreement = {"text": f"sentence {place} {EVIL}", "label": 1, "predicted": 0, "baseline": 1}
    return {
        "name": name,
        "folder": str(folder),
        "engine": {"name": "PyTorch", "type": "float32"},
        "quality": {
            "n": 872,
            "accuracy": accuracy,
            "accuracy_standard_error": 0.01,
            "f1": 0.88,
            "f1_macro": 0.87,
            "roc_auc": 0.95,
            "confusion_matrix": [[381, 47], [39, 405]],
        },
        "parameters": {"total": 22_000_000, "embeddings": 11_900_000, "encoder": 10_000_000},
        "macs": {"total": macs, "encoder": macs - 1000, "gflops": 2 * macs / 1e9},
        "thop": {"macs": macs},
        "size": {"weights_bytes": 90_000_000 - 2_000_000 * place, "folder_bytes": None},
        "latency": {"median_ms": 12.5, "p10_ms": 11.5, "p90_ms": 14.5},
        "throughput": {
            "median_samples_per_second": 100.0 + place,
            "p10_samples_per_second": 90.0,
            "p90_samples_per_second": 110.0,
        },
        "relative": {
            **{"accuracy_points": -0.3 * place, "accuracy_points_standard_error": 0.4, "parameters": 0.5},
            **{"encoder_parameters": 0.5, "macs": 0.5, "encoder_macs": 0.5, "weights_bytes": 0.5, "latency": 0.5},
            **{"throughput": 2.0, "throughput_per_mac_reduction": 1.0},
        },
        "disagreements": {"n": 7, "examples": [disagreement]},
        "lineage": {"stage": "pruned", "ancestors": [], "config": {}, "data": {"name": "SST-2 (GLUE)"}},
    }


def add_classifier(folder, stage, parent=None, **config):
    """A folder with the records of a checkpoint, and none of its weights."""
    inputs = {"parent": {"path": str(parent), "sha256": "0"}} if parent else {}
    settings = {"seed": 42, "importance_mode": "fisher", "target": ["mac", 0.25], "trim_vocabulary": False}
    record = {"stage": stage, "inputs": inputs, "config": settings | config, "seed": 42}
    record |= {"metrics": {"accuracy": 0.875}, "data": {"name": "SST-2 (GLUE)"}, "created": "2026-01-02T03:04:05"}
    write_json(folder / "stage.json", record)
    layers = {str(layer): {"num_attention_heads": layer + 1, "intermediate_size": 64} for layer in range(5)}
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    write_json(folder / "config.json", sizes | {"per_layer_config": layers | {"5": {"skip": ["mlp"]}}})
    epochs = [
        {"epoch": epoch, "loss": 0.5 / epoch, "cross_entropy": 0.4 / epoch, "accuracy": 0.8 + 0.02 * epoch}
        | {"temperature": 10.0 - epoch, "head_sparsity": 0.1 * epoch, "phase": "Pruning", "learning_rate": 5e-5}
        for epoch in (1, 2, 3)
    ]
    write_json(folder / "training_history.json", epochs)


def figures(scale, depth):
    return {
        "computes_in": "float32",
        "parameters": {"total": int(134e6 * scale), "structures": int(106e6 * scale)},
        "layers": [{"query_heads": 9, "key_value_heads": 3, "intermediate_size": int(1536 * scale)}] * depth,
        "perplexity": {"wikitext2": 16.25 / scale, "ptb": 30.5 / scale},
        "perplexity_windows": {"wikitext2": [20, 1024], "ptb": [20, 1024]},
        "zeroshot": {"piqa": {"acc": 0.6 * scale, "acc_standard_error": 0.02, "n": 1838}},
        "samples": [{"text": "wikitext2", "prompt": "The river", "continuation": f"flows {scale} {EVIL}"}],
    }


def add_run(results, name, scale=0.8):
    """The results of a run that pruned a language model of 30 layers."""
    folder = results / name
    speeds = {"median_tokens_per_second": 200.0, "p10_tokens_per_second": 190.0, "p90_tokens_per_second": 210.0}
    costs = {"prefill": speeds, "decode": speeds, "macs": {"encoder": 10**9}}
    write_json(folder / "run.json", {"stage": "global_pruning"})
    evaluation = {
        "dense": figures(1.0, 30),
        "pruned": figures(scale, 28),
        "finetuned": figures(0.9, 28),
        "reduction": {"structures": 1 - scale, "total": 0.16},
        "efficiency": {"dense": costs, "pruned": costs},
        "agreement": {"kl": 0.123, "top1": 0.765},
        "kept_layers": list(range(2, 30)),
    }
    write_json(folder / "evaluation" / "evaluation_results.json", evaluation)
    write_json(folder / "models" / "stage.json", {"stage": "global_pruning", "config": {"pruning_ratio": 0.2}})
    values = [20.0 + layer for layer in range(30)]
    write_json(folder / "analysis" / "layer_removal_ppl.json", {"dense": 16.25, "layer": values})
    write_json(folder / "analysis" / "block_removal_ppl.json", {"dense": 16.25, "attention": values, "mlp": values})


def fill(folder, count=MODELS):
    """Folders of models and results with a teacher and so many pruned models, language models and a study."""
    models, results = folder / "models", folder / "results"
    names = ["Teacher"] + ["Pruned Student (KGSP + MSP)"] * (count > 1)
    names += [f"Pruned Student (KGSP + MSP), pruning_with_finetuning_{place}" for place in range(2, count)]
    entries = []
    for place, name in enumerate(names):
        path = models / (f"pruning_with_finetuning_{place}" if place else "teacher_model")
        add_classifier(path, "pruned" if place else "teacher", models / "teacher_model" if place else None)
        entries.append(entry(name, path, place))
    add_classifier(models / f"mine {EVIL.replace('/', '')}", "pruned", models / "teacher_model")
    report = {
        "task": {"labels": ["negative", "positive"], "primary": "accuracy", "metrics": {"accuracy": "Accuracy"}},
        "data": {"name": "SST-2 (GLUE)", "source": "a local folder", "n": 872, "duplicates": 0},
        "baseline": "Teacher",
        "models": entries,
        "missing": [{"name": "Soft labels", "command": "python 2_distill_student.py --variant soft_labels"}],
        "warnings": [f"a warning {EVIL}"],
        "config": {"flops_sequence_length": 128, "throughput_batch_size": 32},
        "environment": {"torch": "2.13.0"},
        "device": "the CPU",
    }
    report["task"]["metrics"] |= {"f1": "F1", "f1_macro": "Macro F1"}
    write_json(results / "final_report.json", report)
    add_run(results, "smol20")
    add_run(results, "smol50", 0.5)
    study = results / "studies" / "modes"
    study.mkdir(parents=True)
    (study / "table.csv").write_text(f"mode,accuracy,sd\nl2,0.9,0.01\n{EVIL},0.8125,0.02\n")
    return models, results, report


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """The folders, the report in them, and the page of both."""
    models, results, report = fill(tmp_path_factory.mktemp("filled"))
    return models, results, report, write_page(models, results).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(filled):
    return Parsed(filled[3])


def points_of(page):
    """The rows of the chart of all classifiers, of quality against cost."""
    found = (dig(spec, "data", "values") or [{}] for spec in page.charts.values())
    return next(rows for rows in found if "gflops" in rows[0])


def test_every_model_is_there_with_the_figures_of_the_json(filled, page):
    report = filled[2]
    points = points_of(page)
    assert [point["name"] for point in points] == [one["name"] for one in report["models"]]
    for point, one in zip(points, report["models"], strict=True):
        assert point["gflops"] == one["macs"]["gflops"]
        assert point["megabytes"] == pytest.approx(one["size"]["weights_bytes"] / 1e6)
        assert point["accuracy"] == pytest.approx(100 * one["quality"]["accuracy"])
        assert point["accuracy_high"] - point["accuracy"] == pytest.approx(1)
        assert (point["latency"], point["latency_low"], point["latency_high"]) == (12.5, 11.5, 14.5)
        quality = one["quality"]["accuracy"]
        assert f"{one['name']} PyTorch float32 {100 * quality:.2f} ± 1.00" in page.text
    assert "SST-2 (GLUE), 872 validation texts (a local folder)" in page.text
    assert "python 2_distill_student.py --variant soft_labels" in page.text
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "details" and attrs.get("class") == "model"]
    assert len(sections) == len(set(sections)) == MODELS + 1 + 2, "one that is not in the report, and two runs"
    links = {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"}
    assert set(sections) <= links <= {attrs.get("id") for _, attrs in page.tags}


def test_a_model_shows_its_training_what_it_keeps_and_where_it_disagrees(page):
    titles = [str(spec.get("title")) for spec in page.charts.values()]
    for title in ("Loss terms", "Temperature", "Learning rate", "Left of each layer (%)", "Confusion matrix (rows)"):
        assert titles.count(title) >= MODELS, title
    kept = next(spec for spec in page.charts.values() if spec.get("title") == "Left of each layer (%)")
    rows = {(row["layer"], row["part"]): row["kept"] for row in kept["datasets"]["rows"]}
    assert rows[0, "attention heads"] == 1 and rows[5, "attention heads"] == 12 and rows[5, "neurons"] == 0
    losses = next(spec for spec in page.charts.values() if spec.get("title") == "Loss terms")["datasets"]["rows"]
    assert {row["what"] for row in losses} == {"loss", "cross entropy"} and losses[0]["value"] == 0.5
    assert "Where it and Teacher disagree: 7 of 872 texts" in page.text
    assert f"sentence 3 {EVIL} positive negative positive" in page.text
    command = "python 8_pruning_with_finetuning.py --seed 42 --importance_mode fisher --target mac 0.25"
    assert f"{command} --no_trim_vocabulary" in page.text


def test_language_models_stand_beside_what_they_were(page):
    for said in (
        "smol20: dense PyTorch, float32 134.00 106.00 16.25 30.50 60.0 ± 2.0",
        "smol20: pruned PyTorch, float32 107.20 84.80 20.31 38.12 48.0 ± 2.0 0.123 76.5 1.000 200.0 200.0",
        "smol50: recovered",
        "Perplexity, wikitext2 (20 × 1024 tokens)",
        "Gone of the layers' parameters 20.0 %",
        "python run_global_pruning.py --pruning_ratio 0.2",
        f"The river … (wikitext2) flows 1.0 {EVIL} flows 0.8 {EVIL} flows 0.9 {EVIL}",
    ):
        assert said in page.text
    kept = [spec for spec in page.charts.values() if spec.get("title") == "Left of each layer (%)"]
    smol50 = next(spec for spec in reversed(kept) if len(spec["datasets"]["rows"]) == 60)
    shares = {(row["layer"], row["part"]): row["share"] for row in smol50["datasets"]["rows"]}
    assert shares[0, "attention"] == shares[1, "MLP"] == 0 and shares[2, "MLP"] == 50
    removal = next(spec for spec in page.charts.values() if str(spec.get("title")).startswith("Perplexity without"))
    assert "16.25" in json.dumps(removal)


def test_a_study_is_a_table(page):
    assert "modes" in page.text and f"{EVIL} 0.8125 0.02" in page.text


def test_lineage_puts_every_folder_below_its_parent(filled):
    nodes = charts.family(read_records(*filled[:2]))
    places = {node.checkpoint.path.name: place for place, node in enumerate(nodes)}
    assert len(nodes) == MODELS + 1 + 2, "one that is not in the report, and two runs"
    for node in nodes:
        if node.checkpoint.stage == "pruned":
            assert (node.depth, node.parent_row) == (1, places["teacher_model"])


def test_nothing_of_a_text_is_markup_and_nothing_lies_elsewhere(filled, page):
    assert EVIL not in filled[3], "a text ended up as markup"
    assert EVIL in page.text
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    for tag, attrs in page.tags:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            assert attrs.get(name) is None or attrs[name].startswith("#"), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs)
    style = next(script for script in page.scripts if "prefers-color-scheme" in script)
    assert "url(" not in style and "@import" not in style
    policy = next(attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs)
    assert "default-src 'none'" in policy and "http" not in policy and "eval" not in policy
    assert len(filled[3].encode()) < LARGEST


def test_a_model_looks_as_in_every_other_picture(filled, page):
    wanted = list(looks([one["name"] for one in filled[2]["models"]]))
    points = points_of(page)
    assert [point["colour"].lower() for point in points] == [colour.lower() for colour, _ in wanted]
    assert [point["shape"] for point in points] == [charts.path_of(marker) for _, marker in wanted]
    assert len({(point["colour"], point["shape"]) for point in points}) == MODELS
    # The palette's black is the page's ink, which a dark page has light.
    assert [charts.colour_on_page(colour) for colour in COLOURS].count(charts.INK) == 1


@pytest.mark.parametrize("there", [True, False])
def test_folders_without_any_run(tmp_path, there):
    if there:
        (tmp_path / "models").mkdir()
        (tmp_path / "results").mkdir()
    page = Parsed(write_page(tmp_path / "models", tmp_path / "results").read_text(encoding="utf-8"))
    assert "Nothing was measured yet in these folders" in page.text and not page.charts


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("results/final_report.json", "final_report.json is not valid JSON"),
        ("models/teacher_model/stage.json", "stage.json is not valid JSON"),
        ("models/teacher_model/config.json", "config.json is not valid JSON"),
        ("models/pruning_with_finetuning_1/training_history.json", "training_history.json is not valid JSON"),
        ("results/smol20/evaluation/evaluation_results.json", "evaluation_results.json is not valid JSON"),
        ("results/smol20/analysis/layer_removal_ppl.json", "layer_removal_ppl.json is not valid JSON"),
        ("results/lora_evaluation.json", "lora_evaluation.json is not valid JSON"),
    ],
)
@pytest.mark.parametrize("text", ['{"models": [', ""])
def test_a_half_written_file_is_named_and_all_else_shown(tmp_path, broken, said, text):
    models, results, _ = fill(tmp_path, 3)
    (tmp_path / broken).write_text(text)
    page = Parsed(write_page(models, results).read_text(encoding="utf-8"))
    problems = page.text[page.text.index("Not shown, because") :]
    assert said in problems
    assert "smol50: pruned" in page.text
    assert "teacher_model" in page.text and ("smol20: pruned" in page.text) == ("evaluation_results" not in broken)


@pytest.mark.parametrize("bad", [None, 7, [1, None, {"name": 3}], {"name": EVIL}], ids=str)
def test_values_of_any_other_kind_stop_nothing(tmp_path, bad, monkeypatch):
    """Every value of the report, of an entry of it and of a run's evaluation, one after the other."""
    # Charts are drawn from rows of finite numbers; here they need not be checked against the schema a hundred times.
    monkeypatch.setattr(charts, "finished", lambda chart, height, description: {"description": description})
    models, results, report = fill(tmp_path, 2)
    evaluation = json.loads((results / "smol20" / "evaluation" / "evaluation_results.json").read_text())
    shutil.rmtree(results / "smol50")
    shutil.rmtree(results / "smol20")
    first, other = report["models"]
    for changed in [report | {key: bad} for key in report] + [
        report | {"models": [first | {key: bad}, other]} for key in first
    ]:
        write_json(results / "final_report.json", changed)
        text = build(read_records(models, results))
        assert EVIL not in text and (other["name"] in text or "models" in changed)
    (results / "final_report.json").unlink()
    shutil.rmtree(models)
    write_json(results / "one" / "run.json", {})
    for key in evaluation:
        write_json(results / "one" / "evaluation" / "evaluation_results.json", evaluation | {key: bad})
        assert "run-1" in build(read_records(models, results))


def test_an_unknown_stage_and_a_circle_of_parents_are_shown(tmp_path):
    models = tmp_path / "models"
    add_classifier(models / "one", "a stage of tomorrow", models / "two")
    add_classifier(models / "two", "pruned", models / "one")
    (models / "three").mkdir()
    write_json(models / "three" / "stage.json", {"stage": 5, "inputs": [], "config": None, "parent": 3})
    records = read_records(models, tmp_path / "results")
    assert sorted(node.checkpoint.path.name for node in charts.family(records)) == ["one", "three", "two"]
    page = Parsed(write_page(models, tmp_path / "results").read_text(encoding="utf-8"))
    assert "a stage of tomorrow" in page.text or "A model" in page.text or "a model" in page.text


def test_commands_have_every_setting_but_how_the_run_went():
    settings = {"resume": True, "amp": "auto", "flag": True, "off": False, "none": None, "list": [1, 2], "path": "a b"}
    made = Checkpoint(None, {"stage": "student_softlabel", "config": settings})
    command = "python 2_distill_student.py --amp auto --flag --no_off --list 1 2 --path 'a b'"
    assert command_of(made) == command
    for stage, script in (("pruned_quantized", "9_quantize"), ("pruned_onnx", "export_"), ("recovery", "post_")):
        assert command_of(Checkpoint(None, {"stage": stage, "config": {"a": 1}})).startswith(f"python {script}")
    assert command_of(Checkpoint(None, {"stage": "of tomorrow", "config": {"a": 1}})) is None
    for model in EVALUATED:
        command = command_of(Checkpoint(None, {"stage": model.stage, "config": {"a": 1}}))
        assert command.split()[1] == model.command.split()[1]


def test_the_script_writes_the_page_and_nothing_else(tmp_path):
    models, results, _ = fill(tmp_path, 2)
    before = {path for path in tmp_path.rglob("*")}
    said = run_script("report.py", "--models_dir", models, "--results_dir", results)
    assert {path.name for path in set(tmp_path.rglob("*")) - before} == {PAGE, ".written.json"}
    assert f"-> {results / PAGE}" in said.stdout
    run_script("report.py", "--models_dir", models, "--results_dir", results)  # anew


def test_a_page_of_someone_else_is_left_alone(tmp_path, caplog):
    models, results, _ = fill(tmp_path, 2)
    (results / PAGE).write_text("mine")
    said = run_script("report.py", "--models_dir", models, "--results_dir", results, expect=2)
    assert f"holds a {PAGE} that is not an earlier result" in said.stderr
    with pytest.raises(UserError, match=PAGE):
        write_page(models, results)
    update_page(models, results)  # behind a run: its results are written, so that this is no failure
    assert (results / PAGE).read_text() == "mine"
    run_script("report.py", "--models_dir", results / PAGE, "--results_dir", tmp_path / "new", expect=2)


# In a browser.

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = """
addEventListener("load", async () => {
  const wait = (ready) => new Promise((done) => { const ask = () => ready() ? done() : setTimeout(ask, 50); ask(); });
  document.querySelectorAll("details.model:not(#model-2, #run-1, #run-2)").forEach((one) => one.remove());
  dispatchEvent(new Event("beforeprint"));  // opens and draws what is left
  await wait(() => !document.querySelector(".chart:not(.drawn)"));
  const table = document.querySelector("#overview table");
  table.querySelectorAll("th button")[3].click();
  document.body.dataset.order = Array.from(table.tBodies[0].rows, (row) => row.cells[3].dataset.sort).join(" ");
  const choose = document.querySelector("select");
  choose.value = "latency";
  choose.dispatchEvent(new Event("change"));
  choose.dispatchEvent(new Event("input"));
  await wait(() => document.querySelector("#overview svg").textContent.includes("→ Latency"));
  document.body.dataset.wide = String(document.documentElement.scrollWidth - innerWidth);
  document.body.dataset.paper = getComputedStyle(document.body).backgroundColor;
  // What the page asked for; what its policy forbids is an error on the console.
  document.body.dataset.asked = performance.getEntriesByType("resource").map((one) => one.name).join(" ");
  document.body.dataset.done = "yes";
});
"""


def browse(path, tmp_path, width, *flags):
    """What the browser makes of a page: its DOM, and what it says on the console."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path}/user", "--disable-background-networking", "--disable-component-update"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=60000"]
    command += [f"--window-size={width},900", *flags]
    done = subprocess.run([*command, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=280)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(
    ("width", "flags", "paper"),
    [(1280, [], "rgb(255, 255, 255)"), (390, ["--blink-settings=preferredColorScheme=0"], "rgb(21, 24, 28)")],
)
def test_a_browser_draws_all_of_it_without_errors_or_a_network(filled, tmp_path, width, flags, paper):
    copy = tmp_path / "page.html"
    copy.write_text(f"<script>{DRIVER}</script>".join(filled[3].rsplit("</body>", 1)))
    dom, console = browse(copy, tmp_path, width, *flags)
    assert console == []
    body = re.search(r"<body[^>]*>", dom)[0]
    assert 'data-done="yes"' in body, body
    assert 'data-wide="0"' in body, "it scrolls sideways"
    assert paper in body
    drawn = Parsed(dom)
    places = sum(tag == "div" and "chart" in attrs.get("class", "").split() for tag, attrs in drawn.tags)
    assert places == sum(tag == "svg" and "marks" in attrs.get("class", "") for tag, attrs in drawn.tags) > 15
    accuracies = [float(value) for value in re.search(r'data-order="([^"]*)"', body)[1].split()]
    assert len(accuracies) == MODELS and accuracies == sorted(accuracies)
    assert 'data-asked=""' in body, "it asks for something"
