"""Made models: stock llama.cpp runs them, the gguf package reads them, and they are what was asked for."""

import ctypes
import hashlib
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from tiny import tiny_model

from benchmarks import maker
from benchmarks.architecture import architecture_names
from benchmarks.maker import FILE_TYPES, make_model, plan_model
from benchmarks.routing import popularity
from benchmarks.weights import BLOCKS, RandomStream, random_rows

TEXT = "The quick brown fox, 1984: it's\na test of d\u00e9j\u00e0 vu.".encode()
EXPERT_ARCHITECTURES = [name for name in architecture_names() if maker.read_architecture(name).has_experts]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


class Stock:
    """Stock llama.cpp on one model, on the CPU, with one thread."""

    def __init__(self, path, vocab_only=False, on_node=None):
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers, params.vocab_only = 0, vocab_only
        params.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp refuses {path}"
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.context = None
        if not vocab_only:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = 512, 512, 512
            params.n_threads = params.n_threads_batch = 1
            if on_node:
                self._callback = llama_cpp.ggml_backend_sched_eval_callback(on_node)
                params.cb_eval = self._callback
            self.context = llama_cpp.llama_init_from_model(self.model, params)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.context:
            llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    @property
    def num_tokens(self):
        return llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def tokenize(self, text):
        tokens = (llama_cpp.llama_token * 512)()
        count = llama_cpp.llama_tokenize(self.vocabulary, text, len(text), tokens, 512, True, False)
        assert count > 0
        return tokens[:count]

    def detokenize(self, tokens):
        text = ctypes.create_string_buffer(4096)
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        count = llama_cpp.llama_detokenize(self.vocabulary, array, len(tokens), text, 4096, True, False)
        return text.raw[:count]

    def logits(self, tokens):
        """Float32 [len(tokens), vocabulary], decoded as one batch at positions 0, 1, ..."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        assert llama_cpp.llama_decode(self.context, batch) == 0
        pointer = llama_cpp.llama_get_logits(self.context)
        values = np.ctypeslib.as_array(pointer, shape=(len(tokens), self.num_tokens)).copy()
        llama_cpp.llama_batch_free(batch)
        return values


def assert_runs(path):
    with Stock(path) as stock:
        logits = stock.logits([1, 300, 301, 400, 450, 500, 300, 511])
    assert np.isfinite(logits).all()
    assert (logits.std(axis=1) > 0.03).all(), "the logits hardly differ between tokens"
    assert (logits.std(axis=1) < 10).all()
    correlations = np.corrcoef(logits)[np.triu_indices(len(logits), 1)]
    assert correlations.max() < 0.98, "two positions have nearly the same logits"
    assert (logits.argmax(axis=1) >= 259).all(), "a special token or byte wins"


@pytest.mark.parametrize("arch", architecture_names())
def test_stock_runs_every_architecture(models, arch):
    assert_runs(tiny_model(models, arch, "Q4_0"))


@pytest.mark.parametrize("type", FILE_TYPES)
def test_stock_runs_every_type(models, type):
    assert_runs(tiny_model(models, "llama", type))


def test_stock_runs_tied_embeddings(models):
    path = tiny_model(models, "llama", "Q4_K", tied=True)
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert_runs(path)


@pytest.mark.parametrize("arch", architecture_names())
def test_no_two_rows_are_alike(models, arch):
    seen = {}
    for tensor in gguf.GGUFReader(tiny_model(models, arch, "Q4_0")).tensors:
        for number, row in enumerate(tensor.data.reshape(-1, tensor.data.shape[-1])):
            other = seen.setdefault(row.tobytes(), (tensor.name, number))
            assert other == (tensor.name, number)


@pytest.mark.parametrize("type", BLOCKS)
def test_weights_have_mean_zero_and_the_wanted_deviation(type):
    chunks = random_rows(RandomStream(1, "some"), type, 1024, 512, std=1 / 32)
    data = np.concatenate(list(chunks)).reshape(512, -1)
    dtypes = {"F32": np.float32, "F16": np.float16}
    weights = gguf.quants.dequantize(
        data.view(dtypes.get(type, np.uint8)), gguf.GGMLQuantizationType[type]
    ).astype(np.float64)
    assert weights.shape == (512, 1024)
    # MXFP4's scales are powers of two
    tolerance = 0.42 if type == "MXFP4" else 0.02
    assert weights.std() == pytest.approx(1 / 32, rel=tolerance)
    assert abs(weights.mean()) < 0.02 / 32
    assert np.abs(weights.mean(axis=1)).max() < 0.2 / 32


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_same_seed_same_bytes(tmp_path):
    options = {"embedding": 256, "ffn": 512, "heads": 4, "vocabulary": 512, "layers": 2}
    one, same, other = (
        make_model(tmp_path / name, "mixtral", "Q4_K", seed=seed, **options)
        for name, seed in (("one", 7), ("same", 7), ("other", 8))
    )
    assert sha256(one) == sha256(same) != sha256(other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "same"]


def test_a_tensor_does_not_depend_on_the_others(models):
    small, large = (
        {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
        for path in (
            tiny_model(models, "llama", "Q8_0"),
            tiny_model(models, "llama", "Q8_0", layers=5, ffn=768),
        )
    )
    assert small["blk.2.attn_q.weight"] == large["blk.2.attn_q.weight"]
    assert small["output.weight"] == large["output.weight"]


@pytest.mark.parametrize("alignment", [32, 4096])
def test_alignment(models, alignment):
    path = tiny_model(models, "llama", "Q4_0", alignment=alignment)
    tensors = gguf.GGUFReader(path).tensors
    assert all(tensor.data_offset % alignment == 0 for tensor in tensors)
    assert_runs(path)


@pytest.mark.parametrize(
    "arch, type, size, dimensions",
    [
        ("llama", "Q4_0", 3_300_000_000, {}),
        ("llama", "Q4_0", 625_000_000, {"vocabulary": 128_000}),
        ("llama", "F16", 14_000_000_000, {}),
        ("llama", "Q6_K", 40_000_000, {}),
        ("mixtral", "Q4_0", 4_200_000_000, {"layers": 24, "experts": 64, "experts_used": 8}),
        ("mixtral", "Q4_K", 20_000_000_000, {}),
        ("qwen2moe", "Q8_0", 8_000_000_000, {}),
        ("qwen3moe", "Q4_K", 17_000_000_000, {}),
        ("gpt-oss", "Q4_0", 12_000_000_000, {}),
        ("deepseek2", "Q4_0", 9_000_000_000, {}),
        ("gemma2", "Q4_K", 1_600_000_000, {"vocabulary": 256_000}),
    ],
)
def test_plans_meet_the_size(arch, type, size, dimensions):
    recipe = plan_model(arch, type, size=size, **dimensions)
    assert sum(tensor.nbytes for tensor in recipe.tensors) == pytest.approx(size, rel=0.05)
    assert {name: recipe.dimensions[name] for name in dimensions} == dimensions
    assert recipe.dimensions["layers"] <= 64 and recipe.dimensions["ffn"] >= 256


def test_a_3_gb_llama_has_the_shape_of_a_7b():
    dimensions = plan_model("llama", "Q4_0", size=3_800_000_000).dimensions
    shape = {"layers": 32, "embedding": 4096, "ffn": 11008, "heads": 32, "kv_heads": 32, "vocabulary": 32000}
    assert {name: dimensions[name] for name in shape} == shape


def test_files_meet_the_size(tmp_path):
    path = make_model(tmp_path / "model.gguf", "llama", "Q4_0", size=30_000_000)
    assert path.stat().st_size == pytest.approx(30_000_000, rel=0.05)


@pytest.mark.parametrize("size", [512, 128_000])
def test_text_survives_the_vocabulary(models, size):
    path = tiny_model(
        models, "llama", "Q4_0", layers=1, vocabulary=size, tied=True, embedding=32, heads=1, kv_heads=1
    )
    with Stock(path, vocab_only=True) as stock:
        assert stock.num_tokens == size
        tokens = stock.tokenize(TEXT)
        assert tokens[0] == 1 and 0 not in tokens and 2 not in tokens
        assert stock.detokenize(tokens).strip() == TEXT


class ChosenExperts:
    """Counts the experts that llama.cpp's own router chooses, by its graph callback."""

    def __init__(self, experts, used):
        library = Path(llama_cpp.__file__).parent / "lib"
        self.ggml = ctypes.CDLL(str(next(library.glob("libggml-base.*"))))
        self.ggml.ggml_get_name.restype = ctypes.c_char_p
        self.ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
        self.ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
        self.experts, self.used, self.num_tokens = experts, used, 0
        self.counts = {}

    def __call__(self, tensor, ask, _):
        name = self.ggml.ggml_get_name(tensor).decode()
        wanted = name.startswith("ffn_moe_topk-") and name[13:].isdigit()  # not a copy of it
        if wanted and not ask:
            # a view of the first `used` of each token's sorted experts
            ids = np.empty((self.num_tokens, self.experts), np.int32)
            size = ids.nbytes - (self.experts - self.used) * ids.itemsize
            self.ggml.ggml_backend_tensor_get(tensor, ids.ctypes.data, 0, size)
            self.counts[name] = np.bincount(ids[:, : self.used].ravel(), minlength=self.experts)
        return True if not ask else wanted


