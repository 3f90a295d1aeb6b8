"""The protocol's messages: ours are those that others have, and live beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2, service_pb2

from modelyard_server.services.oip.messages import SERVICE, enum_number, message, method_names

THEIRS: dict[str, Any] = {
    **service_pb2.DESCRIPTOR.message_types_by_name,
    **model_config_pb2.DESCRIPTOR.message_types_by_name,
}

LACKING = {("ModelMetadataResponse", "properties")}
"""Fields of the protocol that this client's messages lack; it takes them for unknown ones."""

LACKING_TYPES = {"PropertiesEntry"}


def ours() -> Iterator[tuple[str, Any, Any]]:
    """Every message of ours that is also theirs: its name, our descriptor and theirs."""
    file = message("ModelInferRequest").DESCRIPTOR.file
    files = [file, *file.dependencies]
    left = [(m.name, m) for each in files for m in each.message_types_by_name.values()]
    while left:
        name, descriptor = left.pop()
        top, *inner = name.split(".")
        other = THEIRS[top]
        for part in inner:
            other = other.nested_types_by_name[part]
        yield name, descriptor, other
        left += [
            (f"{name}.{nested.name}", nested)
            for nested in descriptor.nested_types
            if nested.name not in LACKING_TYPES
        ]


MESSAGES = {name: (descriptor, other) for name, descriptor, other in ours()}


@pytest.mark.parametrize("name", MESSAGES)
def test_fields_have_the_protocols_numbers_and_types(name: str) -> None:
    descriptor, other = MESSAGES[name]
    for field in descriptor.fields:
        if (name, field.name) in LACKING:
            continue
        theirs = other.fields_by_name[field.name]
        assert (field.number, field.type) == (theirs.number, theirs.type)
        assert field.is_repeated == theirs.is_repeated
        if field.message_type is not None:
            assert field.message_type.full_name == theirs.message_type.full_name
        if field.enum_type is not None:
            assert field.enum_type.full_name == theirs.enum_type.full_name
        ours_of, theirs_of = field.containing_oneof, theirs.containing_oneof
        assert (ours_of and ours_of.name) == (theirs_of and theirs_of.name)


def test_every_request_that_a_client_sends_is_known_whole() -> None:
    # What is left out of ours may only be what we send: a request's field must not get lost.
    for name, (descriptor, other) in MESSAGES.items():
        if "Request" in name:
            assert {f.name for f in descriptor.fields} == {f.name for f in other.fields}, name


def test_the_service_has_the_protocols_methods() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert theirs.full_name == SERVICE
    assert set(method_names()) == {method.name for method in theirs.methods}


def test_element_types_have_the_protocols_numbers() -> None:
    for name, number in model_config_pb2.DataType.items():
        assert enum_number("DataType", name) == number


def test_messages_of_both_pools_are_the_same_on_the_wire() -> None:
    request = message("ModelInferRequest")(model_name="m", id="1")
    request.inputs.add(name="x", datatype="FP32", shape=[1, -1])
    request.parameters["timeout"].uint64_param = 2**64 - 1
    request.raw_input_contents.append(b"abcd")
    theirs = service_pb2.ModelInferRequest.FromString(request.SerializeToString())
    assert theirs.parameters["timeout"].uint64_param == 2**64 - 1
    assert message("ModelInferRequest").FromString(theirs.SerializeToString()) == request


def test_a_message_that_is_not_of_the_protocol_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        message("ModelDreamRequest")
