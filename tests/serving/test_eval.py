"""`lrserve eval` on tiny random models: the task made from text end to end, local tasks, and what cannot be run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from report.synthetic import metrics
from tiny import dense_model, factorized_model, tiny_tokenizer, write_artifact, write_dense

from lrserve.engines.harness import Harness
from lrserve.engines.harness_worker import collect, load_tasks
from lrserve.errors import ArtifactError, InputError
from lrserve.inputs.cloze import CLOZE, write_cloze
from lrserve.inputs.text import read_documents
from lrserve.pipeline.inspect import verify
from lrserve.recipe import Recipe
from lrserve.report.card import model_card
from lrserve.serving import eval as evaluating
from lrserve.serving.eval import evaluate, named_tasks
from lrserve.storage.store import write_manifest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, an artifact of it and its text."""
    place = tmp_path_factory.mktemp("eval")
    dense = write_dense(dense_model("LlamaForCausalLM"), place / "dense")
    sentences = (
        "The {0} did a thing with number {1}.",
        "Then the {0} went {1} steps up the hill.",
        "Nobody saw {0} after {1} days.",
    )
    documents = (" ".join(s.format(f"cat{index}", 3 * index) for s in sentences * 2) for index in range(20))
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    out = write_artifact(factorized_model("LlamaForCausalLM"), place / "out")
    tiny_tokenizer().save_pretrained(out)
    (out / "lrserve").mkdir()
    recipe = Recipe.load(
        None,
        {
            "model": str(dense),
            "text.calibration": "gone.jsonl",
            "text.report": str(place / "text.jsonl"),
            "engine.dtype": "float32",
            "engine.enforce_eager": True,
        },
    )
    (out / "lrserve" / "recipe.yaml").write_text(recipe.to_yaml())
    (out / "lrserve" / "metrics.json").write_text(json.dumps(metrics()))
    (out / "README.md").write_text(model_card(metrics()))
    write_manifest(out, {"lrserve": "0"}, {})
    return place


@pytest.fixture
def artifact(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "out", tmp_path / "out"))


def test_the_task_made_from_text_runs_and_stands_in_card_metrics_and_manifest(artifact: Path, tmp_path: Path) -> None:
    said: list[str] = []
    figures = evaluate(artifact, limit=12, report=tmp_path / "report", say=said.append)
    task = figures["tasks"][CLOZE]
    assert (task["items"], task["shots"], task["chance"]) == (12, 0, 0.25)
    found = task["metrics"]["acc_norm"]
    for side in ("dense", "compressed"):
        assert 12 * found[side]["value"] == pytest.approx(round(12 * found[side]["value"]))
        assert found[side]["stderr"] is not None
    assert found["difference"]["stderr"] is not None
    assert figures["models"] == {"dense": "dense", "compressed": "out"}
    assert said[-2] in (tmp_path / "report" / "eval.md").read_text()
    assert json.loads((tmp_path / "report" / "eval.json").read_text()) == figures
    kept = json.loads((artifact / "lrserve" / "metrics.json").read_text())
    assert kept["eval"][CLOZE]["metrics"] == task["metrics"]
    assert kept["eval"][CLOZE]["made"] == figures["made"]
    assert {key: kept[key] for key in metrics()} == json.loads(json.dumps(metrics()))
    assert f"| {CLOZE} | acc_norm |" in (artifact / "README.md").read_text()
    assert "match the manifest" in verify(artifact)


LOCAL = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_local_files_and_folders_are_tasks(place: Path, tmp_path: Path) -> None:
    cloze = write_cloze(read_documents(str(place / "text.jsonl")), tmp_path, 8)
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(LOCAL.format(name=name, data=cloze.with_suffix(".jsonl")))
    tasks = named_tasks([str(cloze), str(folder)])
    with Harness(place / "dense", tasks, engine="transformers", dtype="float32") as harness:
        alone = harness.evaluate(tasks[0])
        both = harness.evaluate(tasks[1], limit=5, shots=1)
    assert list(alone) == [CLOZE]
    assert (alone[CLOZE]["items"], len(alone[CLOZE]["metrics"]["acc_norm"]["samples"])) == (8, 8)
    assert {name: (task["items"], task["shots"], list(task["metrics"])) for name, task in both.items()} == {
        "one": (5, 1, ["acc"]),
        "two": (5, 1, ["acc"]),
    }


@pytest.mark.engine
def test_vllm_gives_what_transformers_gives(place: Path, tmp_path: Path) -> None:
    task = str(write_cloze(read_documents(str(place / "text.jsonl")), tmp_path, 12))
    found = []
    for engine in ("transformers", "vllm"):
        with Harness(place / "out", [task], engine=engine, dtype="float32") as harness:
            found.append(harness.evaluate(task)[CLOZE])
    assert found[0] == found[1]


def test_names_paths_and_what_is_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    mine = str(tmp_path / "mine.yaml")
    assert named_tasks(["arc_easy,hellaswag", "mine.yaml", "arc_easy"]) == ["arc_easy", "hellaswag", mine]
    for path in ("other.yaml", "no/such/folder"):
        with pytest.raises(InputError, match=f"no task at {path}"):
            named_tasks([path])


