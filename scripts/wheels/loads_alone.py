"""Loads a wheel's module without the package and computes with it: loads_alone.py MODULE.so

It needs Python alone, so that it runs on emulated processors in seconds. Where the module runs an
instruction that the processor lacks, the process ends with SIGILL. Prints one JSON object.
"""

import ctypes
import importlib.util
import json
import sys

FLOAT32 = 0
HIDDEN = 64


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    context = native.Context("", 2)
    row = [0.25 * (number % 7) - 0.5 for number in range(HIDDEN)]
    x, out = (ctypes.c_float * HIDDEN)(*row), (ctypes.c_float * HIDDEN)()
    weight = (ctypes.c_float * HIDDEN)(*[2.0] * HIDDEN)
    at = [ctypes.addressof(array) for array in (x, weight, out)]
    native.rms_norm(context, FLOAT32, at[0], 0, at[1], at[2], 1, HIDDEN, 1e-6)
    mean = sum(value * value for value in row) / HIDDEN
    wanted = [2.0 * value / (mean + 1e-6) ** 0.5 for value in row]
    furthest = max(abs(a - b) for a, b in zip(out, wanted, strict=True))
    assert furthest < 1e-5, f"rms_norm is {furthest} away"
    try:
        native.Context("no such table", 1)
    except Exception as error:  # noqa: BLE001  whatever it is: that it arrives is what is tested
        refused = type(error).__name__
    else:
        raise AssertionError("a table that does not exist was taken")
    found = {"usable": native.usable_isas(), "chosen": context.isa, "refused": refused}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
