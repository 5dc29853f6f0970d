"""The bindings of the extension: arrays, addresses, names and sizes that would read elsewhere."""

import os
import re

import numpy as np
import pytest
from table_records import needs_extension

from realign_kernels._extension import extension
from realign_kernels.refcache.store import compact_table, open_table

pytestmark = needs_extension
PRINT = bytes(16)


def misaligned(array):
    """The same values, one byte after an aligned address."""
    shifted = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype)
    assert not shifted.flags.aligned and (shifted == array).all()
    return shifted


UNSUITABLE = {
    "misaligned": misaligned,
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "not contiguous": lambda array: np.repeat(array, 2)[::2],
    "two dimensions": lambda array: array[None],
    "another dtype": lambda array: array.astype("c16"),
    "objects": lambda array: array.astype(object),
}


@pytest.mark.parametrize("change", UNSUITABLE.values(), ids=UNSUITABLE)
def test_an_unsuitable_array_is_refused(change, tmp_path):
    core = extension()
    ints, values = np.array([3, 1]), np.array([0.5, 0.25])
    floats, counts = np.zeros(4, np.float32), np.array([1, 2], np.int32)
    keys = np.arange(4, dtype="i8").view("V16")
    table = core.Table(str(tmp_path / "table"), PRINT)
    for at in range(3):
        lengths = [ints, ints, np.array([0, 1])]
        lengths[at] = change(lengths[at])
        with pytest.raises(ValueError, match="must be a contiguous 1-D int64 array"):
            core.pack_forest(*lengths, 16)
    with pytest.raises(ValueError, match="offsets must be a contiguous 1-D int64 array"):
        core.StagingRing(1).push(floats.ctypes.data, 4, change(ints))
    with pytest.raises(ValueError, match="x must be a contiguous 1-D float32 array"):
        core.exponential(change(floats))
    with pytest.raises(ValueError, match="logps must be a contiguous 1-D float64 array"):
        table.insert(keys, change(values), counts)
    with pytest.raises(ValueError, match="tokens must be a contiguous 1-D int32 array"):
        table.insert(keys, values, change(counts))
    assert len(table) == 0


def test_keys_are_contiguous_at_any_address(tmp_path):
    table = extension().Table(str(tmp_path / "table"), PRINT)
    keys = np.frombuffer(bytes(33), "V16", offset=1)
    assert table.insert(keys, np.zeros(2), np.ones(2, np.int32)) == 1
    assert table.lookup(keys)[1].tolist() == [1, 1]
    for unsuitable in (np.repeat(keys, 2)[::2], keys[None]):
        with pytest.raises(ValueError, match="keys must be a contiguous 1-D V16 array"):
            table.lookup(unsuitable)
    with pytest.raises(ValueError, match="keys must be a contiguous 1-D array of V16"):
        table.lookup(keys.view("i8"))


def test_a_misaligned_address_is_refused():
    core, memory = extension(), np.zeros(64)
    odd, even = memory.ctypes.data + 1, memory.ctypes.data
    with pytest.raises(ValueError, match="a tensor is not aligned"):
        core.StagingRing(1).push(odd, 4, np.array([0, 4]))
    product = ["float32", 2, 2, 2, even, 2, 1, even, 2, 1, even + 64, 2, "float32", False, 1]
    rows = [even, "float32", 4, 1, 4, even, 0, 0.0, 1.0, 0, even, "float32", 4, *[even] * 5, 1]
    finish = [1, 2, even, even, 2, "float32", *[even] * 4, even, "float32", 1]
    for call, arguments, addresses in (
        (core.gemm, product, (4, 7, 10)),
        (core.read_rows, rows, (0, 5, 10, 13, 14, 15, 16, 17)),
        (core.finish_direction, finish, (2, 3, 6, 7, 8, 9, 10)),
    ):
        for at in addresses:
            with pytest.raises(ValueError, match="a tensor is not aligned"):
                call(*arguments[:at], odd, *arguments[at + 1 :])


def test_sizes_outside_of_their_range_are_refused():
    core, memory = extension(), np.zeros(64)
    at, most = memory.ctypes.data, 2**63 - 1
    for m, threads in ((-1, 1), (2, 0), (2, -5)):
        with pytest.raises(ValueError, match="a size is negative: -1|threads must be at least 1"):
            core.gemm("float32", m, 2, 2, at, 2, 1, at, 2, 1, at, 2, "float32", False, threads)
        with pytest.raises(ValueError, match="a size is negative: -1|threads must be at least 1"):
            core.finish_direction(
                m, 2, at, at, 2, "float32", at, at, at, at, at, "float32", threads
            )
        with pytest.raises(ValueError, match="a size is negative: -1|threads must be at least 1"):
            core.read_rows(
                *(at, "float32", 4, m, 4, at, 0, 0.0, 1.0, 0, at, "float32", 4, *[at] * 5, threads)
            )
    for threads in (4097, 2**31 - 1):
        with pytest.raises(ValueError, match="threads must be at least 1 and at most 4096"):
            core.gemm("float32", 0, 2, 2, at, 2, 1, at, 2, 1, at, 2, "float32", False, threads)
    for size in (most, 2**64 - 1):
        with pytest.raises(ValueError, match="is too large"):
            core.Block(size)
    for offsets, count in (([0, 4], -1), ([-1, 4], 4), ([0, most], 4), ([-most, most], 4)):
        with pytest.raises(ValueError, match="offsets must be non-decreasing"):
            core.StagingRing(1).push(at, count, np.array(offsets))
    for roots, leaves, budget in (
        ([1, 1], [most, 1], most),
        ([most], [1], most),
        ([1], [1], -most),
        ([1], [-most], most),
    ):
        with pytest.raises(ValueError, match=r"must be in \[1"):
            core.pack_forest(np.array(roots), np.array(leaves), np.arange(len(leaves)) * 0, budget)


