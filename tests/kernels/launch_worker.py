"""Compiles and launches every Triton kernel on a stub of libcuda, and writes a JSON line for each.

`launch_worker.py FOLDER`: FOLDER holds libcuda.so.1, compiled from driver_stub.c.
TRITON_LIBCUDA_PATH and LD_LIBRARY_PATH name FOLDER, and STUB_RECORDS names a file. A line of
FOLDER/launches has the records of the stub and the arguments that the kernel must get. These
arguments are derived from the tensors of the case and the names in the kernel's signature, not from
the launcher. If the launch compiled the kernel, the line also has the report.
"""

import ctypes
import importlib
import json
import os
import pkgutil
import re
import sys
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver

import realign_kernels.backends.triton as package
from realign_kernels import objectives
from realign_kernels.backends.base import Scores
from realign_kernels.backends.triton import (
    configs,
    epilogue,
    exp_head,
    forward,
    loss,
    row_kernel,
    scatter,
)
from realign_kernels.backends.triton.compile import PROCESSORS, Launch, compile_launch
from realign_kernels.backends.triton.logits import assume_device
from realign_kernels.lm_head import Head

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MAP_TYPES = {FP16: 6, FP32: 7, BF16: 9}  # CUtensorMapDataType
LETTERS = {".ptr": "p", ".b8": "t", ".u64": "l", ".u32": "i", ".f32": "f"}  # by PTX type
MODULES = [
    importlib.import_module(f"{package.__name__}.{module.name}")
    for module in pkgutil.iter_modules(package.__path__)
]
KERNELS = {name: k for m in MODULES for name, k in vars(m).items() if name.endswith("_kernel")}
FOLDER, RECORDS = Path(sys.argv[1]), Path(os.environ["STUB_RECORDS"])
STUB = ctypes.CDLL(str(FOLDER / "libcuda.so.1"))
STUB.stub_describe.argtypes = [ctypes.c_uint64, ctypes.c_char_p]
# Up to 53 GB are addressed but not touched. A sparse file takes no memory.
MEMORY = torch.from_file(str(FOLDER / "memory"), shared=True, size=2**36, dtype=torch.uint8)


class Driver(driver.CudaDriver):
    """Triton's driver with the stub as its device, without torch.cuda."""

    def __init__(self, architecture: int) -> None:
        self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps one cache per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


passed = {}  # the arguments of the last launch, by name


def describe(module, function, name, files, digest):
    """Reads the types of a kernel's parameters from its PTX."""
    (path,) = (path for file, path in files.items() if file.endswith(".ptx"))
    (declared,) = re.findall(r"\.entry \w+\((.*?)\)", Path(path).read_text(), re.DOTALL)
    lines = [line for line in declared.splitlines() if ".param" in line]
    letters = "".join(next(LETTERS[kind] for kind in LETTERS if kind in line) for line in lines)
    STUB.stub_describe(function, letters.encode())


def compile_with_report(source, target, options):
    """Replaces the compiler of the JIT, which then finds the kernel in its cache."""
    launch = Launch(source.fn, source, options["num_warps"], options["num_stages"])
    compile_with_report.last = compile_launch(target.arch, source.fn.__name__, launch)
    return triton.compile(source, target, options)


def keep_arguments(launch):
    """Fills the outputs that the head combines, to detect swapped results. No kernel runs."""
    passed.clear()
    passed.update(launch.get()["arguments"])
    for name, value in {"max_logit_out": 2.0, "sum_exp_out": 3.0}.items():
        if name in passed and passed[name].dim() == 2:
            passed[name].fill_(value)


