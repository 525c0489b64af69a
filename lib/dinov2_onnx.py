"""A DINOv2 that was exported to ONNX, alone or inside another model, as a folder that this project and transformers open.

    python -m lib.dinov2_onnx vit_s_focus.onnx dinov2-s          # needs `pip install onnx`
    python finetune_vlm.py --vision dinov2-s --data ...

torch's exporter keeps the names of transformers' Dinov2Model for vectors, and those of its modules in the names of nodes. The
matrix of a linear layer stands transposed and without a name as an input of a MatMul, whose product is added to the bias that
has the layer's name. Width, blocks, heads, patches and the norms' epsilon are read from the graph: nothing is assumed.
"""

import math
import re
from pathlib import Path

import torch

from data.image_settings import ImageSettings
from lib.cli import Parser, run_cli
from lib.files import need, new_folder, write_json
from lib.image_settings import write_image_settings
from lib.layouts import find_layout
from lib.layouts.common import respell
from lib.weights import empty_model, load_tensors, write_tensors

IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}  # what DINOv2 is published with
# transformers 5 has other names inside attention than the published files, which it still writes
SPELLINGS = {
    **{rf"\.attention\.{part[0]}_proj\.": f".attention.attention.{part}." for part in ("query", "key", "value")},
    r"\.attention\.o_proj\.": ".attention.output.dense.",
}


