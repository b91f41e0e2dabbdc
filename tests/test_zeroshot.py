"""Files of zero-shot questions are checked line by line before a model is measured."""

import pytest
from conftest import save_decoder, tiny_decoder, write_zero_shot
from transformers import AutoTokenizer

from compression.llm.zeroshot import check_tasks, zero_shot
from compression.runtime import UserError

PIQA = {"goal": "a b", "sol1": "c", "sol2": "d", "label": 1, "source": None}
ARC = {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": "B"}
WINOGRANDE = {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "2"}
HELLASWAG = {"query": "a", "choices": ["b", "c"], "gold": 0}
GOOD = {"piqa": PIQA, "arc_easy": ARC, "winogrande": WINOGRANDE, "hellaswag": HELLASWAG}


def test_good_files_pass(tmp_path):
    for task, row in GOOD.items():
        write_zero_shot(tmp_path, task, row, row | {"note": "only here"}, row)
    check_tasks(list(GOOD), str(tmp_path))


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("piqa", "{", "line 3: Expecting property name"),
        ("piqa", "[" * 100_000, "line 3: it is nested too deeply"),
        ("piqa", "[1]", "line 3 holds a list; allowed is an object"),
        ("piqa", PIQA | {"goal": 5}, "line 3: goal is '5', a int; allowed is one type in all lines"),
        ("piqa", PIQA | {"goal": None}, "line 3: the task piqa cannot read it (it lacks goal)"),
        ("piqa", {"goal": "a", "sol1": "b", "label": 0}, "line 3: the task piqa cannot read it (it lacks sol2)"),
        (
            "piqa",
            PIQA | {"label": 2},
            "line 3: the task piqa cannot read it (ValueError: the right answer is '2', of 2)",
        ),
        ("piqa", PIQA | {"label": -1}, "the right answer is '-1', of 2"),
        ("arc_easy", ARC | {"answerKey": "C"}, "line 3: the task arc_easy cannot read it ("),
        ("winogrande", WINOGRANDE | {"sentence": "a b"}, "line 3: the task winogrande cannot read it ("),
        ("winogrande", WINOGRANDE | {"answer": "3"}, "line 3: the task winogrande cannot read it (KeyError: '3')"),
        ("hellaswag", HELLASWAG | {"choices": [1, 2]}, "cannot read it ("),
        (
            "hellaswag",
            HELLASWAG | {"choices": []},
            "line 3: the task hellaswag cannot read it (ValueError: its answers",
        ),
    ],
)
def test_a_line_that_the_task_cannot_read_is_named(tmp_path, task, line, message):
    path = write_zero_shot(tmp_path, task, GOOD[task], "", line)
    with pytest.raises(UserError) as caught:
        check_tasks([task], str(tmp_path))
    assert str(caught.value).startswith(f"--data_dir {path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\n", "no questions"), (b"a\0", "byte 1 is zero")]
)
def test_files_without_questions_are_refused(tmp_path, content, message):
    write_zero_shot(tmp_path, "piqa").write_bytes(content)
    with pytest.raises(UserError, match=message):
        check_tasks(["piqa"], str(tmp_path))


def test_a_column_that_all_lines_lack_is_named(tmp_path):
    write_zero_shot(tmp_path, "piqa", {"goal": "a", "label": 0})
    with pytest.raises(UserError, match="validation.jsonl: .*the task piqa cannot read it .it lacks sol1, sol2"):
        check_tasks(["piqa"], str(tmp_path))


def test_only_the_lines_that_are_used_are_put_to_the_task(tmp_path):
    write_zero_shot(tmp_path, "piqa", PIQA, PIQA | {"label": 7})
    check_tasks(["piqa"], str(tmp_path), limit=1)
    with pytest.raises(UserError, match="line 2"):
        check_tasks(["piqa"], str(tmp_path))


def test_what_the_harness_fails_on_is_said_with_task_and_file(tmp_path, monkeypatch):
    model = tiny_decoder()
    tokenizer = AutoTokenizer.from_pretrained(save_decoder(tmp_path / "model", model))
    path = write_zero_shot(tmp_path, "piqa", PIQA)
    assert zero_shot(model, tokenizer, ["piqa"], str(tmp_path))["piqa"]["n"] == 1

    def fail(*_, **__):
        raise KeyError("nothing")

    monkeypatch.setattr("lm_eval.simple_evaluate", fail)
    message = f"zero-shot tasks piqa: lm-evaluation-harness failed on {path} .KeyError: 'nothing'.; leave one out"
    with pytest.raises(UserError, match=message):
        zero_shot(model, tokenizer, ["piqa"], str(tmp_path))
