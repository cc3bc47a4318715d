# Models and rows: what fits, what is a row's own error, what the model rejects.
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from idunno.base.errors import ModelFailed
from idunno.worker.data import Bad, Chunk, Picture
from idunno.worker.runtimes import Answered, Model, load_model
from idunno.worker.runtimes.onnx import _plain
from idunno.worker.runtimes.prepare import Input, RowError, layout, row
from tests.unit.worker.helpers import EXAMPLES, add_one, png, save_model


def outputs(model: Model, rows: list[Any]) -> list[Any]:
    """What the model says to each row; an error as its text."""
    answers = model.predict(Chunk(list(range(len(rows))), rows))
    return [answer.error if isinstance(answer, Bad) else answer.output for answer in answers]


def wanted(shape: tuple[int | None, ...], kind: Any = np.float32) -> Input:
    return Input("x", np.dtype(kind), shape)


@pytest.mark.parametrize(
    ("shape", "result"),
    [
        ((1, 4, 6), (1, 4, 6)),
        ((3, 4, 6), (3, 4, 6)),
        ((4, 6, 1), (4, 6, 1)),
        ((4, 6, 3), (4, 6, 3)),
        ((4, 6), (4, 6)),
        ((16,), (16,)),
        ((3, None, None), (3, 8, 8)),
    ],
)
def test_an_image_takes_the_layout_of_the_input(shape: tuple[int | None, ...], result: tuple[int, ...]) -> None:
    made = row(Picture(png(value=51)), wanted(shape))
    assert made.shape == result
    assert made.dtype == np.float32
    assert np.allclose(made, 0.2)


def test_integer_inputs_get_the_pixels_as_they_are() -> None:
    assert row(Picture(png(value=51)), wanted((1, 8, 8), np.uint8)).max() == 51


@pytest.mark.parametrize("shape", [(2, 8, 8), (10,), (1, 1, 8, 8), ()])
def test_an_input_that_is_no_image_says_so(shape: tuple[int, ...]) -> None:
    assert layout(wanted(shape)) is None
    with pytest.raises(RowError, match="is an image, but the model's input is x float32"):
        row(Picture(png()), wanted(shape))


def test_an_image_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.worker.runtimes.prepare.PIXELS_MAX", 63)
    with pytest.raises(RowError, match="8 x 8 pixels, more than 63"):
        row(Picture(png()), wanted((1, 8, 8)))


@pytest.mark.parametrize("content", [b"", b"garbage", png()[:40], png()[:-24], b"GIF89a" + b"\xff" * 40])
def test_a_broken_image_is_the_error_of_its_row(content: bytes) -> None:
    with pytest.raises(RowError):
        row(Picture(content), wanted((1, 8, 8)))


def test_numbers_are_fitted_only_where_it_is_no_guess() -> None:
    assert row([[1, 2], [3, 4]], wanted((1, 2, 2))).shape == (1, 2, 2)  # an axis of one is missing
    assert row([1, 2, 3, 4], wanted((1, 2, 2))).tolist() == [[[1, 2], [3, 4]]]  # flat
    assert row([[1, 2], [3, 4]], wanted((4,))).tolist() == [1, 2, 3, 4]
    assert row(5, wanted((1,))).tolist() == [5]
    assert row([1, 2, 3], wanted((None,))).tolist() == [1, 2, 3]
    with pytest.raises(RowError, match=r"has shape \[2, 3\], the model's input is x float32\[N, 3, 2\]"):
        row([[1, 2, 3], [4, 5, 6]], wanted((3, 2)))  # transposed or reshaped? not ours to say
    for value in ([1, 2], [[1], [2, 3]], ["a", "b", "c"], [None, 1, 2], {"a": 1}, "text"):
        with pytest.raises(RowError):
            row(value, wanted((3,)))