def taken(height, width, dtype, *, pitch=None, shift=0):
    """A (height, width) tensor in MEMORY, after earlier tensors of this case, with row pitch."""
    pitch = width if pitch is None else pitch
    size = dtype.itemsize
    first = taken.end // size + shift
    taken.end += -(-(height * pitch + shift) * size // 4096) * 4096
    return MEMORY.view(dtype).as_strided((height, width), (pitch, 1), first)


taken.end = 0


def descriptor(tensor, box):
    """A tensor map with its arguments. The dimensions of a map start with the innermost.

    A box is at most as wide as its swizzle, 128 bytes. Wider blocks need several boxes.
    """
    pitch, wide = tensor.stride(0), min(box[1], 128 // tensor.element_size())
    return {
        "map": {
            "address": tensor.data_ptr(),
            "type": MAP_TYPES[tensor.dtype],
            "dims": [tensor.shape[1], tensor.shape[0]],
            "strides": [pitch * tensor.element_size()],
            "box": [wide, box[0]],
        },
        "shape": list(tensor.shape),
        "strides": [pitch, 1],
    }


def blocks_of(tile):
    """The constants of a GEMM kernel."""
    constants = {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}
    return constants | {"BLOCK_DEPTH": tile.depth, "GROUP": tile.group}


def as_json(value):
    return {"pointer": value.data_ptr()} if isinstance(value, Tensor) else value


def write(name, kernel, grid, warps, expected):
    """Writes the line of a launch, with the records of the stub."""
    new = [json.loads(record) for record in RECORDS.read_text().splitlines()[write.seen :]]
    report, compile_with_report.last = compile_with_report.last, None
    constants = {p.name for p in kernel.params if p.is_constexpr}
    line = {
        "case": name,
        "kernel": kernel.__name__,
        "architecture": triton.runtime.driver.active.architecture,
        "names": kernel.arg_names,
        "grid": [*grid, 1, 1][:3],
        "warps": warps,
        "expected": {key: as_json(value) for key, value in expected.items()},
        "constants": {key: passed[key] for key in constants},
        "records": new,
        "report": report and report._asdict(),
    }
    write.seen += len(new)
    write.launched |= {kernel.__name__, name}
    taken.end = 0
    with (FOLDER / "launches").open("a") as file:
        print(json.dumps(line), file=file)


write.seen, write.launched = 0, set()


def read(name, count, vocabulary, dtype, exp_logits=BF16, *, options=False, pitch=None):
    """Launches the row kernel. `options` are bias, softcap, temperature and runner-ups."""
    logits = taken(count, vocabulary, dtype, pitch=pitch)
    target = None
    if exp_logits is not None:
        target = logits if exp_logits == "in place" else taken(count, vocabulary, exp_logits)
    labels = torch.zeros(count, dtype=torch.int64)
    bias = torch.zeros(vocabulary, dtype=BF16) if options else None
    runner_up = torch.zeros(count, dtype=torch.bool) if options else None
    softcap, temperature = (30.0, 0.7) if options else (None, 1.0)
    stats = row_kernel.row_stats(logits, labels, bias, softcap, temperature, runner_up, target)
    config = configs.row_config(triton.runtime.driver.active.architecture, vocabulary)
    expected = {
        "logits": logits,
        "labels": labels,
        "bias": bias,
        "runner_up": runner_up,
        "exp_logits": target,
        **{f"{field}_out": value for field, value in stats._asdict().items()},
        "vocabulary": vocabulary,
        "stride": logits.stride(0),
        "exp_stride": 0 if target is None else target.stride(0),
        "softcap": softcap,
        "inverse_temperature": 1 / temperature,
        "ONE_READ": exp_logits in (FP32, BF16) and not options,
        "BLOCK": config.block,
    }
    write(name, row_kernel.row_kernel, (count,), config.warps, expected)


def head(bin, count, width, vocabulary, dtype=BF16, *, options=False, pitch=None, shift=0):
    """Launches the fused head with the tile of `bin`. `options` are bias, softcap, temperature."""
    architecture = triton.runtime.driver.active.architecture
    hidden = taken(count, width, dtype, pitch=pitch, shift=shift)
    weight = taken(vocabulary, width, dtype)
    labels = torch.zeros(count, dtype=torch.int64)
    bias = torch.zeros(vocabulary, dtype=dtype) if options else None
    softcap, temperature = (30.0, 0.7) if options else (None, 0.9)
    stats = forward.head_stats(hidden, weight, labels, bias, softcap, temperature)
    tile = configs.GEMMS[architecture][bin]
    blocks, tiles = -(-count // tile.rows), -(-vocabulary // tile.columns)
    splits, per_split = configs.choose_splits(blocks, tiles, PROCESSORS[architecture])
    max_logits, sums_exp = passed["max_logit_out"], passed["sum_exp_out"]
    for parts in (max_logits, sums_exp):
        assert parts.shape == (splits, count) and parts.is_contiguous() and parts.dtype == FP32
    assert (stats.max_logit == 2).all() and (stats.sum_exp == 3 * splits).all(), "swapped results"
    described = tile.descriptors
    expected = {
        "hidden": descriptor(hidden, [tile.rows, tile.depth]) if described else hidden,
        "weight": descriptor(weight, [tile.columns, tile.depth]) if described else weight,
        "labels": labels,
        "bias": bias,
        "logit_out": stats.logit,
        "max_logit_out": max_logits,
        "sum_exp_out": sums_exp,
        "count": count,
        "vocabulary": vocabulary,
        "width": width,
        "hidden_stride": hidden.stride(0),
        "weight_stride": width,
        "splits": splits,
        "tiles_per_split": per_split,
        "softcap": softcap,
        "inverse_temperature": 1 / temperature,
        **blocks_of(tile),
        "DESCRIPTORS": described,
        "EVEN_DEPTH": width % tile.depth == 0,
    }
    write(bin, forward.head_kernel, (blocks * splits,), tile.warps, expected)


def exponentials(name, count, width, vocabulary, temperature=1.0, pitch=None):
    """Launches label logits, GEMM with exponential, and scores, in the order of `fused`."""
    hidden, weight = taken(count, width, BF16, pitch=pitch), taken(vocabulary, width, BF16)
    exp_logits = taken(count, vocabulary, BF16, pitch=-(-vocabulary // 8) * 8)
    end, labels = taken.end, torch.zeros(count, dtype=torch.int64)
    head = Head(weight, None, None, temperature)
    logit, shift, narrow = exp_head.label_logits(hidden, labels, head)
    expected = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "logit_out": logit,
        "shift_out": shift,
        "narrow_out": narrow,
        "width": width,
        "hidden_stride": hidden.stride(0),
        "weight_stride": width,
        "inverse_temperature": 1 / temperature,
        "BLOCK": min(1024, 1 << (width - 1).bit_length()),
    }
    write(name, exp_head.label_kernel, (count,), 4, expected)
    taken.end = end
    architecture = triton.runtime.driver.active.architecture
    tile = configs.EXP_HEADS[architecture]
    sums = exp_head.exp_rows(hidden, head, narrow, shift, exp_logits)
    blocks, tiles = -(-count // tile.rows), -(-vocabulary // tile.columns)
    pitch = -(-count // 16) * 16
    assert sums.shape == (2, tiles, count) and sums.dtype == FP32
    assert sums.stride() == (tiles * pitch, pitch, 1)
    programs = min(PROCESSORS[architecture], blocks * tiles)
    expected = {
        "hidden": descriptor(hidden, [tile.rows, tile.depth]),
        "weight": descriptor(weight, [tile.columns, tile.depth]),
        "exp_logits": descriptor(exp_logits, [tile.rows, tile.columns // 2]),
        "labels": narrow,
        "shift": shift,
        "sums_out": sums[0],
        "rounded_out": sums[1],
        "count": count,
        "vocabulary": vocabulary,
        "width": width,
        "sums_stride": pitch,
        "inverse_temperature": 1 / temperature,
        **blocks_of(tile),
        "PROGRAMS": programs,
    }
    write(name, exp_head.exp_kernel, (programs,), tile.warps, expected)
    logps, one_minus_p, sum_exp = exp_head.score_sums(sums, logit, temperature)
    expected = {
        "sums": sums[0],
        "rounded_sums": sums[1],
        "logit": logit,
        "logps_out": logps,
        "one_minus_p_out": one_minus_p,
        "divisor_out": sum_exp,
        "count": count,
        "tiles": tiles,
        "sums_stride": pitch,
        "temperature": temperature,
        "BLOCK_ROWS": 32,
        "BLOCK_TILES": 32,
    }
    write(name, exp_head.score_kernel, (-(-count // 32),), 4, expected)


def last_step(name, count, width, vocabulary, dtype):
    """Launches the last step of the gradient of hidden, and the scaling of a gradient."""
    exp_w, weight, out = (taken(*shape) for shape in (
        (count, width, FP32), (vocabulary, width, BF16), (count, width, dtype)))  # fmt: skip
    target = torch.zeros(count, dtype=torch.int64)
    logps, one_minus_p, sum_exp, dz_dlogit, factor = (torch.zeros(count) for _ in range(5))
    epilogue.hidden_grad_epilogue(
        exp_w, weight, Scores(logps, one_minus_p, target, sum_exp, dz_dlogit), factor, out
    )
    expected = {
        "exp_w": exp_w,
        "weight": weight,
        "target": target,
        "sum_exp": sum_exp,
        "dz_dlogit": dz_dlogit,
        "factor": factor,
        "out": out,
        "width": width,
        "exp_w_stride": width,
        "weight_stride": width,
        "column_stride": 1,
        "out_stride": width,
        "BLOCK": epilogue.BLOCK,
    }
    write(name, epilogue.hidden_grad_kernel, (count, -(-width // epilogue.BLOCK)), 4, expected)
    values, factor = taken(vocabulary, width, dtype), torch.zeros(())
    epilogue.scale(values, factor)
    expected = {
        "values": values,
        "factor": factor,
        "count": vocabulary * width,
        "PROGRAMS": epilogue.SCALE_PROGRAMS,
        "BLOCK": epilogue.SCALE_BLOCK,
    }
    write(name, epilogue.scale_kernel, (epilogue.SCALE_PROGRAMS,), 8, expected)


# The arguments of the loss kernel that describe an objective, by hand.
PAIR = {
    "weights": [1.0],
    "deltas": [0.0],
    "shift": None,
    "SHIFTED": [False],
    "SCALED": [True],
    "RATIO": [True, True],
    "MEAN": [False, False],
    "FACTORS": [1.0, -1.0],
    "UP": [1.0],
    "DOWN": [0.0],
    "LINEAR": [0.0],
}
VISUAL = {
    "weights": [1.0, 0.5],
    "deltas": [0.0, 0.0],
    "shift": None,
    "SHIFTED": [False] * 2,
    "SCALED": [True] * 2,
    "RATIO": [True] * 3,
    "MEAN": [False] * 3,
    "FACTORS": [1.0, -1.0, 0.0, 1.0, 0.0, -1.0],
    "UP": [1.0, 1.0],
    "DOWN": [0.0, 0.0],
    "LINEAR": [0.0, 0.0],
}
ANCHOR = {
    "weights": [1.0, 0.7, 1.3],
    "deltas": [0.0, 0.0, 0.4],
    "shift": None,
    "SHIFTED": [False] * 3,
    "SCALED": [True] * 3,
    "RATIO": [True] * 4,
    "MEAN": [False] * 4,
    "FACTORS": [1.0, -1.0, 0.0, 1.0, 0.0, -1.0, 1.0, 0.0, 0.0],
    "UP": [1.0] * 3,
    "DOWN": [0.0] * 3,
    "LINEAR": [0.0] * 3,
}
PER_TOKEN = PAIR | {"deltas": [1.5], "RATIO": [False, False], "MEAN": [True, True]}
MIXED = {
    "weights": [0.8, 0.2, 0.2, 1.0],
    "SHIFTED": [False, True, True, False],
    "SCALED": [True, True, True, False],
    "RATIO": [True, True, True, False, True],
    "MEAN": [False, False, False, True, False],
    "FACTORS": [1.0, -1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0],
    "UP": [1.0, 1.0, 0.0, 0.0],
    "DOWN": [0.0, 0.0, 1.0, 0.0],
    "LINEAR": [0.0, 0.0, 0.0, 1.0],
}


def preference(objective, described, count, examples, reduction="mean"):
    """Launches the loss kernel. `described` is the objective in arguments of the kernel."""
    leaves = len(objective.leaves)
    logps = torch.zeros(count)
    ids = torch.zeros(count, dtype=torch.int64)
    reference = torch.zeros(leaves, examples)
    output = loss.preference_sums(logps, ids, reference, objective, reduction=reduction)
    finished = passed["finished"]
    assert finished.dtype == torch.int64 and finished.item() == 0
    assert all(finished.data_ptr() != field.data_ptr() for field in output)
    expected = {
        "logps": logps,
        "ids": ids,
        "reference": reference,
        "coefficients": output.coefficients,
        "sums_out": output.sums,
        "counts_out": output.counts,
        "rewards_out": output.rewards,
        "terms_out": output.term_losses,
        "losses_out": passed["losses_out"],
        "loss_out": output.loss,
        "finished": finished,
        "rows": count,
        "examples": examples,
        "beta": objective.beta,
        **described,
        "LEAVES": leaves,
        "PADDED": 1 << (leaves - 1).bit_length(),
        "DIVIDE": reduction == "mean",
        "BLOCK": configs.LOSS_BLOCK,
    }
    name = f"{objective.name} {reduction}"
    write(name, loss.loss_kernel, (examples,), configs.LOSS_WARPS, expected)


def add(name, count, width, vocabulary, dtype):
    """Launches the scatter-add of rows, which sorts the index first."""
    total, source = taken(vocabulary, width, dtype), taken(count, width, FP32)
    index = torch.arange(count).flip(0) % vocabulary
    scatter.add_rows(total, index, source)
    index, order = index.sort(stable=True)
    assert torch.equal(passed["index"], index) and torch.equal(passed["order"], order)
    expected = {
        "total": total,
        "index": passed["index"],
        "order": passed["order"],
        "rows": source,
        "count": count,
        "width": width,
        "total_stride": width,
        "rows_stride": width,
        "BLOCK": scatter.BLOCK,
    }
    write(name, scatter.add_rows_kernel, (count, -(-width // scatter.BLOCK)), 4, expected)


def launch_all():
    """Launches with the sizes of real models, and with the smallest sizes.

    Triton turns arguments of value 1 into constants. Launches with the same argument types share
    one compilation.
    """
    for count, width, vocabulary in ((4096, 4096, 32000), (33792, 3584, 152064)):
        head("wide", count, width, vocabulary)
    head("wide", 33791, 4096, 262144, options=True, pitch=4104)
    head("wide", 4096, 4096, 128256, FP16)
    head("narrow", 1536, 1024, 151936, options=True)
    head("few rows", 64, 4096, 151936)
    head("few rows", 1, 8, 1)
    head("float32", 3072, 1024, 32000, FP32, options=True)
    head("float32", 33792, 1023, 32003, FP32)
    head("pointers", 3072, 1023, 32003, options=True)
    head(
        "pointers", 3072, 1024, 32000, pitch=1032, shift=1
    )  # starts 2 bytes after an aligned address
    head("pointers", 3072, 1024, 32000, pitch=1025)  # a row pitch of 2050 bytes
    exponentials("LLaVA-1.5-7B", 3072, 4096, 32000)
    exponentials("V odd, T, padded", 4095, 4096, 32003, temperature=1.3, pitch=4104)
    exponentials("large", 4224, 2560, 262144)
    exponentials("one", 1, 8, 1)
    for count, vocabulary in ((1, 32000), (7, 32000), (33792, 32000), (33792, 262144)):
        read("fp32 to bf16", count, vocabulary, FP32)
    read("fp32 to fp16, padded, all options", 33792, 32003, FP32, FP16, options=True, pitch=32008)
    read("bf16 in place", 1024, 152064, BF16, "in place")
    read("fp16 in place, all options", 9, 32003, FP16, "in place", options=True)
    read("fp32, no derivative", 33792, 128256, FP32, None)
    read("a vocabulary below a block", 5, 97, FP32)
    read("a vocabulary of one token", 3, 1, FP32)
    last_step("bf16", 33792, 4096, 262144, BF16)
    last_step("fp32, ragged", 1537, 1023, 32003, FP32)
    last_step("one row", 1, 1, 1, FP32)
    preference(objectives.dpo(0.1), PAIR, 33792, 64)
    preference(objectives.rdpo(0.2, visual_weight=0.5), VISUAL, 1536, 8, "sum")
    preference(objectives.mdpo(0.2, 0.7, 1.3, delta=0.4), ANCHOR, 4097, 3)
    preference(objectives.dpo(0.1), PAIR, 1, 1, "sum")
    preference(objectives.simpo(2.0, gamma=1.5), PER_TOKEN, 4097, 3)
    for mean in (0.25, -0.5):  # a running mean changes in each step
        described = MIXED | {"deltas": [0.0, mean, mean, 0.0], "shift": None}
        preference(objectives.mpo().at(mean), described, 4097, 3)
        shift = torch.tensor(mean, dtype=torch.float64)
        described = MIXED | {"deltas": [0.0] * 4, "shift": shift}
        preference(objectives.mpo().at(shift), described, 4097, 3)
    add("bf16", 33792, 4096, 32000, BF16)
    add("fp32, ragged", 1537, 1023, 32003, FP32)
    add("fp16, one row", 1, 3584, 262144, FP16)


def launch_each():
    """Launches every tile and every kernel once."""
    read("fp32 to bf16", 33792, 32000, FP32)
    read("fp32 to fp16, padded, all options", 33792, 32003, FP32, FP16, options=True, pitch=32008)
    read("bf16 in place", 1024, 152064, BF16, "in place")
    read("fp32, no derivative", 33792, 128256, FP32, None)
    head("wide", 4096, 4096, 32000)
    head("narrow", 1536, 1024, 151936, options=True)
    head("few rows", 64, 4096, 151936)
    head("float32", 33792, 1023, 32003, FP32)
    head("pointers", 3072, 1023, 32003, options=True)
    exponentials("V odd, T, padded", 4095, 4096, 32003, temperature=1.3, pitch=4104)
    last_step("bf16", 33792, 4096, 262144, BF16)
    preference(objectives.mdpo(0.2, 0.7, 1.3, delta=0.4), ANCHOR, 4097, 3)
    add("bf16", 33792, 4096, 32000, BF16)


def main():
    runtime = triton.knobs.runtime
    runtime.kernel_load_end_hook.add(describe)
    runtime.launch_enter_hook.add(keep_arguments)
    for kernel in KERNELS.values():
        kernel.launch_metadata = lambda grid, metadata, arguments: {"arguments": arguments}
    compile_with_report.last = None
    triton.compiler.compile = compile_with_report
    for architecture, launch in {90: launch_all, 100: launch_each}.items():
        triton.runtime.driver.set_active(Driver(architecture))
        write.launched.clear()
        with assume_device(architecture, PROCESSORS[architecture]):
            launch()
        missing = {*KERNELS, *configs.GEMMS[architecture]} - write.launched
        assert not missing, f"kernels or tiles without a launch: {missing}"


if __name__ == "__main__":
    main()
