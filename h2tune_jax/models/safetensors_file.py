"""Reading safetensors files tensor by tensor.

The format is a length, a JSON header, and the arrays behind it. The `safetensors` library maps the
whole file, whose pages then count beside the copy made from them; here one tensor at a time is read,
so that importing a model costs little more memory than the model.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from h2tune_jax.types import FederationError

_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
_MAX_HEADER = 100_000_000


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, name: str) -> np.ndarray:
        """Read the tensor; `name` is for the error's sake."""
        if self.dtype not in _DTYPES:
            raise FederationError(
                f"{self.file}: tensor {name!r} has unsupported dtype {self.dtype}"
            )
        dtype = _DTYPES[self.dtype]
        if self.size != int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize:
            raise FederationError(
                f"{self.file}: tensor {name!r} has {self.size} bytes, "
                f"which {self.dtype}{list(self.shape)} does not fill"
            )
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            array = np.fromfile(stream, dtype, self.size // dtype.itemsize)
        return array.reshape(self.shape)


def index(file: Path) -> dict[str, Stored]:
    """List the tensors of one file; a file that ends early is an error."""
    length = os.path.getsize(file)
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if length < 8 or size > min(_MAX_HEADER, length - 8):
            raise FederationError(f"{file}: truncated or not a safetensors file")
        try:
            header = json.loads(stream.read(size))
        except ValueError as error:
            raise FederationError(f"{file}: the header is not JSON: {error}") from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            start, end = entry["data_offsets"]
            dtype, shape = entry["dtype"], tuple(entry["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise FederationError(f"{file}: tensor {name!r} has a broken header entry") from error
        if 8 + size + end > length:
            raise FederationError(
                f"{file}: truncated: tensor {name!r} ends at byte {8 + size + end}, the file at {length}"
            )
        tensors[name] = Stored(file, dtype, shape, 8 + size + start, end - start)
    return tensors
