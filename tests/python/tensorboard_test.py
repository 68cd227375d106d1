"""What TensorBoard reads in the directory that expar train --log-dir has written: tensorboard_test.py EXPAR TEXT."""

import json
import math
import os
import subprocess
import sys
import tempfile
import unittest

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginAccumulator
from tensorboard.util import tensor_util

EXPAR, TEXT = sys.argv[1:3]
EXPERTS, TOPK, LAYERS, BATCH, STEPS = 5, 2, 3, 40, 12
RANKS = 2


def floats(events):
    return [event.value for event in events]


class TensorBoard(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory()
        cls.log = os.path.join(cls.directory.name, "made", "by", "expar")
        text = os.path.join(cls.directory.name, "text")
        with open(TEXT, "rb") as source, open(text, "wb") as target:
            target.write(source.read(78000))
        result = os.path.join(cls.directory.name, "json")
        sizes = dict(experts=EXPERTS, topk=TOPK, layers=LAYERS, batch=BATCH, steps=STEPS, decay_steps=STEPS, hidden=16,
                     inner=16, context=4, ranks=RANKS)
        flags = [word for name, value in sizes.items() for word in ("--" + name.replace("_", "-"), str(value))]
        command = [EXPAR, "train", "--text", text, "--dense", "--log-dir", cls.log, "--json", result, *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(result) as file:
            cls.result = json.load(file)
        cls.moe = EventAccumulator(cls.log, size_guidance={"scalars": 0, "histograms": 0})
        cls.dense = EventAccumulator(os.path.join(cls.log, "dense"), size_guidance={"scalars": 0, "histograms": 0})
        cls.moe.Reload()
        cls.dense.Reload()

    @classmethod
    def tearDownClass(cls):
        cls.directory.cleanup()

    def test_reads_the_losses_of_the_json(self):
        self.assertEqual(len(self.result["losses"]), STEPS)
        self.assertEqual(floats(self.moe.Scalars("loss")), self.result["losses"])
        self.assertEqual([event.step for event in self.moe.Scalars("loss")], list(range(1, STEPS + 1)))

    def test_reads_what_the_held_out_text_says_of_each_model(self):
        for run, key in ((self.moe, "heldout_bits_per_byte"), (self.dense, "dense_heldout_bits_per_byte")):
            (event,) = run.Scalars("heldout_bits_per_byte")
            self.assertEqual(event.step, STEPS)
            self.assertTrue(math.isclose(event.value, self.result[key], rel_tol=1e-6))

    def test_reads_a_rate_that_warms_up_and_times_that_passed(self):
        rates = floats(self.moe.Scalars("lr"))
        self.assertEqual(len(rates), STEPS)
        self.assertTrue(all(rate > 0 for rate in rates))
        self.assertLess(rates[-1], rates[0])
        for phase in self.result["phase_ms"]:
            times = floats(self.moe.Scalars(f"phase_ms/{phase}"))
            self.assertEqual(len(times), STEPS)
            self.assertTrue(all(0 < time < 60e3 for time in times), phase)
        self.assertTrue(all(rate > 0 for rate in floats(self.moe.Scalars("tokens_per_s"))))

    def test_reads_loads_as_histograms_and_as_scalars(self):
        for layer in range(LAYERS):
            tag = f"load/layer{layer}"
            histograms = self.moe.Histograms(tag)
            self.assertEqual(len(histograms), STEPS)
            experts = [floats(self.moe.Scalars(f"{tag}/expert{e}")) for e in range(EXPERTS)]
            uneven = floats(self.moe.Scalars(f"{tag}/max_over_mean"))
            for step, event in enumerate(histograms):
                loads = [expert[step] for expert in experts]
                histogram = event.histogram_value
                self.assertEqual(sum(loads), BATCH * TOPK)
                self.assertEqual(list(histogram.bucket), loads)
                self.assertEqual(list(histogram.bucket_limit), list(range(1, EXPERTS + 1)))
                self.assertEqual(histogram.num, BATCH * TOPK)
                self.assertEqual(histogram.sum, sum(e * load for e, load in enumerate(loads)))
                self.assertTrue(math.isclose(uneven[step], max(loads) * EXPERTS / sum(loads), rel_tol=1e-6))

    def test_shows_one_bar_for_each_expert(self):
        plugins = PluginAccumulator(self.log, tensor_size_guidance={"tensors": 0})
        plugins.Reload()
        bars = tensor_util.make_ndarray(plugins.Tensors("load/layer0")[0].tensor_proto)
        self.assertEqual(bars[:, 0].tolist(), list(range(EXPERTS)))
        self.assertEqual(bars[:, 1].tolist(), list(range(1, EXPERTS + 1)))
        self.assertEqual(bars[:, 2].sum(), BATCH * TOPK)

    def test_keeps_the_dense_twin_apart(self):
        self.assertEqual(floats(self.dense.Scalars("load/layer0/expert0")), [BATCH] * STEPS)
        self.assertNotEqual(floats(self.dense.Scalars("loss")), self.result["losses"])


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
