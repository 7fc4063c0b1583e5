import gzip
import json
import threading

import pytest
import torch

from sapwood.executor.profiler import TorchRecorder
from sapwood.observe.profiling import ProfileOrder


def order(folder, **fields) -> ProfileOrder:
    return ProfileOrder(folder=folder, name="p", **fields)


def test_a_trace_has_the_ops_of_every_thread(tmp_path):
    recorder = TorchRecorder()
    path = tmp_path / "p.trace.json.gz"
    begin, done = threading.Event(), threading.Event()

    def another_thread() -> None:
        begin.wait(30)
        torch.ones(8, 8).softmax(-1)
        done.set()

    thread = threading.Thread(target=another_thread)
    thread.start()
    recorder.start(order(tmp_path, record_shapes=True))
    begin.set()
    done.wait(30)
    torch.ones(4, 4) @ torch.ones(4, 4)
    recorder.stop(path)
    thread.join()
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"aten::mm", "aten::softmax"} <= names
    [product] = [event for event in events if event.get("name") == "aten::mm"]
    assert product["args"]["Input Dims"][:2] == [[4, 4], [4, 4]]


def test_two_recordings_follow_each_other(tmp_path):
    recorder = TorchRecorder()
    for name in ("a", "b"):
        recorder.start(order(tmp_path, activities=("GPU",)))
        torch.ones(2).sum()
        recorder.stop(tmp_path / f"{name}.json.gz")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    recorder = TorchRecorder()
    recorder.start(order(tmp_path))
    with pytest.raises(OSError, match="no such folder"):
        recorder.stop(tmp_path / "no such folder" / "p.json.gz")
