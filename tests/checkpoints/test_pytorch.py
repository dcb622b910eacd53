"""torch.save's files read without torch: equal to what torch loads, and safe against what torch never writes."""

import copy
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from sdjax.checkpoints import pytorch
from sdjax.checkpoints.errors import CheckpointError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()


def read(path):
    return pytorch.read(path)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(tmp_path, dtype):
    tensor = (torch.arange(24).reshape(2, 3, 4) % 5).to(dtype)
    torch.save({"a": tensor}, tmp_path / "a.pt")
    array = read(tmp_path / "a.pt")["a"]
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    assert array.shape == (2, 3, 4)
    assert array.tobytes() == bits(tensor)


def test_views_parameters_and_shared_storages(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "slice": base[1:, ::2, 3],
        "parameter": torch.nn.Parameter(base[0]),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
    }
    torch.save(tensors, tmp_path / "a.pt")
    arrays = read(tmp_path / "a.pt")
    assert arrays.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(arrays[name], tensor.detach().numpy())
    assert np.shares_memory(arrays["base"], arrays["transposed"])


def test_arrays_are_read_only(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="read-only"):
        read(tmp_path / "a.pt")["a"][0] = 1


class ModelCheckpoint:
    def __init__(self):
        self.state = {"score": np.float64(0.5), "array": np.arange(3)}


def test_what_lightning_saves_around_the_weights_is_passed_over(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()  # an OrderedDict with the attribute _metadata
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    around = {
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {ModelCheckpoint: ModelCheckpoint(), "best": np.float32(3)},
        "optimizer_states": [optimizer.state_dict()],
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "generator": torch.random.get_rng_state(),
    }
    torch.save({"state_dict": state, **around}, tmp_path / "a.ckpt")
    arrays, others = pytorch.read(tmp_path / "a.ckpt")
    assert arrays.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())
    assert {"state_dict", *around} <= set(others)


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "executed"
    hostile = Hostile(str(target))
    torch.save(
        {"state_dict": {"a": torch.ones(3), "b": hostile}, "c": [hostile], "d": {"e": hostile}}, tmp_path / "a.ckpt"
    )
    np.testing.assert_array_equal(read(tmp_path / "a.ckpt")["a"], 1)
    torch.save(hostile, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match="not a dict"):
        read(tmp_path / "b.ckpt")
    assert not target.exists()


