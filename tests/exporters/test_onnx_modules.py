"""PyTorch modules and encoders of transformers exported to ONNX, against PyTorch itself."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason='needs pip install "edgeinfer[export]"')
transformers = pytest.importorskip("transformers", reason='needs pip install "edgeinfer[export]"')

from onnx_layout import check_layout  # noqa: E402
from real_onnx import session  # noqa: E402

from edgeinfer.errors import ExportError  # noqa: E402
from edgeinfer.exporters.check import check  # noqa: E402
from edgeinfer.exporters.onnx_export import export_onnx  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {"vocab_size": 99, "max_position_embeddings": 64, **_SIZES}
#: Class -> settings
ENCODERS = {
    "BertForSequenceClassification": _TEXT,
    "RobertaModel": {**_TEXT, "pad_token_id": 1},
    "DistilBertModel": {"vocab_size": 99, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "MPNetModel": _TEXT,
    "ModernBertModel": {
        **_TEXT, "global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
    },
    "ViTModel": {**_SIZES, "image_size": 32, "patch_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, tmp_path):
    """Another batch and another length than those of the example, and padding."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**ENCODERS[name])).eval()
    model.save_pretrained(tmp_path / "hf")
    report = export_onnx(tmp_path / "hf", tmp_path / "m.onnx", check=lambda path: check(tmp_path / "hf", path))
    assert report.architecture == name and report.files[:2] == ("m.onnx", "m.onnx.data")
    check_layout(tmp_path / "m.onnx")
    run = session(tmp_path / "m.onnx")
    for batch, length in ((1, 30), (3, 5)):
        if name == "ViTModel":
            feeds = {"pixel_values": torch.randn(batch, 3, 32, 32)}
        else:
            feeds = {"input_ids": torch.randint(3, 99, (batch, length))}
            feeds["attention_mask"] = torch.ones_like(feeds["input_ids"])
            feeds["attention_mask"][0, -2:] = 0
        none = torch.zeros(batch, length).long()  # token types
        given = {port.name: feeds.get(port.name, none).numpy() for port in run.get_inputs()}
        found = run.run(None, given)
        with torch.no_grad():
            expected = model(**feeds)
        for port, array in zip(run.get_outputs(), found):
            right = expected[port.name].numpy()
            assert np.abs(array - right).max() <= 1e-5 * max(1, np.abs(right).max()), port.name


class Net(torch.nn.Module):
    """Two inputs, two outputs, dropout that must be off."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.out = torch.nn.Linear(16, 64)

    def forward(self, image, scale):
        x = torch.relu(self.norm(self.conv(image))) * scale[:, None, None, None]
        return torch.nn.functional.dropout(self.out(x.mean((2, 3))), 0.5, self.training), x.amax((1, 2, 3))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("quant, limit", [(None, 1e-5), ("F16", 2e-3)])
def test_modules(quant, limit, named, tmp_path):
    torch.manual_seed(0)
    module = Net().train()
    example = {"image": torch.randn(2, 3, 16, 16), "scale": torch.rand(2)}
    inputs = example if named else tuple(example.values())
    report = export_onnx(module, tmp_path / "m.onnx", example_inputs=inputs, quant=quant)
    assert report.architecture == "Net" and module.training, "the module stays as it was"
    check_layout(tmp_path / "m.onnx")
    run = session(tmp_path / "m.onnx")
    assert [port.name for port in run.get_inputs()] == ["image", "scale"]
    feeds = {"image": torch.randn(5, 3, 16, 16), "scale": torch.rand(5)}
    with torch.no_grad():
        expected = module.eval()(**feeds)
    found = run.run(None, {name: value.numpy() for name, value in feeds.items()})
    for right, array in zip(expected, found, strict=True):
        assert np.abs(array - right.numpy()).max() < limit * right.abs().max()


def test_what_a_module_needs_is_said(tmp_path):
    with pytest.raises(ExportError, match="needs example_inputs: a tensor, or a tuple or dict"):
        export_onnx(Net(), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="torch.onnx cannot export Net: .*channels"):
        export_onnx(Net(), tmp_path / "m.onnx", example_inputs=(torch.randn(2, 5, 16, 16), torch.rand(2)))
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_whose_weights_are_missing(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**_TEXT))
    state = {name: value for name, value in model.state_dict().items() if "layer.1" not in name}
    model.save_pretrained(tmp_path / "hf", state_dict=state)
    with pytest.raises(ExportError, match="has no weights for .*layer.1.*The checkpoint is incomplete"):
        export_onnx(tmp_path / "hf", tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
