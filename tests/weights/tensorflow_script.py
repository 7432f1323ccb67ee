"""Run by a Python that has TensorFlow, never by ours: the two must not share a process.

argv: FOLDER OURS. Writes checkpoints of several kinds into FOLDER, their values into
``FOLDER/expected.npz``, and what TensorFlow reads from our checkpoint OURS into
``FOLDER/ours.npz``.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

tf: Any = importlib.import_module("tensorflow")


def save(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Write ``values`` with the operation that every Saver ends in."""
    tf.raw_ops.SaveV2(
        prefix=str(folder / name),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=list(values.values()),
    )


def main(folder: Path, ours: str) -> None:
    rng = np.random.default_rng(0)
    expected: dict[str, Any] = {}

    def keep(name: str, values: dict[str, Any]) -> dict[str, Any]:
        for key, value in values.items():
            array = np.asarray(value)
            # numpy has no bfloat16 of its own
            expected[f"{name}|{key}"] = (
                array.view(np.uint16) if array.dtype == tf.bfloat16.as_numpy_dtype else array
            )
        return values

    numbers = {
        "float32": rng.standard_normal((3, 5)).astype(np.float32),
        "float16": rng.standard_normal(7).astype(np.float16),
        "bfloat16": tf.cast(rng.standard_normal((2, 3)), tf.bfloat16),
        "float64": rng.standard_normal(4),
        "int32": rng.integers(-9, 9, (2, 2, 2), dtype=np.int32),
        "int64": np.int64(-(2**40)),
        "uint8": np.arange(3, dtype=np.uint8),
        "bool": np.array([True, False, True]),
        "scalar": np.float32(1.5),
        "empty": np.zeros((0, 4), np.float32),
        # an odd number of bytes before it: not aligned in the file
        "zz/after": rng.standard_normal(9).astype(np.float32),
    }
    save(folder, "dtypes", keep("dtypes", {k: tf.constant(v) for k, v in numbers.items()}))

    parts = []
    for part in range(3):
        values = {
            f"part{part}/w{i}": rng.standard_normal((4, i + 1)).astype(np.float32) for i in range(3)
        }
        save(folder, f"part{part}", keep("shards", {k: tf.constant(v) for k, v in values.items()}))
        parts.append(str(folder / f"part{part}"))
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=parts, destination_prefix=str(folder / "shards")
    )

    # long names that share little: an index of several blocks
    many = {rng.bytes(450).hex(): tf.constant(np.float32(i)) for i in range(400)}
    save(folder, "blocks", keep("blocks", many))

    # a training by the old Saver: weights, optimizer slots, a step counter
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.get_variable("model/x", initializer=rng.standard_normal((6, 6)))
        step = tf.compat.v1.train.get_or_create_global_step()
        loss = tf.reduce_sum(x * x)
        train = tf.compat.v1.train.AdamOptimizer(0.1).minimize(loss, global_step=step)
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(train)
        variables = tf.compat.v1.global_variables()
        values = session.run({v.op.name: v for v in variables})
        keep("saver", values)
        tf.compat.v1.train.Saver().save(session, str(folder / "saver"))

    # a partitioned variable, and the object graph of TensorFlow 2 (a string)
    half = tf.constant(np.zeros((2, 2), np.float32))
    tf.raw_ops.SaveV2(
        prefix=str(folder / "sliced"),
        tensor_names=["w", "w"],
        shape_and_slices=["4 2 0,2:0,2", "4 2 2,2:0,2"],
        tensors=[half, half],
    )
    tf.train.Checkpoint(v=tf.Variable([1.0, 2.0])).write(str(folder / "objects"))
    keep("objects", {"v/.ATTRIBUTES/VARIABLE_VALUE": np.array([1, 2], np.float32)})
    np.savez(folder / "expected.npz", **expected)

    reader = tf.train.load_checkpoint(ours)
    read = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    np.savez(folder / "ours.npz", **read)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
