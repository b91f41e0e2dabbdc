"""Studies of a script that takes no time: grids, seeds, searches, kills, failures, several workers, tables."""

import csv
import json
import math
import os
import signal
import subprocess
import sys

import pytest
from conftest import tiny_bert, tiny_distilbert
from optuna.trial import TrialState
from scripts import ROOT, run_script, start_script, wait_until

from compression.checkpoint import save_checkpoint
from compression.plots import undominated
from compression.runtime import UserError
from compression.stage_record import describe_stage
from compression.study import shared
from compression.study.figures import look_up
from compression.study.runs import Processes
from compression.study.shared import SharedStudy, make_sampler, open_storage
from compression.study.space import Choices, Range
from compression.study.summary import Row, best_row, effects, summarize
from compression.study.workers import environments

# As a module it has the project's configuration, as a command it needs no library and takes no time.
SCRIPT = """
import json, os, sys, time
from pathlib import Path

if __name__ != "__main__":
    from dataclasses import dataclass
    from typing import Annotated, ClassVar, Literal

    from compression.config import NO_EFFECT, Between, Config
    from compression.runtime import UserError

    @dataclass
    class FakeConfig(Config):
        mode: Literal["plain", "better"] = "plain"
        size: Annotated[float, Between(0, 1)] = 0.5
        layers: int = 2
        pair: tuple[Literal["mac"], float] | None = None
        deep: bool = False
        data: str | None = None
        pruned_model_path: Annotated[Path | None, NO_EFFECT] = None
        models_dir: Annotated[Path, NO_EFFECT] = Path("models")
        output_dir: Annotated[Path | None, NO_EFFECT] = None
        resume: Annotated[bool, NO_EFFECT] = False
        seed: int = 42

        presets: ClassVar = {"fast": dict(layers=1), "large": dict(size=0.9)}

        def check(self):
            if self.deep and self.layers < 2:
                raise UserError(f"--layers {self.layers}: allowed with --deep is at least 2")
else:
    flags = {}
    for word, value in zip(sys.argv[1:], [*sys.argv[2:], "--"]):
        if word.startswith("--"):
            flags[word[2:]] = True if value.startswith("--") else value
    models = Path(flags["models_dir"])
    with (models / "calls").open("a") as file:
        print(os.getpid(), os.environ.get("OMP_NUM_THREADS"), *sys.argv[1:], file=file)
    if flags.get("layers") == "13":
        print("some output")
        print("error: --layers 13: allowed is another", file=sys.stderr)
        sys.exit(2)
    resumed = (models / ".state").exists()
    (models / ".state").touch()
    time.sleep(float(os.environ.get("FAKE_SLEEP", 0)))
    seed, size, name = int(flags["seed"]), float(flags.get("size", 0.5)), Path(__file__).stem
    accuracy = size + (0.1 + 0.01 * seed) * (flags.get("mode") == "better") + 0.02 * seed
    metrics = {"accuracy": accuracy, "cost": {"gflops": 2 * size, "layers": 1}, "resumed": int(resumed)}
    for number in range(100):
        if not (models / f"{name}{number}").exists():
            break
    (models / f"{name}{number}").mkdir()
    (models / f"{name}{number}" / "weights.bin").write_text("x")
    record = {"stage": name, "created": str(time.time()), "metrics": metrics}
    (models / f"{name}{number}" / "stage.json").write_text(json.dumps(record))
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with the script under two names, and how it is studied there."""
    monkeypatch.setattr("compression.runtime.ROOT", tmp_path)
    for name in ("fake", "later"):
        (tmp_path / f"{name}.py").write_text(SCRIPT)
    return tmp_path


def words(work, *flags):
    return ["ablate.py", work / "fake.py", "--results_dir", work, "--models_dir", work / "models", *flags]


def study(work, *flags, expect=0):
    return run_script(*words(work, *flags), expect=expect)


def found(work, name="fake"):
    return json.loads((work / "studies" / name / "study.json").read_text())


def calls(work, name="fake"):
    """What each run's scripts were called with, by the run's point and seed."""
    by_run = {}
    for path in (work / "studies" / name / "runs").glob("*/run.json"):
        record = json.loads(path.read_text())
        lines = (path.parent / "models" / "calls").read_text().splitlines()
        by_run[json.dumps([record["point"], record["seed"]])] = [line.split() for line in lines]
    return by_run


