"""README and docs: their commands exist and run, their links resolve, and what is generated is up to date.

Commands in blocks are checked in three depths. Every command must be of a kind that is known here, with options that it has.
`compress-and-export` in README and guide.md runs with --dry-run on a tiny model. README's runs in full, with real engines.
"""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel
from tiny import dense_model, factorized_model, tiny_tokenizer, write_artifact, write_dense, write_text
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from lrserve.cli import app
from lrserve.pipeline import run
from lrserve.recipe import EngineSettings, Recipe, Workload
from lrserve.serving.bench import server_arguments
from lrserve.serving.kv_cache import LEAST, cache_argument
from lrserve.serving.onnx_server import parser as graph_flags
from lrserve.serving.server import memory_environment, server_command, server_environment

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
README, GUIDE, RECIPE = ROOT / "README.md", ROOT / "docs/guide.md", ROOT / "docs/recipe.md"
PAGES = [README, ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench/results/README.md"]
CELL = re.compile(r"@@[\w-]+@@")
"""A figure that is still to be measured."""
DIARY = re.compile(r"today's build|(earlier|previous) (build|version)|of before\b|since then|session before|used to be", re.I)
VERBS: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OPTIONS = {verb: {name for p in command.params for name in (*p.opts, *p.secondary_opts)} for verb, command in VERBS.items()}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
MARKERS = {marker.partition(":")[0] for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
SMALL: dict[str, Any] = {
    "calibration": {"sequences": 8, "length": 32, "pool_sequences": 4, "batch_tokens": 64},
    "factorization": {"weights": [], "fisher_tokens": 128, "refine_tokens": 128},
    "search": {
        "trials": 3,
        "rank_step": 8,
        "probe_tokens": 64,
        "validation_tokens": 256,
        "validation_pool": 256,
        "validation_length": 32,
        "measured_plans": 1,
    },
    "workloads": {"chat": {"prompt_tokens": 8, "output_tokens": 8, "concurrency": 2}},
    "engine": {"dtype": "float32", "enforce_eager": True, "repeats": 1},
    "report": {"tokens": 128, "length": 32, "prompts": 2, "prompt_tokens": 12, "new_tokens": 8},
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line it begins on, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Where it stands, for messages and test names."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def prose_and_blocks(page: Path) -> tuple[str, list[Block]]:
    """Split a page into its text without fenced blocks, and these."""
    prose: list[str] = []
    blocks: list[Block] = []
    inside: list[str] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if inside is None:
                begin, language, inside = number, line[3:].strip(), []
            else:
                blocks.append(Block(page, begin, language, "\n".join(inside)))
                inside = None
        elif inside is None:
            prose.append(line)
        else:
            inside.append(line)
    assert inside is None, f"{page}: the block at line {begin} does not end"
    return "\n".join(prose), blocks


def commands(text: str) -> Iterator[list[str]]:
    """Yield the commands of a shell block as words, without assignments before them and without comments."""
    lexer = shlex.shlex(text.replace("\\\n", " ").replace("\n", " ; "), posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in (*lexer, ";"):
        if word in (";", "||", "&&"):
            if words:
                yield words
            words = []
        elif words or not re.match(r"[A-Z_]+=", word):
            words.append(word)


def shell(page: Path) -> list[tuple[Block, list[str]]]:
    """Return the commands of a page's shell blocks."""
    found = []
    for block in prose_and_blocks(page)[1]:
        if block.language == "sh":
            text = re.sub(r"(^|\s)#.*", "", block.text, flags=re.M)
            found += [(block, words) for words in commands(text)]
    return found


SHELL = [(block, words) for page in PAGES for block, words in shell(page)]
SPANS = [(page, CELL.sub("1", span)) for page in PAGES for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose_and_blocks(page)[0])]


def ids(found: Sequence[tuple[Block, list[str]]]) -> list[str]:
    return [f"{block.name} {' '.join(words)[:50]}" for block, words in found]


# What a command must be


def check(words: list[str]) -> None:
    """Fail for a command that no reader could run as it stands; teach it here what other commands a page may have."""
    program, arguments = Path(words[0]).name, words[1:]
    match program:
        case "lrserve":
            verb, *rest = arguments
            if verb != "--help":
                assert verb in VERBS, f"no verb {verb}"
                ours = rest[: rest.index("--")] if "--" in rest else rest  # what follows is vLLM's
                context = VERBS[verb].make_context(verb, list(ours))  # raises on unknown options and bad values
                assert not context.args or (verb == "serve" and context.args[0].startswith("-")), context.args
        case "vllm":
            assert arguments[0] == "serve"
        case "torchrun":
            launched = get_args_parser().parse_args(arguments)
            assert launched.no_python
            check([launched.training_script, *launched.training_script_args])
        case "make":
            assert set(arguments) <= TARGETS, f"the Makefile has {sorted(TARGETS)}"
        case "pip":
            check_pip(arguments)
        case "python":
            check_python(arguments)
        case "rm":
            places = [argument for argument in arguments if argument != "-rf"]
            assert places, "nothing to remove"
            assert all(re.fullmatch(r"OUT[\w.-]*|~/\.cache/lrserve", place) for place in places), "removes a user's files"
        case _:
            pytest.fail(f"a command that tests/test_docs.py does not know: {program}")


def check_pip(arguments: list[str]) -> None:
    """Extras must exist, and nothing is installed or removed but ours and torchvision, with what comes with it."""
    verb, *rest = arguments
    names = [word for word in rest if not word.startswith(("-", "https://"))]
    if verb == "uninstall":
        assert set(names) <= {"lrserve", "torchvision", "torchaudio", "torchcodec"}
        return
    assert verb == "install"
    for name in names:
        if name == "torchvision":  # which vLLM needs for multimodal models
            continue
        found = re.fullmatch(r"(?:\.|lrserve)(?:\[([\w,-]+)\])?", name)
        assert found, f"installs {name}"
        missing = set((found[1] or "").split(",")) - {""} - set(PYPROJECT["project"]["optional-dependencies"])
        assert not missing, f"pyproject.toml has no extra {', '.join(missing)}"


def check_python(arguments: list[str]) -> None:
    """Scripts must exist and know their options; code must compile; pytest's paths and markers must exist."""
    if arguments[0] == "-c":
        compile(arguments[1], "docs", "exec")
    elif arguments[:2] == ["-m", "pytest"]:
        rest = arguments[2:]
        for option, value in zip(["", *rest], [*rest, ""], strict=True):
            if option == "-m":
                assert value in MARKERS
            elif value and not value.startswith("-") and option != "-k":
                assert (ROOT / value).exists(), value
    else:
        script = ROOT / arguments[0]
        assert script.is_file(), script
        text = script.read_text()
        imported = (script.with_name(f"{name}.py") for name in re.findall(r"^(?:from|import) (\w+)", text, re.M))
        text += "".join(path.read_text() for path in imported if path.is_file())  # bench's scripts share options
        for option in (word for word in arguments[1:] if word.startswith("--")):
            assert f'"{option}"' in text, f"{arguments[0]} has no {option}"


@pytest.mark.parametrize(("block", "words"), SHELL, ids=ids(SHELL))
def test_every_command_exists_with_its_options(block: Block, words: list[str]) -> None:
    check(words)


@pytest.mark.parametrize(
    "words",
    [
        ["lrserve", "compress", "MODEL"],
        ["lrserve", "compress-and-export", "MODEL", "-o", "OUT", "--ratoi", "0.2"],
        ["lrserve", "bench", "OUT", "--repeat", "3"],
        ["lrserve", "bench", "OUT", "OTHER"],
        ["lrserve", "serve", "OUT", "OTHER"],
        ["lrserve", "verify"],
        ["make", "install"],
        ["pip", "install", ".[gpu]"],
        ["pip", "uninstall", "torch"],
        ["python", "bench/nothing.py"],
        ["python", "bench/speed.py", "--modell", "1b"],
        ["python", "-m", "pytest", "-m", "slow"],
        ["rm", "-rf", "/"],
        ["curl", "http://127.0.0.1:8000"],
    ],
)
def test_a_wrong_command_is_noticed(words: list[str]) -> None:
    with pytest.raises((Exception, pytest.fail.Exception)):
        check(words)


def names_what_is_not_there(span: str) -> bool:
    """Say whether a command in prose, which may leave out arguments, names a verb, an option, an extra or a script in vain."""
    words = span.split()
    if words[0] == "lrserve" and len(words) > 1 and not words[1].startswith("-"):
        options = {word for word in words if word.startswith("--")}
        return words[1] not in VERBS or (words[1] != "serve" and not options <= OPTIONS[words[1]])
    if re.match(r"make \w|pip install \S*\[|python -m |python (bench|docs)/", span):
        try:
            check(shlex.split(span))
        except AssertionError:
            return True
    return False


def test_every_command_in_prose_exists_with_its_options() -> None:
    assert names_what_is_not_there("lrserve compress MODEL")
    assert names_what_is_not_there("python bench/speed.py --modell")
    assert [f"{page.name}: {span}" for page, span in SPANS if names_what_is_not_there(span)] == []


def test_every_setting_and_source_file_in_prose_exists() -> None:
    sections = {name: type(field.default) for name, field in Recipe.model_fields.items()}
    settings = {name: held.model_fields for name, held in sections.items() if issubclass(held, BaseModel)}
    faults = []
    for page, span in SPANS:
        section, _, field = span.partition(".")
        if re.fullmatch(r"[a-z]+\.[a-z_]+", span) and section in settings and field not in settings[section] and field != "html":
            faults.append(f"{page.name}: no setting {span}")
        if re.fullmatch(r"[\w/]+/\w+\.py", span) and not ((ROOT / span).is_file() or (ROOT / "lrserve" / span).is_file()):
            faults.append(f"{page.name}: no file {span}")
    assert not faults


# Running them


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model as MODEL and a text as TEXT."""
    place = tmp_path_factory.mktemp("docs")
    model = dense_model("LlamaForCausalLM")
    model.config.max_position_embeddings = 8192  # the guide's workloads fit
    write_dense(model, place / "MODEL")
    (place / "TEXT").mkdir()
    write_text(place / "TEXT" / "text.jsonl", 200)
    return place


def tiny(words: list[str], inputs: Path, place: Path) -> list[str]:
    """Return the arguments of a command with a tiny model and text, a small recipe, and everything it writes in `place`."""
    written = {"-o": place, "--work": place, "--recipe": place}
    arguments = []
    for before, word in pairwise(words):
        if word == "MODEL":
            word = str(inputs / "MODEL")
        elif word == "TEXT":
            word = str(inputs / "TEXT" / "text.jsonl")
        elif before == "--storage":
            word = f"sqlite:///{place / 'shared.sqlite3'}"
        elif before in written:
            word = str(written[before] / word)
        arguments.append(word)
    return arguments if "--recipe" in words else [*arguments, "--recipe", str(place / "small.yaml")]


YAML = [block for block in prose_and_blocks(GUIDE)[1] if block.language == "yaml"]


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.name)
def test_recipes_of_the_guide_are_recipes(block: Block) -> None:
    assert Recipe.model_validate({"model": "MODEL", **yaml.safe_load(block.text)})


def write_recipes(place: Path) -> None:
    """Write the small recipe, and the guide's with what a tiny model needs besides."""
    (place / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (block,) = [block for block in YAML if "workloads" in block.text]
    (place / "recipe.yaml").write_text(yaml.safe_dump(SMALL | yaml.safe_load(block.text)))


COMPRESS = [(b, words) for b, words in SHELL if b.page in (README, GUIDE) and words[:2] == ["lrserve", "compress-and-export"]]


@pytest.mark.parametrize(("block", "words"), COMPRESS, ids=ids(COMPRESS))
def test_compressing_starts_as_the_page_says(
    block: Block, words: list[str], inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "require_engines", lambda *_: None)  # tests/pipeline/test_supported.py
    write_recipes(tmp_path)
    before = set(tmp_path.iterdir())
    result = CliRunner().invoke(app, [*tiny(words, inputs, tmp_path), "--dry-run"])
    assert result.exit_code == 0, f"{block.name}: {result.exception!r}"
    assert {path for path in set(tmp_path.iterdir()) - before if not path.name.startswith("shared.")} == set()
    wrong = CliRunner().invoke(app, [*tiny(words, inputs, tmp_path), "--dry-run", "--trials", "many"])
    assert wrong.exit_code != 0, "a wrong value is not noticed"


@pytest.mark.engine
@pytest.mark.usefixtures("forked_engines")
def test_readme_makes_an_artifact_that_the_guide_inspects(inputs: Path, tmp_path: Path) -> None:
    write_recipes(tmp_path)
    ((_, words),) = [(block, words) for block, words in COMPRESS if block.page == README]
    place = words.index("--min-speedup")
    words = [*words[:place], "--ratio", "0.2", *words[place + 2 :]]  # nothing makes a tiny model faster
    result = CliRunner().invoke(app, tiny(words, inputs, tmp_path))
    assert result.exit_code == 0, repr(result.exception)
    out = str(tmp_path / "OUT")
    looked = [words[1:] for block, words in SHELL if block.page == GUIDE and words[1] in ("inspect", "verify")]
    assert {words[0] for words in looked} == {"inspect", "verify"}
    for words in looked:
        result = CliRunner().invoke(app, [out if word == "OUT" else word for word in words])
        assert result.exit_code == 0, repr(result.exception)


@pytest.mark.engine
def test_vllm_knows_every_option_that_is_passed_on() -> None:
    """`lrserve serve` and `bench` hand what they do not know to vLLM, and so do pages that name one of its options."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    served = [words for _, words in SHELL if words[0] in ("lrserve", "vllm") and words[1] == "serve"]
    assert any(len(words) > 3 for words in served)
    for _, out, *arguments in (words[1:] for words in served):
        if arguments[:2] == ["--engine", "onnxruntime"]:
            graph_flags().parse_args(arguments[2:])
            continue
        command = server_command(Path(out), [argument for argument in arguments if argument != "--"])
        model_and_options = command[command.index(out) :] if "serve" in command else command[command.index("--model") :]
        parser.parse_args(model_and_options)
    workloads = {"chat": Workload(prompt_tokens=8, output_tokens=8, concurrency=2)}
    parser.parse_args(["--model", "OUT", *server_arguments(workloads, EngineSettings()), cache_argument(LEAST)])  # bench's own
    ours = {option for options in OPTIONS.values() for option in options}
    parsers = (parser, graph_flags())
    known = ours | {option for parser in parsers for action in parser._actions for option in action.option_strings}
    named = {word for _, span in SPANS if span.startswith("--") for word in span.split() if word.startswith("--")}
    assert named <= known, f"neither lrserve's nor vLLM's: {sorted(named - known)}"


PYTHON = [block for page in (README, GUIDE) for block in prose_and_blocks(page)[1] if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=[block.name for block in PYTHON])
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer().save_pretrained(write_artifact(factorized_model("LlamaForCausalLM"), tmp_path / "OUT"))
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.name, "exec"), {})


# The pages themselves


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose_and_blocks(page)[0], re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose_and_blocks(page)[0])
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}; {target.name} has {sorted(anchors(target))}"


def test_readme_can_be_read_in_two_minutes() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []
    programs = [words for block, words in SHELL if block.page == README]
    assert ["make", "demo"] in programs
    assert ["make", "test"] in programs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_says_what_is_true_now(page: Path) -> None:
    found = [line for line in page.read_text(encoding="utf-8").splitlines() if DIARY.search(line)]
    assert not found


def test_every_figure_is_measured() -> None:
    """No cell waits for a figure, and a run that a page names is kept; README's table is that run's."""
    faults = [f"{page.name}: {cell}" for page in PAGES for cell in sorted(set(CELL.findall(page.read_text(encoding="utf-8"))))]
    for page, span in SPANS:
        if re.fullmatch(r"[a-z0-9-]+-smollm2", span) and not (ROOT / "bench/results" / f"{span}.md").is_file():
            faults.append(f"{page.name}: no bench/results/{span}.md")
    assert not faults
    section = README.read_text(encoding="utf-8").partition("## Results")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    runs = re.findall(r"`([a-z0-9-]+-smollm2)`", section)
    assert table
    assert runs
    kept = "\n".join((ROOT / f"bench/results/{run}.md").read_text(encoding="utf-8") for run in runs)
    assert set(table) <= set(kept.splitlines())


@pytest.mark.parametrize(
    ("script", "function", "written"),
    [("docs/generate_recipe.py", "page", RECIPE), ("docs/picture.py", "picture", ROOT / "docs/picture.svg")],
)
def test_what_is_generated_is_up_to_date(script: str, function: str, written: Path) -> None:
    made = runpy.run_path(str(ROOT / script))[function]()
    assert written.read_text(encoding="utf-8") == made, f"run: python {script}"


def test_performance_lists_what_serve_sets() -> None:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    for name, value in memory_environment(server_environment({})).items():
        assert f"{name}={value}" in page
