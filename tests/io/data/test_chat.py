"""Chats: only what the assistant wrote is learned, and a template cannot do harm."""

import json

import numpy as np
import pytest

from megatree.io.data import ChatTemplate, chat_dataset, encode_chats, read_conversations

TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{% generation %}"
    "{{ m.content | trim }}<end>{% endgeneration %}{{ '\\n' }}{% else %}"
    "<{{ m.role }}>{{ m.content }}<end>{% endif %}{% endfor %}"
)
# Renders earlier answers differently from the last one.
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last or m.role == 'user' %}{{ m.content }}"
    "{% else %}...{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": " yo "},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
]


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_a_template_of_turns_is_cut_where_the_assistant_begins_and_ends() -> None:
    with ChatTemplate(TURNS) as template:
        assert template.pieces(CHAT) == [
            ("<user>hi<end><assistant>", False),
            (" yo <end>", True),
            ("<user>q<end><assistant>", False),
            ("a<end>", True),
        ]
        assert template.text(CHAT[:1], prompt=True) == "<user>hi<end><assistant>"
        assert template.pieces(CHAT[:1]) == [("<user>hi<end>", False)]
    with ChatTemplate(TURNS, learn="last") as template:
        assert template.pieces(CHAT)[-1] == ("a<end>", True)
        assert len(template.pieces(CHAT)) == 2


def test_a_template_with_generation_blocks_says_what_is_learned() -> None:
    with ChatTemplate(MARKED) as template:
        assert template.pieces(CHAT) == [
            ("<user>hi<end><assistant>", False),
            ("yo<end>", True),
            ("\n<user>q<end><assistant>", False),
            ("a<end>", True),
            ("\n", False),
        ]


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_the_last_is_learned() -> None:
    with (
        ChatTemplate(FORGETFUL) as template,
        pytest.raises(ValueError, match="its text up to message 1 changes with what follows"),
    ):
        template.pieces(CHAT)
    with ChatTemplate(FORGETFUL, learn="last") as template:
        assert template.pieces(CHAT) == [
            ("<user>hi<end><assistant>...<end><user>q<end><assistant>", False),
            ("a<end>", True),
        ]


def test_templates_see_their_variables() -> None:
    source = "{{ bos_token }}{{ tools | tojson }}{{ messages[0].content }}"
    with ChatTemplate(source, variables={"bos_token": "<s>"}) as template:
        text = template.text(CHAT[:1], prompt=False, variables={"tools": [{"é": 1}]})
        assert text == '<s>[{"é": 1}]hi'


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (LOOP, r"runs for more than 0\.3 seconds"),
        ("{{ 'a' * 10**11 }}", "takes more memory than it may"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append'"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader"),
        ("{{ raise_exception('roles must alternate') }}", "refuses .*: roles must alternate"),
        ("{{ messages[0].content.missing.more }}", "UndefinedError"),
    ],
)
def test_a_template_that_does_harm_is_ended_and_the_next_chat_goes_on(source, text: str) -> None:
    guarded = "{% if messages[0].content == 'hi' %}" + source + "{% else %}fine{% endif %}"
    with ChatTemplate(guarded, time_limit_s=0.3) as template:
        with pytest.raises(ValueError, match=f"chat template: .*{text}"):
            template.pieces(CHAT)
        assert template.text([{"role": "user", "content": "x"}], prompt=False) == "fine"


def test_a_template_that_is_no_jinja_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="chat template: TemplateSyntaxError"):
        ChatTemplate("{% if")


def test_only_the_assistant_is_learned_from_file_to_batch(tmp_path) -> None:
    path = tmp_path / "chats.jsonl"
    lines = [{"messages": CHAT}, {"messages": CHAT[:2]}, {"messages": [CHAT[0], CHAT[3]]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with ChatTemplate(TURNS) as template:
        report = encode_chats(
            read_conversations(path), tmp_path / "x", template, encode, dtype="uint16"
        )
    written = [" yo <end>", "a<end>", " yo <end>", "a<end>"]
    assert (report.written, report.learned) == (3, len("".join(written)))
    for dataset, count in [
        (chat_dataset(tmp_path / "x", 200), 1),
        (chat_dataset(tmp_path / "x", 80, packing="single"), 3),
    ]:
        assert len(dataset) == count
        rows = dataset.rows(np.arange(count))
        learned = rows["labels"][rows["weights"] == 1]
        assert bytes(learned.tolist()).decode() == "".join(written)
    assert rows.keys() == {"tokens", "labels", "weights"}, "one chat a row has no boundary"
    row = chat_dataset(tmp_path / "x", 200).rows(np.array([0]))
    assert (row["positions"] == 0).sum() >= 3
    segments = row["segments"]
    assert set(segments.ravel().tolist()) == {0, 1, 2, 3}  # three chats and the padding


BAD = [
    ("{", "no JSON"),
    ('{"text": 1}', 'has no list "messages"'),
    ('{"messages": []}', 'has no list "messages"'),
    ('{"messages": [{"content": "x"}]}', 'message 0 has no text "role"'),
    ('{"messages": [{"role": "user", "content": "x"}]}', "nothing is learned"),
    ('{"messages": [{"role": "user", "content": "a<end>b"}]}', "special token '<end>'"),
]


@pytest.mark.parametrize(("line", "text"), BAD)
def test_a_bad_conversation_is_named_by_file_and_line(tmp_path, line: str, text: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + line + "\n", encoding="utf-8")
    with ChatTemplate(TURNS) as template:
        options = {"dtype": "uint16", "reserved": ["<end>"]}
        with pytest.raises(ValueError, match=rf"chats\.jsonl:2: .*{text}"):
            encode_chats(read_conversations(path), tmp_path / "x", template, encode, **options)
        assert not (tmp_path / "x_tokens.idx").exists()
        report = encode_chats(
            read_conversations(path), tmp_path / "x", template, encode, bad="skip", **options
        )
    assert report.written == 1
    assert sum(report.skipped.values()) == 1


def test_a_line_that_never_ends_is_skipped_in_pieces(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("megatree.io.data.chat._LONGEST_LINE", 100)
    path = tmp_path / "chats.jsonl"
    path.write_text('"' + "a" * 1000 + '"\n[1]\n\n\n[2]', encoding="utf-8")
    read = list(read_conversations(path))
    assert [place.rsplit(":", 1)[1] for place, _ in read] == ["1", "2", "5"]
    assert str(read[0][1]) == "line of more than 100 bytes"
    assert [value for _, value in read[1:]] == [[1], [2]]
