"""Mappings, configs in old and new forms, exact conversion, bad checkpoints, bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='needs pip install "edgeinfer[export]"')
transformers = pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_checkpoints import llama_logits, plain_vocabulary, tiny_checkpoint  # noqa: E402

from edgeinfer.errors import BudgetError, ExportError, ModelFileError  # noqa: E402
from edgeinfer.exporters import vocabulary  # noqa: E402
from edgeinfer.exporters.conversion import OutOfRange, convert, interleave_halves  # noqa: E402
from edgeinfer.exporters.to_gguf import export_gguf  # noqa: E402
from edgeinfer.modelfile import read_model_file  # noqa: E402


@pytest.fixture(autouse=True)
def _vocabulary(monkeypatch):
    monkeypatch.setattr(vocabulary, "read_vocabulary", plain_vocabulary)


@pytest.fixture
def llama(tmp_path):
    return tiny_checkpoint(tmp_path / "tiny", "llama", dtype="bfloat16").folder


def _change_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def _change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_sliding_window_that_llama_cpp_does_not_have_is_said(tmp_path, llama):
    _change_config(llama, architectures=["MistralForCausalLM"], sliding_window=100)
    report = export_gguf(llama, tmp_path / "out.gguf")
    assert "attends to the last 100 tokens" in report.notes[0]
    _change_config(llama, sliding_window=5000)
    assert not export_gguf(llama, tmp_path / "out.gguf").notes


# ---- tensors ---------------------------------------------------------------------------------------------


def test_names_cannot_write_to_the_terminal(tmp_path, llama):
    _change_tensors(llama, lambda tensors: tensors.update({"a\x1b[31mb": torch.zeros(2)}))
    with pytest.raises(ExportError) as caught:
        export_gguf(llama, tmp_path / "out.gguf")
    assert r"'a\x1b[31mb'" in str(caught.value) and "\x1b" not in str(caught.value)


def test_missing_and_extra_tensors_are_named(tmp_path, llama):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.sinks"] = torch.ones(4)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old versions saved it

    _change_tensors(llama, change)
    words = (
        "1 tensor is missing: model.layers.1.mlp.up_proj.weight; "
        "1 tensor is without a place in llama.cpp's llama: model.layers.0.self_attn.sinks[.]"
    )
    with pytest.raises(ExportError, match=words):
        export_gguf(llama, tmp_path / "out.gguf")


def test_an_expert_that_is_missing_is_named(tmp_path):
    folder = tiny_checkpoint(tmp_path / "tiny", "olmoe").folder
    _change_tensors(folder, lambda tensors: tensors.pop("model.layers.0.mlp.experts.2.up_proj.weight"))
    with pytest.raises(ExportError, match="1 tensor is missing: model.layers.0.mlp.experts.2.up_proj.weight"):
        export_gguf(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"intermediate_size": 100},
            r"gate_proj.weight': expected shape \[100, 64\] by config.json, found \[96, 64\]",
        ),
        (
            {"vocab_size": 361},
            r"embed_tokens.weight': expected shape \[361, 64\] by config.json, found \[360, 64\]",
        ),
        ({"num_hidden_layers": 3}, "9 tensors are missing: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "9 tensors are without a place"),
        (
            {"num_hidden_layers": 1 << 31},
            "num_hidden_layers is 2,147,483,648, but the checkpoint has only 21 tensors",
        ),
        (
            {"tie_word_embeddings": True, "num_key_value_heads": 4},
            r"[kv]_proj.weight': expected shape \[64, 64\]",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(tmp_path, llama, change, words):
    _change_config(llama, **change)
    with pytest.raises(ExportError, match=words):
        export_gguf(llama, tmp_path / "out.gguf")


def test_a_number_of_experts_that_cannot_be(tmp_path):
    folder = tiny_checkpoint(tmp_path / "tiny", "olmoe").folder
    _change_config(folder, num_experts=1 << 31)
    with pytest.raises(ExportError, match=r"expected shape \[2147483648, 64\]"):
        export_gguf(folder, tmp_path / "out.gguf")


def test_integer_weights_are_refused(tmp_path, llama):
    def change(tensors):
        tensors["lm_head.weight"] = torch.ones(360, 64, dtype=torch.int8)

    _change_tensors(llama, change)
    with pytest.raises(ExportError, match="'lm_head.weight': expected one of F64, F32, F16, BF16, found I8"):
        export_gguf(llama, tmp_path / "out.gguf")


def test_a_vocabulary_of_another_size(tmp_path, llama, monkeypatch):
    def other(folder, config):
        made = plain_vocabulary(folder, config)
        return vocabulary.Vocabulary(made.metadata, 400)

    monkeypatch.setattr(vocabulary, "read_vocabulary", other)
    with pytest.raises(ExportError, match="the tokenizer has 400 tokens, the embedding 360 rows"):
        export_gguf(llama, tmp_path / "out.gguf")


def test_the_text_part_of_a_multimodal_gemma3(tmp_path):
    """The wrapper's config and names, with an image encoder that is left out."""
    tiny = tiny_checkpoint(tmp_path / "tiny", "gemma3")
    export_gguf(tiny.folder, tmp_path / "text.gguf")
    config = json.loads((tiny.folder / "config.json").read_text())
    for place, beginning in enumerate(("language_model.", "model.language_model.")):

        def change(tensors, beginning=beginning):
            for name in list(tensors):
                if name.startswith(("model.", "language_model.")):
                    text = name.removeprefix("language_model.").removeprefix("model.")
                    new = f"{beginning}{'model.' if beginning == 'language_model.' else ''}{text}"
                    tensors[new] = tensors.pop(name)
            tensors["vision_tower.patch.weight"] = torch.ones(3, 3)

        _change_tensors(tiny.folder, change)
        wrapper = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": config,
        }
        (tiny.folder / "config.json").write_text(json.dumps(wrapper))
        report = export_gguf(tiny.folder, tmp_path / f"{place}.gguf", name="tiny")
        assert report.notes == ("1 tensor that does not belong to the language model is left out",)
        np.testing.assert_array_equal(
            llama_logits(tmp_path / f"{place}.gguf", tiny.tokens),
            llama_logits(tmp_path / "text.gguf", tiny.tokens),
        )


