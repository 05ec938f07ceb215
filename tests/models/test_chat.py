"""Conversations become tokens: the plain format, a template and its arguments, and the token that ends a turn."""

from __future__ import annotations

import pytest

from lco_lite.errors import ModelError
from lco_lite.models.chat import ChatFormat, conversation
from lco_lite.models.loading import byte_tokenizer
from lco_lite.recipe.file import load_recipe

# the switch as Qwen 3 has it: thinking unless told otherwise, an empty thought where it is switched off
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ASKED = conversation("2+2", "Be brief.")


def templated(template: str | None):
    tokenizer = byte_tokenizer(256)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(("arguments", "thought"), [({}, ""), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")])
def test_template_arguments_of_the_recipe_reach_the_prompt(tiny, arguments, thought):
    recipe = load_recipe(tiny, [f"chat.template_args.{key}={value}" for key, value in arguments.items()])
    chat = ChatFormat(templated(THINKING), recipe.chat.template_args)
    assert chat.prompt_text(ASKED) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n" + thought
    )
    assert chat.text(chat.response("4")) == "4"


def test_a_turn_ends_with_the_templates_token_and_a_cut_response_with_none():
    tokenizer = templated(THINKING)
    chat = ChatFormat(tokenizer)
    assert chat.end == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id
    example = chat.example(ASKED, "4")
    assert example.response[-1] == chat.end and chat.example(ASKED, "4", closed=False).response == example.response[:-1]


def test_without_a_template_the_plain_format_ends_with_eos():
    tokenizer = templated(None)
    chat = ChatFormat(tokenizer)
    assert chat.prompt_text(ASKED).endswith("### System:\nBe brief.\n\n### User:\n2+2\n\n### Assistant:\n")
    assert chat.end == tokenizer.eos_token_id


def test_specials_inside_a_response_are_left_out_of_its_text():
    chat = ChatFormat(templated(THINKING))
    assert chat.text(chat.response("4") + chat.response("5")) == "45"


def test_a_template_that_refuses_a_role_is_told_with_the_roles():
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + THINKING
    with pytest.raises(ModelError, match=r"roles system, user: .*no system role"):
        ChatFormat(templated(picky)).prompt(ASKED)


def test_a_tokenizer_that_can_end_no_response_is_refused():
    tokenizer = templated(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="could never end"):
        ChatFormat(tokenizer)
