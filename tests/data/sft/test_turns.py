"""Every key of a message is used, refused by name, or named by the user."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.data.sft.shapes import RejectedRowError, read_shape
from entrenar.data.sft.turns import Turn, UnusableRowError, read_turn

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("message", "turn"),
    [
        ({"from": "human", "value": "u"}, Turn("user", "u")),
        ({"from": "gpt", "value": "a"}, Turn("assistant", "a")),
        ({"from": "observation", "value": "3"}, Turn("tool", "3")),
        ({"role": "developer", "content": "s"}, Turn("system", "s", given={"role": "developer"})),
        ({"role": "function", "content": "3", "name": "add"},
         Turn("tool", "3", given={"role": "function", "name": "add"})),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
         Turn("user", "ab", given={"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]},
         Turn("assistant", "", given={"tool_calls": [CALL], "content": None})),
        ({"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
         Turn("assistant", "", given={"content": None, "tool_calls": [
             {"type": "function", "function": {"name": "add", "arguments": "{}"}}]})),
        ({"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
         Turn("assistant", "", given={"content": None, "tool_calls": [CALL]})),
        ({"role": "assistant", "content": "a", "thinking": "t", "weight": 1},
         Turn("assistant", "a", given={"thinking": "t"})),
        ({"role": "assistant", "content": "a", "weight": 0}, Turn("assistant", "a", is_trained=False)),
        ({"role": "user", "content": "u", "tool_calls": [], "id": None}, Turn("user", "u")),
    ],
)  # fmt: skip
def test_messages_of_every_spelling_are_read(message, turn):
    """OpenAI's, Hugging Face's and ShareGPT's roles and keys; null and empty keys say nothing."""
    assert read_turn(message, "messages[0]", ()) == turn


@pytest.mark.parametrize(
    ("changes", "is_trained"),
    [
        ({"weight": 0}, False), ({"weight": 0.0}, False), ({"weight": 1}, True), ({"weight": "0"}, False),
        ({"train": False}, False), ({"loss": False}, False), ({"trainable": False}, False), ({"loss_mask": 0}, False),
        ({"label": False}, False), ({"masked": True}, False),
        ({"masked": False}, True), ({"train": "True"}, True), ({"loss": None}, True),
        ({"weight": 0, "masked": True}, False),
    ],
)  # fmt: skip
def test_every_mark_of_a_message_is_read(changes, is_trained):
    """weight, train, loss, label and masked, as numbers, booleans or the words of a table."""
    assert read_turn({**HELLO, **changes}, "messages[0]", ()).is_trained is is_trained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0.5}, r"messages\[0\]\.weight must be true, false, 1 or 0, got 0\.5"),
        ({"weight": 1, "train": False}, r"messages\[0\]\.weight and train contradict each other"),
        ({"id": 7}, r"messages\[0\]\.id is not used, so training would drop it; .* \(--ignore-fields id\)$"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "content must be text or a list of text parts"),
        ({"content": None}, "content must be text or a list of text parts, got nothing"),
        ({"tool_calls": "add"}, r"messages\[0\]\.tool_calls must be a list of objects"),
        ({"function_call": {"arguments": 1}}, "function_call must have name and arguments"),
        ({"role": "user", "train": True}, "marked as trained, but is the user's"),
        ({"name": b"x"}, r"messages\[0\]\.name must be text, numbers, lists and objects"),
        ({"name": "a\ud800"}, r"messages\[0\]\.name holds a lone surrogate"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(changes, message):
    """The key is in the message."""
    with pytest.raises(UnusableRowError, match=message):
        read_turn({**HELLO, **changes}, "messages[0]", ())


def test_ignored_keys_are_left_out():
    """The user names what to drop."""
    assert read_turn({**HELLO, "id": 7}, "messages[0]", ("id",)) == Turn("assistant", "Hello")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, HELLO], "source": "web"},
        {"prompt": "a", "completion": "b", "system": "s"},
        {"instruction": "a", "output": "b", "text": "all"},
        {"text": "t", "meta": {"a": 1}},
    ],
)
def test_field_of_a_row_that_is_not_used_is_refused(row):
    """Each shape has a closed set of fields; the user may name more to ignore."""
    extra = list(row)[-1]
    with pytest.raises(UnusableRowError, match=f"^{extra} is not used, so training would drop it") as caught:
        read_shape(row, None)
    assert caught.value.kind == "field"
    read_shape(row, None, (extra,))


def test_system_tools_documents_and_history_become_the_conversation():
    """What stands beside the turns comes before them, or goes to the template."""
    row = {"instruction": "And now?", "input": "x", "output": "Three", "system": "Count", "history": [["One?", "One"]]}
    conversation = read_shape(row, None)
    assert conversation.shape == "messages"
    assert [(turn.role, turn.content) for turn in conversation.turns] == [
        ("system", "Count"), ("user", "One?"), ("assistant", "One"), ("user", "And now?\n\nx"), ("assistant", "Three"),
    ]  # fmt: skip
    tools = [{"name": "add"}]
    for spelled in (tools, '[{"name": "add"}]'):
        found = read_context({"tools": spelled, "documents": [{"title": "t"}]})
        assert (found.tools, found.documents) == (({"name": "add"},), ({"title": "t"},))
    assert read_context({"tools": [], "system": " "}).turns == read_shape({"messages": [HI, HELLO]}, None).turns
    for wrong, message in (
        ({"tools": "add"}, "tools must be JSON"), ({"documents": ["x"]}, "documents must be a list of objects"),
    ):  # fmt: skip
        with pytest.raises(UnusableRowError, match=message):
            read_context(wrong)


def read_context(fields):
    return read_shape({"messages": [HI, HELLO], **fields}, None)


def test_two_system_prompts_are_refused():
    """One of them would be dropped."""
    with pytest.raises(UnusableRowError, match=r"a system field and messages\[0\] is a system message; keep one"):
        read_shape({"messages": [{"role": "system", "content": "s"}, HI, HELLO], "system": "other"}, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b", "label": False}, "^label marks it as not trained$"),
        ({"text": "t", "weight": 0}, "^weight marks it as not trained$"),
        ({"messages": [HI, {**HELLO, "train": False}]}, "^all answers are marked as not trained$"),
    ],
)
def test_rows_that_are_not_to_be_trained_are_told_apart(row, message):
    """An answer to avoid is never trained, and is no fault either."""
    with pytest.raises(RejectedRowError, match=message):
        read_shape(row, None)
    read_shape({"prompt": "a", "completion": "b", "label": True}, None)


NAMES = st.sampled_from(
    ["messages", "conversations", "role", "from", "content", "value", "user", "assistant", "gpt", "tool_calls", "tools",
     "weight", "label", "masked", "system", "history", "instruction", "output", "prompt", "completion", "text", "name",
     "type", "function", "arguments", "function_call"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3) | NAMES | st.just("a\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(row=st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_row_is_a_conversation_or_says_why_not(row):
    """No value of any field, and no nesting, gives another error than the row's own."""
    try:
        conversation = read_shape(row, None)
    except (UnusableRowError, RejectedRowError):
        return
    assert any(turn.role == "assistant" for turn in conversation.turns)
