"""The demonstration's parts, and the whole of it with a tenth of the training."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import srigl_fx as sx
from srigl_fx.demo import data, figures, models, serve, train
from srigl_fx.demo.run import run_demo
from srigl_fx.runtime.ort.library import library_status


def test_the_split_is_fixed_and_stratified() -> None:
    first, second = data.digits(), data.digits()
    assert torch.equal(first.test_x, second.test_x)
    assert torch.equal(first.test_y, second.test_y)
    counts = torch.bincount(first.test_y)
    assert (counts >= 43).all()
    assert (counts <= 46).all()
    assert abs(float(first.train_x.mean())) < 1e-5
    assert float(first.train_x.std()) == pytest.approx(1, abs=1e-3)


def test_the_noise_is_the_same_at_test_time_and_what_it_says() -> None:
    split = data.noisy_digits()
    assert torch.equal(split.test_x, data.noisy_digits().test_x)
    assert float((split.test_x - split.test_y).std()) == pytest.approx(data.NOISE, rel=0.01)
    assert float(split.test_y.min()) >= 0
    assert float(split.test_y.max()) <= 1


def test_augmentation_moves_by_at_most_a_pixel() -> None:
    images = torch.arange(64.0).reshape(1, 1, 8, 8)
    moved = {int(data.shift(images, torch.Generator().manual_seed(seed))[0, 0, 4, 4]) for seed in range(60)}
    assert moved == {8 * row + column for row in (3, 4, 5) for column in (3, 4, 5)}


@pytest.mark.parametrize("build", [models.VisionTransformer, models.ResidualNetwork])
def test_networks_answer_each_image_alone(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    images = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[3:4], model(images[3:4]), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def short_run() -> train.Run:
    task = train.TASKS[0]
    return train.train(task, "srigl", 0.9, steps=3 * task.update_every)


@pytest.mark.long
def test_training_records_the_topology_at_each_update(short_run: train.Run) -> None:
    update_every = short_run.task.update_every
    assert sorted({snapshot.step for snapshot in short_run.history}) == [update_every * i for i in range(4)]
    rows = [row for row in sx.summary(short_run.model).rows if row.status != "dense"]
    last = [snapshot for snapshot in short_run.history if snapshot.step == 3 * update_every]
    assert [snapshot.active for snapshot in last] == [row.active_neurons for row in rows]
    assert [round(snapshot.fan_in, 2) for snapshot in last] == [row.fan_in for row in rows]
    assert not short_run.model.training
    sx.verify(short_run.model)


@pytest.mark.long
def test_training_repeats_itself(short_run: train.Run) -> None:
    again = train.train(short_run.task, "srigl", 0.9, steps=3 * short_run.task.update_every)
    assert again.history == short_run.history
    for name, tensor in short_run.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


@pytest.mark.slow
def test_the_figure_is_drawn(short_run: train.Run, tmp_path: Path) -> None:
    figures.draw_topology([short_run, short_run], tmp_path / "topology.png")
    assert (tmp_path / "topology.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def served(short_run: train.Run, tmp_path_factory: pytest.TempPathFactory) -> serve.Pair:
    return serve.serve(short_run, tmp_path_factory.mktemp("served"))


@pytest.mark.long
def test_serving_measures_what_was_trained(short_run: train.Run, served: serve.Pair) -> None:
    whole = served.whole
    assert whole.path.name == "vit_srigl_90.onnx"
    assert whole.file_bytes == whole.path.stat().st_size
    assert 0 < whole.max_difference < 1e-4
    with torch.no_grad():
        predicted = short_run.model(short_run.split.test_x).argmax(dim=1)
    assert whole.score == pytest.approx(float((predicted == short_run.split.test_y).float().mean()), abs=1 / 450)
    latency = serve.latencies_us({"only": whole.session}, short_run.split.test_x[:1].numpy(), seconds=0.05)
    assert 1 < latency["only"] < 1e6


@pytest.mark.long
def test_a_run_is_served_in_eight_bits(served: serve.Pair) -> None:
    whole, int8 = served.whole, served.int8
    assert int8.path.name == "vit_srigl_90_int8.onnx"
    assert int8.file_bytes < 0.9 * whole.file_bytes  # the rest is the embedding, and nodes
    assert 1e-4 < int8.max_difference < 0.1 * float(np.abs(whole.outputs).max())


@pytest.mark.long
def test_a_dense_run_is_exported_once(short_run: train.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolutional network, which has given scales in int8."""
    exports, export = [], torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: exports.append(export(*args, **options)))
    cnn = train.TASKS[1]
    found = serve.serve(train.Run(cnn, "dense", 0.0, cnn.build().eval(), short_run.split, 0.0), tmp_path)
    assert len(exports) == 1
    served = found.int8
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in onnx.load(served.path).graph.node}
    assert served.file_bytes < 0.4 * found.whole.file_bytes
    assert served.max_difference < 0.2 * float(np.abs(served.outputs).max())


@pytest.mark.long
def test_the_whole_demonstration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    status = run_demo(out, quick=True)
    assert status == 0 or not library_status().supported

    printed = capsys.readouterr().out
    assert "times as fast" in printed
    with (out / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 + 2
    assert {row["network"] for row in rows} == {"vit", "cnn", "wide"}
    by_training = {(row["network"], row["training"], row["sparsity"]): row for row in rows}
    for (network, training, _), row in by_training.items():
        assert float(row["max_difference"]) < 1e-3
        dense = by_training[network, "dense", "0.0"]
        assert float(row["dense_us_int8"]) > 0
        assert (row["sparse_us_int8"] == "") == (training == "dense")
        if network == "wide":  # in small files the fallback, which has more steps in int8, weighs more than the weights
            assert int(row["file_bytes_int8"]) < 0.6 * int(row["file_bytes"])
        if row["metric"] == "accuracy":
            assert abs(float(row["score_int8"]) - float(row["score"])) < 0.03
        if training != "dense":
            assert int(row["file_bytes"]) < 0.5 * int(dense["file_bytes"])
            assert float(row["kept_weights"]) < 0.15
    assert (out / "topology.png").stat().st_size > 10_000

    files = sorted(out.glob("*.onnx"))
    assert len(files) == 16
    split = data.digits()
    stock = ort.InferenceSession(out / "cnn_srigl_90.onnx")  # without the library: the fallback inside the file
    with_library = sx.runtime.load(out / "cnn_srigl_90.onnx")
    np.testing.assert_allclose(
        serve.answer(stock, split.test_x.numpy()),
        serve.answer(with_library, split.test_x.numpy()),
        rtol=1e-4,
        atol=1e-4,
    )
