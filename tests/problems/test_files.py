"""Readers on small files of each format, whole, cut off and of another kind; and where files are looked for."""

import gzip
import struct

import numpy as np
import pytest
import scipy.io
import torch

from ocnopt.errors import DataError
from ocnopt.problems import learning_task
from ocnopt.problems.learning import miniboone, photographs, protein, series
from ocnopt.problems.learning.files import (
    data_folder,
    find,
    read_arrays,
    read_cifar,
    read_idx,
    read_matlab,
    read_series,
    read_table,
)

VOWELS = """# a comment
@problemName Small
@timeStamps false
@classLabel true b a
@data
1,2,3:4,5,6:b
7,8:9,10:a
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OCNOPT_DATA", str(tmp_path))
    return tmp_path


def idx(array):
    return b"\0\0" + bytes([8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def image_files(folder, part, count, seed):
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 10
    for name, array in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return torch.from_numpy(images), torch.from_numpy(labels)


def test_idx(tmp_path):
    array = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    path = tmp_path / "a-idx3-ubyte"
    path.write_bytes(idx(array))
    assert torch.equal(read_idx(path), torch.from_numpy(array))
    path.write_bytes(b"\0\0\x0d\x01" + struct.pack(">I2f", 2, 1.5, -2.0))
    assert read_idx(path).tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda whole: whole[:-1],
            r"holds 27 bytes; expected 28 \(a header of 16, then entries of shape \(3, 2, 2\)\)",
        ),
        (lambda whole: whole + b"\0", "holds 29 bytes; expected 28"),
        (lambda whole: whole[:9], "holds 9 bytes; expected 16"),
        (lambda whole: b"PK\x03\x04" + whole[4:], "begins with 504b0304; expected an IDX file"),
        (lambda whole: b"", "begins with nothing; expected an IDX file"),
    ],
)
def test_broken_idx(tmp_path, change, message):
    path = tmp_path / "a-idx3-ubyte"
    path.write_bytes(change(idx(np.zeros((3, 2, 2), dtype=np.uint8))))
    with pytest.raises(DataError, match=rf"{path} .*{message}"):
        read_idx(path)


def test_a_compressed_file_that_breaks_off(tmp_path):
    path = tmp_path / "a-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(1000, dtype=np.uint8)))[:-6])
    with pytest.raises(
        DataError, match=rf"a-idx1-ubyte.gz \({path.stat().st_size} bytes\) cannot be read .*whole file"
    ):
        read_idx(path)


def test_cifar(tmp_path):
    path, rows = tmp_path / "test_batch.bin", np.random.default_rng(0).integers(0, 10, (2, 3073), dtype=np.uint8)
    path.write_bytes(rows.tobytes())
    images, labels = read_cifar(path)
    assert labels.tolist() == rows[:, 0].tolist()
    assert images.shape == (2, 3, 32, 32)
    assert int(images[1, 2, 31, 30]) == rows[1, -2]  # channel after channel, row after row
    path.write_bytes(rows.tobytes()[:-5])
    with pytest.raises(DataError, match="holds 6141 bytes; expected a multiple of 3073"):
        read_cifar(path)
    path.write_bytes(bytes([10]) * 3073)
    with pytest.raises(DataError, match="holds the class 10; expected 0 to 9"):
        read_cifar(path)


def test_series(tmp_path):
    path = tmp_path / "Small_TRAIN.ts"
    path.write_text(VOWELS)
    values, classes = read_series(path)
    assert [x.tolist() for x in values] == [[[1, 4], [2, 5], [3, 6]], [[7, 9], [8, 10]]]
    assert classes.tolist() == [1, 0]  # in sorted order of the labels


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("@data", "", r"no line @data in its \d+ bytes"),
        ("timeStamps false", "timeStamps true", "has time stamps"),
        ("9,10:a", "9", r"series 2 of .* \(\d+ bytes\) cannot be read"),
        ("7,8:", "7,8:1,2:", r"series of \[2, 3\] channels; expected the same number"),
        (":b\n", ":c\n", r"series 1 .* a class of \['a', 'b'\]"),
        ("1,2,3:4,5,6:b\n7,8:9,10:a\n", "", r"series of \[\] channels"),
    ],
)
def test_broken_series(tmp_path, old, new, message):
    path = tmp_path / "Small_TRAIN.ts"
    path.write_text(VOWELS.replace(old, new))
    with pytest.raises(DataError, match=message):
        read_series(path)


def test_tables_and_arrays(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("1,2\n3,4\n")
    assert read_table(path, (2, 2)).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(DataError, match=r"holds \(2, 2\) numbers in 8 bytes; expected \(3, 2\)"):
        read_table(path, (3, 2))
    path.write_text("1,2\n3")
    with pytest.raises(DataError, match=r"table.csv \(5 bytes\) cannot be read"):
        read_table(path, (2, 2))
    arrays = tmp_path / "arrays.npz"
    np.savez(arrays, X=np.eye(2), objects=np.array([{}], dtype=object))
    assert torch.equal(read_arrays(arrays, ("X",))[0], torch.eye(2, dtype=torch.float64))
    for name in ("y", "objects"):  # missing; a pickle
        with pytest.raises(DataError, match=rf"expected a whole .npz of numbers with {name}"):
            read_arrays(arrays, (name,))
    arrays.write_bytes(arrays.read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read"):
        read_arrays(arrays, ("X",))
    with pytest.raises(DataError, match="expected a whole MATLAB file with X"):
        read_matlab(arrays, ("X",))


def test_where_files_are_looked_for(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "a.ts").touch()
    assert find("set/a.ts", dataset="set", source="there", others=[elsewhere]) == elsewhere / "a.ts"
    (folder / "set").mkdir()
    (folder / "set" / "a.ts").touch()
    assert find("set/a.ts", dataset="set", source="there", others=[elsewhere]) == folder / "set" / "a.ts"
    with pytest.raises(
        DataError, match=r"b.ts is missing; expected it as .*set/b.ts, from there: fetch it with 'ocnopt"
    ):
        find("set/b.ts", dataset="set", source="there")
    with pytest.raises(DataError, match="bring it there, or set OCNOPT_DATA"):
        find("b.ts", dataset="", source="there")
    monkeypatch.delenv("OCNOPT_DATA")
    assert data_folder().name == "data"


def test_mnist_in_its_published_split(folder):
    (folder / "mnist").mkdir()
    images, labels = image_files(folder / "mnist", "train", 30, 0)
    test_images, _ = image_files(folder / "mnist", "t10k", 20, 1)
    task = learning_task("mnist").build()
    mean, deviation = images.float().mean(), images.float().std()
    torch.testing.assert_close(task.train_inputs[:, 0], (images - mean) / deviation)
    torch.testing.assert_close(task.test_inputs[:, 0], (test_images - mean) / deviation)
    assert task.train_targets.tolist() == labels.tolist()
    assert task.make_model()(task.test_inputs[:2]).shape == (2, 10)
    image_files(folder / "mnist", "t10k", 20, 1)
    (folder / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(3, dtype=np.uint8))))
    with pytest.raises(DataError, match=r"\(20, 28, 28\) and t10k-labels-idx1-ubyte.gz \(3,\); expected \(N, 28, 28\)"):
        learning_task("mnist").build()


def test_half_size_images(folder, monkeypatch):
    images, _ = image_files(folder, "t10k", 30, 0)
    monkeypatch.setattr(photographs, "SMALL_TEST", 10)
    task = learning_task("mnist_small").build()
    assert task.train_inputs.shape == (20, 1, 14, 14)
    together = torch.cat([task.train_inputs, task.test_inputs])
    halves = images.float().unflatten(1, (14, 2)).unflatten(3, (14, 2)).mean(dim=(2, 4))
    # the same images in another order, shifted and scaled
    scale = halves.std() / together.std()
    torch.testing.assert_close(
        together[:, 0].flatten().sort()[0] * scale, (halves - halves.mean()).flatten().sort()[0], atol=0.2, rtol=0
    )
    assert abs(float(task.train_inputs.mean())) < 1e-5


def test_colour_images(folder):
    random = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / "cifar10").mkdir(exist_ok=True)
        rows = random.integers(0, 256, (2, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        (folder / "cifar10" / f"{name}.bin").write_bytes(rows.tobytes())
    task = learning_task("cifar10").build()
    assert task.split == "10 train, 2 test, as published"
    assert task.train_inputs.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert task.make_model()(task.test_inputs).shape == (2, 10)
    pixels = random.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    (folder / "svhn").mkdir()
    for part in ("train", "test"):
        scipy.io.savemat(folder / "svhn" / f"{part}_32x32.mat", {"X": pixels, "y": [[10], [1], [2], [9]]})
    task = learning_task("svhn").build()
    assert task.test_targets.tolist() == [0, 1, 2, 9]
    assert task.test_inputs.shape == (4, 3, 32, 32)
    assert torch.equal(
        task.train_inputs[0, :, 1, 2].argsort(), torch.from_numpy(pixels[1, 2, :, 0].astype(float)).argsort()
    )
    scipy.io.savemat(folder / "svhn" / "test_32x32.mat", {"X": pixels, "y": [[1]]})
    with pytest.raises(DataError, match=r"holds X \(32, 32, 3, 4\) and y \(1, 1\); expected \(32, 32, 3, N\)"):
        learning_task("svhn").build()


def test_the_archive_s_series(folder):
    (folder / "articulary_words").mkdir()
    for part in ("TRAIN", "TEST"):
        (folder / "articulary_words" / f"ArticularyWordRecognition_{part}.ts").write_text(VOWELS)
    task = learning_task("articulary_words").build()
    assert task.train_inputs.shape == (2, 3, 2)
    assert task.train_inputs[1, 2].tolist() == [0, 0]
    assert abs(float(task.train_inputs.sum())) < 1e-5
    assert task.make_model()(task.test_inputs).shape == (2, 2)


def test_the_series_that_the_aeon_package_brings(folder, monkeypatch):
    kept = folder / "site" / "aeon" / "datasets" / "data" / "JapaneseVowels"
    kept.mkdir(parents=True)
    for part in ("TRAIN", "TEST"):
        (kept / f"JapaneseVowels_{part}.ts").write_text(VOWELS)
    with pytest.raises(DataError, match="fetch it with 'ocnopt data fetch japanese_vowels'"):
        learning_task("japanese_vowels").build()
    monkeypatch.syspath_prepend(folder / "site")
    assert learning_task("japanese_vowels").build().train_targets.tolist() == [1, 0]


def test_spoken_digits_at_irregular_times(folder, monkeypatch):
    monkeypatch.setattr(series, "DIGITS_SHAPE", (40, 2))
    monkeypatch.setattr(series, "DIGITS_TEST", 10)
    random = np.random.default_rng(0)
    lengths = random.integers(3, 9, 40)
    frames = random.normal(size=(lengths.sum(), 2)).astype(np.float32)
    np.savez(folder / series.DIGITS_FILE, X=frames, y=np.arange(40) % 10, lengths=lengths)
    task = series.spoken_digits(kept=0.5)
    inputs, targets = task.train_inputs, task.train_targets
    assert sorted(torch.bincount(targets).tolist()) == [3] * 10
    seen = ~inputs.isnan().any(dim=2)
    assert bool((seen.int().diff(dim=1) <= 0).all())  # observations first, then nothing
    assert inputs[:, 0, 0].tolist() == [0.0] * 30
    assert bool((inputs[..., 0][seen][1:] * 2 % 1 == 0).all())  # gaps are whole frames over a mean gap of two
    assert series.spoken_digits(kept=1.0).train_inputs[:, 1, 0].tolist() == [1.0] * 30
    # a series alone gives what it gives among longer ones
    model = task.make_model()
    rows = seen.sum(dim=1).argsort()
    shortest = inputs[rows[:1], : int(seen[rows[0]].sum())]
    torch.testing.assert_close(model(inputs[rows[:1]]), model(shortest))
    torch.testing.assert_close(model(inputs)[rows[:1]], model(shortest), atol=1e-4, rtol=0)
    np.savez(folder / series.DIGITS_FILE, X=frames[:-1], y=np.arange(40) % 10, lengths=lengths)
    with pytest.raises(
        DataError, match=r"of 40 utterances and 40 digits; expected 40 of each and \(sum of lengths, 2\)"
    ):
        series.spoken_digits()


def test_proteins(folder, monkeypatch):
    monkeypatch.setattr(protein, "SIZE", (20, 10))
    monkeypatch.setattr(protein, "TEST_SIZE", 5)
    table = np.random.default_rng(0).normal(3, 2, (20, 10))
    np.savetxt(folder / "protein.csv.gz", table, delimiter=",")
    data = protein.load()
    assert data.train_inputs.shape == (15, 9)
    assert data.test_targets.shape == (5, 1)
    together = torch.cat([data.train_inputs, data.train_targets], dim=1)
    assert together.mean(0).abs().max() < 1e-6
    assert (together.std(0) - 1).abs().max() < 1e-6
    (folder / "protein.csv.gz").unlink()
    (folder / "protein").mkdir()
    # as published: a header, and the distance in front
    np.savetxt(folder / "protein" / "CASP.csv", np.roll(table, 1, axis=1), delimiter=",", header="RMSD,F1", comments="")
    assert torch.equal(protein.load().train_inputs, data.train_inputs)
    assert learning_task("protein_flow").build().make_model()(data.test_inputs).shape == (5,)
    assert learning_task("protein").build().make_model()(data.test_inputs).shape == (5, 1)


def test_neutrinos(folder, monkeypatch):
    """Two events are far out, one column has a value that comes too often; a tenth of the rest is for testing."""
    monkeypatch.setattr(miniboone, "EVENTS", (30, 4))
    monkeypatch.setattr(miniboone, "SIGNAL", 22)
    monkeypatch.setattr(miniboone, "SIZE", (20, 3))
    table = np.random.default_rng(0).normal(size=(30, 4))
    table[:8, 2] = -5.0
    table[[3, 9]] = -999.0
    (folder / "miniboone").mkdir()
    path = folder / "miniboone" / "MiniBooNE_PID.txt"
    np.savetxt(path, table, header=" 22 8", comments="")
    train, test = miniboone.load()
    rows = torch.from_numpy(np.delete(np.delete(table[:22], [3, 9], axis=0), 2, axis=1))
    expected = (rows - rows[:18].mean(0)) / rows[:18].std(0, correction=0)
    torch.testing.assert_close(train, expected[:17].float())
    torch.testing.assert_close(test, expected[18:].float())
    assert learning_task("miniboone_flow").build().make_model()(test).shape == (2,)
    monkeypatch.setattr(miniboone, "SIZE", (20, 4))
    with pytest.raises(DataError, match=r"\(20, 3\) numbers after the preprocessing; expected \(20, 4\)"):
        miniboone.load()
