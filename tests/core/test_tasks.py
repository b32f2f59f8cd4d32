import functools
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from jaxlab.core import jsonl, tasks
from tests.core import task_functions as functions

_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.latest
def test_results_in_order():
    results = list(tasks.map(functions.square, range(50), workers=2))
    assert results == [tasks.TaskResult(number, number * number) for number in range(50)]
    assert list(tasks.map(functions.square, [], workers=2)) == []


def test_workers_stay_warm_and_light():
    first = [result.value for result in tasks.map(functions.name_of_worker, range(5), workers=1)]
    second = [result.value for result in tasks.map(functions.name_of_worker, range(5), workers=1)]
    processes = {process for process, *_ in first + second}
    assert len(processes) == 1
    assert os.getpid() not in processes
    # A module-level cache lives on, from item to item and from call to call.
    assert [count for _, count, *_ in first + second] == list(range(first[0][1], first[0][1] + 10))
    assert {(jax, platforms) for *_, jax, platforms in first + second} == {(False, "cpu")}


def test_bad_tasks_cost_one_item_each():
    bad = ["exit", "kill", "hang", "hang in C", "raise", "sys.exit", "unpicklable value", "bad value"]
    items = [item for word in bad for item in (word, f"after {word}")]
    items.insert(3, lambda: "unpicklable item")
    started = time.monotonic()
    results = list(tasks.map(functions.misbehave, items, workers=2, timeout_s=1.0, retries=0))
    assert time.monotonic() - started < 15
    assert [result.item for result in results] == items
    for result in results:
        if isinstance(result.item, str) and result.item.startswith("after"):
            assert result == tasks.TaskResult(result.item, f"{result.item} done")
        else:
            assert result.value is None
    errors = {result.item: result.error for result in results}
    assert "died: exit code 3" in errors["exit"]
    assert "died: killed by SIGKILL" in errors["kill"]
    assert "time limit of 1 s" in errors["hang"]
    assert "time limit of 1 s" in errors["hang in C"]
    assert errors["raise"].startswith("Traceback")
    assert errors["raise"].rstrip().endswith("KeyError: 'no such thing'")
    assert "task_functions.py" in errors["raise"]
    assert "SystemExit: leaving" in errors["sys.exit"]
    assert "pickle" in errors["unpicklable value"]
    assert "cannot be unpickled" in errors["bad value"]
    assert "cannot be pickled" in errors[items[3]]


@pytest.mark.parametrize("function", [functions.fails_once, functions.raises_once])
def test_retries(function, tmp_path):
    paths = [str(tmp_path / str(number)) for number in range(3)]
    assert [result.value for result in tasks.map(function, paths, workers=2)] == ["second try"] * 3
    (result,) = tasks.map(function, [str(tmp_path / "x")], retries=0, workers=1)
    assert result.error


def test_endless_items_bounded_ahead():
    taken = itertools.count()
    results = tasks.map(functions.square, (next(taken) for _ in itertools.count()), workers=2)
    assert [next(results).value for _ in range(30)] == [number * number for number in range(30)]
    time.sleep(0.2)
    assert next(taken) <= 30 + 4 * 2 + 1
    results.close()


def test_results_do_not_wait_for_a_slow_source():
    def source():
        yield 3
        while not seen:  # the next item depends on the first result
            time.sleep(0.01)
        yield seen[0] + 1

    seen = []
    for result in tasks.map(functions.square, source(), workers=2):
        seen.append(result.value)
    assert seen == [9, 100]


def test_an_error_of_the_items_comes_in_its_place():
    def source():
        yield from range(3)
        raise RuntimeError("source is broken")

    results = tasks.map(functions.square, source(), workers=1)
    assert [next(results).value for _ in range(3)] == [0, 1, 4]
    with pytest.raises(RuntimeError, match="source is broken"):
        next(results)


def test_a_killed_worker_takes_what_it_started_along(tmp_path):
    (result,) = tasks.map(functions.start_a_child, [str(tmp_path / "pid")], timeout_s=1, retries=0, workers=1)
    assert "time limit" in result.error
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _calls(folder):
    return sorted((folder / "calls").read_text().split())


def test_resumes_from_a_folder(tmp_path):
    items = [(str(tmp_path), number) for number in (0, 1, "exit", 3)]
    run = functools.partial(tasks.map, functions.count_call, workers=2, retries=0, folder=tmp_path / "work")
    first = list(run(items[:3]))
    assert [result.error is None for result in first] == [True, True, False]
    assert _calls(tmp_path) == ["0", "1", "exit"]
    with (tmp_path / "work" / "results.jsonl").open("a") as file:
        file.write('{"index": 3, "it')  # killed while writing
    second = list(run(items))
    assert second[:2] == first[:2]
    assert second[0].value == {"number": 0, "pair": (1, 2)}  # the tuple is a tuple still
    assert second[3].value["number"] == 3
    assert _calls(tmp_path) == ["0", "1", "3", "exit", "exit"]  # what failed is tried again
    changed = list(run([items[1], items[1]]))  # another item in position 0
    assert [result.value["number"] for result in changed] == [1, 1]
    assert _calls(tmp_path) == ["0", "1", "1", "3", "exit", "exit"]
    with pytest.raises(ValueError, match=r"holds the results of .*count_call"):
        tasks.map(functions.square, [1], folder=tmp_path / "work")