def test_a_cast_that_would_change_a_number_is_refused() -> None:
    assert row([1.0, 2.0], wanted((2,), np.int64)).dtype == np.int64
    with pytest.raises(RowError, match="numbers that uint8 cannot hold"):
        row([1, 256], wanted((2,), np.uint8))
    with pytest.raises(RowError, match="numbers that int64 cannot hold"):
        row([1.5, 2], wanted((2,), np.int64))


def test_bad_rows_among_good_ones_do_not_fail_the_batch(tmp_path: Path) -> None:
    model = load_model("onnx", str(add_one(tmp_path / "m")), 1)
    answers = outputs(model, [[1, 2], [1, 2, 3], Bad("is no JSON"), [3, 4], "text"])
    assert answers[0] == [2.0, 3.0]
    assert answers[3] == [4.0, 5.0]
    assert answers[1] == "has shape [3], the model's input is x float32[N, 2]"
    assert answers[2] == "is no JSON"
    assert "holds something else than numbers" in answers[4]


def test_an_array_is_one_run_and_a_wrong_one_is_an_error_of_every_row(tmp_path: Path) -> None:
    model = load_model("onnx", str(add_one(tmp_path / "m")), 1)
    good = model.predict(Chunk([0, 1], np.array([[1, 2], [3, 4]], np.uint8)))
    assert good == [Answered([2.0, 3.0]), Answered([4.0, 5.0])]
    wrong = model.predict(Chunk([0, 1], np.zeros((2, 5), np.float32)))
    assert wrong == [Bad("has shape [5], the model's input is x float32[N, 2]")] * 2


def test_a_fixed_batch_is_cut_and_filled_up(tmp_path: Path) -> None:
    model = load_model("onnx", str(add_one(tmp_path / "m", batch=4)), 1)
    assert model.rows_max % 4 == 0
    assert outputs(model, [[i, 0] for i in range(6)]) == [[i + 1.0, 1.0] for i in range(6)]


def test_several_inputs_are_given_by_name_and_several_outputs_come_by_name(tmp_path: Path) -> None:
    scalar, floats = ["N", 1], TensorProto.FLOAT
    folder = save_model(
        tmp_path / "m",
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["rest"])],
        {"a": (floats, scalar), "b": (floats, scalar)},
        {"sum": (floats, scalar), "rest": (floats, scalar)},
    )
    model = load_model("onnx", str(folder), 1)
    answers = outputs(model, [{"a": 5, "b": [2], "more": "x"}, {"a": 1}, [1, 2]])
    assert answers[0] == {"sum": [7.0], "rest": [3.0]}
    assert answers[1] == "has fields a; the model's inputs are a, b"
    assert answers[2].startswith("has one value")


def test_text_goes_to_a_model_of_text(tmp_path: Path) -> None:
    text = (TensorProto.STRING, ["N", 1])
    folder = save_model(tmp_path / "m", [helper.make_node("Identity", ["x"], ["y"])], {"x": text}, {"y": text})
    model = load_model("onnx", str(folder), 1)
    assert outputs(model, ["héllo", ["you"], {"x": "named"}]) == [["héllo"], ["you"], ["named"]]
    assert "something else than text" in outputs(model, [3])[0]


def test_a_model_that_rejects_the_batch_says_it_in_its_own_words(tmp_path: Path) -> None:
    numbers = (TensorProto.INT64, ["N", 1])
    table = helper.make_tensor("table", TensorProto.FLOAT, [2], [0.5, 1.5])
    nodes = [helper.make_node("Gather", ["table", "x"], ["y"])]
    folder = save_model(tmp_path / "m", nodes, {"x": numbers}, {"y": (TensorProto.FLOAT, ["N", 1])}, [table])
    model = load_model("onnx", str(folder), 1)
    assert outputs(model, [[1]]) == [[1.5]]
    with pytest.raises(ModelFailed, match=r"rejected a batch of 2: .*out of data bounds") as caught:
        outputs(model, [[1], [7]])
    assert "\n" not in str(caught.value)


