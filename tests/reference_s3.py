"""The reference packages of the S3 tokenizers and of CAM++, and ONNX files in the layouts of the published ones."""

import contextlib
import importlib
import importlib.util
import sys
import types
import warnings

import numpy as np
import pytest
import torch


@contextlib.contextmanager
def stubbed(*names):
    """Empty modules of these names, where there are none, for as long as a package is imported."""
    missing = [name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None]
    sys.modules |= {name: types.ModuleType(name) for name in missing}
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def package(name):
    """A module of a reference package; the test is skipped where it is not installed."""
    with warnings.catch_warnings(), stubbed("torchaudio"):
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def s3_model(version=2, **sizes):
    """A tokenizer of which every parameter matters and the codes differ; v2's or v3's class."""
    module = package(f"s3tokenizer.model_v{version}")
    kind, settings = (module.S3TokenizerV2, module.ModelConfig) if version == 2 else (module.S3TokenizerV3, module.ModelConfigV3)
    torch.manual_seed(version)
    model = kind(f"speech_tokenizer_v{version}_25hz", settings(**sizes)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value += 0.1 * torch.randn_like(value)
            elif "project_down" in name:
                value *= 3
    return model


class Graph:
    """A graph under construction; the initializers of node k are named by the exporter's counter, or as they are given."""

    def __init__(self):
        self.helper = package("onnx").helper
        self.nodes, self.initializers = [], []

    def value(self, name, array, constant=False):
        tensor = package("onnx.numpy_helper").from_array(np.asarray(array, order="C"), name)
        if constant:
            self.nodes.append(self.helper.make_node("Constant", [], [name], name, value=tensor))
        else:
            self.initializers.append(tensor)
        return name

    def node(self, operator, path, inputs, **attributes):
        """Adds a node as torch names it; returns the name of its output."""
        name = f"/{path}/{operator}"
        output = f"{name}_output_{sum(node.name == name for node in self.nodes)}"
        self.nodes.append(self.helper.make_node(operator, inputs, [output], name, **attributes))
        return output

    def linear(self, x, path, weight, bias=None, constant=False):
        """A MatMul by ("name", [out in]), and an Add of a bias, which the exporter puts first."""
        x = self.node("MatMul", path, [x, self.value(weight[0], weight[1].T)])
        return x if bias is None else self.node("Add", path, [self.value(*bias, constant=constant), x])

    def save(self, path, **how):
        onnx = package("onnx")
        graph = self.helper.make_graph(self.nodes, "main_graph", [], [], self.initializers)
        onnx.save_model(self.helper.make_model(graph, opset_imports=[self.helper.make_opsetid("", 17)]), str(path), **how)
        return path


def s3_onnx(path, model, eps=(1e-5, 1e-5), decomposed=False, **how):
    """A tokenizer as speech_tokenizer_v2.onnx (``decomposed``: _v3) has it.

    The weights are where they are there, but the network does not run: what has no weights is left out or stands for itself.
    """
    graph, state = Graph(), {name.removeprefix("encoder."): value.numpy() for name, value in model.state_dict().items()}
    counter = iter(range(4700, 9999))

    def name(operator, number):
        return f"onnx::{operator}_{next(counter) if decomposed else number}"

    def norm(x, path, number, epsilon):
        weight, bias = state[f"{path}.weight"], state[f"{path}.bias"]
        path = "/".join(path.rsplit(".", 1))
        if not decomposed:
            values = (
                graph.value(name("LayerNormalization", number), weight),
                graph.value(f"onnx::LayerNormalization_{number + 1}", bias),
            )
            return graph.node("LayerNormalization", path, [x, *values], axis=-1, epsilon=epsilon)
        values = graph.value(name("Mul", 0), weight), graph.value(name("Add", 0), bias)
        mean = graph.node("ReduceMean", path, [x], axes=[-1])
        centred = graph.node("Sub", path, [x, mean])
        square = graph.node("Pow", path, [centred, graph.value(f"/{path}/Constant_output_0", np.float32(2), constant=True)])
        constant = graph.value(f"/{path}/Constant_1_output_0", np.float32(epsilon), constant=True)
        deviation = graph.node(
            "Sqrt", path, [graph.node("Add", path, [graph.node("ReduceMean", path, [square], axes=[-1]), constant])]
        )
        scaled = graph.node("Mul", path, [graph.node("Div", path, [centred, deviation]), values[0]])
        return graph.node("Add", path, [scaled, values[1]])

    x = "feats"
    for i in (1, 2):
        inputs = [(name("Conv", 2214 + 2 * i), state[f"conv{i}.weight"]), (name("Conv", 2215 + 2 * i), state[f"conv{i}.bias"])]
        x = graph.node("Conv", f"conv{i}", [x, *(graph.value(*pair) for pair in inputs)], strides=[2])
    layers = sum("attn_ln.weight" in key for key in state)
    for i in range(layers):
        b, block, part = 2224 + 52 * i, f"blocks.{i}", {}
        y = norm(x, f"{block}.attn_ln", b, eps[0])
        for kind, offset in (("query", 3), ("key", 5), ("value", 8), ("out", 42)):
            if kind == "out":  # attention, which has no weights
                y = graph.node("MatMul", f"{block}/attn", [part["query"], part["key"]])
                y = graph.node("MatMul", f"{block}/attn", [graph.node("Add", f"{block}/attn", [y, "bias"]), part["value"]])
            at = f"{block}.attn.{kind}"
            bias = None if kind == "key" else (name("Add", b + offset), state[f"{at}.bias"])
            weight = name("MatMul", b + offset + 1), state[f"{at}.weight"]
            part[kind] = graph.linear(y, f"{block}/attn/{kind}", weight, bias)
        memory = f"{block}.attn.fsmn_block.weight"
        memory = graph.node("Conv", f"{block}/attn/fsmn_block", [part["value"], graph.value(memory, state[memory])])
        x = graph.node("Add", block, [x, graph.node("Add", f"{block}/attn", [part["out"], memory])])
        y = norm(x, f"{block}.mlp_ln", b + 44, eps[1])
        for layer, offset in ((0, 47), (2, 50)):
            at = f"{block}.mlp.{layer}"
            bias = name("Add", b + offset), state[f"{at}.bias"]
            weight = name("MatMul", b + offset + 1), state[f"{at}.weight"]
            y = graph.linear(y, f"{block}/mlp/mlp.{layer}", weight, bias, constant=decomposed and layer == 2)
        x = graph.node("Add", block, [x, y])
    down = "quantizer._codebook.project_down"
    weight, bias = (name("MatMul", 2536), state[f"{down}.weight"]), ("quantizer.project_in.bias", state[f"{down}.bias"])
    x = graph.node("Tanh", "quantizer", [graph.linear(x, "quantizer/project_in", weight, bias)])
    x = graph.node("Add", "quantizer", [x, graph.value("/quantizer/Constant_output_0", np.float32(1), constant=True)])
    powers = graph.value("/quantizer/Constant_1_output_0", np.float32([3**i for i in range(8)]), constant=True)
    graph.node("ReduceSum", "quantizer", [graph.node("Mul", "quantizer", [x, powers])])
    return graph.save(path, **how)


def campplus_model(small=False, plain=False):
    """A speaker encoder of which every parameter matters; ``plain``: with equal norms; ``small``: with 4 layers."""
    kinds, layers = package("speakerlab.models.campplus.DTDNN"), package("speakerlab.models.campplus.layers")
    torch.manual_seed(0)
    sizes = {"growth_rate": 4, "bn_size": 2, "init_channels": 8} if small else {}
    model = kinds.CAMPPlus(feat_dim=16 if small else 80, embedding_size=12 if small else 192, **sizes).eval()
    if small:
        for block, (count, width) in enumerate(((2, 8), (1, 8), (1, 6)), start=1):
            dense = layers.CAMDenseTDNNBlock(count, width, 4, 8, 3, dilation=1 if block == 1 else 2)
            total = width + 4 * count
            setattr(model.xvector, f"block{block}", dense)
            setattr(model.xvector, f"transit{block}", layers.TransitLayer(total, total // 2, bias=False))
        model.xvector.out_nonlinear = layers.get_nonlinear("batchnorm-relu", 5)
        model.xvector.dense = layers.DenseLayer(10, 12, config_str="batchnorm_")
        model.eval()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_mean"):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value += 0.3 if plain else 0.2 * torch.randn_like(value)
            elif "cam_layer.linear2.weight" in name:
                value *= 10  # masks that differ from segment to segment
    return model


def campplus_onnx(path, model):
    """A speaker encoder as torch exports it, with which campplus.onnx was made."""
    package("onnx")
    frames = torch.zeros(1, 250, model.head.out_channels // 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (frames,), str(path), dynamo=False, opset_version=17, dynamic_axes={"x": {1: "frames"}}, input_names=["x"]
        )
    return path