GRID = ("--grid", "mode=plain,better", "size=0.2,0.4", "--seeds", 2)


def test_a_grid_with_seeds_gives_tables_and_every_run_its_record(work):
    said = study(work, *GRID, "--maximize", "accuracy", "--minimize", "gflops", "--fast").stdout
    folder = work / "studies" / "fake"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [(row["mode"], row["size"], row["seeds"]) for row in rows] == [
        ("plain", "0.2", "2"),
        ("plain", "0.4", "2"),
        ("better", "0.2", "2"),
        ("better", "0.4", "2"),
    ]
    # Row 3, seeds 0 and 1: 0.3 and 0.33; less row 1: 0.1 and 0.11.
    third = {name: float(value) for name, value in rows[2].items() if name.startswith("accuracy")}
    assert third == pytest.approx(
        {
            "accuracy mean": 0.315,
            "accuracy standard deviation": 0.03 / math.sqrt(2),
            "accuracy difference": 0.105,
            "accuracy standard error": 0.005,
        }
    )
    page = (folder / "table.md").read_text()
    assert "| 4 | better | 0.4 | 2 | **0.515 ± 0.021** | +0.305 ± 0.005 |" in page
    assert "| 1 | plain | 0.2 | 2 | 0.21 ± 0.014 |  | 0.4 ± 0 |" in page, "two rows have as few gflops: none is best"
    assert "| accuracy | mode | better | 4 | 0.415 | +0.105 ± 0.0029 |" in page
    assert (folder / "pareto.png").stat().st_size > 10_000 and "![pareto](pareto.png)" in page
    assert found(work)["front"] == [2, 3] and found(work)["command"].startswith("python ablate.py ")
    records = list(folder.glob("runs/*/models/fake0/stage.json"))
    assert len(records) == 8 and said.count("accuracy 0.") == 8
    assert all("--fast" in flags and "--resume" in flags for (flags,) in calls(work).values())


def test_the_same_command_does_nothing_anew_and_more_seeds_and_values_only_what_is_new(work):
    study(work, *GRID)
    first = calls(work)
    study(work, *GRID)
    assert calls(work) == first
    study(work, "--grid", "mode=plain,better", "size=0.2,0.4,0.6", "--seeds", 3, "--minimize", "gflops")
    now = calls(work)
    assert (
        len(now) == 18 and {run: now[run] for run in first} == first and {len(lines) for lines in now.values()} == {1}
    )
    assert [row["point"]["size"] for row in found(work)["rows"]] == [0.2, 0.4, 0.6] * 2


def test_a_run_is_its_inputs_too(work):
    data = work / "data.txt"
    for text, runs in (("one", 1), ("other", 2), ("one", 2)):
        data.write_text(text)
        study(work, "--fixed", f"data={data}")
        assert len(list((work / "studies/fake/runs").glob("*/run.json"))) == runs


def test_words_presets_and_switches_reach_the_script(work):
    (work / "study.yaml").write_text(
        "script: later.py\nfast: true\nseeds: 1\n"
        "grid: {pair: [[mac, 0.5], [mac, 0.2]], preset: [large]}\nfixed: {deep: true, layers: 3}\n"
    )
    run_script("ablate.py", work / "fake.py", "--config", work / "study.yaml", "--results_dir", work)
    flags = [" ".join(line[2:]) for (line,) in calls(work, "study").values()]
    assert sorted(line.split(" --models_dir")[0] for line in flags) == [
        f"--deep --layers 3 --fast --pair mac {share} --preset large --seed 0" for share in (0.2, 0.5)
    ]


def test_later_scripts_follow_each_run_and_read_its_model(work):
    then = [f"{work}/later.py --size 0.7 --output_dir {{run}}/x", f"{work}/later.py --seed 5"]
    study(work, "--grid", "size=0.1,0.2", "--then", *then, "--minimize", "fake.accuracy", "later.accuracy")
    for run, lines in calls(work).items():
        point, _ = json.loads(run)
        (model,) = {line[line.index("--pruned_model_path") + 1] for line in lines[1:]}
        assert model.endswith("/models/fake0") and len(lines) == 3
        assert lines[1][lines[1].index("--output_dir") + 1] == model.replace("models/fake0", "x")
        assert [line[line.index("--seed") + 1] for line in lines] == ["0", "0", "5"]
        (row,) = [row for row in found(work)["rows"] if row["point"] == point]
        assert row["goals"]["fake.accuracy"]["mean"] == point["size"]
        assert row["goals"]["later.accuracy"]["mean"] == pytest.approx(0.6), "the last one's"