def test_torch_is_not_imported(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "a.ckpt")
    program = (
        "import sys; import sdjax.checkpoints; from sdjax.checkpoints import pytorch;"
        f"print(pytorch.read({str(tmp_path / 'a.ckpt')!r})[0]['a'].sum(), 'torch' in sys.modules, 'jax' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["3.0", "False", "False"]


# From here on: files that torch did not write.


def write(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def program(size=(2,), stride=(1,), offset=0, count=4, key="0", kind="FloatStorage", root="storage"):
    """The pickle of {"a": a tensor of these numbers}, written out by hand."""

    def text(string):
        return b"X" + struct.pack("<I", len(string)) + string.encode()

    def numbers(values):
        return b"(" + b"".join(pickle.dumps(value, 2)[2:-1] for value in values) + b"t"

    identifier = b"(" + text(root) + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu")
    identifier += pickle.dumps(count, 2)[2:-1] + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identifier + pickle.dumps(offset, 2)[2:-1]
    tensor += numbers(size) + numbers(stride) + b"\x89N" + b"tR"
    return b"\x80\x02}" + text("a") + tensor + b"s."


NUMBERS = np.arange(4, dtype=np.float32).tobytes()


def test_the_hand_written_file_is_read(tmp_path):
    path = write(tmp_path / "a.ckpt", [("x/data.pkl", program()), ("x/data/0", NUMBERS)])
    np.testing.assert_array_equal(read(path)["a"], [0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (5,)}, "beyond its storage"),
        ({"size": (4,), "offset": 1}, "beyond its storage"),
        ({"offset": 4}, "beyond its storage"),
        ({"offset": 2**40}, "beyond its storage"),
        ({"size": (2, 2), "stride": (3, 1)}, "beyond its storage"),
        ({"size": (2,), "stride": (2**40,)}, "beyond its storage"),
        ({"size": (10**12,), "stride": (0,)}, "beyond its storage"),
        ({"size": (10**12, 10**12), "stride": (0, 0)}, "beyond its storage"),
        ({"offset": -1}, "not those of a tensor"),
        ({"size": (-1,)}, "not those of a tensor"),
        ({"stride": (-1,)}, "not those of a tensor"),
        ({"size": (2**70,)}, "not those of a tensor"),
        ({"size": (2, 2)}, "not those of a tensor"),
        ({"size": (1,) * 40, "stride": (1,) * 40}, "not those of a tensor"),
        ({"size": (1.5,)}, "not those of a tensor"),
        ({"size": (True,)}, "not those of a tensor"),
        ({"size": (0, 2**40), "stride": (1, 1)}, "larger than an array"),
        ({"count": 5}, "another count"),
        ({"count": 3}, "another count"),
        ({"count": -4}, "another count"),
        ({"count": 2**62}, "another count"),
        ({"kind": "DoubleStorage"}, "another count"),
        ({"kind": "QInt8Storage"}, "numbers of torch.QInt8Storage"),
        ({"key": "1"}, "not in the archive"),
        ({"key": "../../etc/passwd"}, "not in the archive"),
        ({"key": "/etc/passwd"}, "not in the archive"),
        ({"root": "module"}, "not a storage"),
    ],
)
def test_tensors_outside_of_their_storage(tmp_path, arguments, message):
    path = write(tmp_path / "a.ckpt", [("x/data.pkl", program(**arguments)), ("x/data/0", NUMBERS)])
    with pytest.raises(CheckpointError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "zip"),
        ([("x/data/0", NUMBERS)], "not one that torch.save wrote"),
        ([("data.pkl", program()), ("data/0", NUMBERS)], "not one that torch.save wrote"),
        ([("x/y/data.pkl", program())], "not one that torch.save wrote"),
        ([("x/data.pkl", program()), ("y/data.pkl", program())], "2 data.pkl"),
        ([("x/data.pkl", program()), ("x/data/0", NUMBERS), ("x/data/0", NUMBERS)], "twice|2 data.pkl"),
        ([("x/data.pkl", program()), ("y/data/0", NUMBERS)], "not in the archive"),
        ([("x/data.pkl", program()), ("../x/data/0", NUMBERS)], "not in the archive"),
        ([("x/data.pkl", program()), ("x/data/0", NUMBERS), ("x/byteorder", b"big")], "endian"),
        ([("x/data.pkl", b"junk"), ("x/data/0", NUMBERS)], "data.pkl cannot be read"),
        ([("x/data.pkl", pickle.dumps([1, 2]))], "not a dict of tensors"),
        ([("x/data.pkl", pickle.dumps({"state_dict": 3}))], "not a dict of tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_did_not_write(tmp_path, members, message):
    with pytest.raises(CheckpointError, match=message):
        read(write(tmp_path / "a.ckpt", members))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_other_kinds_of_tensors_are_refused_by_name(tmp_path):
    torch.save({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"'a' is made by torch\._utils\._rebuild_qtensor"):
        read(tmp_path / "a.ckpt")


def test_compressed_members(tmp_path):
    members = [("x/data.pkl", program()), ("x/data/0", NUMBERS)]
    with pytest.raises(CheckpointError, match="compressed"):
        read(write(tmp_path / "a.ckpt", members, zipfile.ZIP_DEFLATED))


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(pytorch, "MAX_MEMBERS", 1)
    with pytest.raises(CheckpointError, match="2 files in the archive"):
        read(write(tmp_path / "a.ckpt", [("x/data.pkl", program()), ("x/data/0", NUMBERS)]))


def test_a_directory_that_would_fill_the_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "a.ckpt", [("x/data.pkl", program()), ("x/data/0", NUMBERS)])
    read(path)
    monkeypatch.setattr(pytorch, "MAX_DIRECTORY", 100)
    with pytest.raises(CheckpointError, match=r"a directory of [0-9]* bytes; at most 100 are read"):
        read(path)


def test_a_large_pickle(tmp_path):
    with pytest.raises(CheckpointError, match="at most"):
        read(write(tmp_path / "a.ckpt", [("x/data.pkl", b"N" * (1 << 24) + b".")]))


def test_what_cannot_be_printed_is_not_printed(tmp_path):
    # A tuple of two of a tuple of two ...: 2 ** 60 leaves where a size should be.
    wide = b")" + b"2\x86" * 60
    data = program().replace(b"(K\x02t", wide, 1)
    assert data != program()
    with pytest.raises(CheckpointError, match="not those of a tensor"):
        read(write(tmp_path / "a.ckpt", [("x/data.pkl", data), ("x/data/0", NUMBERS)]))


def replaced(old, new):
    data = program().replace(old, new, 1)
    assert data != program()
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (replaced(b"tR", b"t0}R"), "not a tensor with a storage"),  # a dict for the arguments
        (replaced(b"tR", b"t\x85R"), "not a tensor with a storage"),  # a tuple in a tuple
        (replaced(b"tQ", b"tQQ"), "not a storage"),  # a reference to a reference
        (replaced(b"tQ", b"t"), "not a tensor with a storage"),  # what should be a reference's key
        (replaced(b"(K\x02t", b"]K\x02a"), "not those of a tensor"),  # a list, which could change after the check
        (replaced(b"(K\x02t", b"}"), "not those of a tensor"),
        (replaced(b"(K\x02t", b"cos\nsystem\n)R"), "not those of a tensor"),  # a call for a size
        (replaced(b"(K\x02t", b"(cos\nsystem\nt"), "not those of a tensor"),
        (replaced(b"(K\x02t", b"q\x07h\x07"), "not those of a tensor"),  # the offset, from the memo, for the size
        (replaced(b"ctorch\nFloatStorage\n", b"X\x05\0\0\0Float"), "not a storage"),
        (replaced(b"ctorch\nFloatStorage\n", b"cos\nsystem\n"), "numbers of os.system"),
        (replaced(b"ctorch\nFloatStorage\n", b"cos\nsystem\n)R"), "not a storage"),
        (replaced(b"X\x01\0\0\x000", b"]"), "not in the archive"),  # a list for the storage's key
    ],
)
def test_other_types_where_a_tensor_has_its_parts(tmp_path, data, message):
    path = write(tmp_path / "a.ckpt", [("x/data.pkl", data), ("x/data/0", NUMBERS)])
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_a_state_dict_that_is_in_itself(tmp_path):
    loop = {}
    loop["state_dict"] = loop
    assert read(write(tmp_path / "a.ckpt", [("x/data.pkl", pickle.dumps(loop))])) == {}