# ---- conversion ------------------------------------------------------------------------------------------

NUMBERS = np.concatenate(
    [
        np.random.default_rng(0).standard_normal(70_000).astype(np.float32),
        np.array(
            [0.0, -0.0, 1e-8, 6e-8, 65504, np.inf, -np.inf, np.nan, 1 + 2**-9, 1 + 3 * 2**-9], np.float32
        ),
        np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001], np.uint32).view(np.float32),  # NaNs of other bits
    ]
)
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _bits(tensor):
    kinds = {torch.float64: torch.int64, torch.float32: torch.int32}
    return tensor.view(kinds.get(tensor.dtype, torch.int16)).numpy()


@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("source", TORCH)
def test_numbers_are_rounded_as_torch_does(source, target):
    given = torch.from_numpy(NUMBERS).to(TORCH[source])
    if target == "F16":
        given[given == 65536] = 1  # 65504 in bfloat16
    expected = given.to(torch.float32).to(TORCH[target])
    storage = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    found = np.empty(NUMBERS.size, storage[target])
    convert(_bits(given).view(storage[source]), source, found, target)
    numbers = ~torch.isnan(expected).numpy()
    np.testing.assert_array_equal(found.view(_bits(expected).dtype)[numbers], _bits(expected)[numbers])
    as_torch = torch.from_numpy(found.view(_bits(expected).dtype)).view(TORCH[target])
    assert torch.isnan(as_torch[~torch.from_numpy(numbers)]).all()


