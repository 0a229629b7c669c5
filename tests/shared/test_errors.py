"""Errors: one class a cause, each with a sentence, a status and a code that nobody else has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared import errors
from shared.errors import ServiceError, StageFailed, Unavailable, UserError


def _classes(top: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    yield top
    for below in top.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from _classes(below)


CLASSES = list(_classes())


def test_every_class_of_the_module_belongs_to_the_tree() -> None:
    named = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert named == set(CLASSES)


def test_no_two_causes_share_a_code() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(code == code.lower() and code.replace("_", "").isalpha() for code in codes)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_class_says_in_a_sentence_what_is_wrong(cls: type[ServiceError]) -> None:
    sentence = (cls.__doc__ or "").strip()
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_status_fault_and_retryable_agree(cls: type[ServiceError]) -> None:
    assert cls.fault == ("user" if issubclass(cls, UserError) else "platform")
    assert cls.fault == ("user" if 400 <= cls.status < 500 and cls is not errors.LeaseLost else "platform")
    if cls.fault == "user":
        assert cls.retryable == (cls.status == 429)  # what is wrong with a request stays wrong; a quota frees itself
    if issubclass(cls, Unavailable):
        assert (cls.status, cls.retryable) == (503, True)
        assert cls.retry_after_seconds


def test_the_docstring_is_the_default_message_and_a_detail_replaces_it() -> None:
    assert str(errors.NotFound()) == "There is no such thing, or it belongs to another account."
    told = errors.NotFound("there is no job 7", hint="Look at GET /v1/jobs.", stage="quantize", errors=({"at": 1},))
    assert (told.detail, str(told), told.hint) == ("there is no job 7", "there is no job 7", "Look at GET /v1/jobs.")
    assert (told.stage, told.errors) == ("quantize", [{"at": 1}])


def test_an_error_has_errors_of_its_own() -> None:
    first, second = UserError(), UserError()
    first.errors.append({"x": 1})
    assert second.errors == []


def test_a_failed_stage_can_name_its_own_code() -> None:
    assert StageFailed("No.").code == "stage_failed"
    told = StageFailed("No.", code="calibration_missing", hint="Add a part.")
    assert (told.code, told.hint, StageFailed.code) == ("calibration_missing", "Add a part.", "stage_failed")
