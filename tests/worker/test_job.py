"""A whole job in the workshop: from a claim to its report and its files."""

from tests.worker.workshop import Workshop


def test_a_job_leaves_a_report_and_an_engine(workshop: Workshop) -> None:
    job_id = workshop.submit()
    assert workshop.work() == "succeeded", [(e.kind, e.data) for e in workshop.events(job_id)]
    print(workshop.job(job_id).report)
