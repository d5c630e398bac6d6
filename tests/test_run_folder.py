"""What a run has written outlives it, whole, and no other run adds to it."""

import json
import os
import signal

import pytest

from hierbd3lm.data.run_folder import Log, hash_of, start_run, write_json, write_lines

SETTINGS = {"model": "a", "seed": 0, "pair": (1, 2)}
FILES = ("log.jsonl", "summary.json")


def start(folder, settings=SETTINGS, overwrite=False):
    start_run(folder, settings, "manifest.json", FILES, overwrite)


def test_new_folder_gets_the_settings_and_the_same_run_may_go_on(tmp_path):
    folder = tmp_path / "a" / "b"
    start(folder)
    assert json.loads((folder / "manifest.json").read_text()) == {"model": "a", "seed": 0, "pair": [1, 2]}
    (folder / "log.jsonl").write_text("{}\n")
    start(folder)
    assert (folder / "log.jsonl").read_text() == "{}\n"


def test_other_run_is_refused_with_what_differs(tmp_path):
    start(tmp_path)
    with pytest.raises(ValueError, match=r"`output_dir` must be new or contain this run") as error:
        start(tmp_path, SETTINGS | {"model": "b", "more": True})
    assert "model: 'a' stored, 'b' now; more: None stored, True now" in str(error.value)
    assert "seed" not in str(error.value) and "pair" not in str(error.value)


def test_results_without_settings_are_another_run(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="model: None stored, 'a' now"):
        start(tmp_path)


def test_overwrite_throws_the_results_away_and_nothing_else(tmp_path):
    start(tmp_path)
    for name in (*FILES, "other"):
        (tmp_path / name).write_text("{}")
    start(tmp_path, SETTINGS | {"seed": 1}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "other"]
    assert json.loads((tmp_path / "manifest.json").read_text())["seed"] == 1


RECORDS = [{"text": "a\nb"}, {"text": "é\u2028🐢"}, {"text": "x" * 100_000}]


@pytest.mark.parametrize("content", [b"{", b'{"model": "\xe9"}', b""])
def test_settings_that_cannot_be_parsed_are_refused_by_name(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json must be JSON as the run wrote it.*`--overwrite`"):
        start(tmp_path)
    start(tmp_path, overwrite=True)


def test_log_with_a_broken_line_is_refused_with_its_number_and_stays_free(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 2}\n')
    for _ in range(2):
        with pytest.raises(ValueError, match=r"line 2 of .*log\.jsonl must be JSON as the run wrote it"):
            Log(path)
    path.write_bytes(b'{"a": 1}\n')
    with Log(path) as log:
        assert log.records == [{"a": 1}]


def test_log_holds_what_was_appended(tmp_path):
    for i, record in enumerate(RECORDS):
        with Log(tmp_path / "log.jsonl") as log:
            assert log.records == RECORDS[:i]
            log.append(record)
            assert log.records == RECORDS[: i + 1]


def test_log_that_ends_anywhere_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "log.jsonl"
    short = RECORDS[:2]
    with Log(path) as log:
        for record in short:
            log.append(record)
    content = path.read_bytes()
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        with Log(path) as log:
            assert log.records == short[: content[:end].count(b"\n")]
            for record in short[len(log.records) :]:
                log.append(record)
        assert path.read_bytes() == content


def in_another_process(function):
    """Exit status of a fork that runs a function: 0, or 1 if it raises a ValueError."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except ValueError:
            os._exit(1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_log_is_one_process_s_at_a_time_and_free_when_that_is_killed(tmp_path):
    path = tmp_path / "log.jsonl"

    def hold_and_die():
        log = Log(path)
        log.append({"text": "held"})
        os.kill(os.getpid(), signal.SIGKILL)

    with Log(path):
        assert in_another_process(lambda: Log(path)) == 1
    assert in_another_process(lambda: Log(path)) == 0
    assert in_another_process(hold_and_die) == -signal.SIGKILL
    with Log(path) as log:
        assert log.records == [{"text": "held"}]


def test_files_are_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    for write, value in ((write_json, {"a": 2}), (write_lines, [{"a": 2}])):
        with pytest.raises(KeyboardInterrupt):
            write(path, value)
        assert json.loads(path.read_text()) == {"a": 1}


def test_hash_knows_values_and_not_the_order_of_keys():
    assert hash_of({"a": [1], "b": "é"}) == hash_of({"b": "é", "a": [1]}) != hash_of({"a": [2], "b": "é"})