def test_a_failed_run_keeps_its_last_lines_stops_no_other_and_is_retried_on_request(work):
    flags = ["--grid", "layers=1,13,3"]
    said = study(work, *flags, expect=1).stdout
    assert "layers 13, seed 0" in said and "1 failed" in said
    (failed,) = found(work)["failed"]
    assert failed["point"] == {"layers": 13, "seed": 0}
    assert failed["error"]["last_lines"][-2:] == ["some output", "error: --layers 13: allowed is another"]
    assert [row["point"] for row in found(work)["rows"]] == [{"layers": 1}, {"layers": 3}]
    assert "## Failed" in (work / "studies/fake/table.md").read_text()

    study(work, *flags, expect=1)
    assert {len(lines) for lines in calls(work).values()} == {1}, "no run is tried twice unasked"
    for name in ("fake", "later"):
        (work / f"{name}.py").write_text(SCRIPT.replace('== "13"', '== "no"'))
    study(work, *flags, "--retry_failed")
    assert found(work)["failed"] == [] and len(found(work)["rows"]) == 3
    assert sorted(len(lines) for lines in calls(work).values()) == [1, 1, 2]


@pytest.mark.parametrize("storage", [[], ["--storage", "sqlite:///{work}/study.db"]], ids=["journal", "sqlite"])
def test_a_killed_worker_leaves_no_process_and_the_next_one_takes_its_run_up(work, storage):
    flags = [*(word.format(work=work) for word in storage), "--grid", "size=0.1,0.2,0.3"]
    worker = start_script(*words(work, *flags), FAKE_SLEEP=600)
    states = lambda: list((work / "studies/fake/runs").glob("*/models/.state"))  # noqa: E731
    worker.wait_until(states)
    worker.end(signal.SIGKILL)
    ((line, *_),) = calls(work).values()
    wait_until(lambda: not os.path.exists(f"/proc/{line[0]}") or "Z" in open(f"/proc/{line[0]}/stat").read())
    said = study(work, *flags).stdout
    assert "it is taken up again" in said
    assert sorted(len(lines) for lines in calls(work).values()) == [1, 1, 2]
    resumed = [row["figures"]["fake.resumed"]["0"] for row in found(work)["rows"]]
    assert sorted(resumed) == [0, 0, 1], "it went on where it was"


def test_a_worker_that_is_asked_to_end_does_so_with_its_script(work):
    flags = ["--grid", "size=0.1,0.2"]
    worker = start_script(*words(work, *flags), FAKE_SLEEP=600)
    worker.wait_until(lambda: list((work / "studies/fake/runs").glob("*/models/.state")))
    ((line, *_),) = calls(work).values()
    result = worker.end(signal.SIGTERM).check(128 + signal.SIGTERM)
    assert "Traceback" not in result.stderr and not os.path.exists(f"/proc/{line[0]}")
    study(work, *flags)
    assert sorted(len(lines) for lines in calls(work).values()) == [1, 2]


@pytest.mark.parametrize("storage", [[], ["--storage", "sqlite:///{work}/study.db"]], ids=["journal", "sqlite"])
def test_two_workers_share_a_study_and_do_no_run_twice(work, storage):
    flags = [*(word.format(work=work) for word in storage), "--grid", "size=0.1,0.2,0.3,0.4", "--seeds", 2]
    workers = [start_script(*words(work, *flags), FAKE_SLEEP=0.5) for _ in range(2)]
    said = [worker.wait().check().stdout for worker in workers]
    assert [len(lines) for lines in calls(work).values()] == [1] * 8
    assert sum(text.count(": accuracy") for text in said) == 8 and all(": accuracy" in text for text in said)
    assert len(found(work)["rows"]) == 4 and found(work)["failed"] == []