def test_what_float16_cannot_hold_is_refused():
    with pytest.raises(OutOfRange, match="holds 70000, F16 at most 65504"):
        convert(np.array([1, 70000, np.inf], np.float32), "F32", np.empty(3, np.float16), "F16")


def test_heads_are_interleaved():
    found = np.empty(12)
    interleave_halves(np.arange(12.0), found, head_rows=6, columns=2)
    assert found.reshape(6, 2)[:, 0].tolist() == [0, 6, 2, 8, 4, 10]


def test_a_number_beyond_float16_names_the_tensor(tmp_path, llama):
    _change_tensors(llama, lambda tensors: tensors["lm_head.weight"].fill_(1e5))
    with pytest.raises(
        ExportError, match="'lm_head.weight' holds .*, F16 at most 65504. Export to BF16 or F32"
    ):
        export_gguf(llama, tmp_path / "out.gguf", "F16")


def test_float64_and_mixed_checkpoints(tmp_path, llama):
    """The type of most weights is the model's; float64 becomes F32."""

    def change(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].double()

    _change_tensors(llama, change)
    assert export_gguf(llama, tmp_path / "mixed.gguf").type == "BF16"
    _change_tensors(llama, lambda tensors: tensors.update({name: t.double() for name, t in tensors.items()}))
    assert export_gguf(llama, tmp_path / "double.gguf").type == "F32"
    first, second = (gguf.GGUFReader(tmp_path / name).tensors for name in ("mixed.gguf", "double.gguf"))
    for half, whole in zip(first, second):
        numbers = gguf.quants.dequantize(half.data, half.tensor_type).reshape(whole.data.shape)
        np.testing.assert_array_equal(numbers, whole.data)


@pytest.mark.parametrize("hidden", [64, 1024])
def test_large_tensors_take_many_steps(tmp_path, monkeypatch, hidden):
    """Steps that are whole pages and steps that are not; the result is that of one step."""
    from edgeinfer.exporters import tensor_writer

    folder = tiny_checkpoint(
        tmp_path / "tiny",
        "mixtral",
        hidden_size=hidden,
        intermediate_size=136,
        num_hidden_layers=1,
        dtype="float16",
    ).folder
    export_gguf(folder, tmp_path / "whole.gguf", "BF16")
    monkeypatch.setattr(tensor_writer, "_STEP_BYTES", (10_000,))
    export_gguf(folder, tmp_path / "steps.gguf", "BF16")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "steps.gguf").read_bytes()


@pytest.mark.parametrize("what", ["_direct", "_cached"])
def test_file_systems_without_direct_reads_and_writes(tmp_path, llama, monkeypatch, what):
    from edgeinfer.exporters import aligned_file

    export_gguf(llama, tmp_path / "first.gguf", "F32")
    if what == "_direct":
        monkeypatch.setattr(aligned_file, "_DIRECT", 0)
    else:
        monkeypatch.setattr(aligned_file, "_NO_WAIT", 0)
    export_gguf(llama, tmp_path / "second.gguf", "F32")
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()


def test_a_file_that_shrinks_meanwhile(tmp_path, llama, monkeypatch):
    from edgeinfer.exporters import to_gguf

    write = to_gguf.write_tensors

    def cut_and_write(*args):
        data = (llama / "model.safetensors").read_bytes()
        (llama / "model.safetensors").write_bytes(data[:-1000])
        return write(*args)

    monkeypatch.setattr(to_gguf, "write_tensors", cut_and_write)
    with pytest.raises(ModelFileError, match="model.safetensors: cannot be read: the file became shorter"):
        export_gguf(llama, tmp_path / "out.gguf")


# ---- what is written, and within which memory ------------------------------------------------------------


