"""An artifact is exactly what its manifest says: whatever else a folder holds is refused, unopened and in one line."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.artifacts import LONGEST, TooSlowError, change_json, change_tensors, corrupt, make_manifest, whole_artifact, within
from faults.refusing import Fault, refused
from safetensors.torch import load_file, save_file
from tiny import Rounding, dense_model, factorized_model, rounded_model, write_artifact, write_dense
from transformers import AutoModelForCausalLM

from exporters.onnx import OnnxExporter
from exporters.vllm import VllmExporter
from lrserve.compression.groups import STRUCTURES, Structure
from lrserve.errors import ArtifactError
from lrserve.pipeline.inspect import verify
from lrserve.plugins.checkpoint import require_sound
from lrserve.storage.folder import HARMLESS
from lrserve.storage.store import MANIFEST, check_files

CORRUPTIONS = 40
GROUP = "model.layers.0.self_attn.o_proj"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Structure, Path]:
    return {own: whole_artifact(tmp_path_factory.mktemp(own), own) for own in STRUCTURES}


@pytest.fixture
def artifact(whole: dict[Structure, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole["low_rank"], tmp_path / "out"))


def remade(change: Change) -> Change:
    """Make the manifest again after a change, so that hashes say nothing of it."""

    def both(folder: Path) -> None:
        change(folder)
        make_manifest(folder)

    return both


def tensors(**changes: torch.Tensor | None) -> Change:
    return remade(lambda folder: change_tensors(folder, changes))


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change a manifest of version 1, which has no sha256 of its own."""

    def of_version_1(data: dict[str, Any]) -> None:
        del data["sha256"]
        data["format_version"] = 1
        change(data)

    return lambda folder: change_json(folder / MANIFEST, of_version_1)


def named(name: str) -> Fault:
    """A manifest that names a file outside of the folder, or in none; it is there, and has the size and hash that it says."""

    def rename(data: dict[str, Any]) -> None:
        data["files"][name] = data["files"].pop("README.md")

    return Fault(f"names-{name!r:.12}", manifest(rename), (MANIFEST, "names ", "no file inside the folder"))


def sized(name: str, entry: object) -> Fault:
    def change(data: dict[str, Any]) -> None:
        data["files"]["README.md"] = entry

    return Fault(name, manifest(change), (MANIFEST, "the entry of README.md has no size and sha256"))


def written(name: str, content: bytes = b"x") -> Change:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return write


def extra(name: str) -> Fault:
    return Fault(f"extra-{name}", written(name), (f"{name.partition('/')[0] if 'new/' in name else name} is not in the manifest",))


def replaced(name: str, make: Change) -> Change:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        make(folder / name)

    return change


def bind(path: Path) -> None:
    """Leave a socket at a path."""
    with socket.socket(socket.AF_UNIX) as own:
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # a socket's path is short
        own.bind(path.name)
        os.fchdir(here)
        os.close(here)


def config(change: Callable[[dict[str, Any]], object]) -> Change:
    return remade(lambda folder: change_json(folder / "config.json", change))


def without_group(data: dict[str, Any]) -> None:
    del data["quantization_config"]["groups"][GROUP]


def dense_again(folder: Path) -> None:
    """Make one group dense in config.json and in the weights; the plan alone says otherwise."""
    change_json(folder / "config.json", without_group)
    found = load_file(folder / "model.safetensors")
    parts = {name: found[name] for name in (f"{GROUP}.A.weight", f"{GROUP}.B.weight", f"{GROUP}.B.bias")}
    dense = parts[f"{GROUP}.B.weight"] @ parts[f"{GROUP}.A.weight"]
    change_tensors(folder, {**dict.fromkeys(parts), f"{GROUP}.weight": dense})


