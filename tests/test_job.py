"""Worker jobs: progress, results, errors, cancel."""

from __future__ import annotations

import logging
import threading

import pytest


@pytest.fixture
def jobs(extension):
    return extension("blender_addon.job")


@pytest.fixture
def errors(extension):
    return extension("generator.errors")


def finish(job):
    job.join(20)
    return job.poll()


def test_result_and_progress_arrive_in_order(jobs):
    def work(report, cancel):
        for step in range(5):
            report("Sampling", step + 1, 5, preview=step)
        return "done"

    job = jobs.Job(work).start()
    progress = finish(job)
    assert [(p.stage, p.step, p.total, p.preview) for p in progress] == [("Sampling", i + 1, 5, i) for i in range(5)]
    assert (job.state, job.result, job.message) == (jobs.State.DONE, "done", "")
    assert progress[-1].fraction == 1.0


def test_work_runs_in_another_thread_and_run_in_this_one(jobs):
    def work(report, cancel):
        return threading.current_thread()

    started = jobs.Job(work).start()
    finish(started)
    assert started.result is not threading.current_thread()
    assert started.result.daemon, "a daemon, so that Blender can quit while the work runs"
    assert jobs.Job(work).run() is threading.current_thread()


def test_state_changes_only_when_polled(jobs):
    job = jobs.Job(lambda report, cancel: 1).start()
    job.join(20)
    assert job.state is jobs.State.RUNNING and not job.ended
    job.poll()
    assert job.ended


def test_cancel_stops_at_the_next_step(jobs, errors):
    steps = []
    first, go_on = threading.Event(), threading.Event()

    def work(report, cancel):
        for step in range(1000):
            if cancel.is_set():
                raise errors.Cancelled("stopped")
            steps.append(step)
            first.set()
            go_on.wait(20)

    job = jobs.Job(work).start()
    assert first.wait(20)
    job.cancel()
    assert job.cancelling
    go_on.set()
    finish(job)
    assert job.state is jobs.State.CANCELLED and not job.cancelling
    assert steps == [0]
    assert job.result is None and job.error is None


def test_work_that_ignores_cancel_still_gives_nothing(jobs):
    job = jobs.Job(lambda report, cancel: "unwanted")
    job.cancel()
    job.start()
    finish(job)
    assert job.state is jobs.State.CANCELLED and job.result is None


def test_unexpected_error_is_one_line_and_logged_with_its_traceback(jobs, caplog):
    def work(report, cancel):
        raise ValueError("first\nsecond")

    with caplog.at_level(logging.ERROR):
        job = jobs.Job(work, name="generation").start()
        finish(job)
    assert job.state is jobs.State.FAILED
    assert job.message == "ValueError: first second"
    assert "generation failed" in caplog.text and "Traceback" in caplog.text


def test_error_for_the_user_is_its_message_and_no_traceback(jobs, errors, caplog):
    def work(report, cancel):
        raise errors.InputError("no model in there: choose another")

    job = jobs.Job(work).start()
    finish(job)
    assert job.message == "no model in there: choose another"
    assert "Traceback" not in caplog.text


def test_run_raises_what_the_work_raised_and_cancelled(jobs, errors):
    def fail(report, cancel):
        raise errors.InputError("bad")

    with pytest.raises(errors.InputError, match="bad"):
        jobs.Job(fail).run()
    job = jobs.Job(lambda report, cancel: None)
    job.cancel()
    with pytest.raises(errors.Cancelled):
        job.run()


def test_run_hands_progress_on_at_once(jobs):
    seen = []

    def work(report, cancel):
        report("Loading")
        assert [p.stage for p in seen] == ["Loading"]

    jobs.Job(work).run(seen.append)
    assert seen[0].fraction == 0.0


def test_a_job_runs_once(jobs):
    job = jobs.Job(lambda report, cancel: None)
    job.run()
    with pytest.raises(RuntimeError, match="make a new Job"):
        job.start()