def directory_of(whole):
    """Where the first entry of a zip file's directory begins, whose sizes are at 20 and 24, its offset at 42."""
    return whole.index(b"PK\x01\x02")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (20, 2**31, "compressed"),  # sizes that differ
        (42, 2**31, "not where the archive's directory says|directory cannot be read"),
        (42, 5, "not where the archive's directory says|directory cannot be read"),
        ((20, 24), 2**31, "ends beyond the file"),
        ((20, 24), 2**32 - 1, "ends beyond the file|directory cannot be read|compressed"),  # "see the extra field"
    ],
)
def test_directories_that_lie(tmp_path, place, value, message):
    whole = bytearray(write(tmp_path / "a", [("x/data/0", NUMBERS), ("x/data.pkl", program())]).read_bytes())
    for offset in place if isinstance(place, tuple) else (place,):
        start = directory_of(whole) + offset
        whole[start : start + 4] = struct.pack("<I", value)
    (tmp_path / "a.ckpt").write_bytes(whole)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "a.ckpt")


def test_members_that_overlap_take_no_memory(tmp_path):
    """What a bomb is made of (Fifield 2019): a thousand members of a megabyte that are one and the same."""
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program())
        archive.writestr("x/data/0", NUMBERS)
        archive.writestr("x/data/1", bytes(1 << 20))
        for i in range(2, 1000):
            twin = copy.copy(archive.getinfo("x/data/1"))
            twin.filename = f"x/data/{i}"
            archive.filelist.append(twin)
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    try:
        np.testing.assert_array_equal(read(path)["a"], [0, 1])
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("torch") / "a.ckpt"
    torch.save({"state_dict": {f"layer.{i}": torch.ones(3, 4) for i in range(4)}, "epoch": 1}, path)
    return path.read_bytes()


def survives(path, data):
    """Whatever the bytes, there is an answer or a CheckpointError."""
    path.write_bytes(data)
    try:
        for array in read(path).values():
            array.sum()
    except CheckpointError:
        return False
    return True


def test_truncated_files(tmp_path, whole):
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        assert not survives(tmp_path / "a.ckpt", whole[:length])


def test_damaged_files(tmp_path, whole):
    rng = random.Random(0)
    structures = [i for i in range(len(whole)) if i < 1200 or i > len(whole) - 900]
    for i in range(500):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.choice(structures)] = rng.randrange(256)
        survives(tmp_path / f"{i % 7}.ckpt", bytes(damaged))
