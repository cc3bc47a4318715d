# examples/digits/train.py: makes digits.onnx, digits.zip and labels.csv from scikit-learn's handwritten digits.
#
# Rule 1: the committed files are this script's output: same versions of scikit-learn and Pillow, same bytes.
# Rule 2: the pictures in digits.zip are the data set itself: 1,797 images of 8x8, values 0..16 stretched to 0..255.
#
# Run: pip install "idunno[examples]" && python examples/digits/train.py
from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

HERE: Final = Path(__file__).parent
SEED: Final = 7
HIDDEN: Final = 64
"""Enough for 98 % on images never seen; the model stays below 30 KB."""
HELD_OUT: Final = 0.25
"""The share of the images that training never sees."""
OPSET: Final = 17
"""Read by every onnxruntime since 1.12."""
DATE: Final = (2020, 1, 1, 0, 0, 0)
"""Of every member of the zip: its bytes must not depend on the day."""


def train(pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> tuple[MLPClassifier, float]:
    """A small net on pixels [n, 64] in 0..1, and its accuracy on the held-out quarter."""
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        pixels, labels, test_size=HELD_OUT, random_state=SEED, stratify=labels
    )
    net = MLPClassifier((HIDDEN,), alpha=1e-3, max_iter=400, random_state=SEED)
    net.fit(seen, seen_labels)
    return net, float(net.score(unseen, unseen_labels))


def graph(net: MLPClassifier) -> onnx.ModelProto:
    """The net as ONNX: image float32 [N, 1, 8, 8] in 0..1 -> label int64 [N], probabilities float32 [N, 10]."""
    weights = [w.astype(np.float32) for w in net.coefs_]
    biases = [b.astype(np.float32) for b in net.intercepts_]
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "w1", "b1"], ["sum1"]),
        helper.make_node("Relu", ["sum1"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "w2", "b2"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
    ]
    constants = {"w1": weights[0], "b1": biases[0], "w2": weights[1], "b2": biases[1]}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "digits",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])],
            [
                helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]),
                helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 10]),
            ],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
        producer_name="idunno examples/digits",
    )
    onnx.checker.check_model(model)
    return model


def pictures(images: np.ndarray[Any, Any]) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Name and 8x8 bytes of each picture, in the data set's order."""
    stretched = np.rint(images * 255 / 16).astype(np.uint8)
    return [(f"images/{number:04}.png", image) for number, image in enumerate(stretched)]


def write_zip(path: Path, members: list[tuple[str, np.ndarray[Any, Any]]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, image in members:
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG", optimize=True)
            info = zipfile.ZipInfo(name, DATE)
            info.external_attr = 0o644 << 16
            info.create_system = 3  # Unix, wherever the script runs
            archive.writestr(info, png.getvalue())


def main() -> None:
    digits = load_digits()
    members = pictures(digits.images)
    # What a model is given later: the pictures' bytes, divided by 255.
    pixels = np.stack([image for _, image in members]).reshape(-1, 64).astype(np.float32) / 255
    net, held_out = train(pixels, digits.target)

    (HERE / "digits.onnx").write_bytes(graph(net).SerializeToString(deterministic=True))
    write_zip(HERE / "digits.zip", members)
    rows = [f"{name},{label}\n" for (name, _), label in zip(members, digits.target, strict=True)]
    (HERE / "labels.csv").write_text("query,label\n" + "".join(rows))

    print(f"accuracy: {held_out:.1%} held out, {net.score(pixels, digits.target):.1%} overall")
    for name in ("digits.onnx", "digits.zip", "labels.csv"):
        print(f"{name}: {(HERE / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
