"""`edgeinfer quantize`, as it is typed."""

import json
import shutil
from xml.etree import ElementTree

import gguf
import pytest
from click.testing import CliRunner
from stories import ROOT
from tiny import tiny_model

from edgeinfer.cli import cli
from edgeinfer.modelfile import read_model_file

PAGE = str(ROOT / "exporters" / "texts" / "page.txt")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model"), "llama", "F16", layers=1))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edgeinfer.exporters.windows.default_threads", lambda: 1)

    def run(*args, code=0):
        result = CliRunner().invoke(cli, ["quantize", *map(str, args)])
        assert result.exit_code == code, result.output
        return result.stderr if code else result.stdout

    return run


def test_a_type_by_name(run, model, tmp_path):
    shown = run(model, "-o", "out.gguf", "--quant", "q4_k_m")
    assert "out.gguf: " in shown and "bits a weight" in shown and "Q4_K" in shown
    assert read_model_file(tmp_path / "out.gguf").tensor("blk.0.attn_q.weight").type == "Q4_K"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_perplexity_with_and_without_the_matrix(run, model):
    facts = json.loads(
        run(model, "-o", "out.gguf", "--quant", "Q3_K_S", "--calibration", PAGE, "--check", "--json")
    )
    assert set(facts["perplexity"]) == {"before", "after", "without_importance"}
    assert all(score["tokens"] > 250 and score["value"] > 1 for score in facts["perplexity"].values())
    assert facts["importance"]["tokens"] >= 1024 and facts["importance"]["quantized_without"] == [
        "token_embd.weight"
    ]
    assert facts["source_bytes"] > 2 * facts["target_bytes"] and facts["bits_per_weight"] < 5


def test_the_matrix_is_kept_and_used_again(run, model, tmp_path):
    run(model, "-o", "a.gguf", "--quant", "Q2_K_S", "--calibration", PAGE, "--importance", "matrix.gguf")
    run(model, "-o", "b.gguf", "--quant", "Q2_K_S", "--importance", "matrix.gguf")
    a, b = (gguf.GGUFReader(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert all((x.data == y.data).all() for x, y in zip(a.tensors, b.tensors))
    again = run(
        model, "-o", "c.gguf", "--quant", "Q8_0", "--calibration", PAGE, "--importance", "matrix.gguf", code=1
    )
    assert "matrix.gguf exists already. Give another -o, or --force" in again
    assert not (tmp_path / "c.gguf").exists()


def test_auto_with_a_picture(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr("edgeinfer.exporters.curve.STOCK", ("Q4_K_M",))
    monkeypatch.setattr("edgeinfer.exporters.curve.AUTO_AT", ("Q4_K_M",))
    monkeypatch.setattr("edgeinfer.cli.quantize_job._SMALLEST_DRAWN_BITS", 5)  # below 4, slow types are measured too
    monkeypatch.setattr("edgeinfer.exporters.trials._MOST_CHOICES", 1)
    monkeypatch.setattr("edgeinfer.exporters.trials._LEAST_CHOICES", 1)
    options = ("--quant", "auto", "--size", "30%", "--calibration", PAGE, "--check", PAGE)
    facts = json.loads(run(model, "-o", "out.gguf", *options, "--picture", "p.svg", "--json"))
    assert facts["target_bytes"] <= facts["size_asked_for"] == int(0.3 * facts["source_bytes"])
    assert facts["predicted_divergence"] > 0 and len(facts["curve"]) == 3
    assert facts["calibration_loss_difference_error"] > 0
    assert "loss_difference" not in facts["perplexity"]["before"]
    assert facts["perplexity"]["after"]["loss_difference_error"] < facts["perplexity"]["after"]["error"]
    assert ElementTree.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "p.svg"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--quant", "Q9"], "The type 'Q9' is unknown. Expected one of F32, F16, Q4_0"),
        (["--quant", "auto"], "auto chooses on a text and for a size: give --calibration FILE and --size"),
        (["--quant", "auto", "--size", "1GiB"], "give --calibration FILE and --size"),
        (["--quant", "auto", "--size", "300%", "--calibration", PAGE], "'300%' is no share of the source"),
        (["--quant", "auto", "--size", "9XB", "--calibration", PAGE], "The unit 'xb' of the size"),
        (["--quant", "auto", "--size", "9KB", "--calibration", PAGE], "the smallest that can be is"),
        (["--quant", "Q8_0", "--size", "1GiB"], "--size is for --quant auto; the size of Q8_0 is what it is"),
        (["--quant", "IQ2_S"], "IQ2_S needs an importance matrix"),
        (["--quant", "Q8_0", "--calibration", "none.txt"], "The text none.txt cannot be read: No such file"),
        (["--quant", "Q8_0", "--calibration", "short.txt"], "The text for calibration is too short: it has"),
        (["--quant", "Q8_0", "--check", "short.txt"], "The text for perplexity is too short: it has"),
        (["--quant", "Q8_0", "--importance", "none.gguf"], "none.gguf: there is no such file"),
        (["--quant", "Q8_0", "--importance", PAGE], "page.txt: is not a GGUF model"),
        (["--quant", "Q8_0", "--picture", "p.svg"], "--picture draws perplexity on the text of --check"),
        (
            ["--quant", "Q8_0", "--picture", "p.png", "--check"],
            "expected a name that ends in .svg, found 'p.png'",
        ),
        (["--quant", "Q8_0", "--memory", "1MiB", "--check"], "1.00 MiB of memory are too few to compute with"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_left(run, model, tmp_path, options, words):
    (tmp_path / "short.txt").write_text("Too short.")
    assert words in run(model, "-o", "out.gguf", *options, code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_targets_that_are_kept(run, model, tmp_path):
    (tmp_path / "out.gguf").write_bytes(b"mine")
    assert "out.gguf exists already" in run(model, "-o", "out.gguf", "--quant", "Q8_0", code=1)
    assert (tmp_path / "out.gguf").read_bytes() == b"mine"
    run(model, "-o", "out.gguf", "--quant", "Q8_0", "--force")
    assert read_model_file(tmp_path / "out.gguf").architecture == "llama"
    assert "is the model itself" in run("out.gguf", "-o", "out.gguf", "--quant", "Q8_0", "--force", code=1)
    assert "The folder for the result does not exist" in run(
        model, "-o", "no/out.gguf", "--quant", "Q8_0", code=1
    )


def test_a_quantized_model(run, tmp_path):
    story = ROOT / "models" / "story.gguf"
    assert "is quantized already" in run(story, "-o", "out.gguf", "--quant", "Q4_K_M", code=1)
    shown = run(story, "-o", "out.gguf", "--quant", "Q4_K_M", "--requantize", "--check", PAGE)
    assert "Perplexity on 255 tokens: " in shown and " before, " in shown and shown.strip().endswith("after")


def test_a_comparison_that_finds_no_room_is_an_error(run, model, tmp_path, monkeypatch):
    """A type without the matrix is left out only where it cannot be made."""
    facts = json.loads(
        run(model, "-o", "a.gguf", "--quant", "Q2_K_S", "--calibration", PAGE, "--check", "--json")
    )
    assert set(facts["perplexity"]) == {"before", "after"}
    usage = shutil.disk_usage

    def full(folder):
        return usage(folder)._replace(free=1000) if ".edgeinfer-" in str(folder) else usage(folder)

    monkeypatch.setattr("edgeinfer.exporters.quantize.shutil.disk_usage", full)
    said = run(model, "-o", "b.gguf", "--quant", "Q4_0", "--calibration", PAGE, "--check", code=1)
    assert "The disk is too full" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