class Graph:
    """The nodes of an ONNX file, and every constant in it by name."""

    def __init__(self, file: Path):
        try:
            from onnx import load, numpy_helper
        except ImportError:
            raise ValueError(f"{file} is read by the onnx package: `pip install onnx`") from None
        from google.protobuf.message import DecodeError

        self.file, to_array = file, numpy_helper.to_array
        try:
            graph = load(str(file)).graph
        except DecodeError as error:
            raise ValueError(f"{file} is not an ONNX file ({error})") from None
        self.nodes = list(graph.node)
        self.constants = {tensor.name: to_array(tensor) for tensor in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.constants.update((node.output[0], to_array(x.t)) for x in node.attribute if x.name == "value")
        self.made_by = {output: node for node in self.nodes for output in node.output}

    def find(self, what: str, under: str, operation: str | None = None) -> list[list]:
        """The inputs (a constant's array, or a name) of the nodes of an operation whose names begin with `under`. Raises
        ValueError, with `what` is looked for, where there are none."""
        nodes = [node for node in self.nodes if node.name.startswith(under) and operation in (None, node.op_type)]
        need(nodes, self.file, f"no {what} of a Dinov2Model that torch exported is in it")
        return [[self.constants.get(name, name) for name in node.input] for node in nodes]


def linear_layers(graph: Graph) -> dict[str, torch.Tensor]:
    """{name: weight [out, in]} of every linear layer that has a bias with a name."""
    weights = {}
    for node in graph.nodes:
        products = [graph.made_by[name] for name in node.input if name in graph.made_by]
        biases = [name for name in node.input if name.endswith(".bias")]
        if node.op_type == "Add" and biases and products and products[0].op_type == "MatMul":
            matrix = graph.constants[products[0].input[1]]
            weights[biases[0].removesuffix("bias") + "weight"] = torch.tensor(matrix.T.copy())
    return weights


def split_positions(graph: Graph, prefix: str) -> torch.Tensor:
    """[1, 1+N, D]: the class token's position and the patches', which are apart in the file, since only those are resized."""
    whole = graph.constants.get(f"{prefix}embeddings.position_embeddings")
    if whole is not None:
        return torch.tensor(whole)
    path = "/" + prefix.replace(".", "/")
    inputs = [x for node in graph.find("embeddings", f"{path}embeddings/") for x in node if getattr(x, "ndim", 0) == 3]
    cls = [x for x in inputs if x.shape[1] == 1 and x is not graph.constants[f"{prefix}embeddings.cls_token"]]
    patches = [x for x in inputs if x.shape[1] > 1]
    need(len(cls) == len(patches) == 1, graph.file, "its position embeddings, [1, 1, D] and [1, N, D], are not found")
    return torch.cat([torch.tensor(cls[0]), torch.tensor(patches[0])], dim=1)


def head_width(graph: Graph, layer: str) -> int:
    """From the shape that queries are split into: [..., heads, width of one]."""
    shape = graph.find("attention", f"{layer}attention/", "Reshape")[0][1]
    if isinstance(shape, str):  # put together from constants, and from the sizes of the batch
        parts = [graph.constants.get(name) for name in graph.made_by[shape].input]
        shape = [part.item() for part in parts if part is not None]
    need(len(shape) and shape[-1] > 0, graph.file, "how wide its heads are is not found")
    return int(shape[-1])


def norm_epsilon(graph: Graph, norm: str) -> float:
    for node in graph.nodes:
        if node.name.startswith(norm) and node.op_type == "LayerNormalization":
            return next(entry.f for entry in node.attribute if entry.name == "epsilon")
    added = [x for node in graph.find("norm", norm, "Add") for x in node if getattr(x, "size", 0) == 1]
    need(added, graph.file, "the epsilon of its norms is not found")
    return float(f"{added[0].item():.6g}")  # 1e-06 as a number of 32 bits is 9.99999997e-07


def read_dinov2(file: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """What transformers' config.json and model.safetensors would hold. Raises ValueError where it is no DINOv2."""
    graph = Graph(file)
    named = [name for name in graph.constants if name.endswith("embeddings.cls_token")]
    need(len(named) == 1, file, f"a DINOv2 has one embeddings.cls_token, here are {len(named)}")
    prefix = named[0].removesuffix("embeddings.cls_token")
    layer = "/" + prefix.replace(".", "/") + "encoder/layer.0/"
    graph.find("GELU", f"{layer}mlp/activation", "Erf")
    vectors = {name: torch.tensor(value) for name, value in graph.constants.items() if name.startswith(prefix)}
    tensors = {**vectors, **{name: weight for name, weight in linear_layers(graph).items() if name.startswith(prefix)}}
    tensors[f"{prefix}embeddings.position_embeddings"] = positions = split_positions(graph, prefix)
    tensors = respell(tensors, {f"^{re.escape(prefix)}": "", **SPELLINGS}, r"^/")  # constants of nodes begin with /
    for name in ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.mlp.fc1.bias"):
        need(name in tensors and positions.ndim == 3, file, f"it has no {name}, or positions of no [1, patches, width]")
    filters, width = tensors["embeddings.patch_embeddings.projection.weight"], positions.shape[2]
    side, hidden = math.isqrt(positions.shape[1] - 1), len(tensors["encoder.layer.0.mlp.fc1.bias"])
    need(side**2 == positions.shape[1] - 1, file, f"its {positions.shape[1] - 1} patches make no square")
    need(hidden % width == 0, file, f"its MLP is {hidden} wide, which is no multiple of {width}")
    tensors["embeddings.mask_token"] = torch.zeros(1, width)  # transformers has one, which nothing here reads
    return {
        "model_type": "dinov2", "architectures": ["Dinov2Model"], "image_size": side * filters.shape[2],
        "patch_size": filters.shape[2], "num_channels": filters.shape[1], "hidden_size": width, "mlp_ratio": hidden // width,
        "num_hidden_layers": len({name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}),
        "num_attention_heads": width // head_width(graph, layer), "hidden_act": "gelu", "qkv_bias": True,
        "layer_norm_eps": norm_epsilon(graph, f"{layer}norm1/"), "layerscale_value": 1.0, "dtype": "float32",
    }, tensors  # fmt: skip


def write_dinov2_folder(file: Path, folder: Path) -> dict:
    """config.json, model.safetensors, and preprocessor_config.json for whole images at the size of the positions; the config is
    returned. Raises ValueError where the file holds no DINOv2, FileExistsError where the folder holds something."""
    need(file.is_file(), file, "there is no such file")
    config, tensors = read_dinov2(file)
    layout = find_layout("dinov2")
    model = empty_model(layout.build, layout.read_config(config))
    load_tensors(model, layout.clean(dict(tensors)), layout.names(model), str(file), torch.float32)  # or says what is missing
    with new_folder(folder) as new:
        write_tensors(new / "model.safetensors", {name: tensor.contiguous() for name, tensor in tensors.items()})
        size = (config["image_size"], config["image_size"])
        write_image_settings(new, ImageSettings(size, **IMAGENET), "Bit")
        write_json(new / "config.json", config)
    return config


def main(argv=None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.onnx")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new one")
    args = parser.parse_args(argv)
    config = write_dinov2_folder(args.file, args.folder)
    sizes = "{num_hidden_layers} blocks of width {hidden_size}, {num_attention_heads} heads, images of {image_size} pixels"
    print(f"{args.folder} is in the layout of dinov2 now: {sizes.format(**config)}")


if __name__ == "__main__":
    run_cli(main)
