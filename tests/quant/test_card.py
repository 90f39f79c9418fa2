"""Licence files and model card beside quantized weights; the hub's own parser reads the card."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from converters.detect import open_checkpoint
from converters.origin import read_origin
from converters.writing import journal
from l4tool.commands.quantize import command
from l4tool.core import licence
from l4tool.core.sizes import format_bytes
from l4tool.hub.manifest import Entry, Manifest, write_manifest
from l4tool.main import main
from quant import pipeline
from quant.card_text import command_line
from quant.schemes import make_recipe
from tests import checkpoints

ROOT = Path(__file__).resolve().parents[2]
REPO, COMMIT = "meta-llama/Llama-4-Scout-17B-16E-Instruct", "0123456789abcdef0123456789abcdef01234567"
LICENCE = "LLAMA 4 COMMUNITY LICENSE AGREEMENT\nLlama 4 Version Effective Date: April 5, 2025\n"
META_CARD = "---\nlicense: other\nlicense_name: llama4\nlanguage:\n- en\n- de\n---\n# As Meta wrote it\n"
NAME = "Llama-4-Scout-17B-16E-Instruct-INT4"


@pytest.fixture(scope="module")
def llama(scout_tiny, tmp_path_factory):
    """A folder as `l4tool fetch` leaves it: card, licence, use policy, manifest."""
    folder = checkpoints.copy(scout_tiny, tmp_path_factory.mktemp("fetched") / "scout")
    (folder / "README.md").write_text(META_CARD)
    (folder / "LICENSE").write_text(LICENCE)
    (folder / "USE_POLICY.md").write_text("# Policy\n")
    entry = Entry((folder / "config.json").stat().st_size, git_oid="0" * 40)
    write_manifest(folder, Manifest(REPO, COMMIT, "https://huggingface.co", {"config.json": entry}))
    return folder


def bare(llama, folder, *names):
    """A copy without these files."""
    checkpoints.copy(llama, folder)
    for name in names:
        (folder / name).unlink()
    return folder


def quantize(source, out, scheme="int4", recipe=None, **options):
    return pipeline.quantize(
        open_checkpoint(source), out, make_recipe(scheme, **(recipe or {})), pipeline.Options(**options)
    )


def card_of(folder):
    card = ModelCard.load(folder / "README.md")
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    return card


def test_what_a_llama_derivative_carries(llama, tmp_path, capsys):
    out = tmp_path / NAME
    report = quantize(llama, out)
    assert capsys.readouterr().err == ""
    assert (out / "LICENSE").read_text() == LICENCE
    assert (out / "USE_POLICY.md").read_text() == "# Policy\n"
    assert (out / "NOTICE").read_text() == licence.NOTICE + "\n"
    assert (out / "README.source.md").read_text() == META_CARD
    assert not (out / "l4tool-manifest.json").exists()
    card = card_of(out)
    data = card.data.to_dict()
    assert data == {
        "base_model": REPO, "base_model_relation": "quantized", "license": "other", "license_name": "llama4",
        "license_link": "LICENSE", "language": ["en", "de"], "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llama", "llama4", "int4", "compressed-tensors", "quantized", "l4tool"],
    }  # fmt: skip
    validate_repo_id(data["base_model"])
    for words in (f"# {NAME}\n", "**Built with Llama**", COMMIT, licence.NOTICE, licence.EU_CLAUSE,
                  licence.USERS_CLAUSE, "(README.source.md)", "[LICENSE](LICENSE)", "(USE_POLICY.md)"):  # fmt: skip
        assert words in card.text, words
    assert report["license"] == {
        "name": "Llama 4 Community License", "base_model": REPO, "commit": COMMIT, "notice": licence.NOTICE,
        "missing": [],
    }  # fmt: skip
    assert json.loads((out / journal.REPORT).read_text())["license"] == report["license"]


def test_figures_of_the_card_are_those_of_the_report(llama, tmp_path):
    report = quantize(llama, tmp_path / NAME, "mixed", {"attention": "fp8"})
    text = card_of(tmp_path / NAME).text
    rows = {cells[0]: cells[1:] for cells in (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    )}  # fmt: skip
    totals = report["totals"]
    assert rows["all"][1:] == [format_bytes(totals["source_bytes"]), format_bytes(totals["output_bytes"])]
    assert rows["mean of the tensors"] == [f"{totals['mean_relative_error']:.4f}"]
    assert rows[f"all {totals['quantized_tensors']} quantized tensors together"] == [
        f"{totals['overall_relative_error']:.4f}"
    ]
    worst = {label[8:-1]: cells[0] for label, cells in rows.items() if label.startswith("worst: ")}
    errors = sorted((entry["relative_error"] for entry in report["tensors"].values()), reverse=True)
    assert list(worst.values()) == [f"{error:.4f}" for error in errors[:5]]
    assert all(worst[name] == f"{report['tensors'][name]['relative_error']:.4f}" for name in worst)
    assert rows["routed experts"][0].startswith("INT4, groups of 128")
    assert rows["attention"][0].startswith("FP8") and rows["shared experts, dense MLPs"][0].startswith("FP8")
    assert next(cells for label, cells in rows.items() if label.startswith("everything"))[0] == "bfloat16, unchanged"


RECIPES = [
    {"scheme": "int4"}, {"scheme": "fp8"}, {"scheme": "mixed"}, {"scheme": "int4", "shared_experts": False},
    {"scheme": "fp8", "attention": "fp8"}, {"scheme": "int4", "group_size": 64, "scale": "absmax"},
    {"scheme": "int4", "format": "quanto"}, {"scheme": "int4", "format": "quanto", "scale": "hqq"},
]  # fmt: skip


@pytest.mark.parametrize("options", RECIPES, ids=lambda options: "-".join(map(str, options.values())))
def test_the_cards_command_makes_the_same_recipe(llama, options):
    """Parsed by the command itself."""
    recipe = make_recipe(**options)
    words = shlex.split(command_line(read_origin(llama), recipe))
    assert words[:3] == ["l4tool", "quantize", REPO] and words[-1].startswith("Llama-4-Scout-17B-16E-Instruct-")
    given = command.make_context("quantize", words[2:]).params
    scheme = next(name for name in ("int4", "fp8", "mixed") if given[name])
    again = make_recipe(
        scheme, given["shared_experts"], given["attention"], given["group_size"], given["scale"], given["format"]
    )
    assert again == recipe


def test_card_names_nothing_of_this_machine(llama, tmp_path):
    quantize(bare(llama, tmp_path / "my-tune", "l4tool-manifest.json"), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text and "\n# Llama-my-tune-INT4\n" in text
    assert "base_model" not in text  # the hub refuses what is no repository


def test_notice_of_the_source_is_kept(llama, tmp_path):
    source = checkpoints.copy(llama, tmp_path / "source")
    (source / "NOTICE").write_bytes(b"Includes work of \xc5\x81ucja and \xff others.\n")
    quantize(source, tmp_path / "Llama-1")
    expected = b"Includes work of \xc5\x81ucja and \xff others.\n\n" + licence.NOTICE.encode() + b"\n"
    assert (tmp_path / "Llama-1" / "NOTICE").read_bytes() == expected
    wrapped = licence.NOTICE.replace("License, ", "License,\n  ") + "\nMore.\n"
    (source / "NOTICE").write_text(wrapped)
    quantize(source, tmp_path / "Llama-2")
    assert (tmp_path / "Llama-2" / "NOTICE").read_text() == wrapped


def test_without_a_licence_text(llama, tmp_path, capsys):
    """Said before the work, noted in the report, and mended by --license, even when the run is complete."""
    source, out = bare(llama, tmp_path / "source", "LICENSE"), tmp_path / "Llama-out"
    report = quantize(source, out)
    told = capsys.readouterr().err
    assert "has no LICENSE" in told and f"l4tool fetch {REPO} --include 'LICENSE*' -o {source}" in told
    assert report["license"]["missing"] == ["LICENSE"] and not (out / "LICENSE").exists()
    assert card_of(out).data.license_link == licence.LICENCE_URL
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    (tmp_path / "text").write_text(LICENCE)
    report = quantize(source, out, licence=tmp_path / "text")
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == shards
    assert (out / "LICENSE").read_text() == LICENCE and card_of(out).data.license_link == "LICENSE"
    assert journal.read_report(out) == report
    assert report["license"]["missing"] == [] and "LICENSE" in report["job"]["files"]
    assert "written again" in capsys.readouterr().err
    (out / "README.md").write_text("edited by hand\n")
    assert quantize(source, out, licence=tmp_path / "text") == report
    assert (out / "README.md").read_text() == "edited by hand\n" and "again" not in capsys.readouterr().err
    quantize(source, out, licence=tmp_path / "text", force=True)
    fresh = quantize(source, tmp_path / "Llama-fresh", licence=tmp_path / "text")
    assert fresh["license"] == report["license"]
    for name in ("README.md", "LICENSE", "NOTICE"):
        assert (tmp_path / "Llama-fresh" / name).read_bytes() == (out / name).read_bytes()


def test_licence_fetched_after_the_run(llama, tmp_path, capsys):
    """Licence files and cards are no part of the job: the weights are not made again."""
    source, out = bare(llama, tmp_path / "source", "LICENSE", "README.md"), tmp_path / "Llama-out"
    quantize(source, out)
    shards = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    for name in ("LICENSE", "README.md"):
        shutil.copy(llama / name, source / name)
    report = quantize(source, out)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == shards
    assert (out / "LICENSE").read_text() == LICENCE and (out / "README.source.md").read_text() == META_CARD
    assert report["license"]["missing"] == [] and "LICENSE" in report["job"]["files"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert quantize(source, out) == report
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_given_licence_wins_over_the_sources(llama, tmp_path):
    (tmp_path / "newer").write_text(LICENCE + "a newer copy\n")
    quantize(llama, tmp_path / "Llama-x", licence=tmp_path / "newer")
    assert (tmp_path / "Llama-x" / "LICENSE").read_text().endswith("a newer copy\n")


def test_bad_licence_files(llama, scout_tiny, tmp_path, capsys):
    (tmp_path / "mit").write_text("MIT License\n")

    def run(source, out, text):
        return main(["quantize", str(source), "--int4", "-o", str(tmp_path / out), "--license", str(tmp_path / text)])

    assert run(llama, "Llama-a", "mit") == 64 and "Llama 4 Community License" in capsys.readouterr().err
    assert run(llama, "Llama-a", "nowhere") == 66 and "nowhere" in capsys.readouterr().err
    assert run(llama, "Llama-a", ".") == 66
    assert not (tmp_path / "Llama-a").exists()
    assert run(scout_tiny, "random", "mit") == 0  # weights that are not Meta's may have any licence
    assert (tmp_path / "random" / "LICENSE").read_text() == "MIT License\n"


@pytest.mark.parametrize(("name", "told"), [(NAME, False), ("Llama", False), ("scout-int4", True), ("llama-4", True)])
def test_name_check(llama, tmp_path, capsys, name, told):
    quantize(llama, tmp_path / name)
    assert ('must begin with "Llama"' in capsys.readouterr().err) == told


def test_other_licences_are_carried_on(scout_tiny, tmp_path, capsys):
    quantize(scout_tiny, tmp_path / "random-int4")
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "random-int4" / "NOTICE").exists()
    card = card_of(tmp_path / "random-int4")
    assert card.data.license == "apache-2.0" and "llama" not in card.data.tags
    assert "Built with" not in card.text and "Meta" not in card.text and "apache-2.0" in card.text
    source = checkpoints.copy(scout_tiny, tmp_path / "own")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: own-1.0\nlicense_link: LICENSE.md\n---\n")
    (source / "LICENSE.md").write_text("Ours.\n")
    quantize(source, tmp_path / "own-int4")
    data = card_of(tmp_path / "own-int4").data
    assert (data.license, data.license_name, data.license_link) == ("other", "own-1.0", "LICENSE.md")
    assert (tmp_path / "own-int4" / "LICENSE.md").read_text() == "Ours.\n"


@pytest.mark.parametrize("card", [None, "no front matter\n", "---\nlicense: [\n---\n", b"\xff\xfe\x00---\n"])
def test_a_source_that_says_nothing_counts_as_llama(llama, tmp_path, card):
    source = bare(llama, tmp_path / "source", "LICENSE", "README.md", "l4tool-manifest.json")
    if card is not None:
        (source / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    report = quantize(source, tmp_path / "Llama-x")
    assert report["license"]["name"] == licence.NAME and (tmp_path / "Llama-x" / "NOTICE").exists()
    assert card_of(tmp_path / "Llama-x").data.license_name == "llama4"
    kept = tmp_path / "Llama-x" / "README.source.md"
    assert kept.exists() == (card is not None)
    if card is not None:
        assert kept.read_bytes() == (source / "README.md").read_bytes()


def test_no_card_of_the_source_is_lost(llama, tmp_path):
    """Not even one that was kept from an earlier source."""
    source = checkpoints.copy(llama, tmp_path / "source")
    (source / "README.source.md").write_text("older\n")
    (source / "README.txt").write_text("plain\n")
    quantize(source, tmp_path / "Llama-x")
    found = {path.name: path.read_text() for path in (tmp_path / "Llama-x").glob("README*") if path.name != "README.md"}
    assert found == {"README.source.md": META_CARD, "README.source.source.md": "older\n", "README.txt": "plain\n"}


def test_hostile_names_stay_text(llama, tmp_path):
    folder = tmp_path / "a`b$(rm -rf ~)\n---\nlicense: mit"
    source = bare(llama, folder, "l4tool-manifest.json")
    quantize(source, tmp_path / "Llama-x")
    card = card_of(tmp_path / "Llama-x")
    assert card.data.license == "other" and "$(" not in re.sub(r"`[^`]*`", "", card.text)
    line = next(line for line in card.text.splitlines() if line.startswith("l4tool quantize"))
    assert not re.search(r"[$`();~\\]", line)


def test_force_removes_what_is_no_longer_right(llama, scout_tiny, tmp_path):
    source, out = checkpoints.copy(llama, tmp_path / "source"), tmp_path / "Llama-x"
    quantize(source, out)
    (out / "mine.txt").write_text("mine")
    for name in ("LICENSE", "USE_POLICY.md", "l4tool-manifest.json"):
        (source / name).unlink()
    shutil.copy(scout_tiny / "README.md", source / "README.md")
    quantize(source, out, force=True)
    assert not any((out / name).exists() for name in ("LICENSE", "NOTICE", "USE_POLICY.md"))
    assert (out / "mine.txt").exists() and card_of(out).data.license == "apache-2.0"


def test_text_only_and_quanto(scout_tiny_text, tmp_path):
    quantize(scout_tiny_text, tmp_path / "text")
    card = card_of(tmp_path / "text")
    assert card.data.pipeline_tag == "text-generation" and "AutoModelForCausalLM" in card.text
    quantize(scout_tiny_text, tmp_path / "quanto", recipe={"format": "quanto"})
    card = card_of(tmp_path / "quanto")
    assert "quanto" in card.data.tags and card.data.library_name is None and "vllm" not in card.text


def test_where_a_checkpoint_comes_from(llama, tmp_path):
    """By preference: told, manifest, path inside the Hugging Face cache, `_name_or_path`, the folder."""
    found = read_origin(llama, {}, "org/Other@abcdef0")
    assert (found.repo, found.commit, found.name) == ("org/Other", "abcdef0", "Other")
    found = read_origin(llama, {"_name_or_path": "org/Config"})
    assert (found.repo, found.commit) == (REPO, COMMIT)
    cached = tmp_path / "models--org--Some-Model" / "snapshots" / COMMIT
    cached.mkdir(parents=True)
    assert (read_origin(cached).repo, read_origin(cached).commit) == ("org/Some-Model", COMMIT)
    plain = tmp_path / "plain"
    plain.mkdir()
    assert read_origin(plain, {"_name_or_path": "org/Config"}).repo == "org/Config"
    for path in ("/data/models/x", "x", "a/b/c", "", 7, None):
        found = read_origin(plain, {"_name_or_path": path})
        assert (found.repo, found.name) == (None, "plain"), path
    (plain / "l4tool-manifest.json").write_text("{")
    assert read_origin(plain).repo is None and not read_origin(plain).is_llama
    assert read_origin(tmp_path / "nowhere").licence_name == "unknown"


def test_killed_and_resumed_runs_write_the_same_bytes(llama, tmp_path):
    """Killed all over the last phase, and once early; then the command again."""

    def run(*stops):
        code = [sys.executable, "-m", "tests.quant.interrupted", str(llama), str(tmp_path), "1500000", *stops]
        done = subprocess.run(code, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def contents(folder):
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        files[journal.REPORT] = json.loads(files[journal.REPORT]) | {"run": None}
        return files

    steps = run("undisturbed/run")[0]["steps"]
    expected = contents(tmp_path / "undisturbed")
    assert {"LICENSE", "NOTICE", "README.md", "README.source.md", "USE_POLICY.md"} <= expected.keys()
    points = [*range(steps - 44, steps, 4), steps // 2]
    results = [line for line in run(*(s for p in points for s in (f"{p}/kill:{p}", f"{p}/run"))) if "stop" in line]
    assert [line["code"] for line in results] == [-signal.SIGKILL, 0] * len(points)
    assert any("README.md" in line["names"] and "config.json" not in line["names"] for line in results)
    assert any("LICENSE" in line["names"] and "README.md" not in line["names"] for line in results)
    for point in points:
        assert contents(tmp_path / str(point)) == expected, point
