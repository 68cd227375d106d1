"""Files from Python's safetensors to expar and back: safetensors_test.py CLIENT."""

import json
import os
import random
import subprocess
import sys
import tempfile
import unittest

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

CLIENT = sys.argv[1]
# What expar has, and what Python calls it, with the type of numpy that has as many bytes.
DTYPES = {
    "F32": ("float32", np.uint32),
    "BF16": ("bfloat16", np.uint16),
    "F16": ("float16", np.uint16),
    "F8_E4M3": ("float8_e4m3fn", np.uint8),
    "I8": ("int8", np.uint8),
    "I32": ("int32", np.uint32),
    "I64": ("int64", np.uint64),
}
SHAPES = [(), (1,), (7,), (0, 5), (3, 5), (2, 3, 5), (2, 1, 3, 5)]


def every_tensor():
    """Name -> (dtype, an array with its bytes), NaNs included."""
    bits = np.random.default_rng(1)
    return {
        f"{dtype} {list(shape)} ü": (dtype, np.asarray(bits.integers(0, 256, (*shape, np.dtype(carrier).itemsize),
                                                                     dtype=np.uint8)).view(carrier).reshape(shape))
        for dtype, (_, carrier) in DTYPES.items() for shape in SHAPES
    }


def write(path, tensors, metadata=None):
    specs = {
        name: safetensors.TensorSpec(dtype=DTYPES[dtype][0], shape=array.shape, data_ptr=array.ctypes.data,
                                     data_len=array.nbytes)
        for name, (dtype, array) in tensors.items()
    }
    safetensors.serialize_file(specs, path, metadata)


def contents(path):
    with open(path, "rb") as file:
        return file.read()


class Safetensors(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)

    def path(self, name):
        return os.path.join(self.directory.name, name)

    def copy(self, source, target):
        subprocess.run([CLIENT, "copy", self.path(source), self.path(target)], check=True)

    def judge(self, names):
        command = [CLIENT, "judge", *map(self.path, names)]
        lines = subprocess.run(command, check=True, capture_output=True).stdout.decode(errors="replace").splitlines()
        self.assertEqual(len(lines), len(names))
        return lines

    def test_both_write_the_same_bytes(self):
        tensors = every_tensor()
        for metadata in (None, {"format": "pt"}, {'quote " and \\ and \n': "ü 專家 \x7f"}):
            write(self.path("python"), tensors, metadata)
            self.copy("python", "expar")
            self.assertEqual(contents(self.path("python")), contents(self.path("expar")))

    def test_python_reads_what_expar_has_written(self):
        tensors = every_tensor()
        write(self.path("python"), tensors)
        self.copy("python", "expar")
        read = dict(safetensors.deserialize(contents(self.path("expar"))))
        self.assertEqual(set(read), set(tensors))
        for name, (dtype, array) in tensors.items():
            self.assertEqual((read[name]["dtype"], tuple(read[name]["shape"])), (dtype, array.shape))
            self.assertEqual(bytes(read[name]["data"]), array.tobytes())

    def test_numpy_meets_its_values_again(self):
        values = {"x": np.arange(12, dtype=np.float32).reshape(3, 4) / 7, "ids": np.array([[3, -1]], dtype=np.int32)}
        save_file(values, self.path("python"), {"k": "v"})
        self.copy("python", "expar")
        read = load_file(self.path("expar"))
        for name, array in values.items():
            np.testing.assert_array_equal(read[name], array)
        with safetensors.safe_open(self.path("expar"), framework="numpy") as file:
            self.assertEqual(file.metadata(), {"k": "v"})

    def test_shards_of_python_are_one_checkpoint(self):
        a, b = np.arange(5, dtype=np.float32), np.arange(3, dtype=np.int64)
        os.mkdir(self.path("model"))
        save_file({"a": a}, self.path("model/model-00001-of-00002.safetensors"))
        save_file({"b": b}, self.path("model/model-00002-of-00002.safetensors"))
        with open(self.path("model/model.safetensors.index.json"), "w") as file:
            json.dump({"metadata": {"total_size": 44},
                       "weight_map": {"a": "model-00001-of-00002.safetensors",
                                      "b": "model-00002-of-00002.safetensors"}}, file, indent=2)
        self.copy("model", "expar")
        read = load_file(self.path("expar"))
        np.testing.assert_array_equal(read["a"], a)
        np.testing.assert_array_equal(read["b"], b)

    def test_dtypes_that_expar_has_not_are_files_all_the_same(self):
        save_file({"d": np.zeros(3), "u": np.zeros(3, np.uint16), "b": np.zeros(3, bool)}, self.path("python"))
        self.assertEqual(self.judge(["python"]), ["accepted"])
        done = subprocess.run([CLIENT, "copy", self.path("python"), self.path("expar")], capture_output=True, text=True)
        self.assertEqual(done.returncode, 6)
        self.assertIn("expar uses F32", done.stderr)
        self.assertFalse(os.path.exists(self.path("expar")))

    def test_expar_accepts_no_file_that_python_refuses(self):
        draw = random.Random(1)
        write(self.path("good"), {name: (dtype, array) for name, (dtype, array) in every_tensor().items()
                                  if array.ndim == 1}, {"k": "v"})
        good = contents(self.path("good"))
        header = 8 + int.from_bytes(good[:8], "little")
        names = []
        for i in range(2000):
            bad = bytearray(good)
            for _ in range(draw.choice((1, 1, 2, 3))):
                place = draw.randrange(header)
                change = draw.randrange(4)
                if change == 0:
                    bad[place] = draw.randrange(256)
                elif change == 1:
                    bad[place] = draw.choice(b'0123456789,:{}[]" ')
                elif change == 2:
                    del bad[place:place + draw.randrange(1, 9)]
                else:
                    bad[place:place] = bad[place:place + draw.randrange(1, 40)]
            if i % 2:  # a length that fits, so that the header is what counts
                bad[:8] = (header - 8 + len(bad) - len(good)).to_bytes(8, "little")
            names.append(f"{i}.safetensors")
            with open(self.path(names[-1]), "wb") as file:
                file.write(bad)
        both = 0
        for name, verdict in zip(names, self.judge(names)):
            if verdict != "accepted":
                self.assertTrue(verdict.startswith("io: "), verdict)
                continue
            safetensors.deserialize(contents(self.path(name)))  # raises if it refuses
            both += 1
        self.assertGreater(both, 10)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
