import gzip
import json

import pytest

from h2tune_jax.bench import trace

THREADS = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/host:CPU"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "python"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "tf_XLAEigen/1"}},
]


def event(name, start, length, *, tid=2, pid=1):
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start, "dur": length}


def test_an_operations_time_is_its_own():
    events = [
        *THREADS,
        event("while", 0, 100),
        event("dot", 10, 30),
        event("add", 40, 10),  # begins as the dot ends
        event("dot", 60, 20),
        event("add", 65, 5),
        event("call", 0, 1000, tid=1),  # Python only waits
        event("Execute (wait for completion)", 200, 50),
    ]
    spent = trace.summarise(events, {"dot": "layer/dot_general"})
    seconds = {s.operation: (pytest.approx(s.seconds * 1e6), s.calls) for s in spent}
    assert seconds == {"while": (40, 1), "dot": (45, 2), "add": (15, 2)}
    assert [s.operation for s in spent] == ["dot", "while", "add"]
    assert spent[0].where == "layer/dot_general"
    assert sum(s.share for s in spent) == pytest.approx(1)


def test_where_there_is_a_device_its_events_count_alone():
    device = {"ph": "M", "name": "process_name", "pid": 9, "args": {"name": "/device:GPU:0"}}
    events = [*THREADS, device, event("dot", 0, 100), event("gemm", 0, 10, pid=9)]
    assert [s.operation for s in trace.summarise(events, {})] == ["gemm"]


def test_operations_lead_back_to_the_source():
    path = "jit(round_fn)/while/body/jvp(net)/up/dot_general"
    text = f"""
  %dot.9 = f32[20,784]{{1,0}} dot(%a, %b), metadata={{op_name="{path}" source_line=3}}
  ROOT %copy.1 = f32[3]{{0}} copy(%c)
"""
    assert trace.sources(text) == {"dot.9": "jit(round_fn)/jvp(net)/up/dot_general"}


def test_the_newest_trace_below_a_folder_is_read(tmp_path):
    file = tmp_path / "plugins" / "vm.trace.json.gz"
    file.parent.mkdir()
    with gzip.open(file, "wt") as stream:
        json.dump({"traceEvents": THREADS}, stream)
    assert trace.read(trace.find(tmp_path)) == THREADS
    with pytest.raises(FileNotFoundError, match=r"no \*.trace.json.gz"):
        trace.find(tmp_path / "plugins" / "none")
