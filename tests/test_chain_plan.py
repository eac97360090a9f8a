import json
from pathlib import Path

import pytest
import yaml

from baton.chain_file import read_chain
from baton.chain_plan import as_argument, plan, select

CHAIN = """
seeds: [0, 1]
stages:
  solo: {recipe: r.yaml}
  teacher: {recipe: r.yaml, seeds: [7]}
  pretrain: {recipe: r.yaml, set: {flag: true, size: 0.5, list: [1, a], none: null, text: two words}}
  student: {recipe: r.yaml, init_from: pretrain, teacher: teacher}
"""


@pytest.fixture
def chain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("a: {b: 1}\n")
    Path("demo.yaml").write_text(CHAIN)
    return read_chain("demo.yaml")


def names(runs):
    return [f"{run.stage.name}{run.seed}" for run in runs]


def student_now():
    return next(run for run in plan(read_chain("demo.yaml")) if run.stage.name == "student")


def finish(run, sha256="s"):
    (run.folder / "model").mkdir(parents=True, exist_ok=True)
    (run.folder / "model" / "config.json").write_text(json.dumps({"baton": {"sha256": sha256, "metrics": {"m": 1.0}}}))


def test_order_is_seed_by_seed_with_parents_first(chain):
    assert names(plan(chain)) == ["solo0", "pretrain0", "teacher7", "student0", "solo1", "pretrain1", "student1"]


def test_a_stage_with_one_seed_serves_all(chain):
    runs = {name: run for name, run in zip(names(plan(chain)), plan(chain), strict=True)}
    assert runs["student1"].parents["teacher"].name == "demo/teacher/seed_7"
    assert runs["student1"].parents["init_from"].name == "demo/pretrain/seed_1"


def test_command(chain):
    runs = plan(chain, "some runs")
    assert runs[3].argv == [
        "fit", "--config", "r.yaml", "--run.root", "some runs", "--run.name", "demo/student/seed_0",
        "--run.resume", "true", "--run.chain", "demo", "--run.stage", "student", "--seed_everything", "0",
        "--model.init_from", "some runs/demo/pretrain/seed_0",
        "--model.init_args.teacher", "some runs/demo/teacher/seed_7",
    ]  # fmt: skip
    assert runs[1].argv[15:] == [
        "--flag", "true", "--size", "0.5", "--list", '[1, "a"]', "--none", "null", "--text", "two words"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value", [True, None, 3, 1e-05, [1, "a", None], {}, [{"class_path": "X", "init_args": {"a": 1}}]]
)
def test_arguments_read_back_as_yaml(value):
    assert yaml.safe_load(as_argument(value)) == value or float(as_argument(value)) == value


@pytest.mark.parametrize("link", ["decoder_from", "trunk_from"])
def test_a_decoder_or_trunk_is_passed_on(link, chain):
    Path("demo.yaml").write_text(CHAIN.replace("teacher: teacher}", f"{link}: pretrain}}"))
    student = plan(read_chain("demo.yaml"), "some runs")[2]
    assert student.stage.name == "student"
    assert student.argv[-2:] == [f"--model.init_args.{link}", "some runs/demo/pretrain/seed_0"]


def test_select_takes_parents_along(chain):
    runs = plan(chain)
    assert names(select(runs, chain, None, ["student"])) == [
        "pretrain0", "teacher7", "student0", "pretrain1", "student1"
    ]  # fmt: skip
    assert names(select(runs, chain, [1], [])) == ["teacher7", "solo1", "pretrain1", "student1"]
    assert names(select(runs, chain, [1], ["solo"])) == ["solo1"]
    assert names(select(runs, chain, [0, 1], ["s*o", "pre*"])) == ["solo0", "pretrain0", "solo1", "pretrain1"]
    assert select(runs, chain, None, []) == runs
    with pytest.raises(
        ValueError, match=r"has no stage 'studnet' \(did you mean 'student'\?\); its stages are solo, teacher"
    ):
        select(runs, chain, None, ["solo", "studnet"])
    with pytest.raises(ValueError, match=r"no run of teacher has one of the seeds \[0\]"):
        select(runs, chain, [0], ["teacher"])


def test_a_finished_run_that_no_longer_matches_is_refused(chain):
    run = plan(chain)[1]
    run.begin()
    finish(run)
    run.check_record()
    assert run.metrics() == {"m": 1.0}
    Path("r.yaml").write_text("# a remark changes nothing\na: {b: 1}\ndata: {num_workers: 8}\n")
    run.check_record()
    Path("r.yaml").write_text("a: {b: 2}\n")
    with pytest.raises(
        ValueError, match=r"pretrain/seed_0 is finished, but a\.b was 1 and is now 2: delete that folder"
    ):
        run.check_record()
    Path("r.yaml").write_text("c: 3\n")
    with pytest.raises(ValueError, match=r"a\.b was 1 and is now not set"):
        run.check_record()


def test_other_overrides_are_refused_and_half_trained_runs_too(chain):
    plan(chain)[1].begin()
    run = plan(chain)[1]
    Path("demo.yaml").write_text(CHAIN.replace("size: 0.5", "size: 0.25"))
    now = plan(read_chain("demo.yaml"))[1]
    now.check_record()  # it has written nothing: an option may be corrected
    run.checkpoint.parent.mkdir(parents=True)
    run.checkpoint.write_text("")
    with pytest.raises(ValueError, match=r"is half-trained, but size was 0\.5 and is now 0\.25"):
        now.check_record()


def test_a_child_of_retrained_weights_is_stale(chain):
    pretrain, student = plan(chain)[1], plan(chain)[3]
    for run in (pretrain, plan(chain)[2]):
        run.begin()
        finish(run)
    student.begin()
    finish(student)
    student.check_record()
    finish(pretrain, sha256="other")
    with pytest.raises(
        ValueError, match=r"student/seed_0 is finished, but the run it started from, demo/pretrain/seed_0"
    ):
        student.check_record()
    Path("demo.yaml").write_text(CHAIN.replace("init_from: pretrain", "init_from: solo"))
    with pytest.raises(ValueError, match=r"its init_from is now demo/solo/seed_0 instead of demo/pretrain/seed_0"):
        student_now().check_record()
    Path("demo.yaml").write_text(CHAIN.replace("init_from: pretrain, ", ""))
    with pytest.raises(ValueError, match=r"it started from demo/pretrain/seed_0 and now has no init_from"):
        student_now().check_record()


def test_foreign_and_damaged_files_are_named(chain):
    run = plan(chain)[0]
    finish(run)
    with pytest.raises(ValueError, match=r"runs/demo/solo/seed_0 was not made by this chain"):
        run.check_record()
    run.record.write_text("{")
    with pytest.raises(ValueError, match=r"seed_0\.json is damaged"):
        run.check_record()
    (run.folder / "model" / "config.json").write_text('{"baton"')
    with pytest.raises(ValueError, match=r"config\.json is damaged: delete"):
        run.metrics()