def test_a_task_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task 'hellaswg' in lm-evaluation-harness; did you mean hellaswag"):
        load_tasks(["hellaswg"], named=True)
    with pytest.raises(InputError, match=r"holds no task .*a \.yaml file"):
        load_tasks([str(tmp_path)], named=False)
    path = tmp_path / "task.yaml"
    for text, reason in ((LOCAL.format(name="x", data="missing.jsonl"), "FileNotFoundError"), ("a: [", "ParserError")):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"task.yaml cannot be loaded \({reason}.*check the file") as caught:
            load_tasks([str(path)], named=False)
        assert "\n" not in str(caught.value)


def harness_results() -> dict[str, Any]:
    """What lm_eval.simple_evaluate returns for a group with figures of its own and a generating task, in part."""
    samples = [
        {"doc_id": index, "filter": "none", "arguments": [[]] * (2 + 2 * index), "acc": float(index), "f1": (1, 2)}
        for index in (1, 0)
    ]
    return {
        "results": {
            "group": {"alias": "group", "name": "group", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 4},
            "inner": {"alias": " - inner", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "below": {"alias": " - below", "acc,none": 0.5, "acc_stderr,none": 0.1},
            "open": {"alias": "open", "acc,none": 0.5, "f1,none": 0.7, "ppl,strict": 3.0, "bleu,none": float("nan")},
        },
        "group_subtasks": {"group": ["inner"], "inner": ["below"]},
        "higher_is_better": {"open": {"acc": True, "ppl": False}, "group": {"acc": True}},
        "n-shot": {"open": 3},
        "configs": {"open": {"output_type": "multiple_choice"}},
        "samples": {"open": samples},
    }


def test_of_a_group_with_figures_of_its_own_only_those_are_shown() -> None:
    found = collect(harness_results())
    assert list(found) == ["group", "open"]
    assert found["group"]["items"] == 4
    assert found["group"]["metrics"] == {"acc": {"value": 0.5, "stderr": None, "higher_is_better": True, "samples": None}}
    without = harness_results()
    without["results"]["group"] = {"alias": "group"}
    assert list(collect(without)) == ["inner", "open"]


def test_items_count_where_the_metric_is_their_mean() -> None:
    found = collect(harness_results())["open"]
    assert (found["items"], found["shots"], found["chance"]) == (2, 3, pytest.approx((1 / 2 + 1 / 4) / 2))
    assert {name: metric["samples"] for name, metric in found["metrics"].items()} == {
        "acc": [0.0, 1.0],
        "f1": None,
        "ppl,strict": None,
    }
    assert {name: metric["higher_is_better"] for name, metric in found["metrics"].items()} == {
        "acc": True,
        "f1": True,
        "ppl,strict": False,
    }


class Fake:
    """A harness that knows the answers."""

    def __init__(self, model: Path, tasks: list[str], **_: Any) -> None:
        self.value = 0.5 if model.name == "dense" else 0.4

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None: ...

    def evaluate(self, task: str, **_: Any) -> dict[str, Any]:
        metric = {"value": self.value, "stderr": 0.01, "higher_is_better": True, "samples": None}
        return {task: {"items": 9, "shots": 0, "chance": None, "metrics": {"acc": metric}}}


def test_tasks_are_added_to_those_of_earlier_runs(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "Harness", Fake)
    for names in (["a"], ["b,c"], ["a"]):
        figures = evaluate(artifact, tasks=names, say=lambda line: None)
        assert figures["tasks"][names[0][0]]["metrics"]["acc"]["recovery"] == pytest.approx(0.8)
        verify(artifact)
    assert set(json.loads((artifact / "lrserve" / "metrics.json").read_text())["eval"]) == {"a", "b", "c"}
    assert (artifact / "README.md").read_text().count("## Tasks") == 1


def test_an_artifact_that_was_changed_stays_as_it_is(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "Harness", Fake)
    (artifact / "README.md").write_text("# Mine\n")
    before = (artifact / "lrserve" / "metrics.json").read_text()
    said: list[str] = []
    evaluate(artifact, tasks=["a"], say=said.append)
    assert "README.md is not the file that the manifest names. Keep the figures with --report" in said[-1]
    assert (artifact / "README.md").read_text() == "# Mine\n"
    assert (artifact / "lrserve" / "metrics.json").read_text() == before


def test_a_text_that_is_not_here_is_named_with_the_ways_out(artifact: Path, tmp_path: Path) -> None:
    recipe = artifact / "lrserve" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("text.jsonl", "gone.jsonl"))
    with pytest.raises(
        InputError, match=r"text of the artifact's recipe cannot be read: no text file at .*Give --text FILE, or --tasks"
    ):
        evaluate(artifact)
    with pytest.raises(InputError, match="no text file at"):
        evaluate(artifact, text=str(tmp_path / "gone.txt"))


def test_what_cannot_be_evaluated_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no folder at"):
        evaluate(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can be made for --report"):
        evaluate(artifact, report=tmp_path / "file" / "report")
    with pytest.raises(InputError, match="no model at"):
        evaluate(artifact, dense="no/such/model")
    (artifact / "config.json").unlink()
    with pytest.raises(ArtifactError, match="has no checkpoint; export it with --export vllm"):
        evaluate(artifact)
