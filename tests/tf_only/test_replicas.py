"""tf.distribute, in a process of its own: devices are cut up before TensorFlow has begun."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import attn_core
from attn_core import masks, scores

x = np.random.default_rng(0).standard_normal((4, 2, 5, 8))
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    weight = tf.Variable(np.random.default_rng(1).standard_normal((8, 8)))
    slopes = tf.Variable([0.25, 0.5], dtype=tf.float64)


def part(x, impl, replicas=1, replica=0):
    with tf.GradientTape() as tape:
        tape.watch([weight, slopes])
        options = {"mask": masks.causal(), "score": scores.alibi(slopes), "impl": impl}
        out = attn_core.attention(x @ weight, x, x, **options)
        loss = tf.reduce_sum(out**2)
    dropout = attn_core.Dropout(0.5, 3 * replicas + replica)
    kept = attn_core.attention(tf.zeros_like(x), x, tf.ones_like(x), dropout=dropout)
    return *tape.gradient(loss, [weight, slopes]), kept


def on_each(x):
    context = tf.distribute.get_replica_context()
    return part(x, "chunked", 2, context.replica_id_in_sync_group)


@tf.function
def run(x):
    found = strategy.run(on_each, (x,))
    summed = [strategy.reduce("sum", g, axis=None) for g in found[:2]]
    return summed, strategy.experimental_local_results(found[2])


halves = strategy.experimental_distribute_values_from_function(
    lambda c: tf.constant(x[2 * c.replica_id_in_sync_group :][:2])
)
summed, kept = run(halves)
for found, want in zip(summed, part(tf.constant(x), "reference")):
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)
for replica, found in enumerate(kept):
    half = tf.constant(x[2 * replica :][:2])
    np.testing.assert_array_equal(found, part(half, "chunked", 2, replica)[2])
assert np.abs(kept[0].numpy() - kept[1].numpy()).max() > 0.1
"""


def test_mirrored_variables_receive_the_gradients_of_the_whole_batch() -> None:
    """Each replica has its half, and a seed of its own, as docs/FROM_TENSORFLOW.md says."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