def measured_shares(path, experts, used):
    """Float [layers, experts]: the share of 500 random tokens that choose each expert, most popular first."""
    chosen = ChosenExperts(experts, used)
    chosen.num_tokens = 500
    tokens = np.random.default_rng(0).integers(259, 4096, chosen.num_tokens).tolist()
    with Stock(path, on_node=chosen) as stock:
        stock.logits(tokens)
    counts = np.array([chosen.counts[name] for name in sorted(chosen.counts)])
    assert (counts.sum(axis=1) == used * chosen.num_tokens).all()
    return -np.sort(-counts / chosen.num_tokens, axis=1), counts.argmax(axis=1)


@pytest.mark.parametrize("arch", EXPERT_ARCHITECTURES)
def test_routing_is_spread_or_skewed(models, arch):
    experts, used = 32, 4
    options = {"experts": experts, "experts_used": used, "vocabulary": 4096, "layers": 6, "ffn": 64}
    spread, _ = measured_shares(tiny_model(models, arch, "Q8_0", **options), experts, used)
    skewed, favourites = measured_shares(
        tiny_model(models, arch, "Q8_0", routing="skewed", **options), experts, used
    )
    assert len(spread) == len(skewed) >= 3
    assert spread.max() < 0.3 and spread.min() > 0.04
    assert spread[:, : experts // 4].sum(axis=1).mean() / used < 0.35
    expected = popularity(experts, used, "skewed")
    assert expected[0] > 8 * expected[-1] and expected[: experts // 4].sum() / used > 0.5
    assert skewed.mean(axis=0) == pytest.approx(expected, abs=0.08)
    assert len(set(favourites)) > 1, "the same expert is the favourite of every layer"


class GateInputs:
    """Keeps each layer's gate input, float32 [tokens, embedding], by llama.cpp's graph callback."""

    def __init__(self, shape):
        self.ggml = ChosenExperts(0, 0).ggml
        self.shape, self.layers = shape, {}

    def __call__(self, tensor, ask, _):
        name = self.ggml.ggml_get_name(tensor).decode()
        wanted = name.startswith("ffn_norm-") and name[9:].isdigit()  # not what is reshaped out of it
        if wanted and not ask:
            values = np.empty(self.shape, np.float32)
            self.ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            self.layers[int(name[9:])] = values
        return True if not ask else wanted


def cross_layer_recall(path, used):
    """Share of the experts of each layer from the second that its gate finds in the gate input of the layer before."""
    tokens = np.random.default_rng(0).integers(259, 4096, 100).tolist()
    inputs = GateInputs((len(tokens), 512))
    with Stock(path, on_node=inputs) as stock:
        stock.logits(tokens)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    recalls = []
    for layer in range(1, len(inputs.layers)):
        gate = tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        scores = [inputs.layers[source] @ gate.T for source in (layer - 1, layer)]
        predicted, chosen = ([set(row[-used:]) for row in np.argsort(one)] for one in scores)
        recalls.append(np.mean([len(one & other) for one, other in zip(predicted, chosen)]) / used)
    return recalls


@pytest.mark.parametrize("routing, low, high", [("predictable", 0.8, 0.9), ("unpredictable", 0.08, 0.17)])
def test_routing_that_can_or_cannot_be_told_from_the_layer_before(models, routing, low, high):
    experts, used = 64, 8
    options = {"experts": experts, "experts_used": used, "vocabulary": 4096, "layers": 12, "ffn": 64}
    path = tiny_model(models, "mixtral", "Q8_0", routing=routing, embedding=512, **options)
    recalls = cross_layer_recall(path, used)
    assert len(recalls) == 11
    assert low < np.mean(recalls) < high
    shares, _ = measured_shares(path, experts, used)
    assert shares.max() < 0.3 and shares.min() > 0.03


@pytest.mark.parametrize(
    "options, words",
    [
        ({"arch": "lama"}, "expected an architecture out of deepseek2, .*found 'lama'"),
        ({"type": "Q5_0"}, "expected a type out of Q4_0, .*found 'Q5_0'"),
        ({"routing": "zipf"}, "expected a routing out of spread, skewed, .*found 'zipf'"),
        ({"alignment": 48}, "power of two from 8, found 48"),
        ({"experts": 8}, "expected no experts for llama"),
        ({"vocabulary": 300}, "vocabulary of 354 to 2,000,000 tokens, found 300"),
        ({"width": 300}, "expected dimensions out of .* found width"),
        (
            {"size": 10_000_000, "layers": 2, "embedding": 4096},
            "expected dimensions that can make 10,000,000",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        make_model(tmp_path / "model.gguf", **options)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(maker, "random_rows", full)
    with pytest.raises(OSError):
        make_model(tmp_path / "model.gguf", size=20_000_000)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, capsys):
    out = tmp_path / "model.gguf"
    shape = ["--layers", "1", "--embedding", "256", "--ffn", "256", "--heads", "2", "--vocab", "512"]
    assert maker.main([str(out), "--arch", "qwen3", "--type", "Q6_K", *shape]) == 0
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        maker.main([str(out), "--experts", "4"])
    assert exit.value.code == 2
    assert "expected no experts for llama" in capsys.readouterr().err