def test_an_output_whose_first_axis_is_not_the_rows_fails_the_task(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)]
    folder = save_model(tmp_path / "m", nodes, {"x": (TensorProto.FLOAT, ["N", 2])}, {"y": (TensorProto.FLOAT, [])})
    with pytest.raises(ModelFailed, match=r"output y has shape \[\] for 2 rows"):
        outputs(load_model("onnx", str(folder), 1), [[1, 2], [3, 4]])


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08" * 30])
def test_a_file_that_is_no_model_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wrong.onnx").write_bytes(content)
    with pytest.raises(ModelFailed, match=r"^wrong.onnx (cannot be loaded|has)|no inputs") as caught:
        load_model("onnx", str(tmp_path), 1)
    assert "\n" not in str(caught.value)


def test_a_folder_must_say_which_file_is_the_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFailed, match=r"has no \.onnx file"):
        load_model("onnx", str(tmp_path), 1)
    shutil.copy(EXAMPLES / "digits.onnx", tmp_path / "a.onnx")
    shutil.copy(EXAMPLES / "digits.onnx", tmp_path / "b.onnx")
    with pytest.raises(ModelFailed, match=r"has 2 \.onnx files: name the one to load model.onnx"):
        load_model("onnx", str(tmp_path), 1)
    shutil.copy(EXAMPLES / "digits.onnx", tmp_path / "model.onnx")
    assert load_model("onnx", str(tmp_path), 1).signature == "image float32[N, 1, 8, 8] -> label, probabilities"


@pytest.mark.parametrize("inside", [True, False])
def test_weights_beside_the_model_are_read_only_inside_its_folder(tmp_path: Path, inside: bool) -> None:
    folder = tmp_path / "m"
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    entry = weights.external_data.add()
    entry.key, entry.value = "location", "w.bin" if inside else "../w.bin"
    for path in (tmp_path / "w.bin", folder / "w.bin"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(np.array([10, 20], np.float32).tobytes())
    floats = (TensorProto.FLOAT, ["N", 2])
    save_model(folder, [helper.make_node("Add", ["x", "w"], ["y"])], {"x": floats}, {"y": floats}, [weights])
    if inside:
        assert outputs(load_model("onnx", str(folder), 1), [[1, 2]]) == [[11.0, 22.0]]
    else:
        with pytest.raises(ModelFailed, match="escapes model directory"):
            load_model("onnx", str(folder), 1)


def test_the_reason_a_model_does_not_load_is_the_same_on_every_node_and_comes_first(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Frobnicate", ["a"], ["y"])],
        "g",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )
    said = set()
    for content in (b"no model", helper.make_model(graph).SerializeToString()):
        for node in ("n1", "n2"):
            folder = tmp_path / node
            folder.mkdir(exist_ok=True)
            (folder / "m.onnx").write_bytes(content)
            with pytest.raises(ModelFailed, match=r"^m\.onnx cannot be loaded: \w") as caught:
                load_model("onnx", str(folder), 1)
            assert str(tmp_path) not in str(caught.value)
            said.add(str(caught.value))
    assert len(said) == 2
    assert "m.onnx cannot be loaded: Protobuf parsing failed. (INVALID_PROTOBUF)" in said


def test_the_runtimes_source_is_left_out_of_a_reason() -> None:
    said = (
        "[ONNXRuntimeError] : 1 : FAIL : Load model from /n3/cache/8/m.onnx failed:/onnxruntime_src/core/graph/utils.h:46 void "
        "onnxruntime::ValidateOpset(const std::unordered_map<std::__cxx11::basic_string<char>, int>&, bool (*)(int), int) "
        "ONNX Runtime only *guarantees* support for (some) models."
    )
    assert _plain(said) == "ONNX Runtime only *guarantees* support for (some) models. (FAIL)"
    assert _plain("something else: 3") == "something else: 3"