def test_the_file_is_laid_out_for_streaming(tmp_path, llama):
    shares = []
    report = export_gguf(llama, tmp_path / "out.gguf", name="Tiny", progress=shares.append)
    file = read_model_file(tmp_path / "out.gguf")
    assert file.metadata["general.alignment"] == 4096 and file.metadata["general.name"] == "Tiny"
    assert file.metadata["general.file_type"] == 32 and file.metadata["general.size_label"] == "108K"
    assert [file.tensors[0].name, file.tensors[-1].name] == ["token_embd.weight", "output.weight"]
    assert report.bytes == (tmp_path / "out.gguf").stat().st_size == file.file_bytes
    assert report.bytes % 4096 == 0
    assert report.parameters == sum(
        tensor.numel() for tensor in load_file(llama / "model.safetensors").values()
    )
    assert shares == sorted(shares) and shares[-1] == 1.0
    types = {tensor.name.split(".")[-2]: tensor.type for tensor in file.tensors}
    assert types["attn_norm"] == "F32" and types["attn_q"] == "BF16"


def test_a_model_from_a_download_cache_keeps_its_name(tmp_path, llama):
    snapshot = tmp_path / "models--someone--Some-1B" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    llama.rename(snapshot)
    export_gguf(snapshot, tmp_path / "out.gguf")
    assert read_model_file(tmp_path / "out.gguf").metadata["general.name"] == "Some-1B"


def test_without_the_gguf_package_it_says_what_to_install(tmp_path, llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r'needs the gguf package: pip install "edgeinfer\[export\]"'):
        export_gguf(llama, tmp_path / "out.gguf")


def test_routers_and_vectors_stay_float32(tmp_path):
    folder = tiny_checkpoint(tmp_path / "tiny", "qwen2moe", dtype="bfloat16").folder
    export_gguf(folder, tmp_path / "out.gguf")
    for tensor in read_model_file(tmp_path / "out.gguf").tensors:
        kept = len(tensor.shape) == 1 or "ffn_gate_inp" in tensor.name
        assert tensor.type == ("F32" if kept else "BF16"), tensor.name


def test_too_little_memory_is_said(tmp_path, llama):
    with pytest.raises(BudgetError, match="takes .* of memory, --memory allows 1.00 MiB. Give .* or more"):
        export_gguf(llama, tmp_path / "out.gguf", memory=1 << 20)


def test_memory_stays_within_the_budget(tmp_path):
    """A checkpoint larger than the budget: 300 MB of bfloat16 experts to float32 in 160 MiB."""
    script = """
import json, struct, sys
from pathlib import Path
from edgeinfer.budget import process_memory
from edgeinfer.exporters import vocabulary
from edgeinfer.exporters.to_gguf import export_gguf
sys.path[:0] = [sys.argv[2]]
from tiny_checkpoints import plain_vocabulary
vocabulary.read_vocabulary = plain_vocabulary
folder = Path(sys.argv[1])
report = export_gguf(folder, folder / "out.gguf", "F32", memory=160 << 20)
print(json.dumps([report.bytes, process_memory().peak_rss_bytes]))
"""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_local_experts": 12,
        "vocab_size": 360,
    }
    expert = {"w1": [4096, 1024], "w2": [1024, 4096], "w3": [4096, 1024]}
    shapes = {
        "model.embed_tokens.weight": [360, 1024],
        "lm_head.weight": [360, 1024],
        "model.norm.weight": [1024],
        "model.layers.0.input_layernorm.weight": [1024],
        "model.layers.0.post_attention_layernorm.weight": [1024],
        "model.layers.0.block_sparse_moe.gate.weight": [12, 1024],
        **{f"model.layers.0.self_attn.{name}_proj.weight": [1024, 1024] for name in "qkvo"},
        **{
            f"model.layers.0.block_sparse_moe.experts.{number}.{name}.weight": shape
            for number in range(12)
            for name, shape in expert.items()
        },
    }
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + place)  # holes: zeros that take no room
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    num_bytes, peak = json.loads(done.stdout)
    (tmp_path / "out.gguf").unlink()
    assert num_bytes > 600_000_000
    assert peak < 160 << 20