def shard(folder: Path, *, wrong: bool) -> None:
    """Divide the weights among two files; with an index that, if it is wrong, says the wrong file of one tensor."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(found)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in found.items() if places[name] == file}, folder / file)
    if wrong:
        places[next(iter(places))] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def swap_members(data: dict[str, Any]) -> None:
    group = next(g for g in data["quantization_config"]["groups"].values() if len(g["members"]) == 2)
    group["members"].reverse()


def head_of(content: bytes) -> Change:
    return lambda folder: (folder / "model.safetensors").write_bytes(
        content + (folder / "model.safetensors").read_bytes()[len(content) :]
    )


FAULTS = [
    # what the manifest does not name
    *map(extra, ("zz.safetensors", "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "model.pt")),
    *map(extra, ("params.json", "consolidated.safetensors", "onnx/zz.onnx", "onnx/zz.onnx_data", "lrserve/zz.json", "new/file")),
    *map(
        extra,
        (
            ".cache/zz.safetensors",
            ".git/lfs/zz.bin",
            ".hidden.safetensors",
            "LICENSE.safetensors",
            "README.md.partial-1.safetensors",
            "modeling.py",
        ),
    ),
    Fault("extra-folder", lambda folder: (folder / "empty").mkdir(), ("empty is not in the manifest",)),
    Fault("extra-line-break", written("a\nb"), ("'a\\nb' is not in the manifest",)),
    Fault("extra-bytes", lambda folder: open(os.fsencode(folder) + b"/\xff", "w").close(), ("is not in the manifest",)),
    # what is no file
    Fault("pipe", lambda folder: os.mkfifo(folder / "zz.safetensors"), ("zz.safetensors is a pipe, not a file",)),
    Fault("pipe-in-place", replaced("model.safetensors", os.mkfifo), ("model.safetensors is a pipe, not a file",)),
    Fault("pipe-manifest", replaced(MANIFEST, os.mkfifo), (f"{MANIFEST} is a pipe, not a file",)),
    Fault("harmless-pipe", lambda folder: os.mkfifo(folder / ".gitattributes"), (".gitattributes is a pipe, not a file",)),
    Fault("link", lambda folder: (folder / "zz.json").symlink_to("config.json"), ("zz.json is a link, not a file",)),
    Fault("link-in-place", replaced("config.json", lambda path: path.symlink_to("../elsewhere")), ("config.json is a link",)),
    Fault("link-to-nothing", lambda folder: (folder / "zz").symlink_to("nothing"), ("zz is a link, not a file",)),
    Fault(
        "link-folder",
        replaced("onnx", lambda path: path.symlink_to("../elsewhere")),
        ("onnx is a link, not a file",),
    ),
    Fault("link-device", lambda folder: (folder / "zz.bin").symlink_to("/dev/zero"), ("zz.bin is a link, not a file",)),
    Fault("socket", lambda folder: bind(folder / "zz.sock"), ("zz.sock is a socket, not a file",)),
    Fault("folder-in-place", replaced("model.safetensors", Path.mkdir), ("model.safetensors is a folder, not a file",)),
    Fault("file-for-folder", replaced("onnx", Path.touch), ("onnx is not in the manifest",)),
    # manifests
    *map(
        named,
        ("../elsewhere", "/etc/hostname", "onnx/../../elsewhere", "./config.json", "", "onnx//x", "a\\b", "a\nb", "..", "x" * 2000),
    ),
    named(MANIFEST),
    *(sized(f"size-{size}", {"bytes": size, "sha256": "0" * 64}) for size in (-1, 2**43, True, "1", 1.5, None)),
    *(sized(f"hash-{index}", {"bytes": 1, "sha256": digest}) for index, digest in enumerate(("", "0" * 63, "G" * 64, None, 1))),
    sized("entry-list", []),
    Fault(
        "entry-folder",
        manifest(lambda data: data["files"].update(onnx=data["files"]["README.md"])),
        ("onnx is a folder, not a file",),
    ),
    Fault("count", manifest(lambda data: data["files"].update({f"f{i}": {} for i in range(10_001)})), ("at most 10000",)),
    Fault("files-list", manifest(lambda data: data.update(files=[])), (MANIFEST, "files is no JSON object")),
    Fault("no-inputs", manifest(lambda data: data.pop("inputs")), (MANIFEST, "inputs is no JSON object")),
    Fault("version-true", manifest(lambda data: data.update(format_version=True)), (MANIFEST, "unknown format version")),
    Fault(
        "older-version",
        lambda folder: change_json(folder / MANIFEST, lambda data: data.update(format_version=1)),
        (MANIFEST, "changed"),
    ),
    Fault("own-hash", lambda folder: change_json(folder / MANIFEST, lambda data: data.pop("sha256")), (MANIFEST, "changed")),
    Fault(
        "other-versions",
        lambda folder: change_json(folder / MANIFEST, lambda data: data.update(created_by={})),
        (MANIFEST, "changed"),
    ),
    Fault(
        "white-space", lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text() + " "), (MANIFEST, "changed")
    ),
    Fault("nested", written(MANIFEST, b"[" * 100_000), (MANIFEST, "is not JSON")),
    Fault("no-text", written(MANIFEST, b"\xff\xfe"), (MANIFEST, "is not JSON")),
    Fault("huge-number", written(MANIFEST, b'{"format_version": ' + b"9" * 5000 + b"}"), (MANIFEST, "is not JSON")),
    Fault("huge", lambda folder: os.truncate(folder / MANIFEST, 2**30), (MANIFEST, "far more than such a file needs")),
    # members, ranks and shapes against the architecture, by a manifest that agrees
    Fault(
        "norm",
        tensors(**{"model.layers.1.input_layernorm.weight": None}),
        ("model.safetensors: missing", "layers.1.input_layernorm"),
    ),
    Fault("last-norm", tensors(**{"model.norm.weight": None}), ("model.safetensors: missing", "model.norm.weight")),
    Fault("embedding", tensors(**{"model.embed_tokens.weight": None}), ("model.safetensors: missing", "embed_tokens.weight")),
    Fault("head", tensors(**{"lm_head.weight": None}), ("model.safetensors: missing", "lm_head.weight")),
    Fault("dense-linear", tensors(**{"model.layers.0.self_attn.q_proj.weight": None}), ("missing", "q_proj.weight")),
    Fault(
        "bias",
        tensors(**{"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}),
        ("model.safetensors: not in the model", "q_proj.bias"),
    ),
    Fault(
        "layer",
        tensors(**{"model.layers.2.input_layernorm.weight": torch.zeros(64)}),
        ("not in the model", "layers.2.input_layernorm"),
    ),
    Fault("norm-shape", tensors(**{"model.norm.weight": torch.zeros(65)}), ("model.norm.weight is (65,) in the checkpoint",)),
    Fault(
        "norm-dtype", tensors(**{"model.norm.weight": torch.zeros(64, dtype=torch.int64)}), ("model.norm.weight is torch.int64",)
    ),
    Fault("half", tensors(**{"model.norm.weight": torch.zeros(64, dtype=torch.float16)}), ("model.norm.weight is torch.float16",)),
    Fault("odd-dtype", tensors(**{"model.norm.weight": torch.zeros(64, dtype=torch.bool)}), ("is of an unknown dtype",)),
    Fault("group", config(without_group), ("model.safetensors: missing", f"{GROUP}.weight")),
    Fault("plan", remade(dense_again), (GROUP, "is not in config.json what lrserve/plan.json says")),
    Fault("all-groups", config(lambda data: data.pop("quantization_config")), ("model.safetensors: missing",)),
    Fault(
        "other-method",
        config(lambda data: data.update(quantization_config={"quant_method": "gptq"})),
        ("config.json", "not lrserve's"),
    ),
    Fault("members", config(swap_members), ("config.json lists", "no group of the architecture")),
    Fault(
        "rank",
        config(lambda data: data["quantization_config"]["groups"][GROUP].update(rank=15)),
        (GROUP, "config.json makes it (15,"),
    ),
    Fault(
        "long-members",
        config(lambda data: data["quantization_config"]["groups"][GROUP].update(members=["x" * 5000])),
        ("no group",),
    ),
    Fault(
        "long-name",
        config(lambda data: data.update(architectures=["x" * 5000])),
        ("config.json", "architectures must be LlamaForCausalLM"),
    ),
    Fault("layers", config(lambda data: data.update(num_hidden_layers=3)), ("missing", "model.layers.2.")),
    Fault("many-layers", config(lambda data: data.update(num_hidden_layers=10**9)), ("config.json has 1000000000 layers",)),
    Fault("sizes", config(lambda data: data.update(vocab_size=300)), ("embed_tokens.weight is (256, 64) in the checkpoint",)),
    Fault("no-sizes", config(lambda data: data.update(hidden_size="much")), ("config.json",)),
    Fault("other-model", config(lambda data: data.update(model_type="bert")), ("config.json",)),
    Fault("no-model", config(lambda data: data.update(model_type="no such")), ("config.json",)),
    Fault("tied", config(lambda data: data.update(tie_word_embeddings=True)), ("not in the model", "lm_head.weight")),
    Fault(
        "second-weights",
        remade(lambda folder: shutil.copy(folder / "model.safetensors", folder / "zz.safetensors")),
        ("zz.safetensors holds",),
    ),
    Fault("other-weights", remade(lambda folder: save_file({}, folder / "zz.safetensors")), ("zz.safetensors",)),
    Fault(
        "no-index",
        remade(lambda folder: (shard(folder, wrong=False), (folder / "model.safetensors.index.json").unlink())),
        ("index",),
    ),
    Fault(
        "index",
        remade(lambda folder: shard(folder, wrong=True)),
        ("model.safetensors.index.json", "in which files the tensors are"),
    ),
    Fault("pickle", remade(written("pytorch_model.bin")), ("pytorch_model.bin may run code",)),
    Fault("python", remade(written("modeling.py")), ("modeling.py may run code",)),
    Fault("auto-map", config(lambda data: data.update(auto_map={"AutoConfig": "x.X"})), ("config.json has an auto_map",)),
    # damage that no hash tells, by a manifest that agrees
    Fault("header", remade(head_of(b"\xff" * 8)), ("model.safetensors is damaged",)),
    Fault("header-json", remade(head_of((8).to_bytes(8, "little") + b"nonsense")), ("model.safetensors is damaged",)),
    Fault("cut", remade(lambda folder: os.truncate(folder / "model.safetensors", 5000)), ("model.safetensors is damaged",)),
    Fault("empty", remade(lambda folder: os.truncate(folder / "model.safetensors", 0)), ("model.safetensors is damaged",)),
    Fault("no-weights", remade(lambda folder: (folder / "model.safetensors").unlink()), ("the weights have 0 tensors",)),
    Fault("no-config", remade(lambda folder: (folder / "config.json").unlink()), ("config.json", "missing")),
    Fault("config-text", remade(written("config.json", b"{")), ("config.json cannot be read",)),
    Fault("config-list", remade(written("config.json", b"[]")), ("config.json holds a list, not a JSON object",)),
    Fault("plan-text", remade(written("lrserve/plan.json", b"{")), ("lrserve/plan.json is not a plan",)),
    Fault(
        "swapped",
        remade(lambda folder: shutil.copy(folder / "lrserve" / "metrics.json", folder / "lrserve" / "plan.json")),
        ("plan.json",),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_verify_refuses_in_one_line(fault: Fault, artifact: Path) -> None:
    fault.damage(artifact)
    with within(LONGEST):
        refused(fault, "verify", artifact)


VERIFY_ALONE = {"plan", "plan-text", "swapped", "pickle", "python", "auto-map"}
"""What makes no loader compute anything else than the manifest and the plan say."""
HARMLESS_IN_TRANSFORMERS = {"members", "long-name", "half", "second-weights", "other-weights", "index"}
"""What transformers reads as it is meant, or does not read; it loads the tensors by their names, from the files that it chooses."""


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.name not in VERIFY_ALONE | {"no-weights"}], ids=str)
def test_vllm_refuses_it_before_it_builds_the_model(fault: Fault, artifact: Path) -> None:
    fault.damage(artifact)
    with within(LONGEST), pytest.raises(ArtifactError):
        require_sound(artifact)


@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault.name not in VERIFY_ALONE | HARMLESS_IN_TRANSFORMERS | {"many-layers"}], ids=str
)
def test_transformers_refuses_it(fault: Fault, artifact: Path) -> None:
    fault.damage(artifact)
    with within(LONGEST), pytest.raises(Exception) as refused:  # noqa: PT011 - transformers' own, where it reads config.json first
        AutoModelForCausalLM.from_pretrained(artifact)
    assert not isinstance(refused.value, TooSlowError)


@pytest.mark.parametrize("name", ["zz.safetensors", "onnx/zz.onnx_data", "adapter_config.json"])
@pytest.mark.parametrize("verb", ["inspect", "generate", "bench", "eval", "serve"])
def test_every_verb_that_loads_refuses_what_was_added(verb: str, name: str, artifact: Path) -> None:
    written(name)(artifact)
    arguments = [verb, artifact, *(["hello", "--engine", "onnxruntime"] if verb == "generate" else [])]
    refused(extra(name), *arguments)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.post_attention_layernorm.weight"]
)
def test_a_dense_tensor_that_is_missing_or_too_many_is_an_error_in_both_loaders(name: str, artifact: Path) -> None:
    loaders: list[Change] = [require_sound, AutoModelForCausalLM.from_pretrained]
    tensors(**{name: None})(artifact)
    for load in loaders:
        with pytest.raises(ArtifactError, match=f"missing from the checkpoint: {name}"):
            load(artifact)
    tensors(
        **{name: torch.zeros(64)} if "embed" not in name else {name: torch.zeros(256, 64)}, **{"model.nothing": torch.zeros(1)}
    )(artifact)
    for load in loaders:
        with pytest.raises(ArtifactError, match="not in the model that config.json describes: model.nothing"):
            load(artifact)


@pytest.mark.parametrize(
    "name", [*sorted(HARMLESS), "README.md.partial-12", "onnx/.DS_Store", "lrserve/metrics.json.partial-7-0ab1"]
)
def test_what_tools_add_is_harmless(name: str, artifact: Path) -> None:
    if name in (".cache", ".git"):
        name += "/huggingface/download/model.safetensors.metadata"
    written(name)(artifact)
    assert "match the manifest" in verify(artifact)
    require_sound(artifact)


def test_parts_that_are_not_loaded_may_be_left_out(artifact: Path) -> None:
    shutil.rmtree(artifact / "onnx")
    (artifact / "README.md").write_text("edited by its publisher")
    check_files(artifact)
    (artifact / "README.md").unlink()
    check_files(artifact)
    with pytest.raises(ArtifactError, match="onnx/config.json is missing"):
        check_files(artifact, "onnx")
    (artifact / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="tokenizer.json is missing"):
        check_files(artifact)


def test_a_snapshot_in_the_hubs_cache_is_made_of_links_and_may_be_partial(artifact: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    names = [path.relative_to(artifact) for path in artifact.rglob("*") if path.is_file() and path.suffix != ".png"]
    for index, name in enumerate(names):
        shutil.copy(artifact / name, repository / "blobs" / str(index))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(repository / "blobs" / str(index), (snapshot / name).parent))
    assert "match the manifest" in verify(snapshot)
    (snapshot / "tokenizer.json").unlink()
    require_sound(snapshot)
    AutoModelForCausalLM.from_pretrained(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(artifact / "config.json")
    with pytest.raises(ArtifactError, match="config.json is a link"):
        check_files(snapshot)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_whole_artifacts_pass(structure: Structure, version: int, whole: dict[Structure, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole[structure], tmp_path / "out"))
    if version == 1:  # of an lrserve that knew neither a manifest's own sha256 nor an entry that stops others
        change_json(folder / "config.json", lambda data: data.pop("transformers_weights"))
        make_manifest(folder)
        manifest(lambda data: None)(folder)
    assert "match the manifest" in verify(folder)
    require_sound(folder)
    AutoModelForCausalLM.from_pretrained(folder)


MODELS = {
    **{own: lambda own=own: factorized_model("LlamaForCausalLM", structure=own) for own in STRUCTURES},
    "apart": lambda: factorized_model("Qwen2ForCausalLM", apart=True),
    **{
        weights: lambda weights=weights: rounded_model("LlamaForCausalLM", Rounding(weights))
        for weights in ("int8", "int4_g32", "fp8")
    },
}

STRANGER = """
import json, sys
from transformers import AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    for loader in (AutoModelForCausalLM, AutoModel):
        for options in ({}, {"ignore_mismatched_sizes": True}):
            try:
                loader.from_pretrained(folder, **options)
            except Exception as error:
                print(json.dumps([type(error).__name__, str(error)]))
            else:
                print("null")
