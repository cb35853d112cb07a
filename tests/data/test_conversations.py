"""Chat templates: what is learned is what the assistant says; what a template refuses is named."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.account import ReadExamples
from rankfold.data.record_examples import record_examples
from rankfold.data.tokens import Tokens
from rankfold.errors import InputError
from tests.command_line import rankfold
from tests.tiny_language_model import save_tiny_llama, tiny_tokenizer

COLUMNS = dict.fromkeys(("text", "label", "target", "tokens", "tags"))
# As the families write them, shortened: names of the turns, ends, and what is refused.
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 2": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set s = "
    "'<<SYS>>' + messages[0].content + '<</SYS>>' %}{% else %}{% set rest = messages %}{% set s = "
    "'' %}{% endif %}{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if m.role == 'user' "
    "%}{{ '<s>[INST] ' + (s if loop.first else '') + m.content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}",
    "llama 3": "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' + "
    "m.content | trim + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant"
    "<|/head|>\n\n' }}{% endif %}",
    "gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') "
    "}}{% endif %}{% for m in messages %}{{ '<start>' + ('model' if m.role == 'assistant' else "
    "m.role) + '\n' + m.content | trim + '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<start>model\n' }}{% endif %}",
    "vicuna": "{% for m in messages %}{{ m.role | upper + ': ' + m.content + ('</s>' if m.role == "
    "'assistant' else ' ') }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' "
    "}}{% endif %}",
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<' + m.role "
    "+ '>' }}{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for part in "
    "m.content %}{{ part.text }}{% endfor %}{% endif %}{% for call in m.tool_calls or [] %}"
    "{{ call | tojson }}{% endfor %}{{ '</>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<assistant>' }}{% endif %}",
    "marked": "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '</>' }}{% endgeneration %}{% else %}{{ m.content + '</>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
}


def _chat(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in turns]


@cache
def _tokenizer() -> Any:
    return tiny_tokenizer()


def _read(folder: Path, template: str, *chats: Any, length: int = 999, **more: Any) -> ReadExamples:
    file = folder / "data.jsonl"
    file.write_text("".join(f"{json.dumps({'messages': chat} | more)}\n" for chat in chats))
    tokenizer = _tokenizer()
    tokenizer.chat_template = template
    found = record_examples(file, tokenizer, length, task=None, columns=COLUMNS)
    assert isinstance(found, ReadExamples)
    return found


def _said(example: dict[str, Any]) -> str:
    kept = example["labels"] != -100
    assert bool((example["labels"][kept] == example["input_ids"][kept]).all())
    return str(_tokenizer().decode(example["labels"][kept]))


GOOD = _chat(("user", "hi there"), ("assistant", " yes "), ("user", "so"), ("assistant", "no, é"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chatml", " yes <|im_end|>\nno, é<|im_end|>\n"),
        ("llama 2", " yes </s> no, é </s>"),
        ("llama 3", "yes<|eot|>no, é<|eot|>"),
        ("gemma", "yes<end>\nno, é<end>\n"),
        # The space before an answer is one token with its first word: that token is learned.
        ("vicuna", " yes </s> no, é</s>"),
        ("tools", " yes </>no, é</>"),
        ("marked", " yes </>no, é</>"),
    ],
)
def test_what_is_learned_is_what_the_assistant_says(name: str, said: str, tmp_path: Path) -> None:
    (example,) = _read(tmp_path, TEMPLATES[name], GOOD)
    tokenizer = _tokenizer()
    ids = tokenizer.apply_chat_template(GOOD, tokenize=True, return_dict=True)["input_ids"]
    assert example["input_ids"].tolist() == ids
    assert _said(example) == said


def test_marks_of_the_template_are_those_of_transformers(tmp_path: Path) -> None:
    (example,) = _read(tmp_path, TEMPLATES["marked"], GOOD)
    tokenizer = _tokenizer()
    wanted = tokenizer.apply_chat_template(
        GOOD, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert (example["labels"] != -100).long().tolist() == wanted["assistant_masks"]


def test_tools_their_calls_and_parts_of_text_are_written(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "what is f"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three", "tool_calls": None},
    ]
    (example,) = _read(tmp_path, TEMPLATES["tools"], chat, tools=[tool])
    written = _tokenizer().decode(example["input_ids"])
    assert written.startswith('[{"type": "function"') and "what is f" in written
    assert _said(example) == f"{json.dumps(call)}</>three</>"


SYSTEM, TWICE = [("system", "be good")], [("user", "a"), ("user", "b")]
ANSWER = [("user", "hi"), ("assistant", "yes")]


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (TEMPLATES["gemma"], SYSTEM + ANSWER, "system, user, assistant.*System role not supported"),
        (TEMPLATES["llama 2"], TWICE + ANSWER[1:], "user, user, assistant.*roles must alternate"),
        (TEMPLATES["llama 2"], ANSWER[1:] + ANSWER, "roles must alternate"),
        ("{% for m in messages %}{{ m.role + }}{% endfor %}", ANSWER, "TemplateSyntaxError"),
        ("{% for m in messages %}{{ m.who.name }}{% endfor %}", ANSWER, "UndefinedError"),
        ("{{ messages[0].content / 2 }}", ANSWER, "TypeError"),
        ("{{ 1 / 0 }}", ANSWER, "ZeroDivisionError"),
        ("", ANSWER, "writes nothing"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         ANSWER, "leaves out what 'assistant' says"),
        ("{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
         SYSTEM + ANSWER, "leaves out what 'system' says"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
         ANSWER + ANSWER, "writes earlier turns otherwise"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ 'bot:'"
         "}}{% endif %}", ANSWER, "starts an answer .* with 'hibot:'"),
        (TEMPLATES["chatml"], [("user", [{"type": "image", "url": "x"}]), ANSWER[1]], "'image'"),
        (TEMPLATES["chatml"], [("user", 5), ANSWER[1]], "content of a message of 'user' is 5"),
        (TEMPLATES["chatml"], [("user", None), ANSWER[1]], "content of a message of 'user' is No"),
        (TEMPLATES["marked"].replace("'assistant'", "'bot'"), ANSWER, "marks none of it"),
    ],
)  # fmt: skip
def test_what_a_template_refuses_or_gets_wrong_names_the_record(
    template: str, turns: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"(?s)record 0 of .*data\.jsonl: .*{message}"):
        _read(tmp_path, template, _chat(*turns))


def test_the_command_names_the_record(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "chat")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES["gemma"]
    tokenizer.save_pretrained(tmp_path / "chat")
    chats = [_chat(*ANSWER)] * 3 + [_chat(*SYSTEM, *ANSWER)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(f"{json.dumps({'messages': chat})}\n" for chat in chats))
    refused = rankfold(
        "lossless", "chat", "--data", file, "--size", "0.9", "--out", "out", cwd=tmp_path, expect=2
    )
    assert "record 3 of" in refused.stderr and "System role not supported" in refused.stderr


def test_what_is_too_long_is_told(tmp_path: Path) -> None:
    long, late = _chat(("user", "hi"), ("assistant", "x" * 150)), _chat(
        ("user", "z" * 150), ("assistant", "x")
    )  # fmt: skip
    found = _read(tmp_path, TEMPLATES["llama 3"], _chat(*ANSWER), long, late, length=120)
    assert found.account.cut == 1 and len(found) == found.account.used == 2
    assert found.account.left_out == {
        "where the assistant says nothing in the first 120 tokens": [2]
    }


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    turns=st.lists(st.tuples(st.text(max_size=8), st.text(min_size=1, max_size=8)), min_size=1,
                   max_size=3),
    name=st.sampled_from(["chatml", "tools", "marked"]),
)  # fmt: skip
def test_every_character_of_an_answer_is_learned_and_no_other(
    turns: list[tuple[str, str]], name: str, tmp_path: Path
) -> None:
    chat = [m for asked, said in turns for m in _chat(("user", asked), ("assistant", said))]
    (example,) = _read(tmp_path, TEMPLATES[name], chat)
    end = "<|im_end|>\n" if name == "chatml" else "</>"
    assert _said(example) == "".join(f"{said}{end}" for _, said in turns)


@pytest.mark.parametrize("side", ["left", "right"])
def test_conversations_are_padded_behind(side: str, tmp_path: Path) -> None:
    """A language model counts its positions from the first token, of text or not."""
    found = _read(tmp_path, TEMPLATES["chatml"], GOOD, GOOD[:2])
    tokenizer = found.collate.tokenizer
    assert found.collate.batches(list(found)) == [[found[0]], [found[1]]]  # no padding token
    padded = deepcopy(tokenizer)
    padded.pad_token, padded.padding_side = padded.eos_token, side
    batch = Tokens(padded, 99).behind()(list(found))
    for row, example in enumerate(found):
        count = len(example["input_ids"])
        assert batch["input_ids"][row, :count].tolist() == example["input_ids"].tolist()
        assert batch["attention_mask"][row].tolist() == [1] * count + [0] * (
            len(found[0]["input_ids"]) - count
        )
        assert bool((batch["labels"][row, count:] == -100).all())