def test_jobs_run_at_once_with_the_cores_divided(work, monkeypatch):
    monkeypatch.setenv("FAKE_SLEEP", "0.2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    study(work, "--grid", "size=0.1,0.2,0.3,0.4", "--jobs", 2)
    assert [len(lines) for lines in calls(work).values()] == [1] * 4
    assert {lines[0][1] for lines in calls(work).values()} == {"4"}


def test_gpus_and_cores_are_divided_among_workers(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def shares(visible, jobs):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return [(share.get("CUDA_VISIBLE_DEVICES"), share.get("OMP_NUM_THREADS")) for share in environments(jobs)]

    assert shares("4,5,6,7", 1) == [("4,5,6,7", None)]
    assert shares("4,5,6,7", 2) == [("4,6", "1"), ("5,7", "1")]
    assert shares("4,5", 3) == [("4", "1"), ("5", "1"), ("4", "1")]
    assert shares("", 2) == [("", "1"), ("", "1")]


def test_discarded_models_leave_their_records_and_inputs_stay(work):
    inputs = work / "models" / "teacher_model"
    inputs.mkdir(parents=True)
    (inputs / "weights.bin").write_text("of the user")
    study(work, "--discard_models")
    (run,) = (work / "studies/fake/runs").glob("*/models")
    assert (run / "fake0" / "stage.json").exists() and not (run / "fake0" / "weights.bin").exists()
    assert (run / "teacher_model").is_symlink() and (inputs / "weights.bin").read_text() == "of the user"


# Searches.


@pytest.mark.parametrize("search", ["tpe", "nsga2"])
def test_a_search_draws_by_its_seed_alone_and_goes_on_where_it_was(work, search):
    space = ["--grid", "size=0.1..0.9", "layers=1..8:log", "mode=plain,better", "--minimize", "gflops"]
    flags = ["--search", search, *space, "--maximize", "accuracy"]

    def points(folder):
        return [(row["point"], row["goals"]["gflops"]["mean"]) for row in found(folder)["rows"]]

    study(work, *flags, "--trials", 9)
    whole = points(work)
    assert 5 < len(whole) <= 9 and all(0.1 <= point["size"] <= 0.9 and 1 <= point["layers"] <= 8 for point, _ in whole)
    assert all(isinstance(point["layers"], int) and gflops == 2 * point["size"] for point, gflops in whole)
    parts = work / "again"
    for trials in (4, 9):
        run_script(*words(work, *flags, "--trials", trials)[:2], *flags, "--trials", trials, "--results_dir", parts)
    assert points(parts) == whole
    assert 0.9 < sum(found(work)["importances"]["gflops"].values()) < 1.1
    assert "What explains gflops" in (work / "studies/fake/table.md").read_text()


def test_a_searched_point_has_all_seeds(work):
    study(work, "--search", "tpe", "--grid", "size=0.1..0.9", "--trials", 2, "--seeds", 2)
    rows = found(work)["rows"]
    assert [set(row["figures"]["accuracy"]) for row in rows] == [{"0", "1"}] * 2
    assert rows[0]["goals"]["accuracy"]["mean"] == pytest.approx(rows[0]["point"]["size"] + 0.01)


# Workers, one by one.


@pytest.fixture(params=["journal", "sqlite"])
def opened(request, tmp_path):
    """Opens the same study again and again, as workers do."""
    url = None if request.param == "journal" else f"sqlite:///{tmp_path}/study.db"

    def open_one(search="none", grace=100.0):
        axes = [Choices("size", (1, 2))] if search == "none" else [Range("size", 1, 9)]
        storage = open_storage(url, tmp_path / "journal.log")
        return SharedStudy(storage, "one", axes, False, {"x": True}, make_sampler(search, 0, 9), grace)

    return open_one


def test_one_trial_is_one_workers(opened):
    first, second = opened(), opened()
    assert first.fill([{"size": 1}, {"size": 2}]) == 2 and second.fill([{"size": 1}, {"size": 2}]) == 0
    taken = [worker.claim().number for worker in (first, second)]
    assert sorted(taken) == [0, 1] and first.claim() is None and second.is_open()
    for worker, number in zip((first, second), taken, strict=True):
        worker.finish(number, [], [1.0])
    assert not first.is_open() and [trial.state for trial in second.trials()] == [TrialState.COMPLETE] * 2


def test_of_a_point_that_two_workers_added_one_trial_counts(opened):
    first, second = opened(), opened()
    for worker in (first, second):
        worker._add({"size": 1})
    assert first.claim().number == 0 and second.claim() is None
    assert [trial.number for trial in second.trials()] == [0]


def test_a_worker_of_another_machine_counts_as_killed_when_nothing_is_heard_of_it(opened, monkeypatch):
    theirs, ours = opened(), opened()
    theirs.fill([{"size": 1}])
    monkeypatch.setattr(shared.socket, "gethostname", lambda: "elsewhere")
    trial = theirs.claim()
    monkeypatch.undo()
    clock = [0.0]
    monkeypatch.setattr(shared.time, "monotonic", lambda: clock[0])
    for seconds, beats in ((0, False), (99, True), (150, False), (198, False)):
        clock[0] = seconds
        if beats:
            theirs.beat(trial.number)
        ours.take_up_killed()
        assert [one.number for one in ours.trials()] == [0]
    clock[0] = 300
    ours.take_up_killed()
    (again,) = ours.trials()
    assert again.number == 1 and again.user_attrs["point"] == {"size": 1} and ours.claim().number == 1

    # It was asleep: what it does now counts nowhere.
    assert theirs.beat(trial.number) is False
    theirs.finish(trial.number, [], [1.0])
    assert [(one.number, one.state) for one in ours.trials()] == [(1, TrialState.RUNNING)]


def test_no_more_points_are_drawn_than_are_asked_for(opened):
    first, second = opened("tpe"), opened("tpe")
    drawn = [worker.draw(3) for worker in (first, second, first, second)]
    assert [trial and trial.number for trial in drawn] == [0, 1, 2, None]
    assert len({trial.user_attrs["point"]["size"] for trial in drawn[:3]}) > 1


def test_what_is_stopped_starts_nothing_more(tmp_path):
    processes = Processes()
    processes.stop()
    with pytest.raises(Exception, match="^$"):
        processes.wait([sys.executable, "-c", "open('x', 'w')"], {}, tmp_path / "log", lambda: None, 1.0)
    assert list(tmp_path.iterdir()) == []


# Arithmetic.


def row(point, **values):
    by_seed = dict(enumerate(values["a"]))
    return Row(point, {"a": by_seed}, {seed: "" for seed in by_seed})


def test_differences_are_paired_by_seed():
    rows = [row({"x": 1}, a=[1.0, 3.0, 5.0]), row({"x": 2}, a=[2.0, 5.0, 6.0]), row({"x": 3}, a=[4.0])]
    first, second, third = summarize(rows, "a", True)
    assert (first.mean, first.spread, first.difference) == (3.0, 2.0, None)
    # 1, 2 and 1: mean 4/3, standard deviation 1/sqrt(3), standard error 1/3; unpaired it would be 1.7.
    assert second.difference.mean == pytest.approx(4 / 3) and second.difference.error == pytest.approx(1 / 3)
    assert (third.spread, third.difference.mean, third.difference.error) == (None, 3.0, None)
    assert summarize(rows, "b", True) == [None, None, None]


@pytest.mark.parametrize(
    ("values", "maximize", "best"),
    [
        ([[1.0, 2.0], [2.0, 3.1], [1.2, 2.0]], True, 1),
        ([[1.0, 2.0], [2.0, 3.1], [1.2, 2.0]], False, None),  # the first one by 0.1 ± 0.1
        ([[1.0, 2.0], [2.0, 2.0], [0.0, 1.0]], False, 2),
        ([[1.0, 2.0], [0.0, 4.0]], True, None),
        ([[5.0, 6.0], [1.0, 2.1]], True, 0),
        ([[1.0], [2.0]], True, None),
        ([[1.0, 2.0]], True, None),
        ([[1.0, 1.0], [1.0, 1.0]], True, None),
    ],
)
def test_the_best_is_marked_where_it_is_sure(values, maximize, best):
    assert best_row([dict(enumerate(own)) for own in values], maximize) == best


def test_effects_compare_runs_that_are_alike_otherwise():
    rows = [row({"x": x, "y": y}, a=[x + y, x + y + s]) for x, y, s in ((0, 0, 1), (1, 0, 2), (0, 5, 1), (1, 5, 2))]
    found = effects(rows, "a")
    assert [(effect.field, effect.value, effect.runs, effect.mean) for effect in found] == [
        ("x", 0, 4, 3.0),
        ("x", 1, 4, 4.5),
        ("y", 0, 4, 1.25),
        ("y", 5, 4, 6.25),
    ]
    assert found[1].difference.mean == 1.5 and found[1].difference.error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert found[3].difference.mean == 5.0 and found[3].difference.error == 0.0


def test_the_front_has_what_nothing_beats():
    points = [(1, 1), (2, 3), (3, 3), (3, 2), (0, 0), (1, 1)]
    assert undominated(points, [True, False]) == [3, 4, 0, 5] or undominated(points, [True, False]) == [0, 3, 4, 5]


def test_figures_are_found_by_a_part_of_their_name():
    steps = [{"pruned.accuracy": 1.0, "pruned.cost.gflops": 2.0}, {"q.accuracy": 3.0, "q.a.x": 4.0, "q.b.x": 5.0}]
    assert look_up(steps, "accuracy", "") == 3.0 and look_up(steps, "pruned.accuracy", "") == 1.0
    assert look_up(steps, "gflops", "") == look_up(steps, "cost.gflops", "") == 2.0 and look_up(steps, "a.x", "") == 4.0
    with pytest.raises(UserError, match="--maximize x: may be q.a.x, q.b.x"):
        look_up(steps, "x", "--maximize")
    with pytest.raises(
        UserError, match="--minimize flops: no such figure; there are pruned.accuracy, pruned.cost.gflops"
    ):
        look_up(steps, "flops", "--minimize")


def test_passwords_of_databases_are_not_shown():
    for url, shown in (
        ("postgresql+psycopg://me:secret@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:///study.db", "sqlite:///study.db"),
    ):
        assert shared.without_password(url) == shown


# What is refused.

SEARCH = ["--search", "tpe", "--grid"]
BAD = [
    (["--grid", "heads=1,2"], "--grid heads: no field of fake.py; there are mode, size, layers"),
    (["--grid", "mode=plain,worse"], "--grid mode=worse: allowed is plain or better"),
    (["--grid", "size=small"], "--grid size=small: allowed is a number"),
    (["--grid", "layers=1.5"], "--grid layers=1.5: allowed is a whole number"),
    (["--grid", "deep=2"], "--grid deep=2: allowed is true or false"),
    (["--grid", "size=0.1,2"], "fake.py: --size 2.0: allowed is 0 to 1"),
    (["--grid", "pair=mac"], "--grid pair=mac: allowed is"),
    (["--grid", "size"], "--grid size: allowed is NAME=VALUE"),
    (["--grid", "size=0.1,0.1"], "has 0.1 twice"),
    (["--grid", "size=[1"], "no JSON list"),
    (["--grid", "size=0.1", "size=0.2"], "--grid size: is given twice"),
    (["--grid", "size=0.1..0.2"], "a range needs --search"),
    (["--grid", "seed=1,2"], "--grid seed: --seeds sets it"),
    (["--grid", "models_dir=x"], "--grid models_dir: a study sets it itself"),
    (["--grid", "preset=small"], "--grid preset=small: unknown; allowed: fast, large"),
    (["--grid", "layers=1,2", "--fixed", "deep=true"], "fake.py: --layers 1: allowed with --deep is at least 2"),
    (["--grid", "size=0.1", "--fixed", "size=0.2"], "--fixed size: is in --grid, too"),
    (["--fixed", "mode=worse"], "--fixed mode=worse: allowed is plain or better"),
    ([*SEARCH, "size=0.1..2"], "fake.py: --size 2.0: allowed is 0 to 1"),
    ([*SEARCH, "size=0.5..0.1"], "LOW under HIGH"),
    ([*SEARCH, "size=0..0.5:log"], "above 0 with :log"),
    ([*SEARCH, "mode=a..b"], "--grid mode=a: allowed is plain or better"),
    (["--search", "tpe"], "needs --grid"),
    (["--then", "nothing.py"], "--then nothing.py: no such file"),
    (["--then", "{work}/later.py --size 3"], "--then later.py: --size 3.0: allowed is 0 to 1"),
    (["--then", "{work}/later.py --heads 3"], "--then later.py: Unrecognized options: --heads"),
    (["--maximize", "a", "--minimize", "a"], "--maximize a: is in --minimize, too"),
    (["--seeds", "0"], "--seeds 0: allowed is at least 1"),
    (["--name", "a/b"], "--name 'a/b': allowed is a plain folder name"),
    (["--storage", "nosuch://x:secret@host/db"], "--storage nosuch://x:***@host/db"),
    (["--config", "nothing.yaml"], "--config nothing.yaml: no such file"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_wrong_is_said_in_one_line_before_the_first_run(work, flags, message):
    err = study(work, *(flag.format(work=work) for flag in flags), expect=2).stderr
    assert message in err and len(err.strip().splitlines()) == 1 and "secret" not in err
    assert not list(work.rglob("run.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: [", "is no YAML"),
        ("- a", "holds a list; allowed is NAME: VALUE"),
        ("gird: {size: [1]}", "gird is no setting; there are discard_models, fast"),
        ("grid: [size]", "grid holds a list; allowed is FIELD: VALUE"),
        ("grid: {mode: [no]}", "--grid mode=False: allowed is plain or better"),
    ],
)
def test_a_bad_file_is_refused(work, text, message):
    (work / "study.yaml").write_text(text)
    err = study(work, "--config", work / "study.yaml", expect=2).stderr
    assert message in err and len(err.strip().splitlines()) == 1


def test_a_script_is_needed_and_must_have_one_configuration(work):
    (work / "none.py").write_text("")
    assert "no script given" in run_script("ablate.py", expect=2).stderr
    assert "has 0 configurations" in run_script("ablate.py", work / "none.py", expect=2).stderr
    assert "no such file" in run_script("ablate.py", work / "gone.py", expect=2).stderr
    assert "draws nothing" in run_script("ablate.py", "9_quantize_pruned_model.py", "--seeds", 2, expect=2).stderr


def test_a_figure_that_is_not_there_ends_the_study_and_its_runs_are_kept(work):
    err = study(work, "--grid", "size=0.1,0.2", "--maximize", "speed", expect=2).stderr
    assert "--maximize speed: no such figure; there are fake.accuracy, fake.cost.gflops" in err
    assert len(calls(work)) == 1
    study(work, "--grid", "size=0.1,0.2", "--maximize", "accuracy")
    assert {len(lines) for lines in calls(work).values()} == {1} and len(found(work)["rows"]) == 2


# Real stages.


class Forked:
    """Stands in for subprocess.Popen of a script: a process that skips the imports."""

    def __init__(self, command):
        self.running = start_script(*command[1:])

    def poll(self):
        return self.running.process.exitcode

    def wait(self, timeout):
        self.running.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("", timeout)
        return self.poll()


def test_stages_8_and_9_of_this_repository_can_be_studied(tmp_path, tokenizer, monkeypatch):
    start = subprocess.Popen
    monkeypatch.setattr(
        "subprocess.Popen",
        lambda command, **options: Forked(command) if command[0] == sys.executable else start(command, **options),
    )
    for name in ("train.tsv", "dev.tsv"):
        rows = [f"{letter} a b{' c' * index}\t{index % 2}" for index, letter in enumerate("abcdefghijklmnopqrst")]
        (tmp_path / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    for stage, model in (("teacher", tiny_bert()), ("student", tiny_distilbert())):
        described = describe_stage(stage, {}, {}, {}, {"name": "x"})
        save_checkpoint(tmp_path / "models" / f"{stage}_model", model, tokenizer, described)
    places = ["--models_dir", tmp_path / "models", "--results_dir", tmp_path, "--fast"]
    quick = ["max_length=32", "num_epochs=1", "pruning_end_epoch=1", f"data_dir={tmp_path}", "train_fraction=1"]
    flags = ["--grid", "head_final_sparsity=0.25,0.5", "--fixed", *quick, "--then", "9_quantize_pruned_model.py"]
    goals = ["--maximize", "accuracy", "--minimize", "gflops", "bytes_after.total", "--discard_models"]
    run_script("ablate.py", "8_pruning_with_finetuning.py", *flags, *places, *goals)
    rows = found(tmp_path, "8_pruning_with_finetuning")["rows"]
    gflops = [row["goals"]["gflops"]["mean"] for row in rows]
    assert gflops[0] > gflops[1] > 0 and all(row["goals"]["bytes_after.total"]["mean"] > 0 for row in rows)
    assert (tmp_path / "models" / "student_model" / "model.safetensors").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_this_repository_are_as_their_scripts_allow(path):
    assert run_script("ablate.py", "--config", path, "--dry_run").stderr == ""
    more = ["--fixed", "batch_size=8"] if "8_pruning" in path.read_text() else ["--fixed", "num_samples=2"]
    assert run_script("ablate.py", "--config", path, *more, "--dry_run").stderr == ""
    assert (
        "no field of" in run_script("ablate.py", "--config", path, "--fixed", "nothing=1", "--dry_run", expect=2).stderr
    )