assert "lrserve" not in sys.modules
"""


def test_a_program_without_lrserve_fails_on_every_structure(tmp_path: Path) -> None:
    folders = [write_artifact(make(), tmp_path / name) for name, make in MODELS.items()]
    done = subprocess.run([sys.executable, "-c", STRANGER, *map(str, folders)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 4 * len(folders)
    assert all(answer and "'import lrserve' before it is loaded" in answer[1] for answer in answers), answers


MEMORY = """
import sys
from pathlib import Path
from transformers import LlamaForCausalLM
from lrserve.pipeline.inspect import check

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

before = peak()
assert check(Path(sys.argv[1]))["faults"] == []
print(peak() - before)
"""


def test_verify_reads_files_piece_by_piece(artifact: Path) -> None:
    (artifact / "lrserve" / "study.sqlite3").touch()
    os.truncate(artifact / "lrserve" / "study.sqlite3", 400 * 2**20)
    make_manifest(artifact)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(artifact)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200, done.stdout


def test_code_is_not_taken_from_the_dense_model(tmp_path: Path) -> None:
    source, out = write_dense(dense_model("LlamaForCausalLM"), tmp_path / "dense"), tmp_path / "out"
    model = factorized_model("LlamaForCausalLM")
    model.config.auto_map = {"AutoConfig": "x.X"}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        change_json(source / name, lambda data: data.update(auto_map={"Auto": "x.X"}, custom_pipelines={"a": {"impl": "x.X"}}))
    out.mkdir()
    VllmExporter().export(model, source, out, torch.float32)
    OnnxExporter().export(dense_model("LlamaForCausalLM"), source, out, torch.float32)
    read = [path.read_text() for path in out.rglob("*.json")]
    assert len(read) >= 6
    assert not any("x.X" in text for text in read)
    make_manifest(out)
    assert "match the manifest" in verify(out)


def test_random_corruptions_are_refused(whole: dict[Structure, Path], tmp_path: Path) -> None:
    found, wrong = corrupt(whole["identity_block"], tmp_path, CORRUPTIONS, seed=0)
    assert sum(count for count, _ in found.values()) == CORRUPTIONS
    assert not wrong, "\n".join(wrong)