_RESUMED = """
import sys
from jaxlab.core import tasks
from tests.core import task_functions as functions
if __name__ == "__main__":
    for result in tasks.map(functions.slow_square, range(30), workers=2, folder=sys.argv[1]):
        print(result.value, flush=True)
"""


def test_a_killed_run_resumes_and_leaves_no_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_RESUMED)
    command = [sys.executable, str(script), str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for _ in range(4):
        process.stdout.readline()
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(jsonl.read(tmp_path / "work" / "results.jsonl")) - 1
    assert 4 <= done < 30
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=5)[1] == []
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout
    assert output.split() == [str(number * number) for number in range(30)]
    indices = [row["index"] for row in jsonl.read(tmp_path / "work" / "results.jsonl")[1:]]
    assert sorted(indices) == list(range(30))  # each computed once


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"fn": lambda x: x}, TypeError, "fn: expected a function that pickles"),
        ({"fn": 3}, TypeError, "fn: expected a function, got 3"),
        ({"workers": 0}, ValueError, "workers"),
        ({"timeout_s": 0}, ValueError, "timeout_s"),
        ({"retries": -1}, ValueError, "retries"),
    ],
)
def test_bad_arguments_fail_at_the_call(unchecked, arguments, error, words):
    with pytest.raises(error, match=words):
        tasks.map(arguments.pop("fn", functions.square), [1], **arguments)


def test_a_function_that_workers_cannot_import():
    unreachable = functools.partial(functions.square)
    sys.modules["__main__"].prompted = _prompted  # as if typed at a prompt
    _prompted.__module__, _prompted.__qualname__ = "__main__", "prompted"
    try:
        with pytest.raises(TypeError, match="a worker process cannot load it"):
            list(tasks.map(_prompted, [1], workers=1))
    finally:
        del sys.modules["__main__"].prompted
    assert [result.value for result in tasks.map(unreachable, [3], workers=1)] == [9]


def _prompted(x):
    return x


def test_an_unguarded_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from jaxlab.core import tasks\nimport math\nprint(list(tasks.map(math.sqrt, [1], workers=1)))\n")
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(_ROOT)}
    )
    assert result.returncode == 1
    assert "if __name__ == '__main__'" in result.stderr


def test_digests_depend_on_content_only():
    digest = tasks._digest
    text = "ab"
    same = [
        ((text, text), (text, "".join(["a", "b"]))),
        ({"x": 1, "y": 2}, {"y": 2, "x": 1}),
        ({"b", "a", "c"}, {"c", "a", "b"}),
        (np.arange(3), np.arange(3)),
        (tasks.TaskResult(1), tasks.TaskResult(1)),
    ]
    for a, b in same:
        assert digest(a) == digest(b)
    different = [
        1,
        1.0,
        True,
        "1",
        b"1",
        None,
        (1,),
        [1],
        {1},
        {1: 1},
        np.ones(1),
        np.ones(1, np.int8),
        ("ab", ""),
        ("a", "b"),
    ]
    assert len({digest(item) for item in different}) == len(different)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra `ray`)")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield "auto"
    ray.shutdown()


def test_on_ray(cluster, tmp_path):
    assert [result.value for result in tasks.map(functions.square, range(20), ray=cluster)] == [
        n * n for n in range(20)
    ]
    assert [result.value for result in tasks.map(lambda x: x + 1, [1, 2], ray=cluster, workers=1)] == [2, 3]
    items = ["exit", "a", "kill", "b", "hang", "c", "raise", "d"]
    results = list(
        tasks.map(functions.misbehave, items, workers=2, timeout_s=2.0, retries=0, ray=cluster, folder=tmp_path)
    )
    assert [result.item for result in results] == items
    assert [result.value for result in results[1::2]] == ["a done", "b done", "c done", "d done"]
    assert "died" in results[0].error
    assert "died" in results[2].error
    assert "time limit of 2 s" in results[4].error
    assert "KeyError: 'no such thing'" in results[6].error
    path = str(tmp_path / "marker")
    assert [result.value for result in tasks.map(functions.fails_once, [path], ray=cluster)] == ["second try"]


def test_without_ray():
    try:
        import ray  # noqa: F401
    except ImportError:
        from jaxlab.core import MissingExtra

        with pytest.raises(MissingExtra, match=r"jaxlab\[ray\]"):
            tasks.map(functions.square, [1], ray="auto")
    else:
        pytest.skip("Ray is installed")