LONG = 2**40  # the product of two is above the range of int64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sizes_with_a_product_above_int64_are_refused(dtype):
    core, at = extension(), np.zeros(64).ctypes.data
    product = [dtype, 2, 2, 2, at, 2, 1, at, 2, 1, at, 2, "float32", False, 1]
    rows = [at, dtype, 4, 1, 4, at, 0, 0.0, 1.0, 0, at, dtype, 4, *[at] * 5, 1]
    finish = [1, 2, at, at, 2, dtype, *[at] * 4, at, dtype, 1]
    for call, arguments, sizes in (
        (core.gemm, product, ((1, 2), (1, 3), (2, 3), (1, 5), (3, 6), (3, 8), (2, 9), (1, 11))),
        (core.read_rows, rows, ((3, 4), (3, 2), (3, 12))),
        (core.finish_direction, finish, ((0, 1),)),
    ):
        for pair in sizes:
            large = [LONG if i in pair else value for i, value in enumerate(arguments)]
            with pytest.raises(ValueError, match="is too large"):
                call(*large)
    with pytest.raises(ValueError, match="a size is negative: -3"):
        core.gemm("float32", 2, 2, 2, at, -3, 1, at, 2, 1, at, 2, "float32", False, 1)


def test_an_address_of_0_is_refused():
    core, at = extension(), np.zeros(64).ctypes.data
    product = ["float32", 2, 2, 2, at, 2, 1, at, 2, 1, at, 2, "float32", False, 1]
    rows = [at, "float32", 4, 1, 4, at, 0, 0.0, 1.0, 0, at, "float32", 4, *[at] * 5, 1]
    finish = [1, 2, at, at, 2, "float32", *[at] * 4, at, "float32", 1]
    with pytest.raises(ValueError, match="a tensor has the address 0"):
        core.StagingRing(1).push(0, 4, np.array([0, 4]))
    for call, arguments, addresses, size in (
        (core.gemm, product, (4, 7, 10), 1),
        (core.read_rows, rows, (0, 5, 13, 14, 15, 16, 17), 3),
        (core.finish_direction, finish, (2, 3, 6, 7, 8, 9, 10), 0),
    ):
        for place in addresses:
            missing = [0 if i == place else value for i, value in enumerate(arguments)]
            with pytest.raises(ValueError, match="a tensor has the address 0"):
                call(*missing)
            missing[size] = 0  # a tensor without elements has no address
            if core.cpu_features()["gemm_f32"] or call is not core.gemm:
                call(*missing)


def test_the_error_of_a_strange_name_is_printable(tmp_path):
    for name in ("\x1b[2J\r\n\x7f", "\u202e\x9b", "\ud800", "\udc80", "a/" + "\x07" * 10**6):
        for call in (extension().Table, open_table):
            with pytest.raises(ValueError, match="writer is '") as error:
                call(str(tmp_path / "table"), PRINT, writer=name)
            assert str(error.value).isprintable() and len(str(error.value)) < 200


def test_long_and_strange_names_are_refused(tmp_path):
    for name in ("x" * 300, "a\0b", "\x1b[2J", "\udc80", "ä", "../a", "+compacted-0"):
        with pytest.raises((ValueError, OSError), match=r"name too long|writer is '"):
            keys = np.zeros(1, "V16")
            open_table(tmp_path / "table", PRINT, writer=name).insert(
                keys, np.zeros(1), np.ones(1, "i4")
            )
    for path in (tmp_path / ("x" * 300), "/".join([str(tmp_path), *["x" * 200] * 30])):
        for call in (open_table, compact_table):
            with pytest.raises(OSError, match="name too long"):
                call(path, PRINT)
    for call in (extension().Table, extension().compact_table):
        with pytest.raises(ValueError, match="folder has a null byte"):
            call(f"{tmp_path}/a\0b", PRINT)
    assert os.listdir(tmp_path) == ["table"] and not os.listdir(tmp_path / "table")


def test_a_path_need_not_be_utf8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    open_table(folder, PRINT).insert(np.zeros(1, "V16"), np.zeros(1), np.ones(1, "i4"))
    with pytest.raises(ValueError, match="belongs to the table") as caught:
        open_table(folder, bytes(15) + b"\1")
    assert folder in str(caught.value)
    os.mkfifo(f"{folder}/a.log")
    with pytest.warns(RuntimeWarning, match=re.escape(f"{folder}/a.log is a pipe")):
        open_table(folder, PRINT)
